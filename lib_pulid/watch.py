"""Checks that the residuals were really added; one check for every way into a denoiser.

A compiled graph, an engine or a step cache may run something else instead of the hooked blocks. Nothing fails then, and
the image shows a stranger, or the face counts twice. The rule, for each site: a residual is added as often as the block
runs.

    the block ran, and the residual was added       right
    neither, in a later call                        right: a step cache (TeaCache) or a cache of deep blocks (DeepCache)
                                                    reuses what an earlier call computed with the face
    neither, in the first call of a sampling        something else runs instead of the block
    the block returned without running              a block cache (FirstBlockCache): its output already has the face of
                                                    an earlier step, or never will
    the block ran, and nothing was added            it was not called as a module
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.sites import Site, Sites, in_this_thread

_REPLACED = (
    "Another component (TensorRT, a compiled or exported model, or an extension that replaces the UNet) bypasses the "
    "layers PuLID needs: {} of {} ran. Disable it or PuLID."
)
_CACHED = (
    "A block cache (FirstBlockCache, MagCache or similar) replaced the output of {}, so the face would count twice or "
    "not at all. Disable the cache or PuLID. Caches that skip whole steps (TeaCache) work."
)
_BYPASSED = "{} ran without its hooks: another extension calls its layers directly. Disable that extension or PuLID."
_SKIPPED = (
    "The face was never added: a step cache skipped every step with PuLID. "
    "Disable the cache, make it skip less, or start PuLID earlier."
)


@dataclass(frozen=True)
class WatchedSites(Sites):
    """Sites that a Watch follows; the Watch's owner checks it."""

    watch: Watch


class Watch:
    """Follows the sites through the denoiser calls of one sampling: `inject(watch.over(sites), ...)` around each.

    Attributes:
        reached: names of the sites at which a residual was added since `begin`.
    """

    def __init__(self) -> None:
        self._sites = 0
        self._fresh: set[str] = set()  # blocks that ran since a residual was last added there
        self._acted: set[str] = set()  # sites reached in this call
        self.begin()

    def begin(self) -> None:
        """Starts a new sampling."""
        self.reached: set[str] = set()
        self._is_first, self._missed = True, False

    def over(self, sites: Sites) -> WatchedSites:
        """Returns the same sites, watched. They raise UnsupportedModelError in a denoiser call if a block returns
        without having run."""
        self._sites = len(sites.sites)
        return WatchedSites(sites.family, tuple(map(self._watched, sites.sites)), self)

    def check_call(self, acts: bool) -> None:
        """Checks a call that returned. acts: whether a face was to be added in it.

        Raises:
            UnsupportedModelError: it was not added.
        """
        is_first, self._is_first = self._is_first, False
        bypassed = self._fresh - self._acted
        if bypassed:
            raise UnsupportedModelError(_BYPASSED.format(min(bypassed)))
        if acts and is_first and len(self.reached) < self._sites:
            raise UnsupportedModelError(_REPLACED.format(len(self.reached), self._sites))
        self._missed |= acts and not self.reached

    def check_end(self) -> None:
        """Checks a sampling that returned. Raises: UnsupportedModelError: the face was never added."""
        if self._missed and not self.reached:
            raise UnsupportedModelError(_SKIPPED)

    def _watched(self, site: Site) -> Site:
        def ran(*_: Any) -> None:
            self._fresh.add(site.name)

        def attach(add: Callable[..., Any]) -> Iterator[RemovableHandle]:
            self._fresh.discard(site.name)
            self._acted.discard(site.name)

            def add_and_note(*tensors: Any) -> Any:
                if site.inner is not None and site.name not in self._fresh:
                    raise UnsupportedModelError(_CACHED.format(site.name))
                self._fresh.discard(site.name)
                self._acted.add(site.name)
                self.reached.add(site.name)
                return add(*tensors)

            if site.inner is not None:
                yield site.inner.register_forward_pre_hook(in_this_thread(ran))
            yield from site.attach(add_and_note)

        return replace(site, attach=attach)


@dataclass
class _Stance:
    """torch's one stance on compiled code, while somebody needs it."""

    users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    held: ExitStack = field(default_factory=ExitStack)


_STANCE = _Stance()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Suspends torch.compile: compiled code has only the hooks that were there when it was compiled.

    The stance is the same for all threads, so it is set by the first that asks and put back by the last that ends.
    Before torch 2.6 this is not possible; then `Watch` finds that the sites are not reached.
    """
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield  # nothing is compiled yet, and the import alone takes seconds
        return
    with _STANCE.lock:
        if not _STANCE.users:
            _STANCE.held.enter_context(torch.compiler.set_stance("force_eager"))
        _STANCE.users += 1
    try:
        yield
    finally:
        with _STANCE.lock:
            _STANCE.users -= 1
            if not _STANCE.users:
                _STANCE.held.close()
