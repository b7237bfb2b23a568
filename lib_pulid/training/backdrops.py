"""Draws backgrounds; puts light and style over an image."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from lib_pulid.training.drawing import Pen, ellipse, mix
from lib_pulid.training.people import Color
from lib_pulid.training.scenes import BACKGROUND_COLOR, SECOND_COLOR, Scene

PAPER: Color = (252, 248, 238)
_PAPER = np.array(PAPER, np.float32)


def draw_background(pen: Pen, scene: Scene) -> None:
    """Fills the image with the scene's pattern, coarse and flat."""
    first, second = BACKGROUND_COLOR[scene.background_color], SECOND_COLOR[scene.second_color]
    if scene.style == "pencil":  # more of the paper is left
        first, second = mix(first, PAPER, 0.4), mix(second, PAPER, 0.4)
    soft = mix(first, second, 0.62 if scene.second_color == "white" else 1.0)
    pen.fill(np.array([(-1, -1), (2, -1), (2, 2), (-1, 2)]), first, 0, 0)
    for shape in _PATTERNS[scene.background](scene.shift):
        pen.fill(np.asarray(shape, float), soft, 0, 0)


def _stripes(shift: float) -> list:
    x0 = np.arange(-2, 6) * 0.25 + 0.25 * shift
    return [[(x, -0.1), (x + 0.125, -0.1), (x - 0.125, 1.1), (x - 0.25, 1.1)] for x in x0]


def _dots(shift: float) -> list:
    cells = [(x, y) for x in range(-1, 6) for y in range(-1, 7)]
    return [ellipse((x + 0.5 * (y % 2) + shift) * 0.24, (y + shift) * 0.2, 0.068, 0.068, count=20) for x, y in cells]


def _checks(shift: float) -> list:
    cells = [(x, y) for x in range(-1, 6) for y in range(-1, 6) if (x + y) % 2]
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    return [(corners + (x + shift, y + shift)) * 0.2 for x, y in cells]


def _waves(shift: float) -> list:
    x = np.linspace(-0.05, 1.05, 45)
    rows = (np.arange(-1, 5) + shift) * 0.25
    edges = [row + 0.035 * np.sin(2 * np.pi * (2.5 * x + shift)) for row in rows]
    return [np.concatenate([np.stack([x, y], 1), np.stack([x, y + 0.12], 1)[::-1]]) for y in edges]


def _rays(shift: float) -> list:
    angles = 2 * np.pi * (np.arange(10) + shift) / 10
    return [[(0.5, 0.5), *((0.5 + np.cos(b), 0.5 + np.sin(b)) for b in (a, a + np.pi / 10))] for a in angles]


def _hills(shift: float) -> list:
    x = np.linspace(-0.05, 1.05, 45)
    y = 0.5 - 0.09 * np.sin(2 * np.pi * (1.2 * x + shift)) - 0.03 * np.sin(2 * np.pi * (2.1 * x - shift))
    sun = ellipse(0.14 + 0.72 * shift, 0.16, 0.1, 0.1)
    return [sun, [*np.stack([x, y], 1), (1.1, 1.1), (-0.1, 1.1)]]


def _clouds(shift: float) -> list:
    shapes = []
    for x, y in ((0.0, 0.14), (0.52, 0.3), (0.04, 0.54), (0.56, 0.72), (0.02, 0.92), (0.54, -0.06)):
        for left in (-1, 0):
            center = x + shift + left
            puffs = ((-0.09, 0.02, 0.07), (0.0, -0.02, 0.09), (0.1, 0.015, 0.075))
            shapes += [ellipse(center + dx, y + dy, r, r * 0.8, count=20) for dx, dy, r in puffs]
    return shapes


_PATTERNS = {
    "plain": lambda shift: [],
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "waves": _waves,
    "rays": _rays,
    "hills": _hills,
    "clouds": _clouds,
}


# Light and style, on the finished image [size, size, 3] of float32, 0..255.


@lru_cache(maxsize=64)
def _light(name: str, size: int) -> np.ndarray:
    """Factors [size, size, 3] of one light."""
    across = np.linspace(0, 1, size, dtype=np.float32)[None, :, None]
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    warm, cool = np.array([1.08, 1.06, 1.0], np.float32), np.array([0.72, 0.72, 0.82], np.float32)
    one = np.ones((size, size, 3), np.float32)
    if name in ("left", "right"):
        part = across if name == "left" else 1 - across
        return one * (warm + (cool - warm) * part**1.2)
    if name == "evening":
        return one * (np.array([1.07, 0.96, 0.8], np.float32) + down * np.array([-0.08, -0.1, -0.06], np.float32))
    if name == "dim":
        return one * np.array([0.64, 0.67, 0.8], np.float32)
    return one


@lru_cache(maxsize=8)
def _clouding(size: int) -> np.ndarray:
    """Makes slow waves [size, size, 1] of -1..1, like watercolor."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) * (2 * np.pi / size)
    waves = np.sin(1.7 * x + 2.1 * y) + np.sin(3.1 * x - 1.3 * y + 1) + 0.7 * np.sin(2.3 * x + 4.3 * y + 2)
    return (waves / 2.7)[..., None]


@lru_cache(maxsize=8)
def _margin(size: int) -> np.ndarray:
    """Returns 1 inside and 0 on the paper's ragged margin, [size, size, 1]."""
    line = np.minimum(np.arange(size), np.arange(size)[::-1]) / size
    edge = np.minimum(line[:, None], line[None, :])[..., None] + 0.012 * _clouding(size)
    return np.clip((edge - 0.025) / 0.03, 0, 1).astype(np.float32)


def finish(image: np.ndarray, scene: Scene) -> np.ndarray:
    """Puts light and style over the reduced image."""
    size = image.shape[0]
    strength = 0.6 if scene.style in ("pencil", "watercolor") else 1.0  # paper is pale
    image = image * (1 + strength * (_light(scene.light, size) - 1))
    if scene.style == "pencil":
        gray = image @ np.array([0.3, 0.59, 0.11], np.float32)
        image = gray[..., None] + 0.6 * (image - gray[..., None])
        image = image + (_PAPER - image) * 0.2
    elif scene.style == "watercolor":
        source = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        blurred = np.asarray(source.filter(ImageFilter.GaussianBlur(size / 40)), np.float32)
        image = image + 0.35 * (image - blurred)
        share = 0.18 + 0.09 * _clouding(size)
        image = image + (_PAPER - image) * share
        image = _PAPER + (image - _PAPER) * _margin(size)
    return np.clip(image, 0, 255)
