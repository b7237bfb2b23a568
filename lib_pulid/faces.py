"""A photo -> one Face: detect, choose, align, leave only the face.

The official way (pulid/pipeline_v1_1.py, `get_id_embedding`, 1aa2fc7) runs two detectors that know nothing of each
other: insightface gives the embedding of the largest face, facexlib the crop of the most central one; in a group photo
these can be two people. Here one face is chosen, and the same one is looked up in the other detector. Where both agree
anyway, the result is equal to the official one bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lib_pulid.errors import NoFaceError, SettingError
from lib_pulid.images import resize_long_edge

if TYPE_CHECKING:
    from torch import Tensor

CROP_SIZE = 512

# Where eyes, nose and mouth corners come to lie in the aligned crop: facexlib, utils/face_restoration_helper.py, the
# five FFHQ points for 512 x 512.
CROP_LANDMARKS = np.array(
    [[192.98138, 239.94708], [318.90277, 240.1936], [256.63416, 314.01935],
     [201.26117, 371.41043], [313.08905, 371.15118]]
)  # fmt: skip
CROP_BORDER_BGR = (135, 133, 132)  # grey, as facexlib's align_warp_face

# BiSeNet's labels that become white: background, ears, ear rings, neck, necklace, cloth, hat
# (pulid/pipeline_v1_1.py, `bg_label`, 1aa2fc7).
WHITE_LABELS = (0, 7, 8, 9, 14, 15, 16, 18)

VISION_SIZE = 336
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # eva_clip/constants.py, OPENAI_DATASET_MEAN, 1aa2fc7
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)  # OPENAI_DATASET_STD

SAME_FACE_IOU = 0.3  # boxes of two detectors around one face overlap by 0.6 and more, those of neighbours hardly
SMALL_FACE = 80  # pixels; a narrower face is enlarged even for the recogniser's 112 x 112 crop

# order -> (the first of it, how the others are counted)
_ORDERS = {
    "largest": ("the largest", "from large to small"),
    "smallest": ("the smallest", "from small to large"),
    "left-to-right": ("the leftmost", "from left to right"),
    "right-to-left": ("the rightmost", "from right to left"),
    "top-to-bottom": ("the topmost", "from top to bottom"),
    "bottom-to-top": ("the lowest", "from bottom to top"),
    "center": ("the most central", "from the centre outwards"),
}
FACE_ORDERS = tuple(_ORDERS)


@dataclass(frozen=True, eq=False)
class Detection:
    """A face in an image.

    box: [4] float32, x0 y0 x1 y1 in pixels; may reach beyond the image.
    landmarks: [5, 2] float32, x y in pixels: the eye on the picture's left, the one on its right, nose, left and right
        corner of the mouth.
    score: 0..1.
    """

    box: np.ndarray
    landmarks: np.ndarray
    score: float


@dataclass(frozen=True)
class FaceChoice:
    """Which face of several: the `index`-th (0-based) in this order. The official choice is the largest."""

    order: str = "largest"
    index: int = 0

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise SettingError(f"Face order {self.order!r} is unknown; it is one of {', '.join(_ORDERS)}.")
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise SettingError(f"The face's index is a whole number from 0 on, not {self.index!r}.")


LARGEST = FaceChoice()


@dataclass(frozen=True, eq=False)
class Face:
    """One face, as the encoders need it.

    detection: in pixels of the photo after resize_long_edge; so are all of `detections`, what was chosen from.
    embedding: [512] float32, the recogniser's raw output, not normalised.
    aligned: uint8 RGB [512, 512, 3], 0..255.
    features: [1, 3, 512, 512] float32 RGB, 0..1: the face in grey on white.
    notes: what the user should know of, in plain words; empty when all went well.
    """

    detection: Detection
    embedding: np.ndarray
    aligned: np.ndarray
    features: Tensor
    faces_found: int
    detections: tuple[Detection, ...]
    notes: tuple[str, ...]


class Detector(Protocol):
    """Finds all faces of an image, uint8 BGR [H, W, 3]; an empty list where there is none."""

    def detect(self, image_bgr: np.ndarray) -> list[Detection]: ...


class Recogniser(Protocol):
    """Gives a person's embedding, [512] float32, not normalised."""

    def embed(self, image_bgr: np.ndarray, detection: Detection) -> np.ndarray:
        """From the whole image, uint8 BGR [H, W, 3], by the detection's landmarks."""
        ...

    def embed_crop(self, aligned_bgr: np.ndarray) -> np.ndarray:
        """From the aligned crop, uint8 BGR [512, 512, 3]."""
        ...


