"""Builds one site of each kind at its real size: the layer without a face, with our hooks, and with the official code.

The official formulas are written out (commit 1aa2fc7): at each step keys and values of identity and zero tokens,
attention, the projection in float32; for FLUX the five matrices of PerceiverAttentionCA. `official_modules` takes the
modules themselves from a checkout.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid import disk, methods
from lib_pulid.identity import Identity
from lib_pulid.injection import DenoiseStep, Injection, compile_injection, inject
from lib_pulid.sites import Site, Sites, cross_attention_site, image_stream_site
from lib_pulid.weights import IMAGE_STREAM_KEYS, Adapter, CrossAttentionWeights, ImageStreamWeights

TOKEN_WIDTH, TOKENS, NUM_ZERO = 2048, 32, 20
SDXL_LAYERS = {(4096, 640): 10, (1024, 1280): 60}  # tokens and width at 1024 x 1024 -> how many of the 70
FLUX_WIDTH, FLUX_INNER, FLUX_TOKENS = 3072, 2048, 4096


@dataclass(frozen=True)
class Case:
    """A layer without a face, with ours, and with the official code (`official_off`: that without a face).

    Args:
        sites: how many of the kind a denoiser has. floor: bytes that any code has to move, which reads the layer's
            tensors once and writes the result once. exact: the official formulas in float64.
    """

    name: str
    sites: int
    floor: int
    off: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    official: Callable[[], Tensor]
    official_off: Callable[[], Tensor]
    exact: Callable[[], Tensor]


@dataclass(frozen=True)
class Person:
    """Random weights and tokens. Args: tokens: [2, N, D], uncond and cond. weights: of each site, by its width."""

    injection: Injection
    tokens: Tensor
    weights: dict[int, Any]


def _person(family: str, sites: tuple, weights: dict[int, Any], device: str, dtype: torch.dtype) -> Person:
    encoder = nn.Identity()
    encoder.output_dim = TOKEN_WIDTH  # type: ignore[assignment]
    adapter = Adapter(methods.usual(family), encoder, sites, Path("bench"))
    tokens = torch.randn(2, TOKENS, TOKEN_WIDTH, device=device).to(dtype)
    identity = Identity(tokens[1:].float(), tokens[:1].float())
    return Person(compile_injection(adapter, identity, device=device, dtype=dtype), tokens, weights)


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


def sdxl_person(widths: Sequence[int], device: str, dtype: torch.dtype) -> Person:
    """Makes a person for sites of these widths; sites of equal width share weights."""
    weights = {
        width: CrossAttentionWeights(*(_random(width, TOKEN_WIDTH, device=device).to(dtype) for _ in "kv"))
        for width in set(widths)
    }
    return _person("sdxl", tuple(weights[width] for width in widths), weights, device, dtype)


def sdxl_case(
    tokens: int, width: int, device: str, dtype: torch.dtype, persons: int = 1, mask: bool = False, modules: Any = None
) -> Case:
    """Builds a cross-attention with one negative and one prompt row, ortho_v2. modules: `official_modules`."""
    person = sdxl_person([width], device, dtype)
    side = int(tokens**0.5)
    injection = replace(person.injection, mask=torch.ones(side, side, device=device) if mask else None)
    layer = Layer(width)
    sites = Sites("sdxl", (cross_attention_site("layer", layer),))
    q, h = (torch.randn(2, tokens, width, device=device, dtype=dtype) for _ in range(2))
    step = DenoiseStep(0.0, [False, True], (side, side))

    def ours() -> Tensor:
        with inject(sites, [injection] * persons, step):
            return layer(q, h)

    def official(with_identity: bool = True) -> Tensor:
        if modules is not None:
            return modules.cross_attention(q, h, person.tokens if with_identity else None, person.weights[width])
        return sdxl_official(q, h, person.tokens, person.weights[width], heads=layer.heads) if with_identity else h

    return Case(
        name=f"SDXL layer, {tokens} x {width}, 2 rows" + f", {persons} persons" * (persons > 1) + ", region" * mask,
        sites=SDXL_LAYERS.get((tokens, width), 1),
        floor=3 * h.nbytes,
        off=lambda: layer(q, h),
        ours=ours,
        official=official,
        official_off=partial(official, False),
        exact=lambda: sdxl_official(*_double(q, h, person.tokens, person.weights[width]), heads=layer.heads),
    )


def sdxl_official(q: Tensor, h: Tensor, identity: Tensor, weights: CrossAttentionWeights, *, heads: int) -> Tensor:
    """Computes the official `IDAttnProcessor2_0`'s output for h, ortho_v2, with identity tokens [B, N, D]."""
    wide = torch.promote_types(h.dtype, torch.float32)
    tokens = torch.cat((identity, torch.zeros_like(identity[:, :1]).expand(-1, NUM_ZERO, -1)), dim=1)
    key, value = F.linear(tokens, weights.to_k), F.linear(tokens, weights.to_v)
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, key, value))
    r = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2).to(wide)
    text = h.to(wide)
    share = (query @ key.transpose(-2, -1)).softmax(-1).mean(1)[:, :, :5].sum(-1, keepdim=True)
    p = (text * r).sum(-2, keepdim=True) / (text * text).sum(-2, keepdim=True) * text
    return (text + (r + (share - 1) * p)).to(h.dtype)


