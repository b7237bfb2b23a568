"""The models behind the protocols of faces.py, read from files, never downloaded.

insightface: SCRFD and ArcFace (ONNX). facexlib: RetinaFace-ResNet50 and BiSeNet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lib_pulid import disk
from lib_pulid.errors import MissingWeightsError, PulidError, WrongWeightsError
from lib_pulid.faces import CROP_SIZE, Detection, FaceModels, Parser, normalise, to_tensor

if TYPE_CHECKING:
    import torch

CPU_ONLY = ("CPUExecutionProvider",)
CUDA = "CUDAExecutionProvider"
ON_THE_CPU = (
    "onnxruntime could not load its CUDA libraries, so faces are found on the CPU; its log names the missing ones "
    "(CUDA and cuDNN of the versions that it was built for)"
)
# As onnxruntime and onnx say that a file is of a later version than they know.
_TOO_NEW = re.compile(r"unsupported model IR version|opset \d+ is under development|max supported (IR|opset)", re.I)

# The official size first. A face that fills the picture is larger than what SCRFD was trained on; at a smaller input
# it is found: the retries are those of cubiq/PuLID_ComfyUI.
DETECTION_SIZES = (640, 576, 512, 448, 384, 320, 256)
DETECTION_THRESHOLD = 0.5  # insightface's FaceAnalysis.prepare
LANDMARK_THRESHOLD = 0.97  # facexlib's FaceRestoreHelper.get_face_landmarks_5
EMBEDDING_SIZE = 512
PARSER_CLASSES = 19
PARSER_MEAN = (0.485, 0.456, 0.406)  # pulid/pipeline_v1_1.py, 1aa2fc7: ImageNet's
PARSER_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FaceFiles:
    """Where the four files are. Without a landmarker, crops are aligned by the detector's own landmarks."""

    detector: Path  # scrfd_10g_bnkps.onnx
    recogniser: Path  # glintr100.onnx
    landmarker: Path | None  # detection_Resnet50_Final.pth
    parser: Path  # parsing_bisenet.pth

    @classmethod
    def among(cls, encoders: Mapping[str, Path]) -> FaceFiles:
        """Picks the four out of `catalog.require_encoders`."""
        return cls(**{field.name: encoders[field.name] for field in fields(cls)})


def load_face_models(files: FaceFiles, device: str = "cpu") -> FaceModels:
    """Load all four models; MissingWeightsError or WrongWeightsError names the file that is at fault."""
    for field in fields(files):  # all of them before any is loaded, which takes seconds
        path = getattr(files, field.name)
        if path is not None:
            _require_file(Path(path), f"the face {field.name}")
    providers = onnx_providers(device)
    detector = InsightFaceDetector(files.detector, providers)
    return FaceModels(
        detector=detector,
        recogniser=ArcFaceRecogniser(files.recogniser, providers),
        landmarker=None if files.landmarker is None else RetinaFaceLandmarker(files.landmarker, device),
        parser=_load_parser(Path(files.parser), device),
        notes=() if set(providers) <= set(detector.providers) else (ON_THE_CPU,),
    )


def _load_parser(path: Path, device: str) -> Parser:
    with path.open("rb") as file:  # the version, field 1 of an ONNX model, comes first
        is_onnx = file.read(1) == b"\x08"
    return OnnxParser(path, onnx_providers(device)) if is_onnx else BiSeNetParser(path, device)


def onnx_providers(device: str) -> tuple[str, ...]:
    """ONNX Runtime's providers for a torch device; its CPU where it was installed without CUDA."""
    if not str(device).startswith("cuda"):
        return CPU_ONLY
    import onnxruntime

    wanted = (CUDA, *CPU_ONLY)
    return tuple(name for name in wanted if name in onnxruntime.get_available_providers())


def cuda_problem() -> str:
    """What keeps ONNX Runtime from a GPU that it was installed for; "" where nothing does, or it was not.

    A model of one step is run, as only that loads the libraries.
    """
    try:
        import onnx
        import onnxruntime

        if CUDA not in onnxruntime.get_available_providers():
            return ""
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "one", [value], [out])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    except ImportError:
        return ""
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CUDA, *CPU_ONLY])
        return "" if CUDA in session.get_providers() else ON_THE_CPU
    except Exception as error:  # of onnxruntime's classes
        return f"{ON_THE_CPU} ({error})"


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

    @property
    def providers(self) -> tuple[str, ...]:
        """Those that ONNX Runtime could load."""
        return tuple(self._model.session.get_providers())

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
            rows = self._model.detect_faces(image_bgr, LANDMARK_THRESHOLD)  # type: ignore[operator]
        return [Detection(row[:4], row[5:15].reshape(5, 2), float(row[4])) for row in rows]


