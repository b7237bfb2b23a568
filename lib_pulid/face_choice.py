"""Chooses one of the faces that a detector has found in an image, and compares their boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lib_pulid.errors import SettingError

SMALL_FACE = 80  # pixels; a narrower face is enlarged even for the recognizer's 112 x 112 crop

# order -> (the first of it, how the others are counted)
_ORDERS = {
    "largest": ("the largest", "from large to small"),
    "smallest": ("the smallest", "from small to large"),
    "left-to-right": ("the leftmost", "from left to right"),
    "right-to-left": ("the rightmost", "from right to left"),
    "top-to-bottom": ("the topmost", "from top to bottom"),
    "bottom-to-top": ("the lowest", "from bottom to top"),
    "center": ("the most central", "from the center outward"),
}
FACE_ORDERS = tuple(_ORDERS)


@dataclass(frozen=True, eq=False)
class Detection:
    """A face in an image.

    box: [4] float32, x0 y0 x1 y1 in pixels; may reach beyond the image.
    landmarks: [5, 2] float32, x y in pixels: the eyes on the image's left and right, the nose, the left and right
        corner of the mouth.
    score: 0..1.
    """

    box: np.ndarray
    landmarks: np.ndarray
    score: float


@dataclass(frozen=True)
class FaceChoice:
    """Chooses one of several faces: the `index`-th (0-based) in this order. The official choice is the largest."""

    order: str = "largest"
    index: int = 0

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise SettingError(f"Face order {self.order!r} is unknown; use one of {', '.join(_ORDERS)}.")
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise SettingError(f"The face index has to be a whole number, 0 or more, not {self.index!r}.")


LARGEST = FaceChoice()


def order_faces(faces: list[Detection], order: str, size: tuple[int, int]) -> list[Detection]:
    """Sorts the faces of an image of this size (height, width) by one of FACE_ORDERS."""
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
        "center": np.hypot(centre_x - width / 2, centre_y - height / 2),  # as in facexlib's get_center_face
    }
    ranks = np.argsort(keys[order], kind="stable")
    if order == "largest":
        # Reversed, not negated: among equally large faces the official code takes the last, `sorted(...)[-1]`.
        ranks = ranks[::-1]
    return [faces[i] for i in ranks]


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """Computes the areas [N] of boxes [N, 4]."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def box_overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Computes the intersection over union of a box [4] with boxes [N, 4]: [N]."""
    inner = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = inner.clip(min=0).prod(axis=1)
    union = box_areas(box[None])[0] + box_areas(boxes) - shared
    return shared / np.maximum(union, 1e-6)


def choice_notes(faces: list[Detection], chosen: Detection, choice: FaceChoice) -> list[str]:
    """Says which of several faces was chosen, and that it is small, if it is."""
    notes = []
    if len(faces) > 1:
        first, counted = _ORDERS[choice.order]
        which = first if choice.index == 0 else f"number {choice.index + 1}, counted {counted},"
        notes.append(f"{len(faces)} faces found; {which} was used")
    side = min(chosen.box[2] - chosen.box[0], chosen.box[3] - chosen.box[1])
    if side < SMALL_FACE:
        notes.append(f"the face is small ({side:.0f} px); a larger one gives a better likeness")
    return notes
