"""`.pulidembd`, stable-diffusion.cpp's file of one person for FLUX: a GGUF file with the tensor `pulid_id`.

ggml's sizes are [D, N], the last axis first (2048 x 32), so the rows are the identity's tokens. F16, F32 or BF16;
`general.architecture` is "pulid", `pulid.version` 1. It has no uncond tokens and does not say which encoder made it.
"""

from __future__ import annotations

import io
import struct

import numpy as np

from lib_pulid.files.checkpoint_header import GGUF_TEXT, read_gguf

SUFFIX = ".pulidembd"
MAGIC = b"GGUF"
TENSOR, ARCHITECTURE, VERSION = "pulid_id", "pulid", 1
ALIGNMENT = 32
_U32 = 4
_F32, _F16, _BF16 = 0, 1, 30  # ggml's types of tensors
_LAYOUTS = {_F32: "<f4", _F16: "<f2", _BF16: "<u2"}


def pack(tokens: np.ndarray) -> bytes:
    """Writes a person's tokens, [N, D] float32, in half precision where that has room for them."""
    fits = np.abs(tokens).max(initial=0) <= np.finfo(np.float16).max
    kind, data = (_F16, tokens.astype("<f2")) if fits else (_F32, tokens.astype("<f4"))
    header = MAGIC + struct.pack("<IQQ", 3, 1, 2)
    header += _text("general.architecture") + struct.pack("<I", GGUF_TEXT) + _text(ARCHITECTURE)
    header += _text("pulid.version") + struct.pack("<II", _U32, VERSION)
    header += _text(TENSOR) + struct.pack("<IQQIQ", 2, *tokens.shape[::-1], kind, 0)
    return header + bytes(-len(header) % ALIGNMENT) + data.tobytes()


def unpack(content: bytes) -> np.ndarray:
    """Reads a person's tokens, [N, D] float32.

    Raises:
        ValueError: it is not such a file; or what the reading of a damaged one raises.
    """
    file = io.BytesIO(content)
    facts, tensors = read_gguf(file)
    if facts.get("general.architecture") != ARCHITECTURE:
        raise ValueError(f"a GGUF file of the kind {facts.get('general.architecture')!r}, not {ARCHITECTURE!r}")
    if facts.get("pulid.version", VERSION) != VERSION:
        raise ValueError(f"version {facts['pulid.version']}; version {VERSION} is known")
    if TENSOR not in tensors:
        raise ValueError(f"it has no tensor {TENSOR}")
    shape, kind, offset = tensors[TENSOR]
    if kind not in _LAYOUTS:
        raise ValueError(f"ggml's type {kind}; only F16, F32 and BF16 can be read")
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    start = file.tell() + -file.tell() % facts.get("general.alignment", ALIGNMENT) + offset
    values = np.frombuffer(content, _LAYOUTS[kind], int(np.prod(shape)), start)
    if kind == _BF16:
        values = (values.astype("<u4") << 16).view("<f4")
    return values.astype(np.float32).reshape(shape)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
