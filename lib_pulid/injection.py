"""Compiles an Identity with an Adapter into an Injection, and injects it into one denoiser call.

    injection = compile_injection(adapter, identity, weight=0.8, device="cuda", dtype=torch.float16)
    for i, t in enumerate(timesteps):
        step = DenoiseStep(i / len(timesteps), is_cond=[False, True], latent_hw=(128, 128), steps=len(timesteps))
        with inject(unet, [injection], step):
            noise = unet(latents, t, ...)

The identity is compiled once; `inject` hooks the denoiser's sites for one call, and always removes the hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_pulid.attention import (
    PROJECTIONS,
    SiteIdentity,
    SiteTensors,
    add_cross_attention,
    add_image_stream,
    prepare_site,
)
from lib_pulid.control import MOST_WEIGHT, Control
from lib_pulid.errors import IdentityMismatchError, SettingError, UnsupportedModelError
from lib_pulid.identity import Identity
from lib_pulid.images import ImageSource
from lib_pulid.lora import Lora, strongest
from lib_pulid.masks import load_mask
from lib_pulid.methods import Method, has
from lib_pulid.sites import Site, Sites, find_sites
from lib_pulid.token_masks import TokenMasks, own_tokens
from lib_pulid.watch import Watch, WatchedSites, uncompiled
from lib_pulid.weights import Adapter

# Maximum of each; the minimum is 0.
MOST = {"weight": 5, "num_zero": 80, "start_step": 10, "lora_weight": 2, "identity_net": MOST_WEIGHT}
_COMPUTED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SLACK = 1e-6  # for comparing i / n with a fraction that a user typed


@dataclass(frozen=True)
class DenoiseStep:
    """One call of the denoiser, as the host sees it.

    Args:
        progress: fraction of the sampling that is done, 0 at the first step, i / n at step i of n.
        is_cond: for each row of the batch, whether it is conditional (gets the identity) or unconditional
            (gets the uncond identity). A single bool applies to all rows.
        latent_hw: height and width of the latent in the VAE's own pixels, not packed (image / 8). Needed for
            masks, and on FLUX to separate the image's own tokens from reference tokens after them.
            None: all image tokens are the image's own, and masks cannot be used.
        steps: number of steps of the sampling. None: injections with a start step cannot be used.
        images: for each row of the batch, the index of the image that it is of. None: not known.
    """

    progress: float
    is_cond: bool | Sequence[bool]
    latent_hw: tuple[int, int] | None = None
    steps: int | None = None
    images: Sequence[int] | None = None

    @property
    def index(self) -> int:
        """Number of the step, from 0; both calls of a second-order step have the same."""
        if self.steps is None:
            raise ValueError("a start step needs DenoiseStep.steps")
        return int(self.progress * self.steps + _SLACK)


@dataclass(frozen=True)
class Injection:
    """An identity compiled for a family of denoisers, with its settings. Made by `compile_injection`."""

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
    images: frozenset[int] | None = None  # of the batch, that get the identity; None: all
    lora: Lora | None = None
    lora_weight: float = 0.0
    control: Control | None = None  # what the method's ControlNet is given; it acts with a weight of 0, too

    @property
    def nbytes(self) -> int:
        """Bytes kept on the device while sampling."""
        others = [one.nbytes for one in (self.mask, self.lora, self.control) if one is not None]
        return sum(site.nbytes for site in self.sites) + sum(others)

    @property
    def has_effect(self) -> bool:
        """Whether it changes anything in any step."""
        return self.weight != 0 or self.control is not None

    def is_active(self, step: DenoiseStep) -> bool:
        """Whether its residuals are added in this call: from `start` and `start_step` on, before `end`; an end of 1
        includes 1."""
        return self.weight != 0 and self._is_within(step)

    def is_controlled(self, step: DenoiseStep) -> bool:
        """Whether its ControlNet runs in this call; the same range."""
        return self.control is not None and self._is_within(step)

    def _is_within(self, step: DenoiseStep) -> bool:
        if self.start_step and step.index < self.start_step:
            return False
        return _between(step.progress, self.start, self.end)


def acts(index: int, steps: int, start: float, end: float, start_step: int) -> bool:
    """Whether an injection with these settings is active in step `index` of `steps`."""
    return index >= start_step and _between(index / steps, start, end)


def _between(progress: float, start: float, end: float) -> bool:
    return start - _SLACK <= progress and (progress < end - _SLACK or end >= 1)


@torch.no_grad()
def prepare_sites(adapter: Adapter, identity: Identity, device: str | torch.device = "cpu") -> Iterator[SiteTensors]:
    """Yields all that depends on adapter and identity alone: each site's tensors, in float32, at a weight of 1.

    Raises:
        IdentityMismatchError: the identity belongs to another adapter.
    """
    _check_match(adapter, identity)
    tokens = identity.rows.to(device, torch.float32)  # [R, N, D]
    for site in adapter.sites:
        yield prepare_site(site, tokens)


@torch.no_grad()
def compile_injection(
    adapter: Adapter,
    identity: Identity,
    *,
    weight: float = 1.0,
    projection: str | None = None,
    num_zero: int | None = None,
    start: float = 0.0,
    end: float = 1.0,
    start_step: int = 0,
    lora_weight: float | None = None,
    mask: Tensor | ImageSource | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prepared: Iterable[SiteTensors] | None = None,
) -> Injection:
    """Computes an Injection: everything that depends on the identity and its settings, once.

    Args:
        weight: likeness strength. Official: 0.8 on SDXL (range 0-5), 1 on FLUX (0-3). 0 changes nothing at all.
        projection: "none", "ortho" or "ortho_v2", see `attention.add_cross_attention`; PuLID for SDXL only, where None
            means "ortho_v2".
        num_zero: zero tokens beside the identity, 0-80; PuLID for SDXL only, where None means 20. More leave more
            freedom to the prompt.
        start, end: fractions of the sampling between which it is active.
        start_step: first step in which it is active, official on FLUX (range 0-10); the later of both starts counts.
        lora_weight: strength of the LoRA in the file, 0-2; FaceID only, where None means 1, the official value. It acts
            on the whole image, whatever the mask, and once for all injections of a file.
        mask: part of the image that gets the identity, in any resolution: [H, W], or an image; see `load_mask`.
        device, dtype: of the denoiser's computation. The products are computed in float32 and rounded once. Dtypes that
            only store weights (8 bits, integers of quantized models) count as float32.
        prepared: the result of `prepare_sites` for this adapter and identity, where it is known already.

    Returns:
        The Injection. Without `identity.uncond`, uncond rows stay unchanged.

    Raises:
        SettingError: a value is out of range, or the adapter's method has no such setting.
        IdentityMismatchError: the identity belongs to another adapter.
        ImageError: the mask is not an image, or black.
    """
    method = adapter.method
    _check_has(method, projection=projection, num_zero=num_zero, lora_weight=lora_weight)
    lora_weight = 1.0 if lora_weight is None else lora_weight
    projection = method.projection if projection is None else projection
    num_zero = method.num_zero if num_zero is None else num_zero
    _check_settings(weight, projection, num_zero, start, end, start_step, lora_weight)
    device = torch.device(device)
    area = None if mask is None else _read_mask(mask).to(device)
    dtype = dtype if dtype in _COMPUTED_IN else torch.float32
    prepared = prepare_sites(adapter, identity, device) if prepared is None else prepared
    return Injection(
        family=adapter.family,
        sites=tuple(site.to(device).weighted(float(weight)).to(dtype) for site in prepared),
        has_uncond=identity.uncond is not None,
        weight=float(weight),
        projection=projection,
        num_zero=int(num_zero),
        start=float(start),
        end=float(end),
        mask=area,
        start_step=start_step,
        lora=None if adapter.lora is None else adapter.lora.to(device, dtype),
        lora_weight=0.0 if adapter.lora is None else float(lora_weight),
    )


@contextmanager
def inject(denoiser: nn.Module | Sites, injections: Sequence[Injection], step: DenoiseStep) -> Iterator[None]:
    """Hooks the denoiser for one call; all injections at a site read the same input, and their residuals add up.

    Args:
        denoiser: see `sites.find_sites`; or its Sites. The call has to reach all of them, unless a Watch follows
            them through a whole sampling, in which a step cache may skip some.
        injections: of the denoiser's family. Those that are not active at `step.progress` cost nothing.
        step: the call's position in the sampling and its rows.

    Raises:
        UnsupportedModelError: the denoiser does not fit the injections, or its layers were bypassed.
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
        masks = TokenMasks([injection.mask for injection in active], found.family, step.latent_hw)
        loras = strongest([(one.lora, one.lora_weight) for one in active if one.lora is not None])
        for n, site in enumerate(watched.sites):
            for handle in _attach_loras(site, n, loras):  # first: the site's query has the LoRA in it
                hooks.callback(handle.remove)
            for handle in attach(site, n, active, step, masks):
                hooks.callback(handle.remove)
        yield
    if watched is not found:
        watched.watch.check_call(acts=True)


