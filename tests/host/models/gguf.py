"""GGUF files: version 3 of the format, with the two simplest kinds of quantised blocks.

Header: "GGUF", version, number of tensors and of entries, the entries; then for each tensor its name, its dimensions
(the fastest first), its kind and the place of its data. The data begins at a multiple of 32 bytes, as does each tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

BLOCK = 32  # values that share a scale
F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30  # numbers of the kinds
UINT32, STRING = 4, 8


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


QUANTISERS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    F32: lambda values: values.astype("<f4"), F16: lambda values: values.astype("<f2"), Q4_0: q4_0, Q8_0: q8_0,
    BF16: lambda values: (values.astype("<f4").view("<u4") >> 16).astype("<u2"),
}  # fmt: skip


def gguf(tensors: Mapping[str, Tensor], kind: int, entries: Mapping[str, str | int]) -> bytes:
    """Matrices are stored as `kind`, everything else in float32, as in the files that people share."""
    alignment = int(entries.get("general.alignment", 32))

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % alignment)

    header, blobs, offset = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)), [], 0
    for name, value in entries.items():
        header += _text(name)
        if isinstance(value, str):
            header += struct.pack("<I", STRING) + _text(value)
        else:
            header += struct.pack("<II", UINT32, value)
    for name, tensor in tensors.items():
        own_kind, values = (kind if tensor.ndim > 1 else F32), tensor.float().numpy()
        header += _text(name) + struct.pack("<I", tensor.ndim)
        header += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)) + struct.pack("<IQ", own_kind, offset)
        blobs.append(padded(QUANTISERS[own_kind](values.reshape(-1, BLOCK) if tensor.ndim > 1 else values).tobytes()))
        offset += len(blobs[-1])
    return padded(header) + b"".join(blobs)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
