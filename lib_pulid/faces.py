"""Reads one Face from a photo: detects, chooses, aligns, and masks the background.

The official code (pulid/pipeline_v1_1.py, `get_id_embedding`, 1aa2fc7) runs two independent detectors: insightface for
the embedding of the largest face, facexlib for the crop of the most central one. In a group photo these can be two
people. Here one face is chosen, and then matched in the other detector's results. If the detectors agree, the result
equals the official one bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lib_pulid.errors import NoFaceError
from lib_pulid.face_choice import LARGEST, Detection, FaceChoice, box_overlaps, choice_notes, order_faces
from lib_pulid.images import resize_long_edge

if TYPE_CHECKING:
    from torch import Tensor

CROP_SIZE = 512
LONGEST = 1024  # pixels to which PuLID's official app first shrinks a photo (app_v1_1.py, 1aa2fc7)

# Positions of eyes, nose and mouth corners in the aligned crop: facexlib, utils/face_restoration_helper.py, the five
# FFHQ points for 512 x 512.
CROP_LANDMARKS = np.array(
    [[192.98138, 239.94708], [318.90277, 240.1936], [256.63416, 314.01935],
     [201.26117, 371.41043], [313.08905, 371.15118]]
)  # fmt: skip
CROP_BORDER_BGR = (135, 133, 132)  # gray, as in facexlib's align_warp_face

# BiSeNet's labels that become white: background, ears, earrings, neck, necklace, cloth, hat
# (pulid/pipeline_v1_1.py, `bg_label`, 1aa2fc7).
WHITE_LABELS = (0, 7, 8, 9, 14, 15, 16, 18)

VISION_SIZE = 336
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # eva_clip/constants.py, OPENAI_DATASET_MEAN, 1aa2fc7
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)  # OPENAI_DATASET_STD

SAME_FACE_IOU = 0.3  # two detectors' boxes of one face overlap by 0.6 or more, those of neighbors hardly


@dataclass(frozen=True, eq=False)
class Face:
    """One face, as the encoders need it.

    detection: in pixels of the photo after resize_long_edge, like `detections`, the candidates.
    photo_bgr: uint8 BGR [H, W, 3], the photo in which it was found, after resize_long_edge.
    embedding: [512] float32, the recognizer's raw output, not normalized; [0] without a recognizer.
    aligned: uint8 RGB [512, 512, 3], 0..255.
    features: [1, 3, 512, 512] float32 RGB, 0..1: the face in gray on white; None without a parser.
    notes: what the user should know; empty if all went well.
    """

    detection: Detection
    photo_bgr: np.ndarray
    embedding: np.ndarray
    aligned: np.ndarray
    features: Tensor | None
    detections: tuple[Detection, ...]
    notes: tuple[str, ...]


class Detector(Protocol):
    """Finds all faces of an image, uint8 BGR [H, W, 3]; returns an empty list if there is none."""

    def detect(self, image_bgr: np.ndarray) -> list[Detection]: ...


class Recogniser(Protocol):
    """Computes a person's embedding, [512] float32, not normalized."""

    def embed(self, image_bgr: np.ndarray, detection: Detection) -> np.ndarray:
        """Embeds a face of an image, uint8 BGR [H, W, 3], aligned by the detection's landmarks."""

    def embed_crop(self, aligned_bgr: np.ndarray) -> np.ndarray:
        """Embeds the aligned crop, uint8 BGR [512, 512, 3]."""


class Parser(Protocol):
    """Labels each pixel of an aligned crop, uint8 RGB [512, 512, 3], with BiSeNet's 19 classes: ints [512, 512]."""

    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class FaceModels:
    """The models that read_face uses. Without a landmarker, crops are aligned by the detector's landmarks; without a
    recognizer or parser, a face lacks what they give.

    notes: what the user should know about the models; repeated with each face.
    """

    detector: Detector
    recogniser: Recogniser | None
    landmarker: Detector | None
    parser: Parser | None
    notes: tuple[str, ...] = ()


