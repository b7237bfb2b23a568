"""Inputs and random weights of the frozen references of InstantID and IP-Adapter; see `cases.py`, which PuLID's have.

`record_methods.py` runs the official code on them, `test_methods.py` this project.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference import cases

IP_ADAPTER, INSTANTID = "62e4af9d", "2145b67f"  # commits of tencent-ailab/IP-Adapter, instantX-research/InstantID

WIDTH = cases.UNET["cross_attention_dim"]  # of the tokens, 48
RESAMPLER = {"dim": 64, "depth": 4, "dim_head": 64, "heads": 2, "num_queries": 16, "output_dim": WIDTH, "ff_mult": 4}
FACE, PATCH = 512, 96  # widths of a face embedding and of a patch
PATCHES = 17
IMAGE = 40  # width of CLIP's image embedding
PLUS_WIDTH = 128  # of the tokens of FaceID Plus alone, whose heads are 64 wide
RANK, TOKENS = 8, 4
SCALE = 0.8


def with_nobody(values: Tensor) -> Tensor:
    """A row of values [1, ...], and a row of zeros."""
    return torch.cat((values, torch.zeros_like(values)))


def embedding() -> Tensor:
    """[2, 512]: raw, as a face recognizer gives it, and zeros."""
    return with_nobody(cases.normal(301, 1, FACE))


def patches() -> Tensor:
    """[2, 17, 96]: of a photo, and of none, which are not zeros."""
    return cases.normal(302, 2, PATCHES, PATCH)


def image() -> Tensor:
    return with_nobody(cases.normal(303, 1, IMAGE))


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """cond and uncond, each [1, count, WIDTH]."""
    return cases.tokens(305, width=WIDTH, count=count)


CONTROL_SIZE = (128, 96)  # width and height
CONTROL_POINTS = [[44.3, 30.9], [84.6, 33.2], [66.1, 51.7], [47.8, 70.2], [80.5, 72.9]]


SIDE = 128  # pixels
STEPS, GUIDANCE, SEED = 3, 5.0, 7
CONTROL_SCALE = 0.6
TEXT, POOLED = 7, 16


def pipeline_inputs() -> dict[str, Tensor]:
    """What both pipelines are called with, besides the face."""
    shapes = {
        "prompt_embeds": (1, TEXT, WIDTH),
        "negative_prompt_embeds": (1, TEXT, WIDTH),
        "pooled_prompt_embeds": (1, POOLED),
        "negative_pooled_prompt_embeds": (1, POOLED),
        "latents": (1, 4, SIDE // 8, SIDE // 8),
    }
    return {name: cases.normal(320 + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def parts() -> dict[str, object]:
    """The models of both pipelines: random, but for the text encoders, of which there are none."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    return {
        "vae": cases.fill(AutoencoderKL(**cases.vae(8)), 51),
        "unet": cases.fill(UNet2DConditionModel(**cases.UNET), 17),
        "scheduler": EulerDiscreteScheduler(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }


def identity_net(unet: torch.nn.Module) -> torch.nn.Module:
    """A ControlNet for the small UNet. Layers that a fresh one has at zero are filled, too."""
    from diffusers import ControlNetModel

    return cases.fill(ControlNetModel.from_unet(unet, load_weights_from_unet=False), 52)
