"""Injections that were compiled last, kept in the computer's memory: the next picture of a person needs them again.

Compiling reads all weights of an adapter, 0.7 GB for SDXL and 0.8 GB for FLUX; what comes out is small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import torch

from lib_pulid.identity import Identity
from lib_pulid.injection import Injection, compile_injection
from lib_pulid.weights import Adapter

MOST = 600_000_000  # bytes; two persons on FLUX, with the rows of the negative prompt


class CompiledInjections:
    """See the module."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Injection] = {}  # the one used last stands last

    def get(
        self, adapter: Adapter, stamp: Hashable, identity: Identity, device: torch.device, **settings: Any
    ) -> Injection:
        """As `compile_injection`. stamp: names the adapter's file and its state."""
        key = (stamp, _named(identity), *((name, _named(value)) for name, value in sorted(settings.items())))
        injection = self._kept.pop(key, None)
        if injection is None:
            injection = compile_injection(adapter, identity, device=device, **settings)
        self._kept[key] = injection.to("cpu")
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > MOST:
            del self._kept[next(iter(self._kept))]
        return injection.to(device)


def _named(value: Any) -> Hashable:
    """Something small that is equal where the value is: of tensors their content."""
    if isinstance(value, Identity):
        return _named(value.cond), _named(value.uncond)
    if not isinstance(value, torch.Tensor):
        return value
    return tuple(value.shape), hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()
