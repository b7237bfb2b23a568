"""The real models behind the protocols of faces.py, read from files, never downloaded; and a detector without any.

insightface: SCRFD and ArcFace (ONNX). facexlib: RetinaFace-ResNet50 and BiSeNet. OpenCV: Haar cascades, for the demo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lib_pulid.errors import MissingWeightsError, PulidError, WrongWeightsError
from lib_pulid.faces import CROP_LANDMARKS, CROP_SIZE, Detection, FaceModels, box_overlaps, normalise, to_tensor

if TYPE_CHECKING:
    import torch

CPU_ONLY = ("CPUExecutionProvider",)

# The official size first. A face that fills the picture is larger than what SCRFD was trained on; at a smaller input
# it is found: the retries are those of cubiq/PuLID_ComfyUI.
DETECTION_SIZES = (640, 576, 512, 448, 384, 320, 256)
DETECTION_THRESHOLD = 0.5  # insightface's FaceAnalysis.prepare
LANDMARK_THRESHOLD = 0.97  # facexlib's FaceRestoreHelper.get_face_landmarks_5
EMBEDDING_SIZE = 512
PARSER_MEAN = (0.485, 0.456, 0.406)  # pulid/pipeline_v1_1.py, 1aa2fc7: ImageNet's
PARSER_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FaceFiles:
    """Where the four files are. Without a landmarker, crops are aligned by the detector's own landmarks."""

    detector: Path  # scrfd_10g_bnkps.onnx
    recogniser: Path  # glintr100.onnx
    landmarker: Path | None  # detection_Resnet50_Final.pth
    parser: Path  # parsing_bisenet.pth


def load_face_models(files: FaceFiles, device: str = "cpu") -> FaceModels:
    """Load all four models; MissingWeightsError or WrongWeightsError names the file that is at fault."""
    for field in fields(files):  # all of them before any is loaded, which takes seconds
        path = getattr(files, field.name)
        if path is not None:
            _require_file(Path(path), f"the face {field.name}")
    providers = onnx_providers(device)
    return FaceModels(
        detector=InsightFaceDetector(files.detector, providers),
        recogniser=ArcFaceRecogniser(files.recogniser, providers),
        landmarker=None if files.landmarker is None else RetinaFaceLandmarker(files.landmarker, device),
        parser=BiSeNetParser(files.parser, device),
    )


def onnx_providers(device: str) -> tuple[str, ...]:
    """ONNX Runtime's providers for a torch device; its CPU where it was installed without CUDA."""
    if not str(device).startswith("cuda"):
        return CPU_ONLY
    import onnxruntime

    wanted = ("CUDAExecutionProvider", *CPU_ONLY)
    return tuple(name for name in wanted if name in onnxruntime.get_available_providers())


class InsightFaceDetector:
    """SCRFD, with the results of insightface's FaceAnalysis(det_size=(640, 640)) where that finds anything.

    Not FaceAnalysis itself: it loads every model of a folder, and needs that folder in a layout of its own.
    """

    def __init__(self, path: str | Path, providers: Sequence[str] = CPU_ONLY) -> None:
        self._model = _load_onnx(Path(path), providers, "detection", "a face detector (SCRFD)")
        if not self._model.use_kps:
            raise WrongWeightsError(
                f"{Path(path).name} is a face detector without landmarks; scrfd_10g_bnkps.onnx is needed."
            )
        self._model.prepare(ctx_id=0, input_size=(640, 640), det_thresh=DETECTION_THRESHOLD)
        # A file of fixed input size cannot be run at another.
        self._sizes = (None,) if isinstance(self._model.input_shape[2], int) else DETECTION_SIZES

    def detect(self, image_bgr: np.ndarray) -> list[Detection]:
        """image_bgr: uint8 BGR [H, W, 3]."""
        if max(image_bgr.shape[:2]) > 256 * min(image_bgr.shape[:2]):
            return []  # insightface would reduce such a strip to no pixels at all
        for size in self._sizes:
            boxes, landmarks = self._model.detect(image_bgr, input_size=size and (size, size))
            if len(boxes):
                return [Detection(box[:4], points, float(box[4])) for box, points in zip(boxes, landmarks)]
        return []


