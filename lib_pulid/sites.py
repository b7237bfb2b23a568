"""A denoiser -> its injection sites, in the order of the adapter's weights.

A Site is a place where a residual is added. `attach` hooks it with PyTorch's own forward hooks and yields
their handles; nothing of the denoiser is replaced or copied.

    SDXL   every cross-attention layer: `to_q`'s output is the query, `to_out[0]`'s input the text attention
    FLUX   the image tokens after double block i when i % 2 == 0, after single block i when i % 4 == 0
           (official `flux/model.py`, `pulid_double_interval` and `pulid_single_interval`, commit 1aa2fc7)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_pulid.errors import UnsupportedModelError

DOUBLE_INTERVAL = 2
SINGLE_INTERVAL = 4
FLUX_BLOCKS = (19, 38)  # double and single, in FLUX.1; near counts have as many sites
# A part that FLUX.1 does not have -> the model that does.
_CHROMA = "distilled_guidance_layer"
_KOLORS = ("encoder_hid_proj", "text_encoder_hid_proj")  # for its text encoder; an IP-Adapter moves it
_RELATIVES = {_CHROMA: "Chroma", "double_stream_modulation_img": "FLUX.2"}
_UNET_LAYOUTS = ("input_blocks", "output_blocks", "middle_block"), ("down_blocks", "up_blocks", "mid_block")
REFINER_WIDTH = 1280
# Width of the text embedding that a UNet's cross-attention reads -> the model, if it is not SDXL's base.
_TEXT_WIDTHS = {
    768: "a Stable Diffusion 1.x model",
    1024: "a Stable Diffusion 2.x model",
    REFINER_WIDTH: "the SDXL refiner, which has no layers for PuLID",
}
_is_compiling = getattr(torch.compiler, "is_compiling", bool)  # torch 2.1 of A1111 does not have it


@dataclass(frozen=True)
class Site:
    """One place of injection.

    Args:
        name: for messages, "input_blocks.4.1.transformer_blocks.0.attn2".
        width: channels of the activations there.
        heads: heads of the cross-attention (SDXL), 0 on an image stream.
        attach: takes the function that adds the residual and yields each hook's handle as it is made. The function is
            `(q, h) -> h with residual` for a cross-attention, and on an image stream `(total, image)`, which adds
            to `total` in place: a copy of `image`, or `image` itself. All are [B, L, width].
        inner: on an image stream, a layer that runs whenever the block does, and not where a cache answers for it. (A
            cross-attention's hooks are inside.)
        attentions: of a cross-attention: the layers q, k, v and out of the self-attention before it and of itself.
    """

    name: str
    width: int
    heads: int
    attach: Callable[[Callable[..., Any]], Iterable[RemovableHandle]]
    inner: nn.Module | None = None
    attentions: tuple[Mapping[str, nn.Module], ...] = ()


@dataclass(frozen=True)
class Sites:
    """All sites of a denoiser. Args: family: "sdxl" or "flux". sites: in the order of an adapter's weights."""

    family: str
    sites: tuple[Site, ...]


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the hook, which does nothing in other threads: they may run the same denoiser for other people.

    A backward pass counts as this thread, since it recomputes checkpointed blocks in threads of its own.
    """
    owner = threading.get_ident()

    def own(*args: Any) -> Any:
        is_own = _is_compiling() or threading.get_ident() == owner
        return hook(*args) if is_own or torch._C._current_graph_task_id() != -1 else None

    return own


def is_chroma(denoiser: nn.Module) -> bool:
    return hasattr(denoiser, _CHROMA)


def find_sites(denoiser: nn.Module, *, chroma: bool = False) -> Sites:
    """The sites of a UNet or transformer.

    Args:
        denoiser: diffusers' UNet2DConditionModel or FluxTransformer2DModel, a UNet of the sgm layout (A1111, Forge),
            or a transformer of the BFL layout (Forge).
        chroma: whether Chroma passes for FLUX.1, whose blocks it has. An experiment: PuLID was not trained for it.

    Raises:
        UnsupportedModelError: it is none of these.
    """
    for mark, name in _RELATIVES.items():
        if hasattr(denoiser, mark) and not (chroma and mark == _CHROMA):
            raise UnsupportedModelError(f"{name} has FLUX.1's layout, but PuLID was not trained for it.")
    if any(isinstance(getattr(denoiser, name, None), nn.Linear) for name in _KOLORS):
        raise UnsupportedModelError("Kolors has SDXL's layout, but PuLID was not trained for it.")
    for parts in _UNET_LAYOUTS:
        if all(hasattr(denoiser, part) for part in parts):
            return _unet_sites(denoiser, parts)
    if hasattr(denoiser, "double_blocks") and hasattr(denoiser, "single_blocks"):
        return _transformer_sites(denoiser, "double_blocks", "single_blocks", image_first=True)
    if hasattr(denoiser, "transformer_blocks") and hasattr(denoiser, "single_transformer_blocks"):
        if not hasattr(denoiser, "time_text_embed"):  # Bria, FIBO, LongCat
            raise UnsupportedModelError(
                f"{type(denoiser).__name__} has FLUX.1's layout, but PuLID was not trained for it."
            )
        return _transformer_sites(denoiser, "transformer_blocks", "single_transformer_blocks", image_first=False)
    raise UnsupportedModelError(f"{type(denoiser).__name__} is neither an SDXL UNet nor a FLUX.1 transformer.")


# ---------------------------------------------------------------- SDXL


def _unet_sites(unet: nn.Module, parts: Sequence[str]) -> Sites:
    if (width := text_width(unet)) in _TEXT_WIDTHS:
        raise UnsupportedModelError(f"this is {_TEXT_WIDTHS[width]}.")
    # The adapter counts attention processors of the diffusers UNet, whose order is down, up, mid.
    return Sites("sdxl", tuple(site for part in parts for site in _cross_attentions(unet, part)))


def text_width(unet: nn.Module) -> int:
    """Returns the width of the text embedding that a UNet's cross-attention reads; 0 if it has none."""
    layers = (getattr(getattr(module, "attn2", None), "to_k", None) for module in unet.modules())
    to_k: Any = next((layer for layer in layers if layer is not None), None)
    # Forge's quantized layers have no in_features, and their weight may be packed.
    weight = getattr(to_k, "weight", None)
    shape = getattr(getattr(weight, "quant_state", None) or weight, "shape", (0,))
    return getattr(to_k, "in_features", None) or shape[-1]


def _cross_attentions(unet: nn.Module, part: str) -> Iterator[Site]:
    whole = getattr(unet, part) or nn.Module()  # pruned UNets have no middle
    for name, module in whole.named_modules(prefix=part):
        attention = getattr(module, "attn2", None)
        if attention is not None and hasattr(attention, "to_q"):
            yield replace(cross_attention_site(f"{name}.attn2", attention), attentions=_attentions(module))


def _attentions(block: Any) -> tuple[Mapping[str, nn.Module], ...]:
    both: list[Any] = [getattr(block, name, None) for name in ("attn1", "attn2")]
    if not all(hasattr(one, "to_q") and hasattr(one, "to_k") for one in both):
        return ()
    return tuple({"q": one.to_q, "k": one.to_k, "v": one.to_v, "out": one.to_out[0]} for one in both)


def cross_attention_site(name: str, attention: Any) -> Site:
    """The site of a cross-attention layer with `to_q`, `to_k`, `to_out[0]` and `heads`."""

    def attach(add: Callable[[Tensor, Tensor], Tensor]) -> Iterator[RemovableHandle]:
        queries: list[Tensor] = []

        def keep_query(module: nn.Module, args: tuple, output: Tensor) -> None:
            queries.append(output)

        def add_residual(module: nn.Module, args: tuple) -> tuple:
            return (add(queries.pop(), args[0]), *args[1:])

        yield attention.to_q.register_forward_hook(in_this_thread(keep_query))
        yield attention.to_out[0].register_forward_pre_hook(in_this_thread(add_residual))

    # Some quantized layers (Forge's) do not tell their width; diffusers' attention tells it, sgm's that of a head.
    widths = (getattr(attention.to_q, "out_features", None), getattr(attention, "inner_dim", None))
    width = next(filter(None, widths), None) or attention.heads * attention.dim_head
    return Site(name, width, attention.heads, attach)


# ---------------------------------------------------------------- FLUX


def _transformer_sites(transformer: Any, double: str, single: str, image_first: bool) -> Sites:
    """image_first: a double block returns (img, txt), as in BFL's code, not (txt, img), as in diffusers."""
    blocks = len(getattr(transformer, double)), len(getattr(transformer, single))
    if blocks != FLUX_BLOCKS:
        wanted = "FLUX.1 has {} double and {} single blocks".format(*FLUX_BLOCKS)
        raise UnsupportedModelError(f"{wanted}, this model {blocks[0]} and {blocks[1]}.")
    width = getattr(transformer, "hidden_size", None) or transformer.inner_dim
    text_length: list[int] = []  # of the call under way; the single blocks see text and image as one sequence
    sites = [
        Site(f"{double}.{i}", width, 0, _after_double(block, 0 if image_first else 1, text_length), _first_layer(block))
        for i, block in enumerate(getattr(transformer, double))
        if i % DOUBLE_INTERVAL == 0
    ]
    sites += [
        Site(f"{single}.{i}", width, 0, _after_single(block, text_length), _first_layer(block))
        for i, block in enumerate(getattr(transformer, single))
        if i % SINGLE_INTERVAL == 0
    ]
    return Sites("flux", tuple(sites))


def _first_layer(block: nn.Module) -> nn.Module | None:
    return next(block.children(), None)


def image_stream_site(name: str, block: nn.Module, width: int, image: int = 0) -> Site:
    """The site after a block that returns two streams; `image` is the place of the image's."""
    return Site(name, width, 0, _after_double(block, image, []))


def _after_double(block: nn.Module, image: int, text_length: list[int]) -> Callable:
    def attach(add: Callable[[Tensor, Tensor], None]) -> list[RemovableHandle]:
        def add_residual(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
            both = list(output)
            text_length[:] = [both[1 - image].shape[1]]
            both[image] = _to_change(module, args, kwargs, output[image])
            add(both[image], output[image])
            return tuple(both)

        return [block.register_forward_hook(in_this_thread(add_residual), with_kwargs=True)]

    return attach


def _after_single(block: nn.Module, text_length: list[int]) -> Callable:
    def attach(add: Callable[[Tensor, Tensor], None]) -> list[RemovableHandle]:
        def add_residual(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
            if isinstance(output, tuple):  # diffusers from 0.35 on: (txt, img)
                total = _to_change(module, args, kwargs, output[1])
                add(total, output[1])
                return (output[0], total)
            total, text = _to_change(module, args, kwargs, output), text_length[0]
            add(total[:, text:], output[:, text:])
            return total

        return [block.register_forward_hook(in_this_thread(add_residual), with_kwargs=True)]

    return attach


def _to_change(block: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """A block's output itself, or a copy where something else may need it as it is.

    That is autograd, whoever wraps the block or hooks it too (step caches keep outputs), and a block that returned
    what it was given.
    """
    is_watched = "forward" in vars(block) or len(block._forward_hooks) > 1
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_watched:
        return output.clone()
    given = {t.untyped_storage()._cdata for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
    return output.clone() if output.untyped_storage()._cdata in given else output