# ---------------------------------------------------------------- at one site


def _attach_cross_attention(
    site: Site, n: int, active: list[Injection], step: DenoiseStep, masks: TokenMasks
) -> Iterable:
    def add(q: Tensor, h: Tensor) -> Tensor:
        identities = _identities(n, active, step, masks, h, h.shape[1])
        return add_cross_attention(q, h, identities, site.heads)

    return site.attach(add)


def _attach_loras(site: Site, n: int, loras: Sequence[tuple[Lora, float]]) -> Iterator[RemovableHandle]:
    for lora, strength in loras:
        for i, parts in enumerate(site.attentions):
            yield from lora.attach(2 * n + i, parts, strength)


def _attach_image_stream(site: Site, n: int, active: list[Injection], step: DenoiseStep, masks: TokenMasks) -> Iterable:
    def add(total: Tensor, image: Tensor) -> None:
        own = own_tokens(image.shape[1], step.latent_hw)
        identities = _identities(n, active, step, masks, image, own)
        add_image_stream(total[:, :own], image[:, :own], identities)

    return site.attach(add)


def _identities(
    n: int, active: list[Injection], step: DenoiseStep, masks: TokenMasks, h: Tensor, tokens: int
) -> list[SiteIdentity[Any]]:
    """Collects the active identities at site `n`, for the rows of h [B, L, C] and so many tokens."""
    found = []
    for index, injection in enumerate(active):
        rows = identity_rows(injection, step, len(h))
        if any(row is not None for row in rows):
            mask = masks.over(index, tokens)
            mask = None if mask is None else mask.to(h.device)
            found.append(SiteIdentity(injection.sites[n], rows, mask, injection.projection, injection.num_zero))
    return found


