"""Loads the vision tower, EVA02-CLIP-L/14-336, with timm.

The official code has its own tower (`eva_clip/eva_vit_model.py`, commit 1aa2fc7). timm's `eva02_large_patch14_clip_336`
is the same network: its `checkpoint_filter_fn` renames all official weights. The official code reads the hidden state
*before* blocks 4, 8, 12, 16, 20, which is the output of blocks 3, 7, 11, 15, 19 here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid.errors import WrongWeightsError
from lib_pulid.files.state_dict import check_numbers, describe, read_state_dict

BLOCKS = (3, 7, 11, 15, 19)  # 0-based; their outputs are the hidden states
HEAD_DIM = 64


class VisionTower(nn.Module):
    """Encodes normalized images as a class token and hidden states.

    Args:
        trunk: timm's Eva with a projection as its classifier.
    """

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encodes images [B, 3, 336, 336], RGB, CLIP mean and std.

        Returns:
            The projected class token [B, 768], not normalized, and five hidden states [B, 577, 1024], the
            class token first.
        """
        final, pairs = self.trunk.forward_intermediates(
            images, indices=list(BLOCKS), return_prefix_tokens=True, output_fmt="NLC", norm=False
        )
        # timm returns patches and prefix (the class token) separately
        hidden = [torch.cat((prefix, patches), dim=1) for patches, prefix in pairs]
        return self.trunk.forward_head(final), hidden


def load_vision_tower(path: str | Path) -> VisionTower:
    """Loads the tower from `EVA02_CLIP_L_336_psz14_s6B.pt`, strictly; skips the text half of the file.

    Args:
        path: the official file, or one of the same layout with other widths.

    Returns:
        The tower in float32 and eval mode, on the CPU.

    Raises:
        MissingWeightsError, WrongWeightsError: the message says what the file is.
    """
    path = Path(path)
    state = read_state_dict(path)
    visual = {key.partition("visual.")[2]: value.float() for key, value in state.items() if "visual." in key}
    if "patch_embed.proj.weight" not in visual or "head.weight" not in visual:
        raise WrongWeightsError(f"{path.name} is {describe(state)}. Needed: EVA02_CLIP_L_336_psz14_s6B.pt.")
    from timm.models.eva import checkpoint_filter_fn

    try:
        with torch.random.fork_rng(devices=()):  # timm draws initial weights; keep the host's random state
            trunk = _build(visual)
        trunk.load_state_dict(checkpoint_filter_fn(visual, trunk), strict=True, assign=True)
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise WrongWeightsError(f"{path.name} is not the vision tower EVA02-CLIP-L/14-336: {error}") from error
    check_numbers(visual, path)
    return VisionTower(trunk).eval().requires_grad_(False)


def _build(visual: Mapping[str, Tensor]) -> nn.Module:
    import timm

    width, _, patch, _ = visual["patch_embed.proj.weight"].shape
    grid = math.isqrt(visual["pos_embed"].shape[1] - 1)
    hidden = visual["blocks.0.mlp.w1.weight"].shape[0]
    if grid != 24 or patch != 14:
        raise ValueError(f"it reads {grid * patch} x {grid * patch} pixels in patches of {patch}")
    # timm creates all layers before loading: their number and sizes have to match the file's weights.
    queries = [key for key in visual if re.fullmatch(r"blocks\.\d+\.attn\.q_proj\.weight", key)]
    for key in queries:
        if visual[key].shape != (width, width) or visual[key.replace("attn.q_proj", "mlp.w1")].shape != (hidden, width):
            raise ValueError(f"{key} does not fit a width of {width}")
    return timm.create_model(
        "eva02_large_patch14_clip_336",
        num_classes=visual["head.weight"].shape[0],
        embed_dim=width,
        depth=len(queries),
        num_heads=width // HEAD_DIM,
        mlp_ratio=(hidden + 0.5) / width,  # timm rounds width x ratio down
    )


def tower_shapes(width: int, classes: int, depth: int = 24, hidden: int = 0) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the visual half of EVA02_CLIP_L_336_psz14_s6B.pt, with other widths."""
    hidden = hidden or int(width * 2.6667)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 577, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    linear = {
        "attn.proj": (width, width),
        "mlp.w1": (hidden, width),
        "mlp.w2": (hidden, width),
        "mlp.w3": (width, hidden),
    }
    norms = {"norm1": width, "norm2": width, "attn.inner_attn_ln": width, "mlp.ffn_ln": hidden}
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= {f"{block}.attn.{name}_proj.weight": (width, width) for name in "qkv"}
        shapes |= {f"{block}.attn.{name}_bias": (width,) for name in "qv"}
        shapes |= {f"{block}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{block}.{name}.bias": shape[:1] for name, shape in linear.items()}
        shapes |= {f"{block}.{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    return shapes
