"""Keeps recent people's tensors in the computer's memory for the next image, whatever its settings.

Computing them reads all weights of an adapter, 0.7 GB for SDXL and 0.8 GB for FLUX; the result is small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lib_pulid.attention import SiteTensors
from lib_pulid.identity import Identity
from lib_pulid.injection import Injection, compile_injection, prepare_sites
from lib_pulid.weights import Adapter

MOST = 600_000_000  # bytes; in float32 a person has 21 MB on SDXL and 252 MB on FLUX, twice that with negative rows


class CompiledInjections:
    """A cache of `prepare_sites` on the CPU, least recently used first."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[SiteTensors, ...]] = {}  # most recently used last

    def get(
        self, adapter: Adapter, stamp: Hashable, identity: Identity, device: torch.device, **settings: Any
    ) -> Injection:
        """Returns the result of `compile_injection`. stamp: identifies the adapter's file and its state."""
        key = (stamp, _hash(identity.cond), identity.uncond is not None and _hash(identity.uncond))
        sites = self._kept.pop(key, None)
        if sites is None:
            sites = tuple(site.to(torch.device("cpu")) for site in prepare_sites(adapter, identity, device))
        injection = compile_injection(adapter, identity, device=device, prepared=sites, **settings)
        self._kept[key] = sites
        while len(self._kept) > 1 and sum(site.nbytes for kept in self._kept.values() for site in kept) > MOST:
            del self._kept[next(iter(self._kept))]
        return injection


def _hash(tokens: Tensor) -> tuple[torch.Size, str]:
    """Returns a small key that is equal if the tokens are."""
    return tokens.shape, hashlib.sha256(tokens.detach().cpu().float().numpy().tobytes()).hexdigest()