def identity_rows(injection: Injection, step: DenoiseStep, batch: int) -> list[int | None]:
    """Returns each row's identity in the compiled tensors, or None for a row that gets none.

    Raises:
        SettingError: the batch's images have different faces, and it is not known which row is whose.
    """
    rows = [0 if cond else 1 if injection.has_uncond else None for cond in _rows(step, batch)]
    if injection.images is None:
        return rows
    if step.images is None or len(step.images) != batch:
        raise SettingError(
            "PuLID: the images of this batch have different faces in their prompts, but it is not known which row "
            "belongs to which image (AND in a prompt, or a script that cuts the batch). Use batch size 1 and a larger "
            "batch count."
        )
    return [row if image in injection.images else None for row, image in zip(rows, step.images)]


def _rows(step: DenoiseStep, batch: int) -> list[bool]:
    if isinstance(step.is_cond, bool):
        return [step.is_cond] * batch
    rows = [bool(cond) for cond in step.is_cond]
    if len(rows) != batch:
        raise SettingError(
            f"is_cond has {len(rows)} rows, but a layer got {batch}. If something splits or repeats the batch in "
            "between (Forge Couple, Regional Prompter, FasterCache, tiles), PuLID cannot tell which rows are the "
            "prompt's: disable it or PuLID. PuLID has regions of its own for several people."
        )
    return rows