# ---------------------------------------------------------------- FLUX


class Block(nn.Module):
    """A double block that hands on its streams as new tensors, as the real ones do."""

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return image * 1, text


def flux_person(sites: int, width: int, device: str, dtype: torch.dtype) -> Person:
    """Makes a person for so many sites, which share weights."""
    shapes: dict[str, tuple[int, ...]] = {"norm_id_weight": (TOKEN_WIDTH,), "norm_id_bias": (TOKEN_WIDTH,)}
    shapes |= {"norm_image_weight": (width,), "norm_image_bias": (width,), "to_q": (FLUX_INNER, width)}
    shapes |= {"to_kv": (2 * FLUX_INNER, TOKEN_WIDTH), "to_out": (width, FLUX_INNER)}
    weights = ImageStreamWeights(**{name: _random(*s, device=device).to(dtype) for name, s in shapes.items()})
    person = _person("flux", (weights,), {width: weights}, device, dtype)
    return replace(person, injection=replace(person.injection, sites=person.injection.sites * sites))


def flux_case(tokens: int, device: str, dtype: torch.dtype, persons: int = 1, modules: Any = None) -> Case:
    """Builds an image stream of one row. modules: `official_modules`."""
    person = flux_person(1, FLUX_WIDTH, device, dtype)
    weights, cond = person.weights[FLUX_WIDTH], person.tokens[1:]
    block, step = Block(), DenoiseStep(0.0, True)
    sites = Sites("flux", (image_stream_site("block", block, FLUX_WIDTH),))
    image, text = (torch.randn(1, n, FLUX_WIDTH, device=device, dtype=dtype) for n in (tokens, 512))

    def off() -> Tensor:
        return block(image, text)[0]

    def ours() -> Tensor:
        with inject(sites, [person.injection] * persons, step):
            return off()

    return Case(
        name=f"FLUX site, {tokens} x {FLUX_WIDTH}" + f", {persons} persons" * (persons > 1),
        sites=20,
        floor=2 * image.nbytes,
        off=off,
        ours=ours,
        official=lambda: (
            off() + 1.0 * (flux_official if modules is None else modules.image_stream)(image, cond, weights)
        ),
        official_off=off,
        exact=lambda: image.double() + flux_official(*_double(image, cond, weights)),
    )


