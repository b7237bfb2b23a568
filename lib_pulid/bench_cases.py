"""One site of each kind in the real sizes: the layer without a face, ours with its hooks, and the official code.

The official formulas are written out (commit 1aa2fc7): at each step keys and values of identity and zero tokens,
attention, the projection in float32; for FLUX the five matrices of PerceiverAttentionCA. `official_modules` takes the
modules themselves from a checkout.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.identity import Identity
from lib_pulid.injection import DenoiseStep, Injection, compile_injection, inject
from lib_pulid.sites import Sites, cross_attention_site, image_stream_site
from lib_pulid.weights import Adapter, CrossAttentionWeights, ImageStreamWeights

TOKEN_WIDTH, TOKENS, NUM_ZERO = 2048, 32, 20
SDXL_LAYERS = {(4096, 640): 10, (1024, 1280): 60}  # tokens and width at 1024 x 1024 -> how many of the 70
FLUX_WIDTH, FLUX_INNER, FLUX_TOKENS = 3072, 2048, 4096


@dataclass(frozen=True)
class Case:
    """A layer without a face, with ours, and with the official code (`official_off`: that without a face).

    Args:
        sites: how many of the kind a denoiser has. floor: bytes that any code has to move, which reads the layer's
            tensors once and writes the result once.
    """

    name: str
    sites: int
    floor: int
    off: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    official: Callable[[], Tensor]
    official_off: Callable[[], Tensor]


def adapter(family: str, sites: tuple) -> Adapter:
    encoder = nn.Identity()
    encoder.output_dim = TOKEN_WIDTH  # type: ignore[assignment]
    return Adapter(family, "bench", encoder, sites, Path("bench"))


# ---------------------------------------------------------------- SDXL


class Layer(nn.Module):
    """A cross-attention layer cut down to the two linear maps that are hooked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.to_q = nn.Identity()
        self.to_q.out_features = width  # type: ignore[assignment]
        self.to_out = nn.ModuleList([nn.Identity()])

    def forward(self, q: Tensor, h: Tensor) -> Tensor:
        self.to_q(q)
        return self.to_out[0](h)


def sdxl_injection(widths: list[int], device: str, dtype: torch.dtype) -> tuple[Injection, CrossAttentionWeights]:
    """An injection of random weights, cond and uncond, and the weights of its last site."""
    matrices = {
        width: [torch.randn(width, TOKEN_WIDTH, device=device).div(TOKEN_WIDTH**0.5).to(dtype) for _ in "kv"]
        for width in set(widths)
    }
    sites = tuple(CrossAttentionWeights(*matrices[width]) for width in widths)
    identity = Identity(*(torch.randn(1, TOKENS, TOKEN_WIDTH, device=device) for _ in range(2)))
    return compile_injection(adapter("sdxl", sites), identity, device=device, dtype=dtype), sites[-1]


def sdxl_case(
    tokens: int, width: int, device: str, dtype: torch.dtype, persons: int = 1, mask: bool = False, modules: Any = None
) -> Case:
    """A cross-attention with a row for each of negative prompt and prompt, ortho_v2."""
    injection, weights = sdxl_injection([width], device, dtype)
    side = int(tokens**0.5)
    injection = replace(injection, mask=torch.ones(side, side, device=device) if mask else None)
    layer = Layer(width)
    sites = Sites("sdxl", (cross_attention_site("layer", layer),))
    q, h = (torch.randn(2, tokens, width, device=device, dtype=dtype) for _ in range(2))
    identity = torch.randn(2, TOKENS, TOKEN_WIDTH, device=device, dtype=dtype)
    step = DenoiseStep(0.0, [False, True], (side, side))

    def ours() -> Tensor:
        with inject(sites, [injection] * persons, step):
            return layer(q, h)

    def official(with_identity: bool = True) -> Tensor:
        if modules is not None:
            return modules.cross_attention(q, h, identity if with_identity else None, weights)
        return sdxl_official(q, h, identity, weights) if with_identity else h

    name = f"SDXL layer, {tokens} x {width}, 2 rows" + f", {persons} persons" * (persons > 1) + ", region" * mask
    sites_of_kind = SDXL_LAYERS.get((tokens, width), 1)
    return Case(name, sites_of_kind, 3 * h.nbytes, lambda: layer(q, h), ours, official, partial(official, False))


def sdxl_official(q: Tensor, h: Tensor, identity: Tensor, weights: CrossAttentionWeights) -> Tensor:
    """What the official `IDAttnProcessor2_0` makes of h, ortho_v2, with the identity tokens [B, N, D] of each row."""
    heads = q.shape[-1] // 64
    tokens = torch.cat((identity, torch.zeros_like(identity[:, :1]).expand(-1, NUM_ZERO, -1)), dim=1)
    key, value = F.linear(tokens, weights.to_k), F.linear(tokens, weights.to_v)
    query, key, value = (x.unflatten(-1, (heads, 64)).transpose(1, 2) for x in (q, key, value))
    r = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).float()
    text = h.float()
    share = (query @ key.transpose(-2, -1)).softmax(-1).mean(1)[:, :, :5].sum(-1, keepdim=True)
    p = (text * r).sum(-2, keepdim=True) / (text * text).sum(-2, keepdim=True) * text
    return (text + (r + (share - 1) * p)).to(h.dtype)


# ---------------------------------------------------------------- FLUX


class Block(nn.Module):
    """A double block that hands on its streams as new tensors, as the real ones do."""

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return image * 1, text


