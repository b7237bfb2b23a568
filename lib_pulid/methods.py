"""The identity methods: what each reads off a photo, which settings it has, and how a weight file shows which it is.

Names, shapes and dtypes of a file's tensors are enough to tell, so nothing is loaded here. Where they are not, the
file's checksum decides, or the file is refused: a guess could show a stranger.

Layouts: tencent-ailab/IP-Adapter at 62e4af9d, instantX-research/InstantID at 2145b67f, ToTheBeginning/PuLID at 1aa2fc7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from lib_pulid.errors import WrongWeightsError

# Models that read photos, by their role in the catalog.
_FACES = ("detector", "recogniser", "landmarker", "parser")
IMAGE_ENCODERS = ("tower", "clip_h", "clip_bigg")
_ANTELOPE, _BUFFALO = ("detector", "recogniser"), ("detector", "recogniser_buffalo")

# Dtypes as a safetensors header names them.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensors(NamedTuple):
    """Shape and dtype ("float16", "float32", ...) of one of a file's tensors."""

    shape: tuple[int, ...]
    dtype: str


Header = Mapping[str, Tensors]


@dataclass(frozen=True)
class Method:
    """One identity method.

    Args:
        name: for users. family: of the denoisers it was made for, "sdxl" or "flux". version: or "".
        inputs: what its encoder is given of a photo, in order; fields of `readings.FaceFeatures`.
        reads: roles of the models that read photos, see `catalog.WeightFile`.
        view: what an image encoder sees: "photo", "face" (its crop) or "aligned" (224 pixels, by the landmarks).
        longest: pixels that a photo's long edge is shrunk to; 0: as it is.
        several: how the official code makes one identity of several photos: "together" in the encoder, all tokens of
            the first and the "first" ones of the others, tokens "joined"; "" if it has no way.
        settings: the names of those fields of a unit that only some methods have.
        projection, num_zero: the defaults. weight: the default.
        control: role of the ControlNet that belongs to it, "" if none does. control_weight: its default strength.
    """

    name: str
    family: str
    version: str = ""
    inputs: tuple[str, ...] = ("id_cond", "vit_hidden")
    reads: tuple[str, ...] = (*_FACES, "tower")
    view: str = ""
    longest: int = 1024
    several: str = ""
    settings: tuple[str, ...] = ()
    projection: str = "none"
    num_zero: int = 0
    weight: float = 1.0
    control: str = ""
    control_weight: float = 0.0

    @property
    def label(self) -> str:
        """The name for users: "PuLID v1.1 for SDXL"."""
        return " ".join(filter(None, (self.name, self.version, "for", self.family.upper())))

    @property
    def reads_faces(self) -> bool:
        """Whether it looks for a face in the photo; else there is nothing to measure likeness by."""
        return "detector" in self.reads