def flux_official(image: Tensor, identity: Tensor, weights: ImageStreamWeights, heads: int = 16) -> Tensor:
    """Computes the official `PerceiverAttentionCA` for image [B, L, W] and identity tokens [B, N, D]."""
    x = F.layer_norm(identity, identity.shape[-1:], weights.norm_id_weight, weights.norm_id_bias)
    latents = F.layer_norm(image, image.shape[-1:], weights.norm_image_weight, weights.norm_image_bias)
    q, (k, v) = F.linear(latents, weights.to_q), F.linear(x, weights.to_kv).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.25
    scores = (q * scale) @ (k * scale).transpose(-2, -1)
    attention = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)
    return F.linear((attention @ v).permute(0, 2, 1, 3).flatten(2), weights.to_out)


# ---------------------------------------------------------------- either


def person_for(sites: Sites, device: str, dtype: torch.dtype) -> Person:
    widths = [site.width for site in sites.sites]
    if sites.family == "sdxl":
        return sdxl_person(widths, device, dtype)
    return flux_person(len(widths), widths[0], device, dtype)


@contextmanager
def official_at(sites: Sites, person: Person) -> Iterator[None]:
    """Adds at all sites what the official code adds, for a row of the negative prompt and one of the prompt (SDXL)."""
    with ExitStack() as hooks:
        for site in sites.sites:

            def add(x: Tensor, y: Tensor, site: Site = site) -> Tensor:
                weights = person.weights[site.width]
                if sites.family == "sdxl":
                    return sdxl_official(x, y, person.tokens, weights, heads=site.heads)
                return x.add_(flux_official(y, person.tokens[1:], weights))

            for handle in site.attach(add):
                hooks.callback(handle.remove)
        yield


def _random(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device) * shape[-1] ** -0.5


def _double(*values: Any) -> list[Any]:
    """Converts tensors, and tensors in weights, to float64."""
    return [
        value.double() if isinstance(value, Tensor) else type(value)(*(x.double() for x in vars(value).values()))
        for value in values
    ]


# ---------------------------------------------------------------- the official modules


def official_modules(checkout: Path) -> SimpleNamespace:
    """Loads the official modules from a checkout of ToTheBeginning/PuLID, as `cross_attention` and `image_stream`."""
    processors = _load(checkout / "pulid" / "attention_processor.py")
    encoders = _load(checkout / "pulid" / "encoders_transformer.py")
    processors.NUM_ZERO, processors.ORTHO, processors.ORTHO_v2 = NUM_ZERO, False, True  # type: ignore[attr-defined]

    def cross_attention(q: Tensor, h: Tensor, identity: Tensor | None, weights: CrossAttentionWeights) -> Tensor:
        processor = processors.IDAttnProcessor2_0(len(weights.to_k), TOKEN_WIDTH)
        processor.id_to_k.weight, processor.id_to_v.weight = (nn.Parameter(w) for w in (weights.to_k, weights.to_v))
        same = nn.Identity()
        layer = SimpleNamespace(  # its input is the query, and h the text attention's output
            spatial_norm=None, group_norm=None, norm_cross=None, residual_connection=False, rescale_output_factor=1.0,
            heads=h.shape[-1] // 64, to_q=same, to_k=same, to_v=same, to_out=[same, same],
        )  # fmt: skip
        return processor(layer, q, h, id_embedding=identity, id_scale=1.0)

    def image_stream(image: Tensor, identity: Tensor, weights: ImageStreamWeights) -> Tensor:
        with torch.device("meta"):
            module = encoders.PerceiverAttentionCA()
        state = {key: getattr(weights, name) for key, name in IMAGE_STREAM_KEYS.items()}
        module.load_state_dict(state, assign=True)
        return module(identity, image)

    return SimpleNamespace(cross_attention=cross_attention, image_stream=image_stream)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    if spec is None or spec.loader is None or not disk.is_file(path):
        raise FileNotFoundError(f"{path} was not found; --official wants a checkout of ToTheBeginning/PuLID.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
