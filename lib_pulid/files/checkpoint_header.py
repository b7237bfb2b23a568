"""What the first bytes of a large file tell: its tensors' names and shapes, and so what kind of checkpoint it is.

Nothing is loaded: a head is some hundred kilobytes of a file of many gigabytes, and is read in milliseconds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

LARGEST_HEADER = 100_000_000  # bytes

# GGUF's kinds of values: bytes of those of fixed size; and the two others.
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_TEXT, GGUF_LIST = 8, 9

# The last blocks of FLUX.1, and what its relatives (more blocks; Chroma) have besides.
_FLUX = ("double_blocks.18.img_attn.", "single_blocks.37.linear1.")
_NOT_FLUX = ("double_blocks.19.", "single_blocks.38.", "distilled_guidance_layer.")
_SDXL_SITES, _SDXL_TEXT_WIDTH = 70, 2048


def checkpoint_family(path: Path) -> str:
    """ "sdxl" or "flux"; "" for anything else, and where the head does not tell (a pickle, a damaged file)."""
    shapes = read_header(path)
    names = [name.removeprefix("model.diffusion_model.") for name in shapes]
    if all(any(name.startswith(part) for name in names) for part in _FLUX):
        return "" if any(name.startswith(_NOT_FLUX) for name in names) else "flux"
    widths = [shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and shape]
    return "sdxl" if len(widths) == _SDXL_SITES or set(widths) == {_SDXL_TEXT_WIDTH} else ""


def read_header(path: Path) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a safetensors or GGUF file's tensors; empty if it is neither, or cannot be read."""
    readers = {".safetensors": _safetensors, ".sft": _safetensors, ".gguf": _gguf}
    try:
        with path.open("rb") as file:
            return readers[path.suffix.lower()](file)
    except (KeyError, ValueError, TypeError, AttributeError, struct.error, OSError):
        return {}
    except (MemoryError, OverflowError, RecursionError):  # lengths and nesting that no real file has
        return {}


def _safetensors(file: BinaryIO) -> Mapping[str, tuple[int, ...]]:
    entries = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), LARGEST_HEADER)))
    return {name: tuple(map(int, entry["shape"])) for name, entry in entries.items() if name != "__metadata__"}


def _gguf(file: BinaryIO) -> Mapping[str, tuple[int, ...]]:
    """Magic, version, number of tensors and of entries; the entries; then of each tensor name, sizes (the last axis
    first), kind and place. Little-endian, version 2 and 3."""
    magic, version, tensors, entries = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("not a GGUF file")
    for _ in range(entries):
        gguf_text(file)
        gguf_skip(file, *struct.unpack("<I", file.read(4)))
    shapes = {}
    for _ in range(tensors):
        name = gguf_text(file)
        (axes,) = struct.unpack("<I", file.read(4))
        shapes[name] = struct.unpack(f"<{axes}Q", file.read(8 * axes))[::-1]
        file.seek(12, 1)
    return shapes


def gguf_text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if file.tell() + length > LARGEST_HEADER:
        raise ValueError("too long a head")
    return file.read(length).decode()


def gguf_skip(file: BinaryIO, kind: int) -> None:
    if kind == GGUF_TEXT:
        gguf_text(file)
    elif kind == GGUF_LIST:
        kind, count = struct.unpack("<IQ", file.read(12))
        if kind in _GGUF_SIZES:
            file.seek(count * _GGUF_SIZES[kind], 1)
            return
        for _ in range(count):
            gguf_skip(file, kind)
    else:
        file.seek(_GGUF_SIZES[kind], 1)