_SDXL = {"family": "sdxl", "settings": ("preset", "projection", "num_zero"), "projection": "ortho_v2", "num_zero": 20}
PULID_V1 = Method("PuLID", version="v1", several="first", weight=0.8, **_SDXL)  # type: ignore[arg-type]
PULID_V11 = Method("PuLID", version="v1.1", several="together", weight=0.8, **_SDXL)  # type: ignore[arg-type]
PULID_FLUX = Method(
    "PuLID", "flux", "v0.9", several="together", settings=("preset", "start_step", "cfg_start_step"),
    projection="ortho_v2", num_zero=20,
)  # fmt: skip
INSTANTID = Method(
    "InstantID", "sdxl", inputs=("embedding",), reads=_ANTELOPE, longest=1280, settings=("identity_net",), weight=0.8,
    control="identity_net", control_weight=0.8,
)  # fmt: skip
PORTRAIT_UNNORM = Method(
    "IP-Adapter FaceID Portrait (unnorm)", "sdxl", inputs=("embedding",), reads=_BUFFALO, longest=0, several="joined"
)  # fmt: skip
# IP-Adapter's README: a scale of 0.5 in most cases, 1 with an empty prompt.
IP_ADAPTER_H = Method(
    "IP-Adapter", "sdxl", "(ViT-H)", inputs=("image",), reads=("clip_h",), view="photo", longest=0, weight=0.5
)  # fmt: skip
IP_ADAPTER_BIGG = replace(IP_ADAPTER_H, version="(ViT-bigG)", reads=("clip_bigg",))
IP_ADAPTER_PLUS = replace(IP_ADAPTER_H, name="IP-Adapter Plus", version="", inputs=("patches",))
IP_ADAPTER_PLUS_FACE = replace(
    IP_ADAPTER_PLUS, name="IP-Adapter Plus Face", reads=("detector", "clip_h"), view="face"
)  # fmt: skip
_LORA = ("lora_weight",)
FACEID = Method(
    "IP-Adapter FaceID", "sdxl", inputs=("unit_embedding",), reads=_BUFFALO, longest=0, settings=_LORA
)  # fmt: skip
FACEID_PLUS = replace(
    FACEID, name="IP-Adapter FaceID Plus", version="v2", inputs=("unit_embedding", "patches"),
    reads=(*_BUFFALO, "clip_h"), view="aligned",
)  # fmt: skip
PORTRAIT = replace(PORTRAIT_UNNORM, name="IP-Adapter FaceID Portrait", inputs=("unit_embedding",))
METHODS = (
    PULID_V1, PULID_V11, PULID_FLUX, INSTANTID, IP_ADAPTER_H, IP_ADAPTER_BIGG, IP_ADAPTER_PLUS, IP_ADAPTER_PLUS_FACE,
    FACEID, FACEID_PLUS, PORTRAIT, PORTRAIT_UNNORM,
)  # fmt: skip

# The fields of a unit that not all methods have.
SPECIAL = frozenset(name for method in METHODS for name in method.settings)


def usual(family: str) -> Method:
    """Returns the method of "auto": PuLID, in the version whose settings are the defaults."""
    return PULID_FLUX if family == "flux" else PULID_V11


def maker_of(label: str, family: str) -> Method:
    """Returns the method whose label an identity carries; the usual one if none has it."""
    return next((method for method in METHODS if method.label == label), usual(family))


def may_be(listed: Method, method: Method) -> bool:
    """Whether a file listed with one method, from its header alone, may be of another in any version."""
    alike = {IP_ADAPTER_PLUS.name, IP_ADAPTER_PLUS_FACE.name}  # the same tensors
    return (listed.name, listed.family) == (method.name, method.family) or {listed.name, method.name} == alike


def has(method: Method, field: str) -> bool:
    """Whether a unit's field is of use in a method."""
    return field not in SPECIAL or field in method.settings


# ---------------------------------------------------------------- which one a file is


def method_of(header: Header, name: str, checksum: Callable[[], str] = str) -> Method | None:
    """Tells a file's method by its tensors.

    Args:
        name: of the file, for messages. checksum: gives the file's sha256; called only where tensors do not tell.

    Returns:
        The method; None for a file of no known method.

    Raises:
        WrongWeightsError: it is a relative that does not work here; the message says why.
    """
    if _any(header, "pulid_encoder.") and _any(header, "pulid_ca."):
        return PULID_FLUX
    if _any(header, "id_adapter.") and _any(header, "id_adapter_attn_layers."):
        return _pulid(header, "id_adapter.")
    if not _any(header, "image_proj."):
        return None
    if _any(header, "ip_adapter.") and (pulid := _pulid(header, "image_proj.")) is not None:
        return pulid
    return _ip_adapter(header, name, checksum)


def _pulid(header: Header, prefix: str) -> Method | None:
    """Tells PuLID's versions by their encoders."""
    if f"{prefix}body.0.weight" in header:
        return PULID_V1
    return PULID_V11 if f"{prefix}proj_out" in header else None


