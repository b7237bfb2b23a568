"""diffusers pipelines around a small UNet, with 7 sites, and a transformer with the real number of blocks, 20 sites.

They have no text encoder: a prompt becomes seeded noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from lib_pulid import miniature
from lib_pulid.hosts.diffusers import denoiser_of
from lib_pulid.hosts.diffusers_base import Base
from lib_pulid.photos import Encoders, IdentityCache
from lib_pulid.sites import find_sites
from lib_pulid.standalone import Workshop
from lib_pulid.vision import load_vision_tower
from lib_pulid.weights import Adapter, load_adapter
from tests import layouts
from tests.reference import cases
from tests.small_models import random_weights, write_files

_folder = TemporaryDirectory(prefix="pulid-small-")  # goes with the process
TEXT_WIDTH = 32
POOLED_WIDTH = 16
NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def small_base(family: str) -> Base:
    """family: "sdxl" or "flux"."""
    pipeline = {"sdxl": _sdxl, "flux": _flux}[family]()
    pipeline.set_progress_bar_config(disable=True)
    guidance = {"sdxl": 7.0, "flux": 4.0}[family]
    return Base(pipeline, family, lambda prompts: _text(family, prompts), size=64, steps=2, guidance=guidance)


@cache
def small_parts(family: str) -> tuple[Base, Adapter, nn.Module]:
    """A base, a PuLID file and a vision tower that fit each other."""
    base = small_base(family)
    widths = [site.width for site in find_sites(denoiser_of(base.pipeline)).sites]
    files = write_files(Path(_folder.name, family), widths, widths[0])
    return base, load_adapter(getattr(files, family)), load_vision_tower(files.tower)


def open_small_workshop(real: Callable[..., Workshop]) -> Callable[..., Workshop]:
    """`standalone.open_workshop` that also knows tiny-sdxl and tiny-flux: `small_parts`."""

    def open_workshop(model: str, models_dir: Path, pulid: Path | None = None, device: str = "cpu") -> Workshop:
        if not model.startswith("tiny-"):
            return real(model, models_dir, pulid, device)
        base, adapter, tower = small_parts(model[5:])
        if pulid is not None:  # of a method without a tower
            adapter, tower = load_adapter(pulid), None

        def encoders() -> Encoders:
            return Encoders(miniature.face_models(), tower)

        cache = IdentityCache(models_dir / "pulid" / "cache")
        return Workshop(base, adapter, lambda method: (encoders, "small"), cache, models_dir=models_dir)

    return open_workshop


def _sdxl() -> Any:
    few = {"layers_per_block": 1, "transformer_layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(**{**cases.UNET, "cross_attention_dim": TEXT_WIDTH, **few})
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        unet=_seeded(unet, 11),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
        **NO_TEXT,
    )


def _flux() -> Any:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=0.3611),
        transformer=_seeded(layouts.flux_transformer(64, 2, TEXT_WIDTH, POOLED_WIDTH, (8, 12, 12)), 12),
        **NO_TEXT,
    )


def _vae(scaling_factor: float) -> Any:
    vae = diffusers.AutoencoderKL(**cases.vae(16), scaling_factor=scaling_factor, shift_factor=0.0)
    return _seeded(vae, 13)


def _seeded(module: Any, seed: int) -> Any:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    module.load_state_dict(random_weights(shapes, seed), strict=False)  # buffers stay as they are
    return module.eval().requires_grad_(False)


def _text(family: str, prompts: list[str]) -> dict[str, Tensor]:
    """What a text encoder would give, as noise that depends on each prompt alone."""
    shapes = {"prompt_embeds": (16, TEXT_WIDTH), "pooled_prompt_embeds": (POOLED_WIDTH,)}

    def noise(name: str, text: str) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32((name[-13:] + text).encode()))
        return torch.randn(shapes[name], generator=generator)

    made = {name: torch.stack([noise(name, prompt) for prompt in prompts]) for name in shapes}
    if family == "sdxl":
        made |= {f"negative_{name}": torch.stack([noise(name, "") for _ in prompts]) for name in shapes}
    return made