class Parser(Protocol):
    """Labels each pixel of an aligned crop, uint8 RGB [512, 512, 3], by BiSeNet's 19 classes: ints [512, 512]."""

    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class FaceModels:
    """What read_face works with. Without a landmarker, crops are aligned by the detector's own landmarks.

    notes: what the user should know of the models, in plain words; they are told with each face.
    """

    detector: Detector
    recogniser: Recogniser
    landmarker: Detector | None
    parser: Parser
    notes: tuple[str, ...] = ()


def read_face(image: np.ndarray, models: FaceModels, choice: FaceChoice = LARGEST, name: str = "image") -> Face:
    """Read one person's face from a photo, uint8 RGB [H, W, 3], 0..255.

    Raises NoFaceError, calling the photo `name`, where there is none, or none of that index.
    """
    # The official app reduces to 1024 before anything else (app_v1_1.py, 1aa2fc7).
    bgr = np.ascontiguousarray(resize_long_edge(image)[:, :, ::-1])
    found = models.detector.detect(bgr)
    marked = models.landmarker.detect(bgr) if models.landmarker is not None else []
    candidates = found or marked
    if not candidates:
        raise NoFaceError(
            f"{name}: no face was found. Use a photo in which the face is upright, uncovered and larger; "
            "crop it so that the face fills about a third."
        )
    chosen = _choose(candidates, choice, bgr.shape[:2], name)
    notes = [*models.notes, *_choice_notes(candidates, chosen, choice)]

    landmarks = chosen.landmarks
    if found and models.landmarker is not None:
        same = _same_face(chosen, found, marked)
        if same is None:
            notes.append("RetinaFace did not find this face; it was aligned by the detector's own landmarks")
        else:
            landmarks = same.landmarks
    aligned_bgr = align(bgr, landmarks, name)
    if found:
        embedding = models.recogniser.embed(bgr, chosen)
    else:
        # As the official code does when insightface finds nothing.
        embedding = models.recogniser.embed_crop(aligned_bgr)
        notes.append("the face was found only by RetinaFace; its embedding was taken from the aligned crop")

    aligned = np.ascontiguousarray(aligned_bgr[:, :, ::-1])
    return Face(
        detection=chosen,
        embedding=np.asarray(embedding, dtype=np.float32).reshape(-1),
        aligned=aligned,
        features=face_features(aligned, models.parser.labels(aligned)),
        faces_found=len(candidates),
        detections=tuple(candidates),
        notes=tuple(notes),
    )


def align(image_bgr: np.ndarray, landmarks: np.ndarray, name: str = "image") -> np.ndarray:
    """The aligned crop, uint8 BGR [512, 512, 3], of an image, uint8 BGR [H, W, 3], by landmarks [5, 2] in pixels.

    The calls are those of FaceRestoreHelper.align_warp_face (facexlib 0.3.0, utils/face_restoration_helper.py).
    """
    import cv2

    matrix = cv2.estimateAffinePartial2D(landmarks, CROP_LANDMARKS, method=cv2.LMEDS)[0]
    if matrix is None:
        raise NoFaceError(f"{name}: a face was found, but its eyes, nose and mouth could not be told apart.")
    return cv2.warpAffine(
        image_bgr, matrix, (CROP_SIZE, CROP_SIZE), borderMode=cv2.BORDER_CONSTANT, borderValue=CROP_BORDER_BGR
    )


def face_features(aligned: np.ndarray, labels: np.ndarray) -> Tensor:
    """The face in grey on white, [1, 3, 512, 512] float32 RGB, 0..1.

    From the crop, uint8 RGB [512, 512, 3], and its labels, ints [512, 512]. pulid/pipeline_v1_1.py, `to_gray` and
    `face_features_image`, 1aa2fc7; leaving this out costs 1.5e-2 of embedding error.
    """
    import torch

    rgb = to_tensor(aligned)
    grey = 0.299 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]
    white = torch.from_numpy(np.isin(labels, WHITE_LABELS))
    return torch.where(white, torch.ones_like(rgb), grey.repeat(1, 3, 1, 1))


