"""Defines the identity encoders, from face features to identity tokens.

    IDEncoder   v1          official `pulid/encoders.py`              an MLP, 10 tokens
    IDFormer    v1.1, FLUX  official `pulid/encoders_transformer.py`  a perceiver resampler, 32 tokens

ToTheBeginning/PuLID at commit 1aa2fc7. Parameter names are those of the weight files, so that loading is strict. Both
are called as `encoder(id_cond, vit_hidden)`:

    id_cond     [B, 1280], or [B, n, 1280] for n photos of one person (IDFormer): ArcFace 512 + EVA-CLIP class token 768
    vit_hidden  five tensors [B, 577, 1024], outputs of blocks 3, 7, 11, 15, 19 of EVA02-CLIP-L/14-336
                ([B, n * 577, 1024] for n photos)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

SCALES = 5  # number of hidden states of the vision tower
HEAD_DIM = 64  # width of an attention head in IDFormer; not visible in a file's shapes


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Builds Linear, LayerNorm, LeakyReLU, Linear, LayerNorm, LeakyReLU, Linear with the four `sizes`."""
    a, b, c, d = sizes
    first = (nn.Linear(a, b), nn.LayerNorm(b), nn.LeakyReLU())
    second = (nn.Linear(b, c), nn.LayerNorm(c), nn.LeakyReLU())
    return nn.Sequential(*first, *second, nn.Linear(c, d))


def _mlp_sizes(state: Mapping[str, Tensor], name: str) -> list[int]:
    return [state[f"{name}.0.weight"].shape[1], *(state[f"{name}.{i}.weight"].shape[0] for i in (0, 3, 6))]


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the weights strictly, in float32 whatever the file's dtype, since identities are computed once."""
    module.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=True, assign=True)
    module.eval().requires_grad_(False)


class IDEncoder(nn.Module):
    """PuLID v1's encoder: five tokens from `id_cond`, and one from each of five hidden states.

    Args:
        body: the four widths of the MLP on `id_cond`; the last is `num_token` x `output_dim`.
        mapping: the four widths of the MLPs on the hidden states; the last is `output_dim`.
    """

    def __init__(self, body: Sequence[int], mapping: Sequence[int]) -> None:
        super().__init__()
        self.output_dim = mapping[-1]
        self.num_token, rest = divmod(body[-1], self.output_dim)
        if rest:
            raise ValueError(f"{body[-1]} is not a multiple of the token width {self.output_dim}")
        self.body = mlp(body)
        for i in range(SCALES):
            setattr(self, f"mapping_{i}", mlp(mapping))
            setattr(self, f"mapping_patch_{i}", mlp(mapping))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> IDEncoder:
        """Builds and strictly loads the encoder, with sizes from the shapes."""
        with torch.device("meta"):
            module = cls(_mlp_sizes(state, "body"), _mlp_sizes(state, "mapping_0"))
        load(module, state)
        return module

    def forward(self, id_cond: Tensor, vit_hidden: Sequence[Tensor]) -> Tensor:
        """Encodes id_cond [B, 1280] and vit_hidden 5 x [B, 577, 1024] as tokens [B, num_token + 5, output_dim]."""
        tokens = [self.body(id_cond).reshape(-1, self.num_token, self.output_dim)]
        for i, hidden in enumerate(vit_hidden):
            of_class = getattr(self, f"mapping_{i}")(hidden[:, :1])
            of_patches = getattr(self, f"mapping_patch_{i}")(hidden[:, 1:]).mean(dim=1, keepdim=True)
            tokens.append(of_class + of_patches)
        return torch.cat(tokens, dim=1)


