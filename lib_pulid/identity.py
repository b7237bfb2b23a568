"""Encodes faces as an Identity: the tokens that a denoiser attends to in place of a photo.

    Face --vision tower--> FaceFeatures --identity encoder--> Identity

Formulas: official `get_id_embedding` in `pulid/pipeline.py`, `pipeline_v1_1.py`, `pipeline_flux.py`, and `run`
in `app.py` for several photos (commit 1aa2fc7). An Identity can be saved; using it later needs neither photo nor
encoders.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib_pulid import __version__, disk
from lib_pulid.control import Pose
from lib_pulid.encoders import SCALES, IDFormer
from lib_pulid.errors import IdentityMismatchError, SettingError, WrongWeightsError
from lib_pulid.files import pulidembd
from lib_pulid.files.state_dict import read_safetensors
from lib_pulid.readings import FaceFeatures, together
from lib_pulid.weights import Adapter

if TYPE_CHECKING:
    import numpy as np

FUSIONS = ("official", "id_mix", "average")
FILE_FORMAT = "sd-webui-pulid identity"
FILE_VERSION = "1"
LARGEST_FILE = 100_000_000  # bytes; the identity of one photo takes 0.5 MB
_EMBEDDING = "embedding."  # begins the names of these tensors in a file; the recognizer's hash follows
_POSE = "pose"  # [6, 2] float32: five landmarks, and the photo's width and height
HIDDEN_TOKENS = 577  # of the vision tower: 24 x 24 patches and the class token
# `Identity.info` of a `.pulidembd`.
_FOREIGN = {"format": FILE_FORMAT, "version": FILE_VERSION, "adapter": "PuLID for FLUX", "made_by": pulidembd.SUFFIX}


@dataclass(frozen=True, eq=False)
class Identity:
    """One person, as encoded by an adapter.

    Args:
        cond: [1, N, D] float32, tokens for conditional rows (N 10 per photo in v1, 32 in v1.1 and FLUX; D 2048).
        uncond: [1, N, D], for unconditional rows: the encoder run on zeros. None leaves those rows untouched.
        info: its origin, all text: "adapter", "encoder" (its fingerprint), "photos", "fusion", "made_by", "name".
        thumbnail: uint8 RGB [h, w, 3], the aligned face, for lists; or None.
        embeddings: [512] float32 of the photos by a recognizer, by the hash of its file; to measure likeness with.
        pose: of the main photo's face, if the method has a use for it.
    """

    cond: Tensor
    uncond: Tensor | None = None
    info: Mapping[str, str] = field(default_factory=dict)
    thumbnail: np.ndarray | None = None
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict)
    pose: Pose | None = None

    def __post_init__(self) -> None:
        for name, tokens in (("cond", self.cond), ("uncond", self.uncond)):
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[0] != 1):
                raise SettingError(f"Identity.{name} has shape {list(tokens.shape)}; it has to be [1, N, D]")
            if tokens is not None and not tokens.numel():
                raise SettingError(f"Identity.{name} is empty, {list(tokens.shape)}: nobody would be in the image")
        if self.uncond is not None and self.uncond.shape != self.cond.shape:
            raise SettingError("Identity.cond and Identity.uncond have different shapes")

    @property
    def rows(self) -> Tensor:
        """[R, N, D]: the tokens for conditional rows and, if there are any, those for unconditional ones."""
        return torch.cat([tokens for tokens in (self.cond, self.uncond) if tokens is not None])

    @property
    def family(self) -> str:
        """The family of the PuLID file that made it, "sdxl" or "flux"; "" if it is not known."""
        family = self.info.get("adapter", "").rpartition(" for ")[2].lower()
        return family if family in ("sdxl", "flux") else ""

    @property
    def short_hash(self) -> str:
        """Ten hex digits of the tokens' hash."""
        return hashlib.sha256(self.cond.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:10]

    def save(self, path: str | Path, replace: bool = False) -> Path:
        """Writes a safetensors file, or a `.pulidembd` if the name ends so. Returns its path; see `disk.write`.

        Raises:
            SettingError: the file exists, and `replace` is not set. StorageError: it cannot be written.
        """
        if Path(path).suffix.lower() == pulidembd.SUFFIX:
            return disk.write(path, self.as_pulidembd(), replace=replace)
        from safetensors.torch import save

        tensors = {"cond": self.cond.detach().cpu().float().contiguous()}
        if self.uncond is not None:
            tensors["uncond"] = self.uncond.detach().cpu().float().contiguous()
        if self.thumbnail is not None:
            tensors["thumbnail"] = torch.from_numpy(self.thumbnail.copy())
        # Programs of earlier versions skip tensors that they do not know.
        tensors |= {_EMBEDDING + key: torch.from_numpy(value.copy()) for key, value in self.embeddings.items()}
        if self.pose is not None:
            tensors[_POSE] = torch.tensor([*self.pose.landmarks.tolist(), self.pose.photo], dtype=torch.float32)
        metadata = {**self.info, "format": FILE_FORMAT, "version": FILE_VERSION}
        path = disk.write(path, save(tensors, metadata), replace=replace)
        _sweep(path.parent)
        return path

    def as_pulidembd(self) -> bytes:
        """Returns the content of a `.pulidembd`. Raises: SettingError: the identity is not for FLUX."""
        if self.family not in ("", "flux"):
            raise SettingError(
                f"{pulidembd.SUFFIX} is for FLUX, but this identity was made with {self.info['adapter']}. "
                "Make it with a PuLID file for FLUX."
            )
        return pulidembd.pack(self.cond[0].detach().cpu().float().numpy())

    @classmethod
    def load(cls, path: str | Path) -> Identity:
        """Reads a file written by `save`, or stable-diffusion.cpp's `.pulidembd`.

        Raises:
            IdentityMismatchError: it is missing, damaged, of a later version, or not a saved identity.
        """
        path = Path(path)
        tensors, info = _read(path)
        if info.pop("format", None) != FILE_FORMAT or "cond" not in tensors:
            raise IdentityMismatchError(f"{path.name} is not a saved identity.")
        if info.pop("version", None) != FILE_VERSION:
            raise IdentityMismatchError(f"{path.name} was written by a later version of sd-webui-pulid. Update it.")
        try:
            thumbnail = _array(tensors.get("thumbnail"), torch.uint8, None, None, 3)
            embeddings = {
                name.removeprefix(_EMBEDDING): value
                for name, tensor in tensors.items()
                if name.startswith(_EMBEDDING) and (value := _array(tensor, torch.float32, None)) is not None
            }
            points = _array(tensors.get(_POSE), torch.float32, 6, 2)
            pose = None
            if points is not None and points[5].min() >= 1:
                pose = Pose(points[:5], (int(points[5, 0]), int(points[5, 1])))
            cond, uncond = (_tokens(tensors.get(name)) for name in ("cond", "uncond"))
            identity = cls(cond, uncond, info, thumbnail, embeddings, pose)  # type: ignore[arg-type]
        except SettingError as error:
            raise IdentityMismatchError(f"{path.name} is damaged: {error}") from error
        if problem := _problem(identity):
            raise IdentityMismatchError(f"{path.name} is damaged: its tokens {problem}.")
        return identity


