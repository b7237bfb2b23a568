"""Counts what PyTorch code would cost on a GPU, without one: kernels, stalls and bytes moved.

The code runs on fake CUDA tensors, which have a shape but no memory. Every operation except views counts as one
kernel that reads its inputs and writes its outputs once; caches are ignored. Fused attention is one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations besides views that start no kernel: they allocate memory or query a tensor.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FREE |= {"_unsafe_view", "device", "lift_fresh"}
_WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_"}  # their first argument


@dataclass(frozen=True)
class Cost:
    """Args: kernels: started. stalls: copies from or to the host. moved: bytes, read or written."""

    kernels: int = 0
    stalls: int = 0
    moved: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(a - b for a, b in zip(astuple(self), astuple(other))))


def count(make: Callable[[], Callable[[], Any]]) -> Cost:
    """Counts one call of the function that `make` returns.

    Args:
        make: builds the inputs (tensors on "cuda" are fake here); not counted.

    Raises:
        DataDependentOutputException: the code reads a number (`item`), and so waits for the GPU.
    """
    with fake_gpu():
        function = make()
        with _Counter() as counter, _FusedAttention(counter):
            function()
    return counter.cost


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Makes all tensors created inside fake, on any device."""
    with torch.no_grad(), FakeTensorMode():
        yield


def nbytes(tensor: Tensor) -> int:
    """Computes the bytes that reading a tensor moves; elements repeated by `expand` count once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride()):
        size *= length if stride else min(length, 1)
    return size


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def add(self, kernels: int, tensors: list[Tensor]) -> None:
        self.cost += Cost(kernels, 0, sum(nbytes(tensor) for tensor in tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        devices = {t.device.type for t in (*given, *made)}
        if "cuda" not in devices or name in _FREE or (func.is_view and not name.startswith("_to_copy")):
            return result
        if len(devices) > 1 and name in ("_to_copy", "copy_"):
            self.cost += Cost(0, 1, sum(nbytes(t) for t in (*given, *made) if t.is_cuda))
            return result
        self.add(1, [*_read(func, name, args, kwargs or {}), *made])
        if name == "baddbmm" or (name == "addmm" and args[0].ndim > 1):
            self.add(1, [*made, *made])  # cuBLAS only adds in place: the first argument is copied there first
        return result


class _FusedAttention(TorchFunctionMode):
    """Replaces fused attention, for which PyTorch would look for a GPU."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, *others = args
        heads, length = q.shape[1:3]
        out = q.new_empty(q.shape[0], length, heads, v.shape[-1]).transpose(1, 2)
        mask = [t for t in (*others, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        self._counter.add(1, [q, k, v, *mask, out])
        return out


def _read(func: Any, name: str, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Yields what an operation reads: all its tensors except those that it only writes to."""
    if name.startswith("new_") or name.endswith("_like"):
        return
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and (argument.kwarg_only or name in _WRITE_ONLY or kwargs.get("beta") == 0):
            continue
        yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))
