"""Loads facexlib's networks for the protocols of faces.py from files: RetinaFace-ResNet50 and BiSeNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib_pulid.errors import PulidError, WrongWeightsError
from lib_pulid.faces import Detection, normalise, to_tensor

if TYPE_CHECKING:
    import torch

LANDMARK_THRESHOLD = 0.97  # facexlib's FaceRestoreHelper.get_face_landmarks_5
PARSER_CLASSES = 19
PARSER_MEAN = (0.485, 0.456, 0.406)  # pulid/pipeline_v1_1.py, 1aa2fc7: ImageNet's
PARSER_STD = (0.229, 0.224, 0.225)


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