# ---------------------------------------------------------------- checks


def _read_mask(mask: Tensor | ImageSource) -> Tensor:
    if isinstance(mask, Tensor):
        if mask.ndim != 2 or not mask.numel():
            raise SettingError(f"mask has shape {list(mask.shape)}; it has to be [H, W]")
        mask = (mask.detach().float() if mask.is_floating_point() else mask.detach()).cpu().numpy()
    return torch.from_numpy(load_mask(mask, "mask"))


def _check_settings(
    weight: float, projection: str, num_zero: int, start: float, end: float, start_step: int, lora_weight: float
) -> None:
    for name, value in (("weight", weight), ("lora_weight", lora_weight)):
        if not 0 <= value <= MOST[name]:  # False for NaN
            raise SettingError(f"{name} is {value}; it has to be in 0..{MOST[name]}")
    for name, count in (("num_zero", num_zero), ("start_step", start_step)):
        if not (isinstance(count, int) and 0 <= count <= MOST[name]):
            raise SettingError(f"{name} is {count!r}; it has to be a whole number in 0..{MOST[name]}")
    if projection not in PROJECTIONS:
        raise SettingError(f"projection is {projection!r}; it has to be one of {', '.join(PROJECTIONS)}")
    if not 0 <= start < end <= 1:
        raise SettingError(f"start and end are {start} and {end}; both have to be in 0..1, and start below end")


def _check_has(method: Method, **given: object) -> None:
    """Raises SettingError where a setting is given that an SDXL method has not; FLUX always passed over them."""
    for name, value in given.items():
        if value is not None and method.family == "sdxl" and not has(method, name):
            raise SettingError(f"{method.name} has no {name}; leave it out")


def _check_match(adapter: Adapter, identity: Identity) -> None:
    made_with = identity.info.get("encoder", "")
    if identity.family not in ("", adapter.family) or (made_with and not adapter.is_encoder(made_with)):
        raise IdentityMismatchError(
            f"This identity was made with {identity.info.get('adapter', 'another PuLID file')} "
            f"(encoder {made_with or 'not known'}), but "
            f"{adapter.path.name} is {adapter.label} (encoder {adapter.fingerprint}). Make it again from the photo."
        )
    if identity.cond.shape[-1] != adapter.encoder.output_dim:
        raise IdentityMismatchError(
            f"The identity's tokens have width {identity.cond.shape[-1]}, but "
            f"{adapter.path.name} needs {adapter.encoder.output_dim}. Make it again from the photo."
        )


def check_fit(found: Sites, injection: Injection) -> None:
    """Raises: UnsupportedModelError: the injection is not for the denoiser of these sites."""
    if found.family != injection.family:
        raise UnsupportedModelError(
            f"The PuLID file is for {injection.family.upper()}, "
            f"but the checkpoint is {found.family.upper()}. Choose a matching pair."
        )
    if len(found.sites) != len(injection.sites):
        raise UnsupportedModelError(
            f"The checkpoint has {len(found.sites)} layers for PuLID, but PuLID for {injection.family.upper()} "
            f"needs {len(injection.sites)}. Use an SDXL or FLUX.1 model of the usual size."
        )
    for site, tensors in zip(found.sites, injection.sites):
        if site.width != tensors.width:
            raise UnsupportedModelError(
                f"The PuLID file is for a model of another size: {site.name} has width {site.width}, "
                f"not {tensors.width}. Use an SDXL or FLUX.1 model of the usual size."
            )
    for n, site in enumerate(found.sites if injection.lora is not None else ()):
        if not site.attentions:
            raise UnsupportedModelError(f"The checkpoint has no self-attention beside {site.name}, where FaceID's LoRA "
                                        "belongs. Use another checkpoint or another method.")  # fmt: skip
        for i, parts in enumerate(site.attentions):
            injection.lora.check_fit(2 * n + i, parts)  # type: ignore[union-attr]