class ArcFaceRecogniser:
    """ArcFace (antelopev2's glintr100), through insightface's own alignment and preprocessing."""

    def __init__(self, path: str | Path, providers: Sequence[str] = CPU_ONLY) -> None:
        self._model = _load_onnx(Path(path), providers, "recognition", "a face recogniser (ArcFace)")
        size = self._model.output_shape[-1]
        if isinstance(size, int) and size != EMBEDDING_SIZE:
            raise WrongWeightsError(f"{Path(path).name} gives {size} numbers per face, not {EMBEDDING_SIZE}.")
        self._model.prepare(ctx_id=0)

    def embed(self, image_bgr: np.ndarray, detection: Detection) -> np.ndarray:
        """image_bgr: uint8 BGR [H, W, 3] -> [512] float32."""
        return self._model.get(image_bgr, SimpleNamespace(kps=detection.landmarks))

    def embed_crop(self, aligned_bgr: np.ndarray) -> np.ndarray:
        """aligned_bgr: uint8 BGR [512, 512, 3] -> [512] float32; `handler_ante.get_feat` of the official code."""
        return self._model.get_feat(aligned_bgr).flatten()


class RetinaFaceLandmarker:
    """facexlib's RetinaFace-ResNet50, called as its FaceRestoreHelper.get_face_landmarks_5 does: at full size."""

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        def build() -> torch.nn.Module:
            from facexlib.detection.retinaface import RetinaFace

            return RetinaFace(network_name="resnet50", device=device)

        self._model = _load_facexlib(Path(path), build, "facexlib's RetinaFace-ResNet50", device)

    def detect(self, image_bgr: np.ndarray) -> list[Detection]:
        """image_bgr: uint8 BGR [H, W, 3]."""
        import torch

        with torch.no_grad():
            rows = self._model.detect_faces(image_bgr, LANDMARK_THRESHOLD)
        return [Detection(row[:4], row[5:15].reshape(5, 2), float(row[4])) for row in rows]


class BiSeNetParser:
    """facexlib's BiSeNet, 19 classes."""

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        def build() -> torch.nn.Module:
            from facexlib.parsing.bisenet import BiSeNet

            return BiSeNet(num_class=19)

        self._model = _load_facexlib(Path(path), build, "facexlib's BiSeNet", device)
        self._device = device

    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray:
        """aligned_rgb: uint8 RGB [512, 512, 3] -> [512, 512] int64."""
        import torch

        with torch.no_grad():
            scores = self._model(normalise(to_tensor(aligned_rgb).to(self._device), PARSER_MEAN, PARSER_STD))[0]
        return scores.argmax(dim=1)[0].cpu().numpy()


class EllipseParser:
    """Stands in for BiSeNet where there are no weights: skin (1) in an ellipse, background (0) around it."""

    CENTRE, HALF_AXES = (256, 286), (132, 186)  # brows to chin of the aligned crop

    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray:  # noqa: ARG002 - the protocol's
        """aligned_rgb: uint8 RGB [512, 512, 3] -> [512, 512] int64, whatever the crop shows."""
        y, x = np.ogrid[:CROP_SIZE, :CROP_SIZE]
        inside = ((x - self.CENTRE[0]) / self.HALF_AXES[0]) ** 2 + ((y - self.CENTRE[1]) / self.HALF_AXES[1]) ** 2 <= 1
        return inside.astype(np.int64)


