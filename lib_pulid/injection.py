"""Identity x Adapter -> Injection -> the denoiser, for one call.

    injection = compile_injection(adapter, identity, weight=0.8, device="cuda", dtype=torch.float16)
    for i, t in enumerate(timesteps):
        step = DenoiseStep(i / len(timesteps), is_cond=[False, True], latent_hw=(128, 128), steps=len(timesteps))
        with inject(unet, [injection], step):
            noise = unet(latents, t, ...)

The identity is compiled once; `inject` hooks the denoiser's sites for one call and unhooks them whatever happens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.attention import (
    PROJECTIONS,
    SiteIdentity,
    SiteTensors,
    add_cross_attention,
    add_image_stream,
    prepare_site,
)
from lib_pulid.errors import IdentityMismatchError, SettingError, UnsupportedModelError
from lib_pulid.identity import Identity
from lib_pulid.images import ImageSource, load_region
from lib_pulid.sites import Site, Sites, find_sites
from lib_pulid.watch import Watch, WatchedSites, uncompiled
from lib_pulid.weights import Adapter

MOST = {"weight": 5, "num_zero": 80, "start_step": 10}  # what each may be; all begin at 0
_SLACK = 1e-6  # i / n against a share that a user typed


@dataclass(frozen=True)
class DenoiseStep:
    """One call of the denoiser, as the host sees it.

    Args:
        progress: share of the sampling that is done, 0 at the first step, i / n at step i of n.
        is_cond: for each row of the batch, whether it is conditional (gets the identity) or unconditional
            (gets the uncond identity). A single bool speaks for all rows.
        latent_hw: height and width of the latent in the VAE's own pixels, not packed (image / 8). Used
            by region masks, and on FLUX to tell the picture's own tokens from reference tokens behind them.
            None: all image tokens are the picture's, and masks cannot be used.
        steps: how many steps the sampling has. None: injections with a start step cannot be used.
    """

    progress: float
    is_cond: bool | Sequence[bool]
    latent_hw: tuple[int, int] | None = None
    steps: int | None = None

    @property
    def index(self) -> int:
        """Number of the step, 0 is the first; the calls of a step of second order have the same."""
        if self.steps is None:
            raise ValueError("a start step needs DenoiseStep.steps")
        return int(self.progress * self.steps + _SLACK)


@dataclass(frozen=True)
class Injection:
    """An identity, compiled for a family of denoisers, with how and when it acts. Made by `compile_injection`."""

    family: str
    sites: tuple[SiteTensors, ...]
    has_uncond: bool
    weight: float
    projection: str
    num_zero: int
    start: float
    end: float
    mask: Tensor | None
    start_step: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes kept on the device while sampling."""
        return sum(site.nbytes for site in self.sites) + (0 if self.mask is None else self.mask.nbytes)

    def to(self, device: str | torch.device) -> Injection:
        device = torch.device(device)
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, sites=tuple(site.to(device) for site in self.sites), mask=mask)

    def is_active(self, step: DenoiseStep) -> bool:
        """Whether it acts in this call: from `start` and `start_step` on and before `end`; an end of 1 includes 1."""
        if self.weight == 0 or (self.start_step and step.index < self.start_step):
            return False
        return _between(step.progress, self.start, self.end)

    def acts_within(self, steps: int) -> bool:
        """Whether there is a step among so many in which it acts."""
        return self.weight != 0 and any(acts(i, steps, self.start, self.end, self.start_step) for i in range(steps))

    def identity_of(self, is_cond: bool) -> int | None:
        """Index of a row's identity in the compiled tensors."""
        return 0 if is_cond else 1 if self.has_uncond else None


def acts(index: int, steps: int, start: float, end: float, start_step: int) -> bool:
    """Whether an injection with these settings acts in step `index` of `steps`."""
    return index >= start_step and _between(index / steps, start, end)


def _between(progress: float, start: float, end: float) -> bool:
    return start - _SLACK <= progress and (progress < end - _SLACK or end >= 1)


