"""Reads names, shapes and dtypes of a torch pickle's tensors without loading it, as of a safetensors header.

The archive's `data.pkl` is a small program that builds the tables. Here it may build nothing but dictionaries and
descriptions of tensors, and no weight is read.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from lib_pulid.files.checkpoint_header import flat
from lib_pulid.methods import Header, Tensors

LARGEST_PROGRAM = 20_000_000  # bytes; that of an adapter has some hundred thousand
_DTYPES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64",
}  # fmt: skip


def read_pickle_header(path: Path) -> Header:
    """Reads a file as `torch.save` writes it since torch 1.6; empty for anything else, and if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if entry.file_size > LARGEST_PROGRAM or entry.compress_type != zipfile.ZIP_STORED:
                return {}
            tables = _Describer(io.BytesIO(archive.read(entry))).load()
        return flat(tables, Tensors)
    except Exception:  # whatever a damaged or malicious program leads to, it says nothing
        return {}


class _Describer(pickle.Unpickler):
    """Runs a program in which only a few harmless names exist."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]  # of ("storage", type, key, device, size)


def _describe(dtype: str, offset: int, shape: tuple[int, ...], *rest: Any) -> Tensors:
    return Tensors(tuple(map(int, shape)), str(dtype))
