"""Makes an Identity from photos, and encodes each photo only once.

Runs `faces.py`, `readings.py` and `identity.py` in one call, and caches the result by the content of all its inputs:
the photos, the choice of face, the weights. A cached identity loads no encoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib_pulid.control import Pose
from lib_pulid.errors import IdentityMismatchError, WrongWeightsError
from lib_pulid.faces import LARGEST, Face, FaceChoice, FaceModels, read_face
from lib_pulid.identity import FILE_VERSION, Identity, check_fusion, encode_identity
from lib_pulid.images import ImageSource, load_image, thumbnail
from lib_pulid.likeness import Recognizer, mean_embedding
from lib_pulid.methods import IMAGE_ENCODERS
from lib_pulid.readings import FaceFeatures, read_features
from lib_pulid.weights import Adapter

if TYPE_CHECKING:
    from lib_pulid.clip_vision import ClipVision
    from lib_pulid.vision import VisionTower


@dataclass(frozen=True)
class Encoders:
    """The models between a photo and an identity encoder; None: the method needs none."""

    faces: FaceModels | None
    tower: VisionTower | ClipVision | None


def load_image_encoder(files: Mapping[str, Path], device: str) -> VisionTower | ClipVision | None:
    """Loads the image encoder that is among files by role; None if none is."""
    from lib_pulid import clip_vision, vision

    if "tower" in files:
        return vision.load_vision_tower(files["tower"]).to(device)
    path = next((files[role] for role in IMAGE_ENCODERS if role in files), None)
    return None if path is None else clip_vision.load_clip_vision(path, device)


def load_encoders(files: Mapping[str, Path], device: str = "cpu") -> Encoders:
    """Loads the models that are among files by role."""
    from lib_pulid.face_models import load_face_models

    faces = load_face_models(files, device) if "detector" in files else None
    return Encoders(faces, load_image_encoder(files, device))


class IdentityCache:
    """Caches identities by their inputs: recent ones in memory and, with a folder, all on disk (0.5 MB each)."""

    MOST_IN_MEMORY = 64

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._memory: dict[str, Identity] = {}

    def get(self, key: str) -> Identity | None:
        """Returns the identity stored under `key`, or None. A damaged file counts as None."""
        if key not in self._memory and self._folder is not None:
            try:
                self._remember(key, Identity.load(self._folder / f"{key}.safetensors"))
            except IdentityMismatchError:
                return None
        return self._memory.get(key)

    def put(self, key: str, identity: Identity) -> None:
        self._remember(key, identity)
        if self._folder is not None:
            with contextlib.suppress(OSError):  # a full or read-only disk: it stays in memory
                identity.save(self._folder / f"{key}.safetensors", replace=True)

    def _remember(self, key: str, identity: Identity) -> None:
        self._memory[key] = identity
        while len(self._memory) > self.MOST_IN_MEMORY:
            self._memory.pop(next(iter(self._memory)), None)


def make_identity(
    photos: Sequence[ImageSource],
    adapter: Adapter,
    *,
    encoders: Callable[[], Encoders],
    encoders_id: str,
    cache: IdentityCache,
    choice: FaceChoice = LARGEST,
    fusion: str = "official",
    on_face: Callable[[str, Face], None] = lambda name, face: None,
    recognizer: str = "",
    judge: Recognizer | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Identity:
    """Makes the identity of one person, or takes it from the cache.

    Args:
        photos: of one person, the main one first; anything `images.load_image` reads.
        encoders: returns the models; called only if the cache does not have the identity.
        encoders_id: identifies their weights.
        choice: which face of each photo. fusion: see `identity.encode_identity`.
        on_face: called with each photo's name and face as it is read.
        recognizer: the hash of the models' recognizer's file, under which its embedding is kept; "": not at all.
        judge: the recognizer that likeness will be measured with; a cached identity without its embedding gets it, as
            it gets its pose where the method has a use for it. Without effect for a method that reads no faces.
        warn: called with notes for the user.

    Raises:
        ImageError, NoFaceError: the message names the photo.
    """
    check_fusion(fusion, adapter, len(photos))
    names = [Path(p).name if isinstance(p, (str, Path)) else f"photo {i}" for i, p in enumerate(photos, 1)]
    images = [load_image(photo, name) for photo, name in zip(photos, names)]
    key = identity_key(images, adapter, encoders_id=encoders_id, choice=choice, fusion=fusion)
    known, wants_pose = cache.get(key), bool(adapter.method.control)
    if judge is not None and (not adapter.method.reads_faces or (known is not None and judge.key in known.embeddings)):
        judge = None  # it has nothing to do
    if known is not None and (known.pose or not wants_pose) and (judge is None or _judged(judge, (), warn) is None):
        return known
    models = encoders()
    faces: list[Face] = []
    if models.faces is not None:
        for name, image in zip(names, images):
            faces.append(read_face(image, models.faces, choice, name, adapter.method.longest))
            on_face(name, faces[-1])
    embeddings = {recognizer: mean_embedding([face.embedding for face in faces])} if recognizer and faces else {}
    if judge is not None and judge.key not in embeddings and faces:
        embeddings |= _judged(judge, faces, warn) or {}
    pose = _pose(faces[0]) if faces and wants_pose else None
    if known is not None:
        identity = replace(known, embeddings={**known.embeddings, **embeddings}, pose=pose)
    else:
        identity = encode_identity(
            _checked(read_features(images, faces, adapter.method, models.tower), adapter),
            adapter,
            fusion=fusion,
            thumbnail=thumbnail(faces[0].aligned if faces else images[0], 128) if images else None,
            embeddings=embeddings,
            pose=pose,
        )
    cache.put(key, identity)
    return identity


def _pose(face: Face) -> Pose:
    height, width = face.photo_bgr.shape[:2]
    return Pose(np.asarray(face.detection.landmarks, dtype=np.float32), (width, height))


def _judged(judge: Recognizer, faces: Sequence[Face], warn: Callable[[str], None]) -> dict[str, np.ndarray] | None:
    """Embeds the photos' faces with the judge; without faces, only loads it. None: it failed, which costs its number,
    and not the person."""
    try:
        recogniser = judge.load()
        each = [recogniser.embed(face.photo_bgr, face.detection) for face in faces]
        return {judge.key: mean_embedding(each)} if each else {}
    except Exception as error:  # a damaged file, a lack of memory, anything of onnxruntime
        warn(f"{judge.name} cannot be used to measure likeness ({error}).")
        return None


def _checked(photos: list[FaceFeatures], adapter: Adapter) -> list[FaceFeatures]:
    """Raises WrongWeightsError where CLIP's width is not the one that the projector was made for."""
    for photo in photos:
        seen = photo.patches if photo.image is None else photo.image
        if seen is not None and seen.shape[-1] != adapter.encoder.input_dim:
            raise WrongWeightsError(
                f"The CLIP image encoder gives {seen.shape[-1]} numbers, but {adapter.path.name} needs "
                f"{adapter.encoder.input_dim}: it is another CLIP. {adapter.label} needs the one of h94/IP-Adapter."
            )
    return photos


def identity_key(
    images: Sequence[np.ndarray], adapter: Adapter, *, encoders_id: str, choice: FaceChoice, fusion: str
) -> str:
    """Hashes all that an identity depends on. images: uint8 RGB [H, W, 3]."""
    digest = hashlib.sha256()
    settings = [adapter.fingerprint, encoders_id, choice.order, choice.index, fusion, FILE_VERSION]
    digest.update(json.dumps(settings).encode())
    for image in images:
        digest.update(repr(image.shape).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()[:32]
