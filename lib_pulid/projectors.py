"""Defines the projectors of IP-Adapter and InstantID, from one reading of a photo to identity tokens.

    Resampler    InstantID, IP-Adapter Plus, FaceID Portrait unnorm    official `ip_adapter/resampler.py`

tencent-ailab/IP-Adapter at 62e4af9d; InstantID's file (2145b67f) is the same class. Parameter names are those of the
weight files, so that loading is strict. All sizes come from a file's shapes, except a head's width, the official 64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib_pulid.encoders import PerceiverLayer, load


class Resampler(nn.Module):
    """Learned queries that attend to a sequence: a perceiver.

    Args:
        dim: width of the queries (1280). depth: layers (4). inner_dim: heads x 64 (1280). ff_dim: (5120).
        num_queries: number of output tokens (16). output_dim: their width (2048).
        input_dim: width of the sequence: 512 for a face embedding, 1280 for ViT-H's patches.
    """

    def __init__(
        self, *, dim: int, depth: int, inner_dim: int, ff_dim: int, num_queries: int, output_dim: int, input_dim: int
    ) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.latents = nn.Parameter(torch.empty(1, num_queries, dim))
        self.proj_in = nn.Linear(input_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(PerceiverLayer(dim, inner_dim, ff_dim) for _ in range(depth))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Resampler:
        """Builds and strictly loads the projector."""
        _, num_queries, _ = state["latents"].shape
        with torch.device("meta"):
            module = cls(num_queries=num_queries, **_sizes(state))
        load(module, state)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Encodes a sequence [B, M, input_dim], or one vector [B, input_dim]: [B, num_queries, output_dim]."""
        x = self.proj_in(x.unsqueeze(1) if x.ndim == 2 else x)
        latents = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


def _sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Reads a perceiver's sizes off its weights."""
    dim, input_dim = state["proj_in.weight"].shape
    return {
        "dim": dim,
        "depth": sum(key.startswith("layers.") and key.endswith(".0.to_q.weight") for key in state),
        "inner_dim": state["layers.0.0.to_q.weight"].shape[0],
        "ff_dim": state["layers.0.1.1.weight"].shape[0],
        "output_dim": state["proj_out.weight"].shape[0],
        "input_dim": input_dim,
    }
