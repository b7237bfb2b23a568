"""Loads the face models for the protocols of faces.py from files; never downloads them.

Detector and recognizer are insightface's SCRFD and ArcFace, landmarker and parser facexlib's RetinaFace and BiSeNet;
the parser may be an ONNX file, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
    "onnxruntime could not load its CUDA libraries, so faces are detected on the CPU. Its log names the missing ones; "
    "install CUDA and cuDNN in the versions that it was built for"
)
# Messages of onnxruntime and onnx about a file of a later version.
_TOO_NEW = re.compile(r"unsupported model IR version|opset \d+ is under development|max supported (IR|opset)", re.I)

# The official size first. A face that fills the image is larger than those SCRFD was trained on, and is found at a
# smaller input size. The same retries as in cubiq/PuLID_ComfyUI.
DETECTION_SIZES = (640, 576, 512, 448, 384, 320, 256)
DETECTION_THRESHOLD = 0.5  # insightface's FaceAnalysis.prepare
EMBEDDING_SIZE = 512
LANDMARK_THRESHOLD = 0.97  # facexlib's FaceRestoreHelper.get_face_landmarks_5
PARSER_CLASSES = 19
PARSER_MEAN = (0.485, 0.456, 0.406)  # pulid/pipeline_v1_1.py, 1aa2fc7: ImageNet's
PARSER_STD = (0.229, 0.224, 0.225)


def load_face_models(files: Mapping[str, Path], device: str = "cpu") -> FaceModels:
    """Loads the face models that are among files by role, see `catalog.require_encoders`.

    Raises: MissingWeightsError, WrongWeightsError: the message names the file.
    """
    detector = InsightFaceDetector(files["detector"], device)
    recogniser = files.get("recogniser") or files.get("recogniser_buffalo")
    return FaceModels(
        detector=detector,
        recogniser=None if recogniser is None else ArcFaceRecogniser(recogniser, device),
        landmarker=RetinaFaceLandmarker(files["landmarker"], device) if "landmarker" in files else None,
        parser=_load_parser(files["parser"], device) if "parser" in files else None,
        notes=() if set(onnx_providers(device)) <= set(detector.providers) else (ON_THE_CPU,),
    )


def _load_parser(path: Path, device: str) -> Parser:
    _require_file(path, "a face parser")
    with path.open("rb") as file:  # an ONNX model starts with field 1, the version
        is_onnx = file.read(1) == b"\x08"
    return OnnxParser(path, device) if is_onnx else BiSeNetParser(path, device)


def onnx_providers(device: str) -> tuple[str, ...]:
    """Returns ONNX Runtime's providers for a torch device; only the CPU if it was installed without CUDA."""
    if not str(device).startswith("cuda"):
        return CPU_ONLY
    import onnxruntime

    wanted = (CUDA, *CPU_ONLY)
    return tuple(name for name in wanted if name in onnxruntime.get_available_providers())


def cuda_problem() -> str:
    """Says why an ONNX Runtime with CUDA cannot use the GPU; "" if it can, or has no CUDA.

    Runs a model with one node, since only that loads the libraries.
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
    """SCRFD, with the results of insightface's FaceAnalysis(det_size=(640, 640)) if that finds anything.

    FaceAnalysis itself would load every model of a folder, and requires its own folder layout.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        self._model = _load_insightface(Path(path), "a face detector (SCRFD)", "detection", device)
        if not self._model.use_kps:
            raise WrongWeightsError(
                f"{Path(path).name} is a face detector without landmarks. Use scrfd_10g_bnkps.onnx."
            )
        self._model.prepare(ctx_id=0, input_size=(640, 640), det_thresh=DETECTION_THRESHOLD)
        # A file with a fixed input size works only at that size.
        self._sizes = (None,) if isinstance(self._model.input_shape[2], int) else DETECTION_SIZES

    @property
    def providers(self) -> tuple[str, ...]:
        """The providers that ONNX Runtime could load."""
        return tuple(self._model.session.get_providers())

    def detect(self, image_bgr: np.ndarray) -> list[Detection]:
        """Detects the faces of an image, uint8 BGR [H, W, 3]."""
        if max(image_bgr.shape[:2]) > 256 * min(image_bgr.shape[:2]):
            return []  # insightface would shrink such a strip to nothing
        for size in self._sizes:
            boxes, landmarks = self._model.detect(image_bgr, input_size=size and (size, size))
            if len(boxes):
                return [Detection(box[:4], points, float(box[4])) for box, points in zip(boxes, landmarks)]
        return []


class ArcFaceRecogniser:
    """ArcFace (antelopev2's glintr100, buffalo_l's w600k_r50), with insightface's own alignment and preprocessing."""

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        self._model = _load_insightface(Path(path), "a face recognizer (ArcFace)", "recognition", device)
        size = self._model.output_shape[-1]
        if isinstance(size, int) and size != EMBEDDING_SIZE:
            raise WrongWeightsError(
                f"{Path(path).name} returns {size} numbers per face, not {EMBEDDING_SIZE}. "
                "Use antelopev2's glintr100.onnx."
            )
        self._model.prepare(ctx_id=0)

    def embed(self, image_bgr: np.ndarray, detection: Detection) -> np.ndarray:
        """Embeds a face of an image, uint8 BGR [H, W, 3]: [512] float32."""
        return self._model.get(image_bgr, SimpleNamespace(kps=detection.landmarks))

    def embed_crop(self, aligned_bgr: np.ndarray) -> np.ndarray:
        """Embeds a crop, uint8 BGR [512, 512, 3]: [512] float32; `handler_ante.get_feat` of the official code."""
        return self._model.get_feat(aligned_bgr).flatten()


