"""Reads the header of a large file: its tensors' names and shapes, and so what kind of checkpoint it is.

No weights are loaded: a header is some hundred kilobytes of a file of many gigabytes, and is read in milliseconds.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from lib_pulid.methods import DTYPES, Header, Tensors

LARGEST_HEADER = 100_000_000  # bytes
Kind = TypeVar("Kind")

# GGUF's types of values: struct's letter of those of fixed size; and the two others.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_TEXT, GGUF_LIST = 8, 9

# The last blocks of FLUX.1, and what its relatives (more blocks; Chroma) have besides.
_FLUX = ("double_blocks.18.img_attn.", "single_blocks.37.linear1.")
_NOT_FLUX = ("double_blocks.19.", "single_blocks.38.", "distilled_guidance_layer.")
SDXL_SITES, SDXL_TEXT_WIDTH = 70, 2048


class GgufTensor(NamedTuple):
    """shape: the last axis last. kind: ggml's type. offset: of its bytes, from the end of the aligned header."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def checkpoint_family(path: Path) -> str:
    """Reads "sdxl" or "flux" from a file's header; "" for anything else, pickles and damaged files among them."""
    shapes = read_header(path)
    names = [name.removeprefix("model.diffusion_model.") for name in shapes]
    if all(any(name.startswith(part) for name in names) for part in _FLUX):
        return "" if any(name.startswith(_NOT_FLUX) for name in names) else "flux"
    widths = [shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and shape]
    return "sdxl" if len(widths) == SDXL_SITES or set(widths) == {SDXL_TEXT_WIDTH} else ""


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads names and shapes of a safetensors or GGUF file's tensors; empty if it is neither, or cannot be read."""
    return {name: tensor.shape for name, tensor in read_tensors(path).items()}


def read_tensors(path: Path) -> Header:
    """Reads the dtypes, too; "" in a GGUF file."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
            file.seek(0)
            if is_gguf:
                return {name: Tensors(tensor.shape, "") for name, tensor in read_gguf(file)[1].items()}
            entries = read_safetensors_header(file)
        entries.pop("__metadata__", None)
        return {
            name: Tensors(tuple(map(int, entry["shape"])), DTYPES.get(entry["dtype"], entry["dtype"]))
            for name, entry in entries.items()
        }
    except Exception:  # whatever a damaged header leads to, it says nothing
        return {}


def flat(tables: Mapping[Any, Any], kind: type[Kind], deeper: int = 2) -> dict[str, Kind]:
    """Makes one level of nesting flat ({"image_proj": {...}}), below a few wrappers ({"state_dict": {...}}) too, and
    keeps values of this kind. deeper: number of those; a pickle can be nested without end."""
    found: dict[str, Kind] = {}
    for key, value in tables.items():
        if isinstance(value, kind):
            found[str(key)] = value
        elif isinstance(value, Mapping) and deeper and key in ("state_dict", "model", "module"):
            found |= flat(value, kind, deeper - 1)
        elif isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in value.items() if isinstance(inner, kind)}
    return found


def unwrapped(table: Mapping[str, Kind]) -> dict[str, Kind]:
    """Removes what all names begin with: a wrapper's "module." or "_orig_mod.", a converter's "diffusion_model."."""
    start = os.path.commonprefix(list(table)).rpartition(".")[0]
    # Some files have one table only, whose name tells what they are.
    start = f"{start}.".partition("image_proj.")[0].removeprefix(".")
    return {name[len(start) :]: value for name, value in table.items()}


def under(table: Mapping[str, Kind], prefix: str) -> dict[str, Kind]:
    """Returns what is under names with a prefix, by the rest of the name."""
    return {name[len(prefix) :]: value for name, value in table.items() if name.startswith(prefix)}


def read_safetensors_header(file: BinaryIO) -> dict[str, Any]:
    """Reads the JSON at the start of a safetensors file. Raises ValueError where there is none."""
    size, start = int.from_bytes(file.read(8), "little"), file.read(1)
    if start != b"{" or size > LARGEST_HEADER:
        raise ValueError("not a safetensors file")
    return json.loads(start + file.read(size - 1))


def read_gguf(file: BinaryIO) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Reads a GGUF file's metadata (None in the place of lists) and its tensors, little-endian, version 2 and 3.

    Raises:
        ValueError: it is not such a file; or what the reading of a damaged one raises.
    """
    magic, version, tensors, entries = _unpack(file, "<4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("not a GGUF file")
    facts = {_text(file): _value(file, *_unpack(file, "<I")) for _ in range(entries)}
    found = {}
    for _ in range(tensors):
        name, (axes,) = _text(file), _unpack(file, "<I")
        found[name] = GgufTensor(_unpack(file, f"<{axes}Q")[::-1], *_unpack(file, "<IQ"))
    return facts, found


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == GGUF_TEXT:
        return _text(file)
    if kind != GGUF_LIST:
        return _unpack(file, f"<{_NUMBERS[kind]}")[0]
    kind, count = _unpack(file, "<IQ")
    if kind in _NUMBERS:
        file.seek(count * struct.calcsize(f"<{_NUMBERS[kind]}"), 1)
    else:
        for _ in range(count):
            _value(file, kind)
    return None


def _text(file: BinaryIO) -> str:
    return _bytes(file, *_unpack(file, "<Q")).decode()


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, _bytes(file, struct.calcsize(layout)))


def _bytes(file: BinaryIO, count: int) -> bytes:
    if file.tell() + count > LARGEST_HEADER:
        raise ValueError("too long a header")
    return file.read(count)