class HaarDetector:
    """A detector whose models come with OpenCV 4 itself: for trying things out where no weights are.

    One Haar cascade alone misses tilted and turned heads and takes hands for faces. So a frontal and a profile cascade
    look at the picture turned by several angles, and only what many of them agree on is a face. The figures below were
    found on insightface's sample photos: faces get 55 votes or more there, all else 29 or fewer.
    """

    SIDE, MIN_SIZE, STEP = 512, 24, 1.15  # pixels of the searched picture, of the smallest face; pyramid
    ANGLES = (-30, -15, 0, 15, 30)
    MIN_VOTES = 40

    def __init__(self) -> None:
        self._frontal = _cascade("haarcascade_frontalface_alt2.xml")
        self._profile = _cascade("haarcascade_profileface.xml")
        self._eye = _cascade("haarcascade_eye.xml")

    def detect(self, image_bgr: np.ndarray) -> list[Detection]:
        """image_bgr: uint8 BGR [H, W, 3]."""
        import cv2

        grey = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2GRAY)
        scale = min(1.0, self.SIDE / max(grey.shape))
        small = grey if scale == 1 else cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        if min(small.shape) < self.MIN_SIZE:
            return []
        hits = np.array([hit for angle in self.ANGLES for hit in self._hits(small, angle)]).reshape(-1, 5)
        faces: list[Detection] = []
        for x, y, side, votes, tilt in _vote(hits):
            if votes < self.MIN_VOTES:
                break
            x, y, side = x / scale, y / scale, side / scale
            box = np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2], dtype=np.float32)
            if faces and box_overlaps(box, np.stack([face.box for face in faces])).max() > 0.3:
                continue
            faces.append(Detection(box, self._landmarks(grey, x, y, side, tilt), votes / (votes + self.MIN_VOTES)))
        return faces

    def _hits(self, grey: np.ndarray, angle: float) -> list[tuple[float, ...]]:
        """Each hit in the picture, uint8 [H, W], turned by an angle: x, y, side (unturned pixels), votes, angle."""
        turned, back = _turn(grey, angle)
        smallest = max(self.MIN_SIZE, int(min(grey.shape) * 0.05))
        hits = []
        # The profile cascade knows one side only, so it sees the mirrored picture too.
        for cascade, mirrored in ((self._frontal, False), (self._profile, False), (self._profile, True)):
            view = np.ascontiguousarray(turned[:, ::-1]) if mirrored else turned
            boxes, votes = cascade.detectMultiScale2(view, self.STEP, 2, minSize=(smallest, smallest))
            for (x, y, side, _), count in zip(boxes, np.ravel(votes)):
                left = turned.shape[1] - x - side if mirrored else x
                centre = back @ np.array([left + side / 2, y + side / 2, 1.0])
                hits.append((centre[0], centre[1], float(side), float(count), float(angle)))
        return hits

    def _landmarks(self, grey: np.ndarray, x: float, y: float, side: float, tilt: float) -> np.ndarray:
        """The five points [5, 2] of a face: the eyes by their cascade, the others by the crop's template."""
        import cv2

        size = 128
        matrix = cv2.getRotationMatrix2D((x, y), tilt, size / side)
        matrix[:, 2] += size / 2 - np.array([x, y])
        upright = cv2.warpAffine(grey, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)
        eyes = self._eyes(upright)
        # The similarity (rotation, scale) as one complex factor: it takes the template's eyes to these.
        target, template = eyes @ [1, 1j], CROP_LANDMARKS @ [1, 1j]
        factor = (target[1] - target[0]) / (template[1] - template[0])
        points = target[0] + factor * (template - template[0])
        points = np.stack([points.real, points.imag, np.ones(5)], axis=1)
        return (points @ cv2.invertAffineTransform(matrix).T).astype(np.float32)

    def _eyes(self, face: np.ndarray) -> np.ndarray:
        """Both eyes' centres [2, 2] in an upright face, uint8 [128, 128]; the usual places where not both are seen."""
        usual = np.array([[0.31, 0.41], [0.69, 0.41]]) * len(face)
        boxes, votes = self._eye.detectMultiScale2(face, 1.1, 2, minSize=(16, 16), maxSize=(48, 48))
        if len(boxes) == 0:
            return usual
        centres = boxes[:, :2] + boxes[:, 2:] / 2
        eyes = usual.copy()
        for i in range(2):
            near = np.hypot(*(centres - usual[i]).T) < 0.14 * len(face)
            if not near.any():
                return usual
            eyes[i] = centres[np.where(near, np.ravel(votes), -1).argmax()]
        return eyes


