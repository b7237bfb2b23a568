"""Finding faces without any weight file: OpenCV's Haar cascades, which lie in its wheel.

For the demo on a machine without antelopev2. Viola and Jones, "Rapid object detection using a boosted cascade of
simple features" (CVPR 2001).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lib_pulid.errors import MissingWeightsError
from lib_pulid.faces import CROP_LANDMARKS, CROP_SIZE, Detection, box_overlaps


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
        hits: list[tuple[float, ...]] = []
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
        matrix = np.asarray(cv2.getRotationMatrix2D((x, y), tilt, size / side))
        matrix[:, 2] += np.array([size / 2 - x, size / 2 - y])
        upright = cv2.warpAffine(grey, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)
        eyes = self._eyes(upright)
        # The similarity (rotation, scale) as one complex factor: it takes the template's eyes to these.
        target, template = eyes @ [1, 1j], CROP_LANDMARKS @ [1, 1j]
        factor = (target[1] - target[0]) / (template[1] - template[0])
        points = target[0] + factor * (template - template[0])
        homogeneous = np.stack([points.real, points.imag, np.ones(5)], axis=1)
        return (homogeneous @ cv2.invertAffineTransform(matrix).T).astype(np.float32)

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
