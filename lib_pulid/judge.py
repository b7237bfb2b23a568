"""Judges drawn images, with networks that no adapter was trained with: who is in them, and what they show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib_pulid.errors import WrongWeightsError
from lib_pulid.face_models import onnx_session
from lib_pulid.faces import CROP_LANDMARKS, Detection
from lib_pulid.likeness import cosine


@dataclass(frozen=True, eq=False)
class Reading:
    """A judge's result for an image. embedding: [512] float32, not normalized. named: attribute -> its value."""

    embedding: np.ndarray
    named: dict[str, str]

    def likeness(self, other: Reading) -> float:
        """Computes the cosine of both embeddings."""
        return cosine(self.embedding, other.embedding)


class Judge:
    """A judge of faces or of whole scenes, from an ONNX file. One of faces is a Recogniser in the sense of faces.py.

    The file's metadata, as JSON: "values": attribute -> names of its values; "points": positions of the five landmarks
    in its input, [5, 2], for a judge of faces.
    """

    def __init__(self, path: str | Path) -> None:
        path, what = Path(path), "a judge of drawn images"
        self._session = onnx_session(path, what)
        facts = self._session.get_modelmeta().custom_metadata_map
        if "values" not in facts:
            raise WrongWeightsError(f"{path.name} in {path.parent} is not {what}.")
        self.values: dict[str, list[str]] = json.loads(facts["values"])
        self._points = np.array(json.loads(facts["points"])) if "points" in facts else None
        self._size = int(self._session.get_inputs()[0].shape[2])

    def read(self, image: np.ndarray, landmarks: np.ndarray | None = None) -> Reading:
        """Reads an image, uint8 RGB [H, W, 3]. landmarks: [5, 2] in pixels, for a judge of faces."""
        if self._points is None:
            import cv2

            seen = cv2.resize(image, (self._size, self._size), interpolation=cv2.INTER_AREA)
        elif landmarks is None:
            raise ValueError("A judge of faces needs landmarks.")
        else:
            seen = cut(image, landmarks, self._points, self._size)
        data = seen.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        embedding, *logits = self._session.run(None, {self._session.get_inputs()[0].name: data})
        named = {name: values[int(row[0].argmax())] for (name, values), row in zip(self.values.items(), logits)}
        return Reading(embedding[0], named)

    def embed(self, image_bgr: np.ndarray, detection: Detection) -> np.ndarray:
        """Embeds a face of an image, uint8 BGR [H, W, 3]: [512] float32."""
        return self.read(np.ascontiguousarray(image_bgr[:, :, ::-1]), detection.landmarks).embedding

    def embed_crop(self, aligned_bgr: np.ndarray) -> np.ndarray:
        """Embeds a crop, uint8 BGR [512, 512, 3]: [512] float32."""
        return self.read(np.ascontiguousarray(aligned_bgr[:, :, ::-1]), CROP_LANDMARKS).embedding


def similarity(landmarks: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Fits the similarity transform [2, 3] from landmarks [5, 2] to points [5, 2], as insightface's estimate_norm."""
    p, q = (np.asarray(x, np.float64) @ (1, 1j) for x in (landmarks, points))
    turn = np.vdot(p - p.mean(), q - q.mean()) / (abs(p - p.mean()) ** 2).sum()
    shift = q.mean() - turn * p.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def cut(image: np.ndarray, landmarks: np.ndarray, points: np.ndarray, size: int) -> np.ndarray:
    """Crops an image [H, W, 3] so that landmarks [5, 2] are at `points`: [size, size, 3], black outside."""
    import cv2

    return cv2.warpAffine(image, similarity(landmarks, points), (size, size), borderValue=0.0)
