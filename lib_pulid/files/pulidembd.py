"""`.pulidembd`, stable-diffusion.cpp's file of one person for FLUX: a GGUF file with the tensor `pulid_id`.

ggml's sizes are [D, N], the last axis first (2048 x 32), so the rows are the identity's tokens. F16, F32 or BF16;
`general.architecture` is "pulid", `pulid.version` 1. It has no uncond tokens and does not tell which encoder made it.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np

from lib_pulid.files.checkpoint_header import GGUF_LIST, GGUF_TEXT, gguf_skip, gguf_text

SUFFIX = ".pulidembd"
MAGIC = b"GGUF"
TENSOR, ARCHITECTURE, VERSION = "pulid_id", "pulid", 1
ALIGNMENT = 32
_U32 = 4
_F32, _F16, _BF16 = 0, 1, 30  # ggml's kinds of tensors
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 7: "?", 10: "Q", 11: "q"}  # GGUF's kinds of whole numbers


def pack(tokens: np.ndarray) -> bytes:
    """Writes a person's tokens, [N, D] float32, in half precision where that has room for them."""
    fits = np.abs(tokens).max(initial=0) <= np.finfo(np.float16).max
    kind, data = (_F16, tokens.astype("<f2")) if fits else (_F32, tokens.astype("<f4"))
    head = MAGIC + struct.pack("<IQQ", 3, 1, 2)
    head += _text("general.architecture") + struct.pack("<I", GGUF_TEXT) + _text(ARCHITECTURE)
    head += _text("pulid.version") + struct.pack("<II", _U32, VERSION)
    head += _text(TENSOR) + struct.pack("<IQQIQ", 2, *tokens.shape[::-1], kind, 0)
    return head + bytes(-len(head) % ALIGNMENT) + data.tobytes()


def unpack(content: bytes) -> np.ndarray:
    """Reads a person's tokens, [N, D] float32.

    Raises:
        ValueError: it is not such a file; or what the reading of a damaged one raises.
    """
    file = io.BytesIO(content)
    magic, version, tensors, entries = struct.unpack("<4sIQQ", file.read(24))
    if magic != MAGIC or version not in (2, 3):
        raise ValueError("not a GGUF file")
    facts = dict(_entry(file) for _ in range(entries))
    if facts.get("general.architecture") != ARCHITECTURE:
        raise ValueError(f"a GGUF file of the kind {facts.get('general.architecture')!r}, not {ARCHITECTURE!r}")
    if facts.get("pulid.version", VERSION) != VERSION:
        raise ValueError(f"version {facts['pulid.version']}; version {VERSION} is known")
    found = dict(_tensor(file) for _ in range(tensors))
    start = file.tell() + -file.tell() % facts.get("general.alignment", ALIGNMENT)
    shape, kind, place = found[TENSOR]
    values = np.frombuffer(content, {_F32: "<f4", _F16: "<f2", _BF16: "<u2"}[kind], int(np.prod(shape)), start + place)
    if kind == _BF16:
        values = (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float32).reshape(shape)


def _entry(file: io.BytesIO) -> tuple[str, Any]:
    name, (kind,) = gguf_text(file), struct.unpack("<I", file.read(4))
    if kind == GGUF_TEXT:
        return name, gguf_text(file)
    if kind in _NUMBERS:
        layout = f"<{_NUMBERS[kind]}"
        return name, struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
    gguf_skip(file, kind)
    return name, GGUF_LIST


def _tensor(file: io.BytesIO) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    name, (axes,) = gguf_text(file), struct.unpack("<I", file.read(4))
    sizes = list(struct.unpack(f"<{axes}Q", file.read(8 * axes)))
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    return name, (tuple(sizes[::-1]), *struct.unpack("<IQ", file.read(12)))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
