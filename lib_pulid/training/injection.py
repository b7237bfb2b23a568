"""Injects for training: an identity for each row, with gradients, by the product's own code.

`injection.compile_injection` and `inject` serve sampling, where one identity holds for a whole image. Here tokens
change with every row and step; the places, the formulas and the hooks are the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.attention import SiteIdentity, add_cross_attention, add_image_stream, prepare_site
from lib_pulid.encoders import IDFormer
from lib_pulid.sites import Site, Sites, find_sites
from lib_pulid.weights import (
    IMAGE_STREAM_HEAD_DIM,
    IMAGE_STREAM_KEYS,
    CrossAttentionWeights,
    ImageStreamWeights,
)


class SDXLAdapter(nn.Module):
    """IDFormer and a pair of key and value projections for each cross-attention, in training.

    Args:
        encoder: makes the identity tokens. widths: of the sites, see `sites.find_sites`.
    """

    def __init__(self, encoder: IDFormer, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.id_to_k = nn.ModuleList(nn.Linear(encoder.output_dim, width, bias=False) for width in widths)
        self.id_to_v = nn.ModuleList(nn.Linear(encoder.output_dim, width, bias=False) for width in widths)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Returns the layers for keys and values of each site."""
        return zip(self.id_to_k, self.id_to_v)

    def weights(self) -> list[CrossAttentionWeights]:
        """Returns the weights of each site, as `weights.load_adapter` reads them from a file."""
        return [CrossAttentionWeights(k.get_parameter("weight"), v.get_parameter("weight")) for k, v in self.pairs()]

    def state(self) -> dict[str, Tensor]:
        """Returns the weights in the layout of pulid_v1.1.safetensors."""
        state = {f"id_adapter.{key}": value for key, value in self.encoder.state_dict().items()}
        for n, site in enumerate(self.weights()):
            state[f"id_adapter_attn_layers.{2 * n + 1}.id_to_k.weight"] = site.to_k
            state[f"id_adapter_attn_layers.{2 * n + 1}.id_to_v.weight"] = site.to_v
        return state


class FluxAdapter(nn.Module):
    """IDFormer and a PerceiverAttentionCA for each site of FLUX, in training; each begins as one that adds little.

    Args:
        encoder: makes the identity tokens. widths: of the sites, see `sites.find_sites`.
    """

    def __init__(self, encoder: IDFormer, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        inner, tokens = IMAGE_STREAM_HEAD_DIM, encoder.output_dim
        self.sites = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(tokens),
                    "norm2": nn.LayerNorm(width),
                    "to_q": nn.Linear(width, inner, bias=False),
                    "to_kv": nn.Linear(tokens, 2 * inner, bias=False),
                    "to_out": nn.Linear(inner, width, bias=False),
                }
            )
            for width in widths
        )
        for site in self.sites:
            nn.init.normal_(site["to_out"].weight, std=1e-3)  # type: ignore[index]

    def weights(self) -> list[ImageStreamWeights]:
        """Returns the weights of each site, as `weights.load_adapter` reads them from a file."""
        names = IMAGE_STREAM_KEYS.items()
        return [ImageStreamWeights(**{name: site.get_parameter(key) for key, name in names}) for site in self.sites]

    def state(self) -> dict[str, Tensor]:
        """Returns the weights in the layout of pulid_flux_v0.9.1.safetensors."""
        state = {f"pulid_encoder.{key}": value for key, value in self.encoder.state_dict().items()}
        for n, site in enumerate(self.sites):
            state |= {f"pulid_ca.{n}.{key}": site.get_parameter(key) for key in IMAGE_STREAM_KEYS}
        return state


@dataclass(frozen=True)
class RowIdentities:
    """Who goes into each row of a batch.

    Args:
        tokens: [B, N, D]. mask: [h, w] in 0..1, where in the latent's frame; None: everywhere.
        weight, projection, num_zero: see `injection.compile_injection`.
    """

    tokens: Tensor
    mask: Tensor | None = None
    weight: float = 1.0
    projection: str = "ortho_v2"
    num_zero: int = 20


@contextmanager
def inject_rows(denoiser: nn.Module | Sites, weights: Sequence[Any], people: Sequence[RowIdentities]) -> Iterator[None]:
    """Hooks all sites of the denoiser for one call; the residuals of several people add up.

    Args:
        weights: of each site, CrossAttentionWeights or ImageStreamWeights.
    """
    found = denoiser if isinstance(denoiser, Sites) else find_sites(denoiser)
    attach = _attach_cross_attention if found.family == "sdxl" else _attach_image_stream
    with ExitStack() as hooks:
        for site, site_weights in zip(found.sites, weights, strict=True):
            for handle in attach(site, site_weights, people):
                hooks.callback(handle.remove)
        yield


def _attach_cross_attention(site: Site, weights: CrossAttentionWeights, people: Sequence[RowIdentities]) -> Any:
    def add(q: Tensor, h: Tensor) -> Tensor:
        return add_cross_attention(q, h, _identities(weights, people, len(h), h.shape[1]), site.heads)

    return site.attach(add)


def _attach_image_stream(site: Site, weights: ImageStreamWeights, people: Sequence[RowIdentities]) -> Any:
    def add(total: Tensor, image: Tensor) -> None:
        add_image_stream(total, image, _identities(weights, people, len(image), image.shape[1]))

    return site.attach(add)


def _identities(weights: Any, people: Sequence[RowIdentities], rows: int, tokens: int) -> list[SiteIdentity[Any]]:
    return [
        SiteIdentity(
            prepare_site(weights, person.tokens).weighted(person.weight),
            range(rows),
            None if person.mask is None else _on_tokens(person.mask, tokens),
            person.projection,
            person.num_zero,
        )
        for person in people
    ]


def _on_tokens(mask: Tensor, tokens: int) -> Tensor:
    """Converts a mask [h, w] to [tokens, 1], for a square frame halved any number of times."""
    side = round(tokens**0.5)
    return F.interpolate(mask[None, None], size=(side, side), mode="area").flatten()[:, None]


def id_former(token_width: int = 64, vit_width: int = 64, dim: int = 64, seed: int = 0) -> IDFormer:
    """Builds PuLID v1.1's encoder at small widths, with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        former = IDFormer(
            dim=dim,
            depth=10,
            inner_dim=64,
            ff_dim=2 * dim,
            num_queries=32,
            output_dim=token_width,
            id_mapping=[512 + 768, 128, 128, 5 * dim],
            mapping=[vit_width, dim, dim, dim],
        )
        nn.init.normal_(former.latents, std=0.5)
        nn.init.normal_(former.proj_out, std=dim**-0.5)
    return former