def vision_input(features: Tensor) -> Tensor:
    """features [1, 3, 512, 512], RGB, 0..1 -> the vision tower's input [1, 3, 336, 336], CLIP mean and std.

    pulid/pipeline_v1_1.py, 1aa2fc7, leaves antialiasing to torchvision, whose default changed with 0.17; it is spelled
    out here (the newer default), so that every host gives the same.
    """
    import torch

    size = (VISION_SIZE, VISION_SIZE)
    small = torch.nn.functional.interpolate(features, size, mode="bicubic", align_corners=False, antialias=True)
    return normalise(small, CLIP_MEAN, CLIP_STD)


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 [H, W, 3], 0..255 -> float32 [1, 3, H, W], 0..1."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).unsqueeze(0).float() / 255.0


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """images [B, 3, H, W] -> [B, 3, H, W], each channel less its mean, divided by its std."""
    import torch

    shift = torch.tensor(mean, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    scale = torch.tensor(std, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    return (images - shift) / scale


def order_faces(faces: list[Detection], order: str, size: tuple[int, int]) -> list[Detection]:
    """Sort the faces of an image of this size (height, width) by one of FACE_ORDERS."""
    boxes = np.stack([face.box for face in faces])
    centre_x, centre_y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    height, width = size
    keys = {
        "largest": box_areas(boxes),
        "smallest": box_areas(boxes),
        "left-to-right": centre_x,
        "right-to-left": -centre_x,
        "top-to-bottom": centre_y,
        "bottom-to-top": -centre_y,
        "center": np.hypot(centre_x - width / 2, centre_y - height / 2),  # as facexlib's get_center_face
    }
    ranks = np.argsort(keys[order], kind="stable")
    if order == "largest":
        # Reversed, not negated: of equally large faces the official code takes the last, `sorted(...)[-1]`.
        ranks = ranks[::-1]
    return [faces[i] for i in ranks]


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """boxes [N, 4] -> areas [N]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def box_overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of a box [4] with boxes [N, 4]: [N]."""
    inner = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = inner.clip(min=0).prod(axis=1)
    union = box_areas(box[None])[0] + box_areas(boxes) - shared
    return shared / np.maximum(union, 1e-6)


def _choose(faces: list[Detection], choice: FaceChoice, size: tuple[int, int], name: str) -> Detection:
    if choice.index >= len(faces):
        found = "only one face was found" if len(faces) == 1 else f"only {len(faces)} faces were found"
        raise NoFaceError(f"{name}: face number {choice.index + 1} was asked for, but {found}.")
    return order_faces(faces, choice.order, size)[choice.index]


def _same_face(chosen: Detection, found: list[Detection], marked: list[Detection]) -> Detection | None:
    """The landmarker's detection (of `marked`) of the face that was chosen from `found`; None if it has none."""
    if not marked:
        return None
    overlaps = box_overlaps(chosen.box, np.stack([face.box for face in marked]))
    best = int(overlaps.argmax())
    # Heads may overlap: what fits another of the detector's faces better is that person, not this one.
    rivals = box_overlaps(marked[best].box, np.stack([face.box for face in found]))
    if overlaps[best] < SAME_FACE_IOU or found[int(rivals.argmax())] is not chosen:
        return None
    return marked[best]


def _choice_notes(faces: list[Detection], chosen: Detection, choice: FaceChoice) -> list[str]:
    notes = []
    if len(faces) > 1:
        first, counted = _ORDERS[choice.order]
        which = first if choice.index == 0 else f"number {choice.index + 1}, counted {counted},"
        notes.append(f"{len(faces)} faces found; {which} was taken")
    side = min(chosen.box[2] - chosen.box[0], chosen.box[3] - chosen.box[1])
    if side < SMALL_FACE:
        notes.append(f"the face is small ({side:.0f} px); a larger one gives a better likeness")
    return notes