def flux_injection(sites: int, width: int, device: str, dtype: torch.dtype) -> tuple[Injection, ImageStreamWeights]:
    """An injection of random weights, the same at all sites, cond and uncond."""
    shapes: dict[str, tuple[int, ...]] = {"norm_id_weight": (TOKEN_WIDTH,), "norm_id_bias": (TOKEN_WIDTH,)}
    shapes |= {"norm_image_weight": (width,), "norm_image_bias": (width,), "to_q": (FLUX_INNER, width)}
    shapes |= {"to_kv": (2 * FLUX_INNER, TOKEN_WIDTH), "to_out": (width, FLUX_INNER)}
    weights = ImageStreamWeights(
        **{name: torch.randn(s, device=device).div(s[-1] ** 0.5).to(dtype) for name, s in shapes.items()}
    )
    identity = Identity(*(torch.randn(1, TOKENS, TOKEN_WIDTH, device=device) for _ in range(2)))
    injection = compile_injection(adapter("flux", (weights,)), identity, device=device, dtype=dtype)
    return replace(injection, sites=injection.sites * sites), weights


def flux_case(tokens: int, device: str, dtype: torch.dtype, persons: int = 1, modules: Any = None) -> Case:
    """An image stream of one row."""
    injection, weights = flux_injection(1, FLUX_WIDTH, device, dtype)
    block, step = Block(), DenoiseStep(0.0, True)
    sites = Sites("flux", (image_stream_site("block", block, FLUX_WIDTH),))
    image, text = (torch.randn(1, n, FLUX_WIDTH, device=device, dtype=dtype) for n in (tokens, 512))
    identity = torch.randn(1, TOKENS, TOKEN_WIDTH, device=device, dtype=dtype)

    def ours() -> Tensor:
        with inject(sites, [injection] * persons, step):
            return block(image, text)[0]

    def official() -> Tensor:
        residual = flux_official if modules is None else modules.image_stream
        return block(image, text)[0] + 1.0 * residual(image, identity, weights)

    def off() -> Tensor:
        return block(image, text)[0]

    name = f"FLUX site, {tokens} x {FLUX_WIDTH}" + f", {persons} persons" * (persons > 1)
    return Case(name, 20, 2 * image.nbytes, off, ours, official, off)


def flux_official(image: Tensor, identity: Tensor, weights: ImageStreamWeights, heads: int = 16) -> Tensor:
    """What the official `PerceiverAttentionCA` returns for image [B, L, W] and identity tokens [B, N, D]."""
    x = F.layer_norm(identity, identity.shape[-1:], weights.norm_id_weight, weights.norm_id_bias)
    latents = F.layer_norm(image, image.shape[-1:], weights.norm_image_weight, weights.norm_image_bias)
    q, (k, v) = F.linear(latents, weights.to_q), F.linear(x, weights.to_kv).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.25
    attention = ((q * scale) @ (k * scale).transpose(-2, -1)).float().softmax(-1).to(q.dtype)
    return F.linear((attention @ v).permute(0, 2, 1, 3).flatten(2), weights.to_out)


def injection_for(sites: Sites, device: str, dtype: torch.dtype) -> Injection:
    """An injection of random weights for these sites."""
    widths = [site.width for site in sites.sites]
    if sites.family == "sdxl":
        return sdxl_injection(widths, device, dtype)[0]
    return flux_injection(len(widths), widths[0], device, dtype)[0]


# ---------------------------------------------------------------- the official modules


def official_modules(checkout: Path) -> SimpleNamespace:
    """The official modules of a checkout of ToTheBeginning/PuLID, as `cross_attention` and `image_stream`."""
    processors = _load(checkout / "pulid" / "attention_processor.py")
    encoders = _load(checkout / "pulid" / "encoders_transformer.py")
    processors.NUM_ZERO, processors.ORTHO, processors.ORTHO_v2 = NUM_ZERO, False, True  # type: ignore[attr-defined]

    def cross_attention(q: Tensor, h: Tensor, identity: Tensor | None, weights: CrossAttentionWeights) -> Tensor:
        processor = processors.IDAttnProcessor2_0(len(weights.to_k), TOKEN_WIDTH)
        processor.id_to_k.weight, processor.id_to_v.weight = (nn.Parameter(w) for w in (weights.to_k, weights.to_v))
        return processor(_layer_for(h), q, h, id_embedding=identity, id_scale=1.0)

    def image_stream(image: Tensor, identity: Tensor, weights: ImageStreamWeights) -> Tensor:
        with torch.device("meta"):
            module = encoders.PerceiverAttentionCA()
        names = {"norm1.weight": "norm_id_weight", "norm1.bias": "norm_id_bias", "norm2.weight": "norm_image_weight"}
        names |= {"norm2.bias": "norm_image_bias"} | {f"{name}.weight": name for name in ("to_q", "to_kv", "to_out")}
        state = {key: getattr(weights, name) for key, name in names.items()}
        module.load_state_dict(state, assign=True)
        return module(identity, image)

    return SimpleNamespace(cross_attention=cross_attention, image_stream=image_stream)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} was not found; --official wants a checkout of ToTheBeginning/PuLID.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _layer_for(h: Tensor) -> SimpleNamespace:
    """What the processor asks of its layer; the query is what it is given, and the text attention gives h."""
    same: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    return SimpleNamespace(
        spatial_norm=None, group_norm=None, norm_cross=None, residual_connection=False, rescale_output_factor=1.0,
        heads=h.shape[-1] // 64, to_q=same, to_k=same, to_v=same, to_out=[same, same],
    )  # fmt: skip
