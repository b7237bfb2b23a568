"""Defines the projectors of IP-Adapter and InstantID, from one reading of a photo to identity tokens.

    Resampler            InstantID, IP-Adapter Plus, FaceID Portrait unnorm    official `resampler.py`
    ImageProjection      IP-Adapter                                            `ip_adapter.py`, ImageProjModel
    FaceProjection       IP-Adapter FaceID, FaceID Portrait                    `ip_adapter_faceid.py`, MLPProjModel
    FacePlusProjection   IP-Adapter FaceID PlusV2                              `ip_adapter_faceid.py`, ProjPlusModel

In `ip_adapter/` of tencent-ailab/IP-Adapter at 62e4af9d; InstantID's Resampler (2145b67f) is the same class.
Parameter names are those of the weight files, so that loading is strict. All sizes come from a file's shapes, except a
head's width, the official 64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lib_pulid.encoders import PerceiverLayer, load

Module = TypeVar("Module", bound=nn.Module)


class FacePerceiver(nn.Module):
    """A perceiver: given queries attend to a sequence.

    Args:
        dim: width of the queries (1280). depth: layers (4). inner_dim: heads x 64 (1280). ff_dim: (5120).
        output_dim: width of the output tokens (2048).
        input_dim: width of the sequence: 512 for a face embedding, 1280 for ViT-H's patches.
    """

    def __init__(self, *, dim: int, depth: int, inner_dim: int, ff_dim: int, output_dim: int, input_dim: int) -> None:
        super().__init__()
        self.input_dim, self.output_dim = input_dim, output_dim
        self.proj_in = nn.Linear(input_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(PerceiverLayer(dim, inner_dim, ff_dim) for _ in range(depth))

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        """Attends from latents [B, L, dim] to a sequence [B, M, input_dim]: [B, L, output_dim]."""
        x = self.proj_in(x)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


class Resampler(FacePerceiver):
    """A perceiver with learned queries. num_queries: number of output tokens (16)."""

    def __init__(self, num_queries: int, **sizes: int) -> None:
        super().__init__(**sizes)
        self.latents = nn.Parameter(torch.empty(1, num_queries, sizes["dim"]))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Resampler:
        """Builds and strictly loads the projector."""
        _, num_queries, _ = state["latents"].shape
        return _loaded(lambda: cls(num_queries, **_sizes(state)), state)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Encodes a sequence [B, M, input_dim], or one vector [B, input_dim]: [B, num_queries, output_dim]."""
        return super().forward(self.latents.expand(len(x), -1, -1), x.unsqueeze(1) if x.ndim == 2 else x)


def _loaded(make: Callable[[], Module], state: Mapping[str, Tensor]) -> Module:
    with torch.device("meta"):
        module = make()
    load(module, state)
    return module


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


class ImageProjection(nn.Module):
    """A linear layer and a norm, from CLIP's image embedding (1024 or 1280) to 4 tokens."""

    def __init__(self, input_dim: int, output_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.input_dim, self.output_dim = input_dim, output_dim
        self.proj = nn.Linear(input_dim, num_tokens * output_dim)
        self.norm = nn.LayerNorm(output_dim)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> ImageProjection:
        """Builds and strictly loads the projector."""
        (outputs, input_dim), (output_dim,) = state["proj.weight"].shape, state["norm.weight"].shape
        return _loaded(lambda: cls(input_dim, output_dim, outputs // output_dim), state)

    def forward(self, image: Tensor) -> Tensor:
        """Encodes embeddings [B, input_dim]: [B, num_tokens, output_dim]."""
        return self.norm(self.proj(image).unflatten(-1, (-1, self.output_dim)))


class FaceProjection(nn.Module):
    """An MLP and a norm, from a normalized face embedding (512) to 4 tokens (16 in Portrait)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.output_dim = output_dim
        last = nn.Linear(hidden_dim, num_tokens * output_dim)
        self.proj = nn.Sequential(nn.Linear(input_dim, hidden_dim), nn.GELU(), last)
        self.norm = nn.LayerNorm(output_dim)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> FaceProjection:
        """Builds and strictly loads the projector."""
        return _loaded(lambda: cls(*_mlp_sizes(state)), state)

    def forward(self, embedding: Tensor) -> Tensor:
        """Encodes embeddings [B, input_dim]: [B, num_tokens, output_dim]."""
        return self.norm(self.proj(embedding).unflatten(-1, (-1, self.output_dim)))


class FacePlusProjection(FaceProjection):
    """The same, and what a perceiver adds to its tokens off the patches of the aligned face (ViT-H, 1280 wide)."""

    def __init__(self, *sizes: int, perceiver: Mapping[str, int]) -> None:
        super().__init__(*sizes)
        self.input_dim = perceiver["input_dim"]
        self.perceiver_resampler = FacePerceiver(**perceiver)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> FacePlusProjection:
        """Builds and strictly loads the projector."""
        inner = {key.removeprefix(_PERCEIVER): tensor for key, tensor in state.items() if key.startswith(_PERCEIVER)}
        return _loaded(lambda: cls(*_mlp_sizes(state), perceiver=_sizes(inner)), state)

    def forward(self, embedding: Tensor, patches: Tensor) -> Tensor:  # type: ignore[override]
        """Encodes embeddings [B, 512] and patches [B, M, input_dim]: [B, num_tokens, output_dim].

        That is v2's shortcut, with the official s_scale of 1.
        """
        tokens = super().forward(embedding)
        return tokens + self.perceiver_resampler(tokens, patches)


_PERCEIVER = "perceiver_resampler."


def _mlp_sizes(state: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    """Returns the widths of input, hidden layer and tokens, and the number of tokens."""
    (hidden_dim, input_dim), (output_dim,) = state["proj.0.weight"].shape, state["norm.weight"].shape
    return input_dim, hidden_dim, output_dim, state["proj.2.weight"].shape[0] // output_dim
