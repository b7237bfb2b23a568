"""Tells the family of the model that a WebUI has loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.files.checkpoint_header import SDXL_SITES, SDXL_TEXT_WIDTH
from lib_pulid.sites import REFINER_WIDTH, Sites, find_sites, is_chroma, text_width

CHROMA = "pulid_chroma"  # name of the setting


def sites_of(denoiser: nn.Module | None, name: str, wanted: str = "an SDXL checkpoint") -> Sites:
    """Finds a denoiser's sites, and so its family. It walks through all modules: once per image is enough.

    Args:
        name: of the checkpoint. wanted: what the host could load instead, for the message.

    Raises:
        UnsupportedModelError: there is no PuLID for this model.
    """
    try:
        return _known_sites(denoiser)
    except UnsupportedModelError as error:
        problem = str(error).rstrip(".")
    what = f"{name}: {problem}" if name else problem[:1].upper() + problem[1:]
    hint = " To try PuLID on Chroma: Settings, PuLID." if denoiser is not None and is_chroma(denoiser) else ""
    raise UnsupportedModelError(f"{what}. PuLID needs {wanted}: select one, or disable PuLID for this image.{hint}")


def tries_chroma() -> bool:
    """Reads the setting that treats Chroma as FLUX.1."""
    from modules.shared import opts

    return bool(opts.data.get(CHROMA, False))


def is_refiner(denoiser: nn.Module | None) -> bool:
    """Whether this is SDXL's refiner. It has no layers for PuLID, so it may only finish an image that the base model
    started."""
    return denoiser is not None and hasattr(denoiser, "input_blocks") and text_width(denoiser) == REFINER_WIDTH


def _known_sites(denoiser: nn.Module | None) -> Sites:
    if denoiser is None:
        raise UnsupportedModelError("no checkpoint is loaded")
    sites = find_sites(denoiser, chroma=is_chroma(denoiser) and tries_chroma())
    if sites.family == "flux":
        return sites
    if len(sites.sites) == SDXL_SITES:
        return sites  # `check_fit` compares its sizes with the PuLID file's
    if (width := text_width(denoiser)) == SDXL_TEXT_WIDTH:
        count = f"{len(sites.sites)} of {SDXL_SITES}"
        raise UnsupportedModelError(f"this is a shortened SDXL with {count} cross-attention layers")
    raise UnsupportedModelError(f"this is an unknown UNet, with text embeddings of width {width}")


def chosen_checkpoint(name: str = "") -> Any:
    """Returns the host's CheckpointInfo of the checkpoint with this name, or of the selected one; None without any.

    Forge loads it only with the next image.
    """
    from modules import sd_models, shared

    known = sd_models.checkpoint_aliases.get(name) if name else None
    return known or sd_models.get_closet_checkpoint_match(shared.opts.data.get("sd_model_checkpoint") or "")
