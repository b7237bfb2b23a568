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
