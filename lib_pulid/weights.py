"""Loads an adapter: a PuLID file of any version, or another method's, recognized by content, never by its name.

Layouts (names and shapes: official `pulid/pipeline.py`, `pipeline_v1_1.py`, `pipeline_flux.py`, commit 1aa2fc7):

    id_adapter.*    id_adapter_attn_layers.{i}.id_to_k/id_to_v.weight    SDXL, v1 and v1.1
    image_proj.*    ip_adapter.{i}.to_k_ip/to_v_ip.weight                SDXL, v1 converted; the other methods
    pulid_encoder.* pulid_ca.{n}.*                                       FLUX, v0.9.0 and v0.9.1

Which method a file is, `methods.method_of` tells. A new one enters there, with its encoder in `_ENCODERS` here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid import methods
from lib_pulid.disk import sha256_of
from lib_pulid.encoders import IDEncoder, IDFormer
from lib_pulid.errors import WrongWeightsError
from lib_pulid.files.checkpoint_header import under, unwrapped
from lib_pulid.files.state_dict import check_numbers, describe, read_state_dict
from lib_pulid.lora import PARTS, Lora
from lib_pulid.methods import Method, Tensors, has
from lib_pulid.projectors import FacePlusProjection, FaceProjection, ImageProjection, Resampler


@dataclass(frozen=True)
class CrossAttentionWeights:
    """SDXL, one cross-attention layer of width C: keys and values of the identity tokens.

    Args:
        to_k, to_v: [C, D], D the width of an identity token.
    """

    to_k: Tensor
    to_v: Tensor


@dataclass(frozen=True)
class ImageStreamWeights:
    """FLUX, one PerceiverAttentionCA (official `pulid/encoders_transformer.py`), inner width I = heads x 128.

    Args:
        norm_id_weight, norm_id_bias: [D], LayerNorm of the identity tokens (`norm1`).
        norm_image_weight, norm_image_bias: [W], LayerNorm of the image tokens (`norm2`).
        to_q: [I, W]. to_kv: [2 I, D]. to_out: [W, I].
    """

    norm_id_weight: Tensor
    norm_id_bias: Tensor
    norm_image_weight: Tensor
    norm_image_bias: Tensor
    to_q: Tensor
    to_kv: Tensor
    to_out: Tensor


IMAGE_STREAM_HEAD_DIM = 128  # width of an attention head there; no shape in a file tells it
SiteWeights = CrossAttentionWeights | ImageStreamWeights


@dataclass(frozen=True)
class Adapter:
    """The content of a PuLID file, or of another method's: an identity encoder, and weights for every site in the order
    of injection.

    Args:
        method: which one it is. (PuLID 0.9.0 and 0.9.1 have the same keys and shapes, and differ only in
            `fingerprint`.)
        encoder: float32, in eval mode; called with the method's inputs, returns tokens [B, N, D].
        sites: CrossAttentionWeights (70 in SDXL) or ImageStreamWeights (20 in FLUX), in the file's dtype.
        path: of the file.
        lora: of all attention layers, in the file's dtype; None if the method has none.
    """

    method: Method
    encoder: nn.Module
    sites: tuple[SiteWeights, ...]
    path: Path
    lora: Lora | None = None

    @property
    def family(self) -> str:
        """ "sdxl" or "flux"."""
        return self.method.family

    @property
    def label(self) -> str:
        """The name for users: "PuLID v1.1 for SDXL"."""
        return self.method.label

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that identify the identity encoder's weights.

        Eight are a hash of their float16 values, so that a half-precision conversion counts as the same file, and eight
        of their signs, which no rounding changes: these identify a file in any 16-bit or 8-bit type, see `is_encoder`.
        """
        return self._digest(Tensor.half)[:8] + self._digest(torch.signbit)[:8]

    def is_encoder(self, fingerprint: str) -> bool:
        """Whether it is the encoder with this fingerprint, in any precision."""
        # Identities of earlier versions have sixteen digits of the float16 values.
        return fingerprint[8:] == self.fingerprint[8:] or fingerprint == self._digest(Tensor.half)[:16]

    def _digest(self, of: Callable[[Tensor], Tensor]) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(of(tensor.detach().cpu()).contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_adapter(path: str | Path) -> Adapter:
    """Loads an adapter of any method and version.

    Args:
        path: a `.safetensors` file or a torch pickle (read with `weights_only=True`). All sizes are taken
            from its shapes, except the width of an attention head, which is the official 64 (encoder)
            and 128 (FLUX).

    Returns:
        The Adapter, on the CPU.

    Raises:
        MissingWeightsError: there is no such file.
        WrongWeightsError: it is something else, incomplete or unreadable; the message says what it is.
    """
    path = Path(path)
    stored = read_state_dict(path)
    state = unwrapped(stored)
    header = {key: Tensors(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in state.items()}
    method = methods.method_of(header, path.name, lambda: sha256_of(path))
    if method is None:
        raise WrongWeightsError(
            f"{path.name} is {describe(stored)}. Needed: a PuLID file, for SDXL (pulid_v1.bin, pulid_v1.1.safetensors, "
            "ip-adapter_pulid_sdxl_fp16.safetensors) or for FLUX (pulid_flux_v0.9.x.safetensors)."
        )
    if scaled := sorted(filter(_SCALED.search, state)):
        raise WrongWeightsError(
            f"{path.name} is a quantized copy of {method.label}: it has scales beside the weights ({scaled[0]}), which "
            "cannot be read here. Use the original file, or a copy in fp16, bf16 or fp8 without scales."
        )
    adapter = (_image_streams if method.family == "flux" else _cross_attentions)(state, method, path)
    check_numbers(state, path)
    return adapter


# What is beside the weights in ComfyUI's scaled fp8, and in the files of bitsandbytes, GPTQ and quanto.
_SCALED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale(_2)?|scale_input|input_scale|comfy_quant|absmax|quant_map|SCB|qweight"
    r"|weight\._scale)$"
)
# An encoder is built by `from_state_dict` and has an `output_dim`.
_ENCODERS: Mapping[Method, type] = {
    methods.PULID_V1: IDEncoder,
    methods.PULID_V11: IDFormer,
    methods.PULID_FLUX: IDFormer,
    methods.INSTANTID: Resampler,
    methods.IP_ADAPTER_H: ImageProjection,
    methods.IP_ADAPTER_BIGG: ImageProjection,
    methods.IP_ADAPTER_PLUS: Resampler,
    methods.IP_ADAPTER_PLUS_FACE: Resampler,
    methods.FACEID: FaceProjection,
    methods.FACEID_PLUS: FacePlusProjection,
    methods.PORTRAIT: FaceProjection,
    methods.PORTRAIT_UNNORM: Resampler,
}
# Prefix of the encoder, and pattern of the layers' keys and values. At most four digits, here and below: a number in a
# name must not determine how long this takes.
_OWN = ("id_adapter.", r"id_adapter_attn_layers\.(\d{1,4})\.id_to_(k|v)\.weight")
_LORA = r"ip_adapter\.(\d{1,4})\.to_(q|k|v|out)_lora\.(down|up)\.weight"
_CONVERTED = ("image_proj.", r"ip_adapter\.(\d{1,4})\.to_(k|v)_ip\.weight")


def _cross_attentions(state: Mapping[str, Tensor], method: Method, path: Path) -> Adapter:
    prefix, pair = _OWN if any(key.startswith(_OWN[0]) for key in state) else _CONVERTED
    encoder = _encoder(under(state, prefix), method, path)
    matches = {key: re.fullmatch(pair, key) for key in state if not key.startswith(prefix)}
    low_rank = {(int(m[1]), m[2], m[3]): state[key] for key in matches if (m := re.fullmatch(_LORA, key))}
    if has(method, "lora_weight"):
        matches = {key: match for key, match in matches.items() if not re.fullmatch(_LORA, key)}
    if foreign := sorted(key for key, match in matches.items() if match is None):
        raise WrongWeightsError(f"{path.name} looks like {method.label}, but also holds {foreign[0]!r}.")
    table = {(int(m[1]), m[2]): state[key] for key, m in matches.items() if m}
    # i counts every attention processor of the UNet; cross-attention is every second one: 1, 3, 5, ...
    count = 1 + max((i for i, _ in table), default=1) // 2
    expected = {(i, x) for i in range(1, 2 * count, 2) for x in "kv"}
    if stray := sorted(set(table) ^ expected):
        raise WrongWeightsError(
            f"{path.name} is {method.label}, but incomplete (layer {stray[0][0]}). Download it again."
        )
    sites = []
    for i in range(1, 2 * count, 2):
        site = CrossAttentionWeights(to_k=table[i, "k"], to_v=table[i, "v"])
        if site.to_k.shape != site.to_v.shape or tuple(site.to_k.shape[1:]) != (encoder.output_dim,):
            raise WrongWeightsError(f"{path.name}: layer {i} does not fit tokens of width {encoder.output_dim}.")
        sites.append(site)
    lora = _lora(low_rank, tuple(sites), path) if has(method, "lora_weight") else None
    return Adapter(method, encoder, tuple(sites), path, lora)


def _lora(state: Mapping[tuple[int, str, str], Tensor], sites: tuple[SiteWeights, ...], path: Path) -> Lora:
    """Builds the LoRA. state: by layer, part, and "down" or "up"."""
    expected = {(n, part, half) for n in range(2 * len(sites)) for part in PARTS for half in ("down", "up")}
    if stray := sorted(set(state) ^ expected):
        raise WrongWeightsError(f"{path.name}: its LoRA is incomplete (layer {stray[0][0]}). Download it again.")
    layers = {}
    for n, part in sorted({place[:2] for place in expected}):
        down, up = state[n, part, "down"], state[n, part, "up"]
        width = sites[n // 2].to_k.shape[0]  # type: ignore[union-attr]
        if down.ndim != 2 or up.ndim != 2 or up.shape != (width, down.shape[0]):
            raise WrongWeightsError(f"{path.name}: its LoRA of layer {n} (to_{part}) does not fit a width of {width}.")
        layers[n, part] = down, up
    digest = hashlib.sha256()
    for pair in layers.values():
        digest.update(b"".join(tensor[0].float().numpy().tobytes() for tensor in pair))
    return Lora(layers, digest.hexdigest()[:16])


def _image_streams(state: Mapping[str, Tensor], method: Method, path: Path) -> Adapter:
    if "pulid_encoder.proj_out" not in state and "pulid_encoder.body.0.weight" in state:
        raise WrongWeightsError(
            f"{path.name} has the cross-attention of PuLID for FLUX, but another encoder. Download it again."
        )
    encoder = _encoder(under(state, "pulid_encoder."), method, path)
    modules = under(state, "pulid_ca.")
    numbers = [int(match[0]) for key in modules if (match := re.match(r"\d{1,4}(?=\.)", key))]
    count = 1 + max(numbers, default=-1)
    expected = {f"{n}.{key}" for n in range(count) for key in IMAGE_STREAM_KEYS}
    stray = sorted((set(modules) ^ expected) | {k for k in state if not k.startswith(("pulid_encoder.", "pulid_ca."))})
    if stray:
        raise WrongWeightsError(
            f"{path.name} is PuLID for FLUX, but has a missing or extra tensor: {stray[0]!r}. Download it again."
        )
    sites = tuple(
        ImageStreamWeights(**{name: modules[f"{n}.{key}"] for key, name in IMAGE_STREAM_KEYS.items()})
        for n in range(count)
    )
    for n, site in enumerate(sites):
        _check_image_stream(site, encoder.output_dim, f"{path.name}: pulid_ca.{n}")
    return Adapter(method, encoder, sites, path)


IMAGE_STREAM_KEYS = {
    "norm1.weight": "norm_id_weight",
    "norm1.bias": "norm_id_bias",
    "norm2.weight": "norm_image_weight",
    "norm2.bias": "norm_image_bias",
    "to_q.weight": "to_q",
    "to_kv.weight": "to_kv",
    "to_out.weight": "to_out",
}


def _check_image_stream(site: ImageStreamWeights, token_dim: int, name: str) -> None:
    if site.to_q.ndim != 2 or not site.to_q.numel() or site.to_q.shape[0] % IMAGE_STREAM_HEAD_DIM:
        shape = tuple(site.to_q.shape)
        raise WrongWeightsError(
            f"{name}.to_q has shape {shape}; it has to be [heads x {IMAGE_STREAM_HEAD_DIM}, width]."
        )
    inner, width = site.to_q.shape
    expected = {
        "norm_id_weight": (token_dim,),
        "norm_id_bias": (token_dim,),
        "norm_image_weight": (width,),
        "norm_image_bias": (width,),
        "to_kv": (2 * inner, token_dim),
        "to_out": (width, inner),
    }
    for field, shape in expected.items():
        if tuple(getattr(site, field).shape) != shape:
            raise WrongWeightsError(f"{name}.{field} has shape {tuple(getattr(site, field).shape)}, expected {shape}.")


def _encoder(state: dict[str, Tensor], method: Method, path: Path) -> Any:
    kind: Any = _ENCODERS[method]
    try:
        return kind.from_state_dict(state)
    except (KeyError, IndexError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise WrongWeightsError(
            f"{path.name}: the identity encoder ({kind.__name__}) is incomplete or has other shapes: {error}"
        ) from error