def _tokens(tensor: Tensor | None) -> Tensor | None:
    """Returns tokens as float32: another program may have saved the file anew in half precision."""
    return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor


def _problem(identity: Identity) -> str:
    """Says what is wrong with the tokens' values; "" if nothing is."""
    for tokens in (identity.cond, identity.uncond):
        if tokens is not None and tokens.dtype != torch.float32:
            return f"are {str(tokens.dtype).removeprefix('torch.')}, not float"
        if tokens is not None and not torch.isfinite(tokens).all():
            return "contain NaN or infinity"
    return "" if identity.cond.any() else "are all 0, so there is nobody in it"


def _array(tensor: Tensor | None, dtype: torch.dtype, *shape: int | None) -> np.ndarray | None:
    """Returns what an identity works without: None if it has another dtype or shape (None: any), or is not finite."""
    if tensor is None or tensor.dtype != dtype or tensor.ndim != len(shape) or not tensor.numel():
        return None
    fits = all(wanted in (None, length) for wanted, length in zip(shape, tensor.shape))
    return tensor.numpy() if fits and torch.isfinite(tensor).all() else None


def _sweep(folder: Path) -> None:
    """Removes temporary files of killed processes. No write takes an hour."""
    for left in disk.listed(folder):
        if left.match(".*.safetensors.*.tmp"):
            with contextlib.suppress(OSError):  # another process was faster
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not disk.is_file(path):
        raise IdentityMismatchError(f"The saved identity {path.name} was not found in {path.parent}.")
    if disk.size_of(path) > LARGEST_FILE:
        raise IdentityMismatchError(f"{path.name} is not a saved identity: it is too large.")
    try:
        with path.open("rb") as file:
            if file.read(4) == pulidembd.MAGIC:
                return {"cond": torch.from_numpy(pulidembd.unpack(path.read_bytes()))[None]}, dict(_FOREIGN)
        return read_safetensors(path)
    except OSError as error:
        raise IdentityMismatchError(disk.why_unreadable(path, error)) from error
    except Exception as error:  # any exception of the reader means a bad file
        raise IdentityMismatchError(f"{path.name} is not a saved identity, or is damaged ({error}).") from error