class OnnxParser:
    """An ONNX parser instead of BiSeNet: [1, 3, 512, 512], ImageNet mean and std -> scores [1, 19, 512, 512]."""

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        path, what = Path(path), "a face parser (ONNX)"
        self._session = onnx_session(path, what, device)
        shapes = [tuple(end[0].shape[1:]) for end in (self._session.get_inputs(), self._session.get_outputs())]
        if shapes != [(3, CROP_SIZE, CROP_SIZE), (PARSER_CLASSES, CROP_SIZE, CROP_SIZE)]:
            raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}.")

    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray:
        """Labels a crop, uint8 RGB [512, 512, 3]: [512, 512] int64."""
        image = normalise(to_tensor(aligned_rgb), PARSER_MEAN, PARSER_STD).numpy()
        return self._session.run(None, {self._session.get_inputs()[0].name: image})[0][0].argmax(axis=0)


# ---------------------------------------------------------------- facexlib's


class RetinaFaceLandmarker:
    """facexlib's RetinaFace-ResNet50, called at full size, as in FaceRestoreHelper.get_face_landmarks_5."""

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        def build() -> torch.nn.Module:
            from facexlib.detection.retinaface import RetinaFace

            return RetinaFace(network_name="resnet50", device=device)

        self._model = _load_facexlib(Path(path), build, "facexlib's RetinaFace-ResNet50", device)

    def detect(self, image_bgr: np.ndarray) -> list[Detection]:
        """Detects the faces of an image, uint8 BGR [H, W, 3]."""
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
        """Labels a crop, uint8 RGB [512, 512, 3]: [512, 512] int64."""
        import torch

        with torch.no_grad():
            scores = self._model(normalise(to_tensor(aligned_rgb).to(self._device), PARSER_MEAN, PARSER_STD))[0]
        return scores.argmax(dim=1)[0].cpu().numpy()


def _load_facexlib(
    path: Path, build: Callable[[], torch.nn.Module], what: str, device: str | torch.device
) -> torch.nn.Module:
    """Builds one of facexlib's networks and loads its weights strictly; facexlib's own loader would download."""
    import torch

    from lib_pulid.files.checkpoint_header import unwrapped
    from lib_pulid.files.state_dict import check_numbers, read_state_dict

    state = unwrapped(read_state_dict(path))
    try:
        # The random initial values are overwritten; drawing them must not shift the seed of the current image.
        with torch.random.fork_rng(devices=[]):
            model = build()
        if any(parameter.is_meta for parameter in model.parameters()):
            raise NotImplementedError  # as RetinaFace does by itself
    except ImportError as error:
        raise PulidError(f"facexlib is needed to read faces, but cannot be imported ({error}).") from error
    except NotImplementedError as error:
        # A1111 loads a checkpoint in another thread; meanwhile, layers are created without memory for their weights.
        raise PulidError("The WebUI is still loading a checkpoint. Try again when it is loaded.") from error
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}. ({str(error)[:300]})") from error
    check_numbers({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, path)
    return model.eval().to(device)


# ---------------------------------------------------------------- ONNX files


def _require_file(path: Path, what: str) -> None:
    if not disk.is_file(path):
        raise MissingWeightsError(f"{path.name} ({what}) was not found in {path.parent}.")


def onnx_session(path: Path, what: str, device: str = "cpu") -> Any:
    """Opens an ONNX file. what: its kind, for messages. Raises: MissingWeightsError, WrongWeightsError, PulidError."""
    with _load_errors(path, what, "onnxruntime"):
        import onnxruntime

        return onnxruntime.InferenceSession(str(path), providers=list(onnx_providers(device)))


def _load_insightface(path: Path, what: str, task: str, device: str) -> Any:
    """Loads an ONNX file with insightface, which sets `taskname` by the graph, so that a wrong file is noticed."""
    with _load_errors(path, what, "insightface"):
        from insightface.model_zoo import get_model

        try:
            model = get_model(str(path), providers=list(onnx_providers(device)))
        except Exception:  # onnxruntime falls back to the CPU by itself, or raises
            model = get_model(str(path), providers=list(CPU_ONLY))
    if getattr(model, "taskname", None) != task:
        raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}.")
    return model


@contextmanager
def _load_errors(path: Path, what: str, library: str) -> Iterator[None]:
    """Raises PulidError, MissingWeightsError or WrongWeightsError if an ONNX file cannot be loaded."""
    _require_file(path, what)
    try:
        path.open("rb").close()  # the libraries would not say why a file is closed to them
    except OSError as error:
        raise WrongWeightsError(disk.why_unreadable(path, error)) from error
    try:
        yield
    except ImportError as error:
        raise PulidError(f"{library} is needed to read faces, but cannot be imported ({error}).") from error
    except Exception as error:  # onnx, onnxruntime and protobuf have their own classes
        if _TOO_NEW.search(str(error)):
            raise WrongWeightsError(
                f"{path.name} in {path.parent} needs a newer onnxruntime. Update it (pip install --upgrade "
                f"onnxruntime), or download the file that PuLID lists. ({error})"
            ) from error
        raise WrongWeightsError(
            f"{path.name} in {path.parent} is not {what}, or is truncated. Download it again. ({error})"
        ) from error
