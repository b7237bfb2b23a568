"""Writes GGUF files: version 3 of the format, with the two simplest kinds of quantised blocks.

Header: "GGUF", version, number of tensors and of entries, the entries; then for each tensor its name, its dimensions
(the fastest first), its kind and the place of its data. The data begins at a multiple of 32 bytes, as does each tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

ALIGNMENT = 32
BLOCK = 32  # values that share a scale
F32, Q4_0, Q8_0 = 0, 2, 8  # numbers of the kinds
STRING = 8


def q8_0(values: np.ndarray) -> np.ndarray:
    """[blocks, 32] -> [blocks, 34]: a scale in 16 bit, and each value as a signed byte."""
    scale = np.abs(values).max(axis=1, keepdims=True) / 127
    steps = np.rint(values / np.where(scale == 0, 1, scale)).astype(np.int8)
    return np.concatenate([scale.astype("<f2").view(np.uint8), steps.view(np.uint8)], axis=1)


def q4_0(values: np.ndarray) -> np.ndarray:
    """[blocks, 32] -> [blocks, 18]: a scale in 16 bit, and each value as 4 bits, 8 for zero; value i beside i + 16."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / -8
    steps = np.clip(np.rint(values / np.where(scale == 0, 1, scale)) + 8, 0, 15).astype(np.uint8)
    pairs = steps[:, : BLOCK // 2] | (steps[:, BLOCK // 2 :] << 4)
    return np.concatenate([scale.astype("<f2").view(np.uint8), pairs], axis=1)


QUANTISERS: dict[int, Callable[[np.ndarray], np.ndarray]] = {Q8_0: q8_0, Q4_0: q4_0}


def write_gguf(path: Path, tensors: Mapping[str, Tensor], kind: int, architecture: str = "flux") -> None:
    """Matrices are quantised as `kind`, everything else is kept in float32, as in the files that people share."""
    infos, blobs, offset = bytearray(), [], 0
    for name, tensor in tensors.items():
        own_kind, blob = _data(tensor, kind)
        infos += _text(name) + struct.pack("<I", tensor.ndim)
        infos += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)) + struct.pack("<IQ", own_kind, offset)
        blobs.append(blob)
        offset += len(blob)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1)
    header += _text("general.architecture") + struct.pack("<I", STRING) + _text(architecture)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_padded(header + bytes(infos)) + b"".join(blobs))


def _data(tensor: Tensor, kind: int) -> tuple[int, bytes]:
    values = tensor.float().numpy()
    if tensor.ndim < 2:
        return F32, _padded(values.astype("<f4").tobytes())
    return kind, _padded(QUANTISERS[kind](values.reshape(-1, BLOCK)).tobytes())


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
