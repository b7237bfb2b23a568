"""Opens the judges: recognizers that say whether two faces are the same person, and what drawn images show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lib_pulid import disk
from lib_pulid.disk import fingerprint
from lib_pulid.errors import MissingWeightsError, PulidError, SettingError, WrongWeightsError
from lib_pulid.face_models import ArcFaceRecogniser
from lib_pulid.faces import Detection, Recogniser
from lib_pulid.files.places import FACENET, JUDGE, find_judge
from lib_pulid.judge import Reading

OWN = "the adapter's own"  # makes the identities; it overestimates, since the adapter was trained with it
HOW_TO_GET = (
    f"Give --judge with the path of {JUDGE} (from insightface's buffalo_l), or --judge facenet=FILE with that of "
    f"facenet-pytorch's {FACENET}."
)


@dataclass(frozen=True)
class FaceJudge:
    """A recognizer with a name. read: reads a face of an image, uint8 RGB [H, W, 3]."""

    name: str
    read: Callable[[np.ndarray, Detection], Reading]


def by_recogniser(name: str, recogniser: Recogniser) -> FaceJudge:
    """Returns an ArcFace recognizer as a judge: the adapter's own, or another."""

    def read(image: np.ndarray, face: Detection) -> Reading:
        return Reading(np.asarray(recogniser.embed(np.ascontiguousarray(image[:, :, ::-1]), face), np.float32), {})

    return FaceJudge(name, read)


def open_facenet(path: Path, device: str = "cpu") -> FaceJudge:
    """Opens facenet-pytorch's InceptionResnetV1, which sees the face's box at 160 x 160, as its MTCNN crops it with
    margin 0."""
    from lib_pulid.files.state_dict import read_state_dict

    try:
        from facenet_pytorch import InceptionResnetV1
    except ImportError as error:
        raise PulidError(
            f"--judge facenet needs facenet-pytorch, which cannot be imported ({error}): "
            "pip install --no-deps facenet-pytorch"
        ) from error
    state = {key: value for key, value in read_state_dict(path).items() if not key.startswith("logits.")}
    network = InceptionResnetV1(pretrained=None, classify=False)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WrongWeightsError(f"{path.name} is not facenet-pytorch's InceptionResnetV1. ({error})"[:400]) from error
    network = network.eval().to(device)

    def read(image: np.ndarray, face: Detection) -> Reading:
        import cv2
        import torch

        height, width = image.shape[:2]
        x0, y0, x1, y1 = (int(value) for value in face.box)
        part = image[max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)]
        part = part if part.size else image
        seen = cv2.resize(part, (160, 160), interpolation=cv2.INTER_AREA).astype(np.float32)
        data = torch.from_numpy((seen.transpose(2, 0, 1)[None] - 127.5) / 128).to(device)
        with torch.no_grad():
            return Reading(network(data)[0].float().cpu().numpy(), {})

    return FaceJudge("facenet vggface2" if path.name == FACENET else path.stem, read)


def open_judges(names: Sequence[str], own: Path | None, models_dir: Path, device: str) -> list[FaceJudge]:
    """Opens the judges that a user names: "facenet", "facenet=FILE" or an ONNX file; without names, those it finds.

    Args:
        own: the file of the adapter's own recognizer, which is refused.
    """
    if not names:
        buffalo, facenet = (find_judge(name, models_dir) for name in (JUDGE, FACENET))
        names = [str(buffalo)] * (buffalo is not None)
        names += [f"facenet={facenet}"] * (facenet is not None and find_spec("facenet_pytorch") is not None)
    return [_open(name, own, models_dir, device) for name in dict.fromkeys(names)]


def _open(name: str, own: Path | None, models_dir: Path, device: str) -> FaceJudge:
    kind, _, file = name.partition("=")
    if kind == "facenet":
        path = disk.user_path(file) if file else find_judge(FACENET, models_dir)
        if path is None:
            raise MissingWeightsError(f"{FACENET} was not found in any of its usual folders. {HOW_TO_GET}")
        return open_facenet(path, device)
    path = disk.user_path(name)
    if not disk.is_file(path):
        raise MissingWeightsError(f"No judge at {path}. {HOW_TO_GET}")
    if own is not None and fingerprint(path) == fingerprint(own):
        raise SettingError(
            f"--judge {path.name} is the adapter's own recognizer, which overestimates likeness and is always "
            f"measured. {HOW_TO_GET}"
        )
    return by_recogniser(path.stem, ArcFaceRecogniser(path, device))