def read_face(
    image: np.ndarray, models: FaceModels, choice: FaceChoice = LARGEST, name: str = "image", longest: int = LONGEST
) -> Face:
    """Reads one person's face from a photo, uint8 RGB [H, W, 3], 0..255. longest: pixels that its long edge is shrunk
    to; 0: as it is.

    Raises:
        NoFaceError: there is no face, or none with this index; the message calls the photo `name`.
    """
    bgr = np.ascontiguousarray(resize_long_edge(image, longest)[:, :, ::-1])
    found = models.detector.detect(bgr)
    marked = models.landmarker.detect(bgr) if models.landmarker is not None else []
    candidates = found or marked
    if not candidates:
        raise NoFaceError(
            f"{name}: no face was found. Use a photo with an upright, uncovered and larger face; "
            "crop it so that the face fills about a third."
        )
    chosen = _choose(candidates, choice, bgr.shape[:2], name)
    notes = [*models.notes, *choice_notes(candidates, chosen, choice)]

    landmarks = chosen.landmarks
    if found and models.landmarker is not None:
        same = _same_face(chosen, found, marked)
        if same is None:
            notes.append("RetinaFace did not find this face; it was aligned by the detector's landmarks")
        else:
            landmarks = same.landmarks
    aligned_bgr = align(bgr, landmarks, name)
    if models.recogniser is None:
        embedding = np.zeros(0)
    elif found:
        embedding = models.recogniser.embed(bgr, chosen)
    else:
        # As in the official code if insightface finds nothing.
        embedding = models.recogniser.embed_crop(aligned_bgr)
        notes.append("only RetinaFace found the face; its embedding was computed from the aligned crop")

    aligned = np.ascontiguousarray(aligned_bgr[:, :, ::-1])
    return Face(
        detection=chosen,
        photo_bgr=bgr,
        embedding=np.asarray(embedding, dtype=np.float32).reshape(-1),
        aligned=aligned,
        features=None if models.parser is None else face_features(aligned, models.parser.labels(aligned)),
        detections=tuple(candidates),
        notes=tuple(notes),
    )


def align(image_bgr: np.ndarray, landmarks: np.ndarray, name: str = "image") -> np.ndarray:
    """Aligns a face of an image, uint8 BGR [H, W, 3], by landmarks [5, 2] in pixels: uint8 BGR [512, 512, 3].

    Makes the same calls as FaceRestoreHelper.align_warp_face (facexlib 0.3.0, utils/face_restoration_helper.py).

    Raises:
        NoFaceError: the landmarks do not span a face.
    """
    import cv2

    matrix = cv2.estimateAffinePartial2D(landmarks, CROP_LANDMARKS, method=cv2.LMEDS)[0]
    if matrix is None:
        raise NoFaceError(
            f"{name}: a face was found, but it cannot be aligned by its eyes, nose and mouth. Use another photo."
        )
    return cv2.warpAffine(
        image_bgr, matrix, (CROP_SIZE, CROP_SIZE), borderMode=cv2.BORDER_CONSTANT, borderValue=CROP_BORDER_BGR
    )


def face_features(aligned: np.ndarray, labels: np.ndarray) -> Tensor:
    """Turns a crop, uint8 RGB [512, 512, 3], with labels, ints [512, 512], into the face in gray on white.

    Returns [1, 3, 512, 512] float32 RGB, 0..1. pulid/pipeline_v1_1.py, `to_gray` and `face_features_image`, 1aa2fc7;
    skipping this causes an embedding error of 1.5e-2.
    """
    import torch

    rgb = to_tensor(aligned)
    grey = 0.299 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]
    white = torch.from_numpy(np.isin(labels, WHITE_LABELS))
    return torch.where(white, torch.ones_like(rgb), grey.repeat(1, 3, 1, 1))


def vision_input(features: Tensor) -> Tensor:
    """Converts features [1, 3, 512, 512], RGB, 0..1, to the vision tower's input [1, 3, 336, 336], CLIP mean and std.

    pulid/pipeline_v1_1.py, 1aa2fc7, uses torchvision's default for antialiasing, which changed with 0.17. Here it is
    explicit (the newer default), so that every host gets the same result.
    """
    import torch

    size = (VISION_SIZE, VISION_SIZE)
    small = torch.nn.functional.interpolate(features, size, mode="bicubic", align_corners=False, antialias=True)
    return normalise(small, CLIP_MEAN, CLIP_STD)


def to_tensor(image: np.ndarray) -> Tensor:
    """Converts uint8 [H, W, 3], 0..255, to float32 [1, 3, H, W], 0..1."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).unsqueeze(0).float() / 255.0


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalizes the channels of images [B, 3, H, W] by mean and std."""
    import torch

    shift = torch.tensor(mean, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    scale = torch.tensor(std, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    return (images - shift) / scale


def _choose(faces: list[Detection], choice: FaceChoice, size: tuple[int, int], name: str) -> Detection:
    if choice.index >= len(faces):
        found = "only one face was found" if len(faces) == 1 else f"only {len(faces)} faces were found"
        raise NoFaceError(f"{name}: face number {choice.index + 1} was requested, but {found}.")
    return order_faces(faces, choice.order, size)[choice.index]


def _same_face(chosen: Detection, found: list[Detection], marked: list[Detection]) -> Detection | None:
    """Returns the landmarker's detection (in `marked`) of the face chosen from `found`; None if there is none."""
    if not marked:
        return None
    overlaps = box_overlaps(chosen.box, np.stack([face.box for face in marked]))
    best = int(np.argmax(overlaps))
    # Heads may overlap: a better match for another of the detector's faces is that person, not this one.
    rivals = box_overlaps(marked[best].box, np.stack([face.box for face in found]))
    if overlaps[best] < SAME_FACE_IOU or found[int(np.argmax(rivals))] is not chosen:
        return None
    return marked[best]
