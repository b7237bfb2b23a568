"""Reads photos: loads the encoders (face models and image encoder) for one that is not in the cache, and releases them.

If they do not fit into the GPU's memory, they run on the CPU until they are released.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lib_pulid.errors import Interrupted, is_out_of_memory
from lib_pulid.files import catalog, places
from lib_pulid.likeness import Recognizer, SeenFace
from lib_pulid.methods import IMAGE_ENCODERS
from lib_pulid.stores.folder import ModelsFolder
from lib_pulid.stores.identities import Identities
from lib_pulid.stores.interruptible import Interruptible

if TYPE_CHECKING:
    from lib_pulid.clip_vision import ClipVision
    from lib_pulid.faces import Detector, Face, FaceChoice, FaceModels, Recogniser
    from lib_pulid.identity import Identity
    from lib_pulid.photos import Encoders
    from lib_pulid.vision import VisionTower
    from lib_pulid.weights import Adapter

CPU = "cpu"
MOVED = "not enough GPU memory to read photos; they were read on the CPU, which takes longer."
Result = TypeVar("Result")


@dataclass(frozen=True)
class Listener:
    """Whoever waits for photos to be read.

    Args:
        tell: is called with the progress. warn: is called with notes for the user.
        stop: whether to abandon the work, polled several times a second; None: never, and no thread is started.
    """

    tell: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] | None = None


NOBODY = Listener()


class EncoderPool:
    """The encoders of photos in a models folder."""

    def __init__(self, folder: ModelsFolder, identities: Identities) -> None:
        self._folder, self._identities = folder, identities
        self._lock = threading.RLock()
        self._work = Interruptible()
        self._models: dict[Any, tuple[Any, Any]] = {}  # by kind: the files it was loaded from, and the model
        self._moved = False  # to the CPU

    def encode(
        self,
        photos: Sequence[np.ndarray],
        adapter: Adapter,
        choice: FaceChoice,
        fusion: str,
        judge: Recognizer | None = None,
        listener: Listener = NOBODY,
    ) -> Identity:
        """Encodes photos of one person, uint8 RGB [H, W, 3], each set of photos once; see `photos.make_identity`.

        Raises:
            ImageError, NoFaceError, MissingWeightsError, WrongWeightsError, SettingError.
            Interrupted: `listener.stop` returned True.
        """

        from lib_pulid.photos import make_identity

        cache = self._identities.cache
        make = partial(make_identity, photos, adapter, cache=cache, choice=choice, fusion=fusion, judge=judge)

        def work(is_left: Callable[[], bool]) -> Identity:
            def tell(text: str) -> None:
                if is_left():
                    raise Interrupted(text)
                listener.tell(text)

            with self._lock:
                try:
                    return self._make(make, adapter.method.reads, tell, listener.warn)
                finally:
                    if is_left():
                        self._release()

        return work(lambda: False) if listener.stop is None else self._work.run(work, listener.stop)

    def _make(
        self, make: partial[Identity], reads: Sequence[str], tell: Callable[[str], None], warn: Callable[[str], None]
    ) -> Identity:
        """Calls `make_identity` with what the models folder has. reads: the roles of the files, see `Method`."""
        files = catalog.require_encoders(self._folder.models_dir, reads)
        identity = self._where_memory_suffices(
            lambda: make(
                encoders=lambda: self._encoders(files, tell),
                encoders_id=catalog.fingerprint(files, self._folder.fingerprint),
                on_face=lambda name, face: tell(f"{name} read"),
                recognizer=self._folder.fingerprint(files["recogniser"]) if "recogniser" in files else "",
                warn=warn,
            ),
            warn,
        )
        if "faces" in self._models:
            for note in self._models["faces"][1].notes:
                warn(note)
        return identity

    def settle(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits for photos that are still being read after an interrupt, or until `stop` returns True."""
        self._work.settle(stop)

    def read_face(
        self, photo: np.ndarray, choice: FaceChoice, name: str, warn: Callable[[str], None] = lambda text: None
    ) -> Face:
        """Reads the face of one photo, uint8 RGB [H, W, 3], for a preview; needs only the face models.

        Raises:
            NoFaceError, MissingWeightsError, WrongWeightsError.
        """
        from lib_pulid.faces import read_face

        with self._lock:
            files = catalog.require_encoders(self._folder.models_dir)
            return self._where_memory_suffices(lambda: read_face(photo, self._face_models(files), choice, name), warn)

    def judges(self) -> list[Recognizer]:
        """Returns what likeness can be measured with, see `recognizers`. Loads no model, but hashes up to 435 MB the
        first time.

        Raises:
            MissingWeightsError, WrongWeightsError: antelopev2 is not there, or a recognizer cannot be read.
        """
        with self._lock:
            own = catalog.require_encoders(self._folder.models_dir, ("detector", "recogniser"))["recogniser"]
            return recognizers(own, self._folder, self._recogniser)

    def see(
        self, image: np.ndarray, judge: Recognizer, warn: Callable[[str], None] = lambda text: None
    ) -> list[SeenFace]:
        """Finds the faces of an image, uint8 RGB [H, W, 3], and embeds them with a judge.

        Raises:
            MissingWeightsError, WrongWeightsError.
        """
        from lib_pulid.images import resize_long_edge

        bgr = np.ascontiguousarray(resize_long_edge(image)[:, :, ::-1])
        scale = max(image.shape[:2]) / max(bgr.shape[:2])

        def see() -> list[SeenFace]:
            detector, recogniser = self._detector(), judge.load()
            found = detector.detect(bgr)
            return [SeenFace(face.box * scale, np.asarray(recogniser.embed(bgr, face)).reshape(-1)) for face in found]

        with self._lock:
            return self._where_memory_suffices(see, warn)

    def release(self) -> None:
        """Releases the encoders unless the settings keep them; after an interrupt, once their work is done."""
        if not self._work.is_busy:
            with self._lock:
                self._release()

    def _release(self) -> None:
        if not self._folder.settings.keep_encoders:
            self._forget()

    def _forget(self) -> None:
        self._models.clear()
        self._moved = False

    def _where_memory_suffices(self, work: Callable[[], Result], warn: Callable[[str], None]) -> Result:
        """Runs the work on the selected device, or on the CPU if memory runs out."""
        try:
            return work()
        except Exception as error:
            if self._place() == CPU or not is_out_of_memory(error):
                raise
        # Outside of the `except`: the exception keeps tensors alive.
        self._forget()
        _empty_caches()
        self._moved = True
        warn(MOVED)
        return work()

    def _place(self) -> str:
        return CPU if self._moved else self._folder.settings.device

    def _kept(self, kind: Any, files: Any, load: Callable[[], Any]) -> Any:
        """Loads a model once. Methods need different files of a kind; only the last one is kept."""
        if kind not in self._models or self._models[kind][0] != files:
            self._models.pop(kind, None)  # first, so that two are never in memory
            self._models[kind] = files, load()
        return self._models[kind][1]

    def _encoders(self, files: dict[str, Path], tell: Callable[[str], None]) -> Encoders:
        from lib_pulid.photos import Encoders, load_image_encoder

        def load() -> VisionTower | ClipVision | None:
            tell("loading the vision tower")
            return load_image_encoder(files, self._place())

        faces = None
        if "detector" in files:
            tell("loading the face models")
            faces = self._face_models(files)
        wanted = [files[role] for role in IMAGE_ENCODERS if role in files]
        return Encoders(faces, self._kept("tower", wanted, load) if wanted else None)

    def _face_models(self, files: dict[str, Path]) -> FaceModels:
        from lib_pulid.face_models import load_face_models

        wanted = {role: path for role, path in files.items() if role not in IMAGE_ENCODERS}
        return self._kept("faces", wanted, lambda: load_face_models(wanted, self._place()))

    def _detector(self) -> Detector:
        from lib_pulid.face_models import InsightFaceDetector

        if "faces" in self._models:
            return self._models["faces"][1].detector
        path = catalog.require_encoders(self._folder.models_dir, ("detector",))["detector"]
        return self._kept("detector", path, lambda: InsightFaceDetector(path, self._place()))

    def _recogniser(self, path: Path) -> Recogniser:
        from lib_pulid.face_models import ArcFaceRecogniser

        return self._kept(("judge", path), path, lambda: ArcFaceRecogniser(path, self._place()))


def recognizers(own: Path | None, folder: ModelsFolder, load: Callable[[Path], Recogniser]) -> list[Recognizer]:
    """Returns what likeness can be measured with, the best first: buffalo_l's recognizer, if it is somewhere in the
    models folder, and the adapter's own. own: its file. load: loads one from its file."""
    found = places.find_judge(places.JUDGE, folder.models_dir)
    keys = {folder.fingerprint(path): path for path in (found, own) if path is not None}
    return [Recognizer(key, path.stem, path == own, partial(load, path)) for key, path in keys.items()]


def _empty_caches() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
