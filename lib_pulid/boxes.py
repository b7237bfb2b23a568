"""Defines boxes: rectangular regions of an image, as fractions of its width and height, with soft edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.02  # width and height of a box; a smaller one is a slip of the mouse
SOFT = 0.15  # fraction of the shorter side over which the edge fades
SIDE = 256  # pixels of a box's mask
_ROUNDED = 1e-3  # so near may an edge of a box that was written as text be to the image's


class Box(NamedTuple):
    """A region: left and top edge, width and height, each 0..1."""

    x: float
    y: float
    width: float
    height: float

    def __str__(self) -> str:
        return " ".join(f"{value:.4g}" for value in self)


def read_box(value: str | Sequence[float]) -> Box:
    """Reads [x, y, width, height], or the same four numbers as text, and cuts off what lies outside the image.

    Raises:
        ValueError: it is no such box, or lies outside the image.
    """
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        x, y, width, height = (_number(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            "a box has four numbers: x, y, width and height, as fractions of the image (0 to 1)."
        ) from None
    left, top = max(0.0, x), max(0.0, y)
    box = Box(left, top, min(width - (left - x), 1 - left), min(height - (top - y), 1 - top))
    if min(box.width, box.height) < LEAST:
        raise ValueError(f"the box is outside the image, or smaller than {LEAST:.0%} of it.")
    return box


def _number(part: object) -> float:
    if isinstance(part, bool) or not isinstance(part, (str, int, float)):
        raise ValueError
    number = float(part)
    if not math.isfinite(number) or abs(number) > 10:
        raise ValueError
    return number


def mask_of(box: Box, side: int = SIDE) -> Tensor:
    """Draws a box: [side, side] float32, 1 inside, 0 outside, fading between over SOFT of the shorter side.

    An edge that is an edge of the image does not fade.
    """
    fade = SOFT * min(box.width, box.height)
    middles = (torch.arange(side) + 0.5) / side
    return _ramp(middles, box.y, box.height, fade)[:, None] * _ramp(middles, box.x, box.width, fade)


def within(mask: Tensor | None, box: Box) -> Tensor:
    """Cuts a mask [H, W] down to a box; without a mask, the box is the mask.

    Raises:
        ValueError: nothing is left but the box's soft edge, in which no face would be visible.
    """
    if mask is None:
        return mask_of(box)
    inside = F.interpolate(mask_of(box)[None, None], mask.shape, mode="bilinear", antialias=True)[0, 0]
    both = (mask >= mask.max() / 16) & (inside >= 0.5)
    if both.float().mean() < LEAST**2 / 2:
        raise ValueError("the box and the mask do not overlap. Remove one of them.")
    return mask * inside


def _ramp(at: Tensor, start: float, length: float, fade: float) -> Tensor:
    """Rises from 0 to 1 around the start, and falls around the end; [side]."""
    end = start + length
    rise = torch.ones_like(at) if start < _ROUNDED else ((at - start) / fade + 0.5).clamp(0, 1)
    fall = torch.ones_like(at) if end > 1 - _ROUNDED else ((end - at) / fade + 0.5).clamp(0, 1)
    return rise * fall
