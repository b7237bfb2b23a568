"""Loads the encoders (face models and vision tower) for a photo that is not in the cache, and releases them after use.

If they do not fit into the GPU's memory, they run on the CPU until then.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lib_pulid.errors import is_out_of_memory
from lib_pulid.files import catalog, judges
from lib_pulid.likeness import Recognizer, SeenFace
from lib_pulid.methods import IMAGE_ENCODERS

if TYPE_CHECKING:
    from lib_pulid.clip_vision import ClipVision
    from lib_pulid.faces import Detector, Face, FaceChoice, FaceModels, Recogniser
    from lib_pulid.identity import Identity
    from lib_pulid.photos import Encoders, IdentityCache
    from lib_pulid.vision import VisionTower
    from lib_pulid.weights import Adapter

CPU = "cpu"
MOVED = "not enough GPU memory to read photos; they were read on the CPU, which takes longer."
Result = TypeVar("Result")


class Readers:
    """The encoders of photos.

    Args:
        device: returns their device. fingerprint: returns a hash of a file's content.
    """

    def __init__(self, device: Callable[[], str], fingerprint: Callable[[Path], str]) -> None:
        self._device, self._fingerprint = device, fingerprint
        self._faces: FaceModels | None = None
        self._tower: VisionTower | ClipVision | None = None
        self._loaded: dict[str, Any] = {}  # the files they were loaded from: methods need different ones
        self._seer: Detector | None = None
        self._judges: dict[Path, Recogniser] = {}
        self._moved = False  # to the CPU

    @property
    def loaded(self) -> bool:
        return any(model is not None for model in (self._faces, self._tower, self._seer)) or bool(self._judges)

    def encode(
        self,
        photos: Sequence[np.ndarray],
        adapter: Adapter,
        choice: FaceChoice,
        fusion: str,
        models_dir: Path,
        cache: IdentityCache,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
        judge: Recognizer | None = None,
    ) -> Identity:
        """Encodes photos of one person, uint8 RGB [H, W, 3]; see `photos.make_identity`."""
        from lib_pulid.photos import make_identity

        files = catalog.require_encoders(models_dir, adapter.method.reads)
        identity = self._where_memory_suffices(
            lambda: make_identity(
                list(photos),
                adapter,
                encoders=lambda: self._encoders(files, tell),
                encoders_id=catalog.fingerprint(files, self._fingerprint),
                cache=cache,
                choice=choice,
                fusion=fusion,
                on_face=lambda name, face: tell(f"{name} read"),
                recognizer=self._fingerprint(files["recogniser"]) if "recogniser" in files else "",
                judge=judge,
            ),
            warn,
        )
        for note in self._faces.notes if self._faces else ():
            warn(note)
        return identity

    def read_face(
        self, photo: np.ndarray, choice: FaceChoice, name: str, models_dir: Path, warn: Callable[[str], None]
    ) -> Face:
        """Reads one face of a photo, uint8 RGB [H, W, 3]; needs only the face models."""
        from lib_pulid.faces import read_face

        files = catalog.require_encoders(models_dir)
        return self._where_memory_suffices(lambda: read_face(photo, self._face_models(files), choice, name), warn)

    def judges(self, models_dir: Path) -> list[Recognizer]:
        """Returns what likeness can be measured with, the best first; loads nothing.

        buffalo_l's recognizer, if it is somewhere in the models folder, and the adapter's own.
        """
        own = catalog.require_encoders(models_dir)["recogniser"]
        found = judges.find(judges.BUFFALO, models_dir)
        keys = {self._fingerprint(path): path for path in (found, own) if path is not None}
        return [Recognizer(key, path.stem, path == own, partial(self._recogniser, path)) for key, path in keys.items()]

    def see(
        self, image: np.ndarray, judge: Recognizer, models_dir: Path, warn: Callable[[str], None]
    ) -> list[SeenFace]:
        """Finds the faces of an image, uint8 RGB [H, W, 3], and embeds them with a judge."""
        from lib_pulid.images import resize_long_edge

        bgr = np.ascontiguousarray(resize_long_edge(image)[:, :, ::-1])
        scale = max(image.shape[:2]) / max(bgr.shape[:2])

        def see() -> list[SeenFace]:
            detector, recogniser = self._detector(models_dir), judge.load()
            found = detector.detect(bgr)
            return [SeenFace(face.box * scale, np.asarray(recogniser.embed(bgr, face)).reshape(-1)) for face in found]

        return self._where_memory_suffices(see, warn)

    def release(self) -> None:
        self._faces = self._tower = self._seer = None
        self._judges.clear()
        self._loaded.clear()
        self._moved = False

    def _where_memory_suffices(self, work: Callable[[], Result], warn: Callable[[str], None]) -> Result:
        """Runs the work on the selected device, or on the CPU if memory runs out."""
        try:
            return work()
        except Exception as error:
            if self._place() == CPU or not is_out_of_memory(error):
                raise
        # Outside of the `except`: the exception keeps tensors alive.
        self.release()
        _free_memory()
        self._moved = True
        warn(MOVED)
        return work()

    def _place(self) -> str:
        return CPU if self._moved else self._device()

    def _encoders(self, files: dict[str, Path], tell: Callable[[str], None]) -> Encoders:
        from lib_pulid.photos import Encoders, load_image_encoder

        faces = None
        if "detector" in files:
            tell("loading the face models")
            faces = self._face_models(files)
        wanted = [files[role] for role in IMAGE_ENCODERS if role in files]
        if wanted and (self._tower is None or self._loaded.get("tower") != wanted):
            tell("loading the vision tower")
            self._tower, self._loaded["tower"] = None, wanted  # first, so that two are never in memory
            self._tower = load_image_encoder(files, self._place())
        return Encoders(faces, self._tower if wanted else None)

    def _face_models(self, files: dict[str, Path]) -> FaceModels:
        from lib_pulid.face_models import FaceFiles, load_face_models

        wanted = FaceFiles.among(files)
        if self._faces is None or self._loaded.get("faces") != wanted:
            self._faces = load_face_models(wanted, self._place())
            self._loaded["faces"] = wanted
        return self._faces

    def _detector(self, models_dir: Path) -> Detector:
        from lib_pulid import face_models

        if self._faces is not None:
            return self._faces.detector
        if self._seer is None:
            self._seer = face_models.load_detector(catalog.require_encoders(models_dir)["detector"], self._place())
        return self._seer

    def _recogniser(self, path: Path) -> Recogniser:
        from lib_pulid import face_models

        if path not in self._judges:
            self._judges[path] = face_models.load_recogniser(path, self._place())
        return self._judges[path]


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
