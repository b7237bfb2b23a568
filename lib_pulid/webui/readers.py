"""The models that read photos (face models and vision tower): loaded for a photo that is not in the cache, released
after use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib_pulid import catalog

if TYPE_CHECKING:
    from lib_pulid.faces import Face, FaceChoice, FaceModels
    from lib_pulid.identity import Identity
    from lib_pulid.photos import Encoders, IdentityCache
    from lib_pulid.vision import VisionTower
    from lib_pulid.weights import Adapter

FACE_FILES = {
    "detector": "scrfd_10g_bnkps.onnx",
    "recogniser": "glintr100.onnx",
    "landmarker": "detection_Resnet50_Final.pth",
    "parser": "parsing_bisenet.pth",
}
TOWER_FILE = "EVA02_CLIP_L_336_psz14_s6B.pt"


class Readers:
    """See the module.

    Args:
        device: gives their device. fingerprint: of a file's content.
    """

    def __init__(self, device: Callable[[], str], fingerprint: Callable[[Path], str]) -> None:
        self._device, self._fingerprint = device, fingerprint
        self._faces: FaceModels | None = None
        self._tower: VisionTower | None = None

    @property
    def loaded(self) -> bool:
        return self._faces is not None or self._tower is not None

    def encode(
        self,
        photos: Sequence[np.ndarray],
        adapter: Adapter,
        choice: FaceChoice,
        fusion: str,
        models_dir: Path,
        cache: IdentityCache,
        tell: Callable[[str], None],
    ) -> Identity:
        """Photos, uint8 RGB [H, W, 3], of one person -> Identity; see `photos.make_identity`."""
        from lib_pulid.photos import make_identity

        files = catalog.require_encoders(models_dir)
        return make_identity(
            list(photos),
            adapter,
            encoders=lambda: self._encoders(files, tell),
            encoders_id=catalog.fingerprint(files, self._fingerprint),
            cache=cache,
            choice=choice,
            fusion=fusion,
            on_face=lambda name, face: tell(f"{name} read"),
        )

    def read_face(self, photo: np.ndarray, choice: FaceChoice, name: str, models_dir: Path) -> Face:
        """One face, uint8 RGB [H, W, 3]; needs the face models only."""
        from lib_pulid.faces import read_face

        return read_face(photo, self._face_models(catalog.require_encoders(models_dir)), choice, name)

    def release(self) -> None:
        self._faces = self._tower = None

    def _encoders(self, files: dict[str, Path], tell: Callable[[str], None]) -> Encoders:
        from lib_pulid.photos import Encoders
        from lib_pulid.vision import load_vision_tower

        tell("loading the face models")
        faces = self._face_models(files)
        if self._tower is None:
            tell("loading the vision tower")
            self._tower = load_vision_tower(files[TOWER_FILE]).to(self._device())
        return Encoders(faces, self._tower)

    def _face_models(self, files: dict[str, Path]) -> FaceModels:
        from lib_pulid.face_models import FaceFiles, load_face_models

        if self._faces is None:
            paths = {kind: files[name] for kind, name in FACE_FILES.items()}
            self._faces = load_face_models(FaceFiles(**paths), self._device())
        return self._faces