@torch.no_grad()
def compile_injection(
    adapter: Adapter,
    identity: Identity,
    *,
    weight: float = 1.0,
    projection: str = "ortho_v2",
    num_zero: int = 20,
    start: float = 0.0,
    end: float = 1.0,
    start_step: int = 0,
    mask: Tensor | ImageSource | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Injection:
    """Computes, once, all that depends on the identity alone.

    Args:
        weight: strength. Official 0.8 on SDXL (range 0-5), 1 on FLUX (0-3). 0 changes nothing at all.
        projection: "none", "ortho" or "ortho_v2"; SDXL only, see `attention.cross_attention_residual`.
        num_zero: zero tokens beside the identity, 0-80; SDXL only. More leave more freedom to the prompt.
        start, end: shares of the sampling between which it acts.
        start_step: number of the first step in which it acts, official on FLUX (range 0-10); it acts where both allow.
        mask: region of the picture that gets the identity, any resolution: [H, W], or an image; see `load_region`.
        device, dtype: of the denoiser's computation. The products are made in float32 and rounded once.

    Returns:
        The Injection. Without `identity.uncond`, rows that are not cond stay untouched.

    Raises:
        SettingError: a value is out of range. IdentityMismatchError: the identity belongs to another adapter.
        ImageError: the mask is none, or black.
    """
    _check_settings(weight, projection, num_zero, start, end, start_step, mask)
    _check_match(adapter, identity)
    device = torch.device(device)
    rows = [identity.cond] if identity.uncond is None else [identity.cond, identity.uncond]
    tokens = torch.cat(rows).to(device, torch.float32)  # [R, N, D]
    sites = tuple(prepare_site(site, tokens, float(weight)).to(dtype) for site in adapter.sites)
    return Injection(
        family=adapter.family,
        sites=sites,
        has_uncond=identity.uncond is not None,
        weight=float(weight),
        projection=projection,
        num_zero=int(num_zero),
        start=float(start),
        end=float(end),
        mask=None if mask is None else _read_mask(mask).to(device),
        start_step=start_step,
    )


@contextmanager
def inject(denoiser: nn.Module | Sites, injections: Sequence[Injection], step: DenoiseStep) -> Iterator[None]:
    """Hooks the denoiser for one call; all injections at a site read the same input, and their residuals add up.

    Args:
        denoiser: see `sites.find_sites`; or its Sites, found before. This call has to reach them all, unless a
            Watch follows them through a whole sampling, in which a step cache may skip some.
        injections: of the denoiser's family. Those that are not active at `step.progress` cost nothing.
        step: the call's place in the sampling and its rows.

    Raises:
        UnsupportedModelError: the denoiser does not fit the injections, or they could not act in it.
    """
    active = [injection for injection in injections if injection.is_active(step)]
    if not active:
        yield
        return
    found = denoiser if isinstance(denoiser, Sites) else find_sites(denoiser)
    for injection in active:
        check_fit(found, injection)
    attach = _attach_cross_attention if found.family == "sdxl" else _attach_image_stream
    watched = found if isinstance(found, WatchedSites) else Watch().over(found)
    with ExitStack() as hooks:
        hooks.enter_context(uncompiled())
        masks = _Masks(active, step)
        for n, site in enumerate(watched.sites):
            for handle in attach(site, n, active, step, masks):
                hooks.callback(handle.remove)
        yield
    if watched is not found:
        watched.watch.check_call(acts=True)


# ---------------------------------------------------------------- at one site


def _attach_cross_attention(site: Site, n: int, active: list[Injection], step: DenoiseStep, masks: _Masks) -> Iterable:
    def add(q: Tensor, h: Tensor) -> Tensor:
        identities = _identities(n, active, step, masks, len(h), h.shape[1])
        return add_cross_attention(q, h, identities, site.heads)

    return site.attach(add)


def _attach_image_stream(site: Site, n: int, active: list[Injection], step: DenoiseStep, masks: _Masks) -> Iterable:
    def add(total: Tensor, image: Tensor) -> None:
        own = _own_tokens(image.shape[1], step)
        identities = _identities(n, active, step, masks, len(image), own)
        add_image_stream(total[:, :own], image[:, :own], identities)

    return site.attach(add)


def _identities(
    n: int, active: list[Injection], step: DenoiseStep, masks: _Masks, batch: int, tokens: int
) -> list[SiteIdentity[Any]]:
    """What acts at site `n`, on so many rows and tokens."""
    found = []
    for index, injection in enumerate(active):
        rows = [injection.identity_of(cond) for cond in _rows(step, batch)]
        if any(row is not None for row in rows):
            mask = None if injection.mask is None else masks.over(index, tokens)
            found.append(SiteIdentity(injection.sites[n], rows, mask, injection.projection, injection.num_zero))
    return found


def _own_tokens(tokens: int, step: DenoiseStep) -> int:
    """How many image tokens are the picture's own; reference tokens (Kontext) follow them."""
    if step.latent_hw is None:
        return tokens
    own = math.prod(_packed(step.latent_hw))
    if tokens < own:
        raise ValueError(f"latent_hw {step.latent_hw} means {own} image tokens, but the block has {tokens}")
    return own


def _rows(step: DenoiseStep, batch: int) -> list[bool]:
    if isinstance(step.is_cond, bool):
        return [step.is_cond] * batch
    rows = [bool(cond) for cond in step.is_cond]
    if len(rows) != batch:
        raise SettingError(
            f"is_cond has {len(rows)} rows, but the denoiser was called with {batch}. If something in between cuts or "
            "repeats the batch (FasterCache, tiles), disable it or PuLID."
        )
    return rows


class _Masks:
    """The regions of the active injections on the token grids of one call."""

    def __init__(self, active: Sequence[Injection], step: DenoiseStep) -> None:
        self._masks = [injection.mask for injection in active]
        self._family = active[0].family
        self._latent_hw = step.latent_hw
        self._made: dict[tuple[int, int], Tensor] = {}
        if step.latent_hw is None and any(mask is not None for mask in self._masks):
            raise ValueError("region masks need DenoiseStep.latent_hw")

    def over(self, index: int, tokens: int) -> Tensor:
        """The mask of injection `index` as [tokens, 1]: each token gets the mean of the region's share in it."""
        if (index, tokens) not in self._made:
            grid = token_grid(tokens, self._latent_hw, self._family)  # type: ignore[arg-type]
            mask = F.interpolate(self._masks[index][None, None], size=grid, mode="area")  # type: ignore[index]
            self._made[index, tokens] = mask.flatten()[:, None]
        return self._made[index, tokens]


def token_grid(tokens: int, latent_hw: tuple[int, int], family: str) -> tuple[int, int]:
    """Height and width of the token grid of a layer.

    An SDXL layer sees the latent, or the latent halved (rounded up) once or several times; FLUX sees it in 2 x 2 packs.

    Raises:
        SettingError: no such grid has `tokens` tokens.
    """
    height, width = latent_hw
    for _ in range(4):
        if height * width == tokens:
            return height, width
        height, width = _packed((height, width))
    raise SettingError(
        f"A layer has {tokens} tokens, which no halving of the {family.upper()} latent {latent_hw} gives, so a mask "
        "cannot be used: disable what changes their number (Kohya HRFix, token merging), or remove the mask."
    )


def _packed(hw: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(hw[0] / 2), math.ceil(hw[1] / 2)


# ---------------------------------------------------------------- checks


def _read_mask(mask: Tensor | ImageSource) -> Tensor:
    if isinstance(mask, Tensor):
        mask = (mask.detach().float() if mask.is_floating_point() else mask.detach()).cpu().numpy()
    return torch.from_numpy(load_region(mask, "mask"))


def _check_settings(
    weight: float,
    projection: str,
    num_zero: int,
    start: float,
    end: float,
    start_step: int,
    mask: Tensor | ImageSource | None,
) -> None:
    if not 0 <= weight <= MOST["weight"]:  # NaN is not, either
        raise SettingError(f"weight is {weight}; it has to be in 0..{MOST['weight']}")
    if projection not in PROJECTIONS:
        raise SettingError(f"projection is {projection!r}; it has to be one of {', '.join(PROJECTIONS)}")
    for name, value in (("num_zero", num_zero), ("start_step", start_step)):
        if not (isinstance(value, int) and 0 <= value <= MOST[name]):
            raise SettingError(f"{name} is {value!r}; it has to be a whole number in 0..{MOST[name]}")
    if not 0 <= start < end <= 1:
        raise SettingError(f"start and end are {start} and {end}; both have to be in 0..1, and start below end")
    if isinstance(mask, Tensor) and (mask.ndim != 2 or not mask.numel()):
        raise SettingError(f"mask has shape {tuple(mask.shape)}; it has to be [H, W]")


def _check_match(adapter: Adapter, identity: Identity) -> None:
    made_with = identity.info.get("encoder", "")
    if identity.family not in ("", adapter.family) or (made_with and not adapter.is_encoder(made_with)):
        raise IdentityMismatchError(
            f"This identity was made with {identity.info.get('adapter', 'another PuLID file')} "
            f"(encoder {made_with or 'not known'}); "
            f"{adapter.path.name} is {adapter.label} (encoder {adapter.fingerprint}). Make it again from the photo."
        )
    if identity.cond.shape[-1] != adapter.encoder.output_dim:
        raise IdentityMismatchError(
            f"The identity's tokens are {identity.cond.shape[-1]} wide, "
            f"{adapter.path.name} needs {adapter.encoder.output_dim}."
        )


def check_fit(found: Sites, injection: Injection) -> None:
    """Raises UnsupportedModelError: the denoiser of these sites is not the one that the injection is for."""
    if found.family != injection.family:
        raise UnsupportedModelError(
            f"The PuLID file is for {injection.family.upper()}, "
            f"but the checkpoint is of the {found.family.upper()} kind."
        )
    if len(found.sites) != len(injection.sites):
        raise UnsupportedModelError(
            f"The checkpoint has {len(found.sites)} places for an identity, PuLID for {injection.family.upper()} "
            f"needs {len(injection.sites)}. Is it an SDXL or FLUX.1 model of the usual size?"
        )
    for site, tensors in zip(found.sites, injection.sites):
        if site.width != tensors.width:
            raise UnsupportedModelError(
                f"The checkpoint is not of the size that the PuLID file is for: {site.name} is {site.width} wide, "
                f"not {tensors.width}. Choose an SDXL or FLUX.1 model of the usual size."
            )