def _require_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise MissingWeightsError(f"{path.name} ({what}) was not found in {path.parent}.")


def _load_onnx(path: Path, providers: Sequence[str], task: str, what: str) -> Any:
    """insightface's model of an ONNX file; it tells the kind by the graph, so a wrong file shows by its `taskname`."""
    _require_file(path, what)
    try:
        from insightface.model_zoo import get_model
    except ImportError as error:
        raise PulidError(f"insightface is needed to read faces and cannot be imported ({error}).") from error
    try:
        model = get_model(str(path), providers=list(providers))
    except Exception as error:  # of onnx, onnxruntime and protobuf, each with classes of its own
        raise WrongWeightsError(
            f"{path.name} in {path.parent} is not {what}, or is truncated; download it again. ({error})"
        ) from error
    if getattr(model, "taskname", None) != task:
        raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}.")
    return model


def _load_facexlib(
    path: Path, build: Callable[[], torch.nn.Module], what: str, device: str | torch.device
) -> torch.nn.Module:
    """Build one of facexlib's networks and fill it strictly; facexlib's own loader would download."""
    import torch

    from lib_pulid.weights import read_state_dict

    _require_file(path, what)
    state = {key.removeprefix("module."): value for key, value in read_state_dict(path).items()}
    try:
        # The random start values are overwritten; drawing them must not shift the seed of a picture under way.
        with torch.random.fork_rng(devices=[]):
            model = build()
    except ImportError as error:
        raise PulidError(f"facexlib is needed to read faces and cannot be imported ({error}).") from error
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}. ({str(error)[:300]})") from error
    return model.eval().to(device)


def _cascade(name: str) -> Any:
    import cv2

    folder = getattr(getattr(cv2, "data", None), "haarcascades", None)
    path = Path(folder or ".") / name
    if not hasattr(cv2, "CascadeClassifier") or folder is None or not path.is_file():
        raise MissingWeightsError(
            f"{name} does not come with OpenCV {cv2.__version__} (OpenCV 4 has it); finding faces takes the antelopev2 "
            "files or opencv-python 4."
        )
    return cv2.CascadeClassifier(str(path))


def _turn(grey: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """A picture, uint8 [H, W], turned by an angle in degrees with nothing cut off, and the way back [2, 3]."""
    import cv2

    height, width = grey.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    cos, sin = abs(matrix[0, 0]), abs(matrix[0, 1])
    new_width, new_height = int(height * sin + width * cos), int(height * cos + width * sin)
    matrix[:, 2] += (new_width - width) / 2, (new_height - height) / 2
    turned = cv2.warpAffine(grey, matrix, (new_width, new_height), borderMode=cv2.BORDER_REPLICATE)
    return turned, cv2.invertAffineTransform(matrix)


def _vote(hits: np.ndarray) -> list[np.ndarray]:
    """Hits [N, 5] (x, y, side, votes, angle) that mean the same face become one, their mean; most votes first."""
    groups: list[list[np.ndarray]] = []
    for hit in hits[np.argsort(-hits[:, 3], kind="stable")]:
        for group in groups:
            x, y, side = group[0][:3]
            if max(abs(hit[0] - x), abs(hit[1] - y)) < 0.35 * side and 0.6 < hit[2] / side < 1.66:
                group.append(hit)
                break
        else:
            groups.append([hit])
    merged = []
    for group in groups:
        mean = np.average(group, axis=0, weights=[hit[3] for hit in group])
        mean[3] = sum(hit[3] for hit in group)
        merged.append(mean)
    return sorted(merged, key=lambda face: -face[3])