class PerceiverAttention(nn.Module):
    """Perceiver attention of Flamingo (arXiv 2204.14198): latents attend to the context and to themselves."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.heads, rest = divmod(inner_dim, HEAD_DIM)
        if rest:
            raise ValueError(f"attention of width {inner_dim} does not divide into heads of {HEAD_DIM}")
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, inner_dim * 2, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """Attends from latents [B, L, dim] to context [B, M, dim]: [B, L, dim]."""
        context, latents = self.norm1(context), self.norm2(latents)
        q = self._split(self.to_q(latents))
        k, v = (self._split(x) for x in self.to_kv(torch.cat((context, latents), dim=1)).chunk(2, dim=-1))
        out = nn.functional.scaled_dot_product_attention(q, k, v)  # [B, heads, L, 64]
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)  # [B, heads, tokens, 64]


class PerceiverLayer(nn.ModuleList):
    """Perceiver attention and a feed-forward, each with a residual connection."""

    def __init__(self, dim: int, inner_dim: int, ff_dim: int) -> None:
        up, down = nn.Linear(dim, ff_dim, bias=False), nn.Linear(ff_dim, dim, bias=False)
        super().__init__([PerceiverAttention(dim, inner_dim), nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), down)])

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        attention, feed_forward = self
        latents = attention(context, latents) + latents
        return feed_forward(latents) + latents


class IDFormer(nn.Module):
    """PuLID v1.1's and FLUX's encoder.

    The latents are learned queries followed by the id tokens made from `id_cond`; each of the five hidden
    states, preceded by the id tokens, serves depth / 5 layers.

    Args:
        dim: width of the latents (1024). depth: layers (10). inner_dim: heads x 64 (1024).
        ff_dim: width of the feed-forward (4096). num_queries: number of output tokens (32).
        output_dim: their width (2048). id_mapping: four widths, the last is id tokens (5) x dim.
        mapping: four widths of the MLPs on the hidden states, the last is dim.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        inner_dim: int,
        ff_dim: int,
        num_queries: int,
        output_dim: int,
        id_mapping: Sequence[int],
        mapping: Sequence[int],
    ) -> None:
        super().__init__()
        self.dim, self.num_queries, self.output_dim = dim, num_queries, output_dim
        self.layers_per_scale, rest = divmod(depth, SCALES)
        if rest or id_mapping[-1] % dim:
            raise ValueError(f"depth {depth} or the id mapping's width {id_mapping[-1]} does not fit IDFormer")
        self.latents = nn.Parameter(torch.empty(1, num_queries, dim))
        self.proj_out = nn.Parameter(torch.empty(dim, output_dim))
        self.layers = nn.ModuleList(PerceiverLayer(dim, inner_dim, ff_dim) for _ in range(depth))
        for i in range(SCALES):
            setattr(self, f"mapping_{i}", mlp(mapping))
        self.id_embedding_mapping = mlp(id_mapping)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> IDFormer:
        """Builds and strictly loads the encoder, with sizes from the shapes (heads have width 64)."""
        _, num_queries, dim = state["latents"].shape
        with torch.device("meta"):
            module = cls(
                dim=dim,
                depth=sum(key.startswith("layers.") and key.endswith(".0.to_q.weight") for key in state),
                inner_dim=state["layers.0.0.to_q.weight"].shape[0],
                ff_dim=state["layers.0.1.1.weight"].shape[0],
                num_queries=num_queries,
                output_dim=state["proj_out"].shape[1],
                id_mapping=_mlp_sizes(state, "id_embedding_mapping"),
                mapping=_mlp_sizes(state, "mapping_0"),
            )
        load(module, state)
        return module

    def forward(self, id_cond: Tensor, vit_hidden: Sequence[Tensor]) -> Tensor:
        """Encodes id_cond [B, (n,) 1280] and vit_hidden 5 x [B, n * 577, 1024]: [B, num_queries, output_dim]."""
        id_tokens = self.id_embedding_mapping(id_cond).reshape(len(id_cond), -1, self.dim)  # [B, n * 5, dim]
        latents = torch.cat((self.latents.expand(len(id_cond), -1, -1), id_tokens), dim=1)
        for i in range(SCALES):
            context = torch.cat((id_tokens, getattr(self, f"mapping_{i}")(vit_hidden[i])), dim=1)
            first = i * self.layers_per_scale
            for layer in self.layers[first : first + self.layers_per_scale]:
                latents = layer(context, latents)
        return latents[:, : self.num_queries] @ self.proj_out