def _ip_adapter(header: Header, name: str, checksum: Callable[[], str]) -> Method | None:
    width = next((_width(header, key) for key in header if key.endswith("to_k_ip.weight")), 0)
    if reason := _refusal(header, width):
        raise WrongWeightsError(f"{name} is {reason}")
    if not width:
        return None
    if "image_proj.latents" in header:
        if _width(header, "image_proj.proj_in.weight") == FACE_WIDTH:
            return _raw_face_id(header, name)
        return IP_ADAPTER_PLUS_FACE if checksum().startswith(_PLUS_FACE) else IP_ADAPTER_PLUS
    if "image_proj.proj.weight" in header:
        return IP_ADAPTER_BIGG if _width(header, "image_proj.proj.weight") == _BIGG_WIDTH else IP_ADAPTER_H
    return _face_id(header, name) if "image_proj.proj.2.weight" in header else None


def _face_id(header: Header, name: str) -> Method:
    has_lora = _any(header, "ip_adapter.0.to_q_lora.")
    if not has_lora and _tokens(header) == _PORTRAIT_TOKENS:
        return PORTRAIT
    if not has_lora:
        raise WrongWeightsError(
            f"{name} is IP-Adapter FaceID without its LoRA, which it was trained with. Use the original file."
        )
    return FACEID_PLUS if _any(header, "image_proj.perceiver_resampler.") else FACEID


def _raw_face_id(header: Header, name: str) -> Method:
    """InstantID and FaceID Portrait unnorm have the same tensors, but read different face recognizers' embeddings. They
    were published in different dtypes: all float32, and a float32 encoder beside float16 layers."""
    encoder = header["image_proj.proj_in.weight"].dtype
    layers = {info.dtype for key, info in header.items() if key.startswith("ip_adapter.")}
    if encoder == "float32" and layers == {"float32"}:
        return INSTANTID
    if encoder == "float32" and layers == {"float16"}:
        return PORTRAIT_UNNORM
    raise WrongWeightsError(
        f"{name} is InstantID or IP-Adapter FaceID Portrait (unnorm), converted to another precision, so that the two "
        "can no longer be told apart. They need different face recognizers. Use the original file."
    )


FACE_WIDTH = 512  # of a face embedding
_PORTRAIT_TOKENS = 16  # FaceID has 4
_BIGG_WIDTH = 1280  # of ViT-bigG's image embedding; ViT-H's has 1024
_PLUS_FACE = "677ad886"  # checksum of ip-adapter-plus-face_sdxl_vit-h.safetensors, whose tensors are those of plus

_OTHER_WIDTHS = {
    768: "an IP-Adapter for Stable Diffusion 1.5, but PuLID works with SDXL and FLUX. Use the file for SDXL.",
    1024: "an IP-Adapter for Stable Diffusion 2, but PuLID works with SDXL and FLUX. Use the file for SDXL.",
    4096: "an IP-Adapter for Kolors or FLUX, whose layers are not SDXL's. Use the file for SDXL.",
}


def _refusal(header: Header, width: int) -> str:
    """Says what a relative is that does not work here, and why; "" for the others. width: of its tokens."""
    proj_out = header.get("image_proj.proj_out.weight") or header.get("image_proj.perceiver_resampler.proj_out.weight")
    if width in _OTHER_WIDTHS:
        return _OTHER_WIDTHS[width]
    if not width and proj_out is not None and proj_out.shape[:1] == (4096,):
        return (
            "InfiniteYou's projector for FLUX, whose tokens go to a ControlNet of its own (InfuseNet), which does not "
            "work here. For FLUX, use PuLID."
        )
    if "image_proj.proj.3.weight" in header:
        return "IP-Adapter Full Face, which exists for Stable Diffusion 1.5 only. Use IP-Adapter Plus Face for SDXL."
    return ""


def _tokens(header: Header) -> int:
    """Returns the number of tokens that a FaceID file's MLP makes."""
    rows = header["image_proj.proj.2.weight"].shape[0]
    return rows // (_width(header, "image_proj.norm.weight") or rows)


def _any(header: Header, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in header)


def _width(header: Header, key: str) -> int:
    """Returns the last axis of a tensor; 0 if it is missing or has none."""
    info = header.get(key)
    return info.shape[-1] if info is not None and info.shape else 0
