"""Keeps recently compiled injections in the computer's memory for the next image of the same person.

Compiling reads all weights of an adapter, 0.7 GB for SDXL and 0.8 GB for FLUX; the result is small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import torch

from lib_pulid.identity import Identity
from lib_pulid.injection import Injection, compile_injection
from lib_pulid.weights import Adapter

MOST = 600_000_000  # bytes; two people on FLUX, with the negative prompt's rows


class CompiledInjections:
    """A cache of compiled injections on the CPU, least recently used first."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Injection] = {}  # most recently used last

    def get(
        self, adapter: Adapter, stamp: Hashable, identity: Identity, device: torch.device, **settings: Any
    ) -> Injection:
        """Returns the result of `compile_injection`. stamp: identifies the adapter's file and its state."""
        key = (stamp, _named(identity), *((name, _named(value)) for name, value in sorted(settings.items())))
        injection = self._kept.pop(key, None)
        if injection is None:
            injection = compile_injection(adapter, identity, device=device, **settings)
        self._kept[key] = injection.to("cpu")
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > MOST:
            del self._kept[next(iter(self._kept))]
        return injection.to(device)


def _named(value: Any) -> Hashable:
    """Returns a small key that is equal if the value is: for tensors, a hash of their content."""
    if isinstance(value, Identity):
        return _named(value.cond), _named(value.uncond)
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()