# ---------------------------------------------------------------- Faces -> Identity


@torch.no_grad()
def encode_identity(
    photos: Sequence[FaceFeatures],
    adapter: Adapter,
    *,
    fusion: str = "official",
    thumbnail: np.ndarray | None = None,
    embeddings: Mapping[str, np.ndarray] | None = None,
    pose: Pose | None = None,
) -> Identity:
    """Encodes one or several photos of a person as one identity, on the encoder's device.

    Args:
        photos: the main photo first.
        fusion: "official": v1 keeps all tokens of the main photo and the first five of the others; v1.1
            and FLUX encode all photos in one pass; FaceID Portrait keeps all tokens; other methods take one photo.
            "id_mix" (v1 only): all tokens of all photos, to blend two people. "average": the mean of each photo's own
            tokens, which is no method's official way.
        thumbnail, embeddings, pose: stored with the identity.

    Raises:
        SettingError: there is no photo, or the method does not support this fusion with this number of photos.
        WrongWeightsError: the encoder returns NaN or infinity.
    """
    check_fusion(fusion, adapter, len(photos))
    if not photos:
        raise SettingError("an identity needs at least one photo")
    device = next(adapter.encoder.parameters()).device
    photos = [photo.to(device) for photo in photos]
    several = adapter.method.several
    if fusion == "average":
        each = [_encode(adapter, photo) for photo in photos]
        cond, uncond = (torch.stack(tokens).mean(0) for tokens in zip(*each))
    elif several == "together":
        cond, uncond = _encode(adapter, together(photos))
    else:
        first, *others = [_encode(adapter, photo) for photo in photos]
        keep = adapter.encoder.num_token if several == "first" and fusion != "id_mix" else None
        cond, uncond = (torch.cat([one, *(t[:, :keep] for t in rest)], dim=1) for one, *rest in zip(first, *others))
    if not (torch.isfinite(cond).all() and torch.isfinite(uncond).all()):
        raise WrongWeightsError(
            "An encoder returned NaN or infinity, so its file is damaged: the vision tower, the face recognizer, or "
            f"{adapter.path.name}. Delete it and download it again."
        )
    info = {"adapter": adapter.label, "encoder": adapter.fingerprint, "photos": str(len(photos)), "fusion": fusion}
    info["made_by"] = f"sd-webui-pulid {__version__}"
    return Identity(cond.cpu().float(), uncond.cpu().float(), info, thumbnail, embeddings or {}, pose)


def check_fusion(fusion: str, adapter: Adapter, photos: int = 1) -> None:
    """Checks, before any photo is read, that the adapter's method supports a fusion. photos: how many there are.

    Raises:
        SettingError.
    """
    if fusion not in FUSIONS:
        raise SettingError(f"fusion is {fusion!r}; it has to be one of {', '.join(FUSIONS)}")
    if fusion == "id_mix" and adapter.method.several != "first":
        raise SettingError(f"fusion id_mix works with PuLID v1 only, but the loaded file is {adapter.label}")
    if fusion == "official" and photos > 1 and not adapter.method.several:
        raise SettingError(
            f"{adapter.method.name} has no official way to use several photos of a person. Give one photo, or set "
            "fusion to average"
        )


def _encode(adapter: Adapter, photo: FaceFeatures) -> tuple[Tensor, Tensor]:
    """Encodes a photo, and nobody in the place of one photo: cond and uncond tokens, each [1, N, D]."""
    cond, uncond = (adapter.encoder(*given(adapter.method)) for given in (photo.inputs, photo.nobody))
    return cond, uncond


@torch.no_grad()
def with_uncond(identity: Identity, adapter: Adapter) -> Identity:
    """Adds uncond tokens to an identity from a `.pulidembd`, which has none: the encoder run on zeros, the same for
    every photo. Returns other identities unchanged."""
    if identity.uncond is not None or identity.info.get("made_by") != pulidembd.SUFFIX:
        return identity
    if not isinstance(adapter.encoder, IDFormer) or adapter.encoder.output_dim != identity.cond.shape[-1]:
        return identity  # compile_injection reports what does not fit
    like = next(adapter.encoder.parameters())
    id_width, hidden_width = (
        adapter.encoder.get_parameter(f"{name}.0.weight").shape[1] for name in ("id_embedding_mapping", "mapping_0")
    )
    id_cond, hidden = like.new_zeros(1, id_width), like.new_zeros(1, HIDDEN_TOKENS, hidden_width)
    uncond = adapter.encoder(id_cond, [hidden] * SCALES).cpu().float()
    return replace(identity, uncond=uncond) if uncond.shape == identity.cond.shape else identity
