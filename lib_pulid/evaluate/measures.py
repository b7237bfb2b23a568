"""Computes the measures on arrays: likeness, copy-paste, pose, change outside the head, attributes kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lib_pulid.likeness import cosine


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the angle between two embeddings [D], 0..pi."""
    return float(np.arccos(cosine(a, b)))


def copy_paste(image: np.ndarray, target: np.ndarray, reference: np.ndarray) -> float | None:
    """Measures whether an image copies the reference photo more than it shows the person; as in WithAnyone (996d152b).

    (angle(image, target) - angle(image, reference)) / angle(target, reference), on embeddings [D].

    Args:
        target: of another photo of the person.

    Returns:
        1 for a copy of the reference, 0 midway, -1 for the target; None if the two photos are the same.
    """
    apart = angle(target, reference)
    return (angle(image, target) - angle(image, reference)) / apart if apart > 1e-4 else None


def pose(landmarks: np.ndarray) -> dict[str, float]:
    """Measures how a face is tilted and turned, by its landmarks [5, 2] (see `faces.Detection`), in pixels.

    Returns:
        roll: angle of the line of the eyes in degrees, positive clockwise. turn: how far the tip of the nose is from
        the middle between the eyes, along their line, in distances between the eyes; positive to the image's right.
        Empty if both eyes are in one place.
    """
    left, right, nose = (np.asarray(point, np.float64) for point in landmarks[:3])
    line = right - left
    if not line.any():
        return {}
    roll = float(np.degrees(np.arctan2(line[1], line[0])))
    return {"roll": roll, "turn": float((nose - (left + right) / 2) @ line / (line @ line))}


def slope(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Computes how much of a reference's value images have: the slope of the least squares line.

    Args:
        pairs: (image, reference).

    Returns:
        1: all of it, 0: none. None: fewer than three pairs, or references that do not differ.
    """
    if len(pairs) < 3:
        return None
    image, reference = np.asarray(pairs, np.float64).T
    apart = reference - reference.mean()
    return float(apart @ image / (apart @ apart)) if np.abs(apart).max() > 1e-6 else None


def change(image: np.ndarray, other: np.ndarray, leave_out: np.ndarray) -> float | None:
    """Computes the mean absolute difference of two images, uint8 [H, W, 3], outside leave_out, bool [H, W]: 0..1.

    None: nothing is left to compare.
    """
    if leave_out.all():
        return None
    return float(np.abs(image.astype(np.float32) - other)[~leave_out].mean() / 255)


def kept(wanted: Mapping[str, str], seen: Mapping[str, str]) -> dict[str, bool]:
    """Returns attribute -> whether it was seen as wanted, for those that can be seen."""
    return {name: seen[name] == value for name, value in wanted.items() if name in seen}


def mean(values: Sequence[float | None]) -> float | None:
    """Computes the mean of the measured values; None if there are none."""
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else None


def spread(values: Sequence[float | None]) -> float | None:
    """Computes the sample standard deviation of the measured values; None for fewer than two."""
    measured = [value for value in values if value is not None]
    return float(np.std(measured, ddof=1)) if len(measured) > 1 else None


def change_at(likeness: float, curve: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Interpolates the change at which a likeness is first reached, on a curve in order of weight.

    Args:
        curve: (likeness, change) of each weight.

    Returns:
        None: it is not reached.
    """
    points = [(x, y) for x, y in curve if x is not None and y is not None]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= likeness <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (likeness - x0) / (x1 - x0)
    return None
