"""Builds calls of denoisers with random weights, to measure what a face costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_pulid.injection import DenoiseStep
from lib_pulid.sites import Sites, find_sites, image_stream_site


@dataclass(frozen=True)
class BenchCall:
    """A call of a denoiser with random weights. Args: step: its place in the sampling and its rows."""

    name: str
    sites: Sites
    step: DenoiseStep
    run: Callable[[], Tensor]


def bench_call(family: str, device: str, dtype: torch.dtype, small: bool) -> BenchCall:
    """Builds a call of SDXL's UNet, or of two double and four single blocks of FLUX, a tenth of it, with two sites.

    512 x 512 pixels on a CPU, 1024 x 1024 on a GPU. small: narrow stand-ins at 256 x 256.
    """
    side = 32 if small else 128 if device.startswith("cuda") else 64
    return (_bench_sdxl if family == "sdxl" else _bench_flux)(side, device, dtype, small)


def _bench_sdxl(side: int, device: str, dtype: torch.dtype, small: bool) -> BenchCall:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**(_TINY_SDXL if small else _SDXL))
    unet = _random(unet, device, dtype)
    text, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim
    pooled -= 6 * unet.config.addition_time_embed_dim
    like: Any = {"device": device, "dtype": dtype}
    added = {"text_embeds": torch.randn(2, pooled, **like), "time_ids": torch.zeros(2, 6, **like)}
    args = (torch.randn(2, 4, side, side, **like), torch.tensor(500, device=device), torch.randn(2, 77, text, **like))
    step = DenoiseStep(0.0, [False, True], (side, side))
    name = f"SDXL UNet, {8 * side} x {8 * side}, 2 rows" + ", narrow" * small
    return BenchCall(name, find_sites(unet), step, lambda: unet(*args, added_cond_kwargs=added).sample)


def _bench_flux(side: int, device: str, dtype: torch.dtype, small: bool) -> BenchCall:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    heads, head = (2, 32) if small else (24, 128)
    width, tokens = heads * head, (side // 2) ** 2
    with torch.device("meta"):
        blocks = FluxTransformerBlock(width, heads, head), FluxSingleTransformerBlock(width, heads, head)
    double, single = (_random(block, device, dtype) for block in blocks)
    once, twice = _Again(double), _Again(single)
    like: Any = {"device": device, "dtype": dtype}
    image, text, vec = (torch.randn(*s, width, **like) for s in ((1, tokens), (1, 512), (1,)))
    angles = torch.zeros(512 + tokens, head, device=device)
    given = {"temb": vec, "image_rotary_emb": (angles.cos(), angles.sin())}

    def run() -> Tensor:
        x, y = image, text
        for block in (once, double, twice, single, single, single):
            y, x = block(hidden_states=x, encoder_hidden_states=y, **given)
        return x

    sites = tuple(image_stream_site(name, block, width, 1) for name, block in (("double", once), ("single", twice)))
    name = f"FLUX, 2 double and 4 single blocks, {8 * side} x {8 * side}" + ", narrow" * small
    return BenchCall(name, Sites("flux", sites), DenoiseStep(0.0, True), run)


class _Again(torch.nn.Module):
    """A block under another name, so that only one of its calls is hooked."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self._block = [block]

    def forward(self, **kwargs: Any) -> Any:
        return self._block[0](**kwargs)


def _random(module: Any, device: str, dtype: torch.dtype) -> Any:
    """Fills a module on "meta" with random values that keep activations finite."""
    module = torch.nn.Module.to(module, dtype).to_empty(device=device)  # diffusers' own `to` warns of nothing
    module = module.eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1)
    return module


_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
_TINY_SDXL = _SDXL | {
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}