class BiSeNetParser:
    """facexlib's BiSeNet, 19 classes."""

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        def build() -> torch.nn.Module:
            from facexlib.parsing.bisenet import BiSeNet

            return BiSeNet(num_class=PARSER_CLASSES)

        self._model = _load_facexlib(Path(path), build, "facexlib's BiSeNet", device)
        self._device = device

    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray:
        """aligned_rgb: uint8 RGB [512, 512, 3] -> [512, 512] int64."""
        import torch

        with torch.no_grad():
            scores = self._model(normalise(to_tensor(aligned_rgb).to(self._device), PARSER_MEAN, PARSER_STD))[0]
        return scores.argmax(dim=1)[0].cpu().numpy()


class OnnxParser:
    """A parser in BiSeNet's place, as ONNX: [1, 3, 512, 512], ImageNet mean and std -> scores [1, 19, 512, 512]."""

    def __init__(self, path: str | Path, providers: Sequence[str] = CPU_ONLY) -> None:
        path, what = Path(path), "a face parser (ONNX)"
        _require_file(path, what)
        try:
            import onnxruntime

            self._session = onnxruntime.InferenceSession(str(path), providers=list(providers))
        except ImportError as error:
            raise PulidError(f"onnxruntime is needed to read faces and cannot be imported ({error}).") from error
        except Exception as error:  # onnxruntime's, of classes of its own
            raise WrongWeightsError(
                f"{path.name} in {path.parent} is not {what}, or is truncated; download it again. ({error})"
            ) from error
        shapes = [tuple(end[0].shape[1:]) for end in (self._session.get_inputs(), self._session.get_outputs())]
        if shapes != [(3, CROP_SIZE, CROP_SIZE), (PARSER_CLASSES, CROP_SIZE, CROP_SIZE)]:
            raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}.")

    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray:
        """aligned_rgb: uint8 RGB [512, 512, 3] -> [512, 512] int64."""
        image = normalise(to_tensor(aligned_rgb), PARSER_MEAN, PARSER_STD).numpy()
        return self._session.run(None, {self._session.get_inputs()[0].name: image})[0][0].argmax(axis=0)


def _require_file(path: Path, what: str) -> None:
    if not disk.is_file(path):
        raise MissingWeightsError(f"{path.name} ({what}) was not found in {path.parent}.")


def _load_onnx(path: Path, providers: Sequence[str], task: str, what: str) -> Any:
    """insightface's model of an ONNX file; it tells the kind by the graph, so a wrong file shows by its `taskname`."""
    _require_file(path, what)
    try:
        import insightface.model_zoo  # noqa: F401
    except ImportError as error:
        raise PulidError(f"insightface is needed to read faces and cannot be imported ({error}).") from error
    try:
        model = _session(path, providers)
    except Exception as error:  # of onnx, onnxruntime and protobuf, each with classes of its own
        if _TOO_NEW.search(str(error)):
            raise WrongWeightsError(
                f"{path.name} in {path.parent} was written for a newer onnxruntime: update it (pip install --upgrade "
                f"onnxruntime), or take the catalogue's file. ({error})"
            ) from error
        raise WrongWeightsError(
            f"{path.name} in {path.parent} is not {what}, or is truncated; download it again. ({error})"
        ) from error
    if getattr(model, "taskname", None) != task:
        raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}.")
    return model


def _session(path: Path, providers: Sequence[str]) -> Any:
    """With the CPU alone where the others cannot be loaded: onnxruntime falls back to it, or raises."""
    from insightface.model_zoo import get_model

    try:
        return get_model(str(path), providers=list(providers))
    except Exception as error:
        if tuple(providers) == CPU_ONLY or _TOO_NEW.search(str(error)):
            raise
        return get_model(str(path), providers=list(CPU_ONLY))


def _load_facexlib(
    path: Path, build: Callable[[], torch.nn.Module], what: str, device: str | torch.device
) -> torch.nn.Module:
    """Build one of facexlib's networks and fill it strictly; facexlib's own loader would download."""
    import torch

    from lib_pulid.files.state_dict import check_numbers, read_state_dict

    _require_file(path, what)
    state = {key.removeprefix("module."): value for key, value in read_state_dict(path).items()}
    try:
        # The random start values are overwritten; drawing them must not shift the seed of a picture under way.
        with torch.random.fork_rng(devices=[]):
            model = build()
        if any(parameter.is_meta for parameter in model.parameters()):
            raise NotImplementedError  # as RetinaFace does by itself
    except ImportError as error:
        raise PulidError(f"facexlib is needed to read faces and cannot be imported ({error}).") from error
    except NotImplementedError as error:
        # A1111 loads a checkpoint in another thread; until it has, layers are made without memory for their weights.
        raise PulidError("The WebUI is loading a checkpoint just now; try again when it has done so.") from error
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}. ({str(error)[:300]})") from error
    check_numbers({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, path)
    return model.eval().to(device)
