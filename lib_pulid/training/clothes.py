"""Draws clothes. Body coordinates: upright, the base of the neck at 0, one unit is half a head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lib_pulid.training.drawing import NECK, Sketch, ellipse, lit, mirrored, shaded, smooth
from lib_pulid.training.people import Color
from lib_pulid.training.scenes import CLOTHES_COLOR

WHITE: Color = (252, 250, 246)
CREAM: Color = (250, 240, 220)
NAVY: Color = (50, 60, 92)
GRAY: Color = (90, 90, 104)
BRASS: Color = (246, 206, 110)

_SIDE = smooth([(0, -0.02), (0.34, 0), (0.72, 0.16), (1.1, 0.36), (1.3, 0.74), (1.42, 1.5), (1.5, 4)], 5)[:31]
TORSO = mirrored([*_SIDE, (1.5, 4), (0, 4)])
_STRIPES = (0.2, 0.62, 1.04, 1.46, 1.88)
_BIB = [(-0.62, 0.72), (0.62, 0.72), (0.7, 1.2), (0.95, 1.5), (1, 4), (-1, 4), (-0.95, 1.5), (-0.7, 1.2)]
_RING = [(-0.42, -0.02), (-0.34, 0.2), (0, 0.34), (0.34, 0.2), (0.42, -0.02), (0, -0.2)]
_COLLAR = np.concatenate([smooth(_RING, 5)[:21] * (1.05, 1) + (0, 0.07), (smooth(_RING, 5)[:21] * (0.88, 0.9))[::-1]])
_ROLL = smooth(mirrored([(0, -0.16), (0.42, -0.24), (0.48, 0.14), (0.32, 0.3), (0, 0.36)]))
_HOOD = smooth([(0.34, -0.24), (0.6, -0.04), (0.5, 0.26), (0, 0.52), (0.06, 0.3), (0.32, 0.1)])
_CORD = [(0.14, 0.4), (0.22, 0.38), (0.24, 0.86), (0.16, 0.86)]
_SHIRT_FRONT = mirrored([(0, 0.24), (0.36, 0.02), (0.3, 0.5), (0, 1.5)])
_TIE = [(-0.09, 0.2), (0.09, 0.2), (0.14, 0.9), (0, 1.4), (-0.14, 0.9)]
_LAPEL = [(0.34, -0.06), (0.56, 0.1), (0.6, 0.6), (0, 1.6), (0.24, 0.6), (0.3, 0.2)]


def draw_body(sketch: Sketch) -> None:
    """Clothes as far as the neck and the hair go over them."""
    placement, put = sketch.face.placement, sketch.wear
    kind, color = placement.clothes, CLOTHES_COLOR[placement.clothes_color]
    if kind == "hoodie":
        put(ellipse(0, -0.12, 0.82, 0.46), shaded(color, 0.22))
    put(TORSO, CREAM if kind == "overalls" else color)
    if kind == "striped shirt":
        for y in _STRIPES:
            put(_band(y, y + 0.2), GRAY if placement.clothes_color == "white" else WHITE, 0)
    elif kind == "dress":
        put(_band(-0.02, 0.66), sketch.face.skin, label=NECK)
        _both(sketch, [(0.46, 0.04), (0.64, 0.1), (0.7, 0.72), (0.5, 0.72)], color, 0)
    elif kind == "overalls":
        _both(sketch, [(0.42, 0.04), (0.66, 0.12), (0.6, 0.86), (0.38, 0.86)], color)
        put(_BIB, color)
        _both(sketch, ellipse(0.49, 0.84, 0.07, 0.07, count=14), BRASS, 0.5)


def draw_collar(sketch: Sketch) -> None:
    """Draws the part of the clothes over the neck."""
    placement, put = sketch.face.placement, sketch.wear
    kind, color = placement.clothes, CLOTHES_COLOR[placement.clothes_color]
    if kind in ("shirt", "striped shirt", "overalls"):
        put(_COLLAR, shaded(CREAM if kind == "overalls" else color, 0.22), 0.7)
    elif kind == "turtleneck":
        put(_ROLL, shaded(color, 0.12))
    elif kind == "hoodie":
        _both(sketch, _HOOD, shaded(color, 0.12))
        _both(sketch, _CORD, CREAM if placement.clothes_color != "white" else GRAY, 0.5)
    elif kind == "suit":
        put(_SHIRT_FRONT, WHITE)
        put(_TIE, (206, 70, 70) if placement.clothes_color in ("black", "blue", "purple") else NAVY, 0.6)
        dark = placement.clothes_color == "black"
        _both(sketch, _LAPEL, lit(color, 0.16) if dark else shaded(color, 0.18))


def _both(sketch: Sketch, points: np.ndarray | Sequence[tuple[float, float]], color: Color, line: float = 1.0) -> None:
    """Draws a shape on the right and its mirror image."""
    for side in (-1, 1):
        sketch.wear(np.asarray(points) * (side, 1), color, line)


def _band(top: float, bottom: float) -> np.ndarray:
    """Draws the torso between two heights."""
    y = np.linspace(top, bottom, 9)
    x = np.interp(y, _SIDE[:, 1], _SIDE[:, 0])
    return np.concatenate([np.stack([x, y], 1), np.stack([-x, y], 1)[::-1]])
