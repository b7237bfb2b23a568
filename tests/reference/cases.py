"""Inputs and random weights of the frozen references, made the same way on every machine.

`record.py` runs the official code on them and keeps what it returns; `test_official.py` runs this project on
them and compares. NumPy's legacy generator is used because its stream never changes between versions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

COMMIT = "1aa2fc7"  # of ToTheBeginning/PuLID

# What the official classes are built with where their sizes can be chosen.
ID_ENCODER = {"width": 1280, "context_dim": 64, "num_token": 5}
ID_FORMER = {"dim": 64, "depth": 10, "dim_head": 64, "heads": 2, "num_queries": 8, "output_dim": 64}
CROSS_ATTENTION = {"query_dim": 128, "cross_attention_dim": 48, "heads": 2, "dim_head": 64}
IMAGE_STREAM = {"dim": 96, "dim_head": 128, "heads": 2, "kv_dim": 64}
VISION_WIDTH = 128

SETTINGS = [("none", 0), ("ortho", 16), ("ortho_v2", 0), ("ortho_v2", 8), ("ortho_v2", 20)]

UNET = {
    "sample_size": 16, "block_out_channels": (32, 64, 64), "norm_num_groups": 8, "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (2, 2, 2),  # the number of heads, in spite of its name
    "cross_attention_dim": 48, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}  # fmt: skip

FLUX = {
    "in_channels": 16, "vec_in_dim": 24, "context_in_dim": 40, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1,
    "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10_000, "qkv_bias": True,
    "guidance_embed": True,
}  # fmt: skip
FLUX_STREAM = {"dim": 128, "dim_head": 128, "heads": 2, "kv_dim": 64}
FLUX_GRID = (6, 4)  # image tokens, as rows and columns


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32) * scale)


def vae(width: int) -> dict[str, object]:
    """The sizes of a small AutoencoderKL."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return {**blocks, "block_out_channels": (width,) * 4, "norm_num_groups": 4, "latent_channels": 4}


def scaled(shapes: Mapping[str, tuple[int, ...]], draw: Callable[[tuple[int, ...]], Tensor]) -> dict[str, Tensor]:
    """Random weights by name, scaled so that activations keep their size; gains of norms lie around 1."""
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = draw(shape)
        is_gain = len(shape) == 1 and name.endswith(("weight", "scale"))
        weights[name] = 1 + 0.1 * values if is_gain else values / (values[0].numel() if len(shape) > 1 else 100) ** 0.5
    return weights


def fill_shapes(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    random = np.random.RandomState(seed)
    return scaled(shapes, lambda shape: torch.from_numpy(random.standard_normal(shape).astype(np.float32)))


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Puts `fill_shapes` weights into a module's parameters."""
    weights = fill_shapes({name: tuple(p.shape) for name, p in module.named_parameters()}, seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    return module.eval().requires_grad_(False)


def faces(seed: int, patches: int = 16, width: int = 1024) -> tuple[Tensor, list[Tensor]]:
    """id_cond [2, 1280] and five hidden states [2, 1 + patches, width]; the second row is the uncond one, zeros."""
    keep = torch.tensor([1.0, 0.0])
    id_cond = normal(seed, 2, 1280) * keep[:, None]
    return id_cond, [normal(seed + 1 + i, 2, 1 + patches, width) * keep[:, None, None] for i in range(5)]


def tokens(seed: int, width: int = 64, count: int = 12) -> tuple[Tensor, Tensor]:
    """cond and uncond identity tokens, each [1, count, width]."""
    return normal(seed, 1, count, width), normal(seed + 1, 1, count, width, scale=0.5)


def unet_inputs() -> dict[str, Tensor]:
    """Two rows: uncond, cond, as diffusers orders them."""
    return {
        "sample": normal(101, 2, 4, 16, 16),
        "timestep": torch.tensor(601),
        "encoder_hidden_states": normal(102, 2, 7, UNET["cross_attention_dim"]),
        "text_embeds": normal(103, 2, 16),
        "time_ids": torch.tensor([[128.0, 128.0, 0.0, 0.0, 128.0, 128.0]] * 2),
    }


def run_unet(unet: nn.Module, text: Tensor | None = None, **attention: object) -> Tensor:
    """text: in the place of the inputs' own. attention: for the attention processors."""
    i = unet_inputs()
    added = {"text_embeds": i["text_embeds"], "time_ids": i["time_ids"]}
    args = (i["sample"], i["timestep"], i["encoder_hidden_states"] if text is None else text)
    return unet(*args, added_cond_kwargs=added, cross_attention_kwargs=attention or None).sample


def flux_inputs() -> dict[str, Tensor]:
    height, width = FLUX_GRID
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return {
        "img": normal(201, 2, height * width, FLUX["in_channels"]), "img_ids": ids.reshape(1, -1, 3).repeat(2, 1, 1),
        "txt": normal(202, 2, 5, FLUX["context_in_dim"]), "txt_ids": torch.zeros(2, 5, 3),
        "timesteps": torch.tensor([0.7, 0.7]), "y": normal(203, 2, FLUX["vec_in_dim"]),
        "guidance": torch.tensor([4.0, 4.0]),
    }  # fmt: skip


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def relative(ours: Tensor, official: Tensor) -> float:
    """The error of a result, as a share of the official one."""
    assert ours.shape == official.shape
    return ((ours - official).norm() / official.norm()).item()
