"""Draws shapes into an image (Pen), and computes the geometry of a head in it (Face)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from lib_pulid.training.people import HAIR_COLOR, SKIN, Color, Person
from lib_pulid.training.scenes import Placement

FINE = 4  # drawn this many times larger, then reduced
CROWN = -0.96
INK: Color = (46, 36, 44)
# Numbers of the classes of BiSeNet's face parsing.
BACKGROUND, SKIN_AREA, BROW, EYE, GLASSES_AREA, EAR, NOSE, MOUTH, UPPER_LIP, LOWER_LIP, NECK, CLOTH, HAIR = (
    *(0, 1, 2, 4, 6, 7, 10, 11, 12, 13, 14, 16, 17),
)


def mix(color: Color, other: Color, share: float) -> Color:
    """Mixes a fraction of another color into a color."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(color, other))
    return red, green, blue


def shaded(color: Color, share: float = 0.2) -> Color:
    """Returns the color in a warm shadow."""
    return mix(color, (70, 20, 50), share)


def lit(color: Color, share: float = 0.2) -> Color:
    """Returns the color in a warm light."""
    return mix(color, (255, 244, 222), share)


@lru_cache(maxsize=64)
def _spline(count: int, steps: int) -> np.ndarray:
    """Returns the matrix [count * steps, count] of a closed Catmull-Rom curve."""
    powers = (np.arange(steps)[:, None] / steps) ** np.arange(4)
    basis = powers @ (0.5 * np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]))
    matrix = np.zeros((count, steps, count))
    for index in range(count):
        for k in range(4):
            matrix[index, :, (index + k - 1) % count] += basis[:, k]
    return matrix.reshape(count * steps, count)


def smooth(points: ArrayLike, steps: int = 6) -> np.ndarray:
    """Interpolates a closed curve [n * steps, 2] through points [n, 2]."""
    points = np.asarray(points, float)
    return _spline(len(points), steps) @ points


@lru_cache(maxsize=16)
def _circle(count: int, power: float) -> np.ndarray:
    angle = np.arange(count) * (2 * np.pi / count)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.sign(circle) * np.abs(circle) ** power


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0, count: int = 28) -> np.ndarray:
    """Returns an ellipse [count, 2], turned clockwise."""
    return turned(_circle(count, 1.0) * (rx, ry), degrees) + (x, y)


def squarish(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """Returns a rectangle with round corners [36, 2]."""
    return _circle(36, 0.36) * (rx, ry) + (x, y)


def turned(points: np.ndarray, degrees: float) -> np.ndarray:
    """Points turned clockwise about the origin."""
    return points @ _rotation(degrees) if degrees else points


def _rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, s], [-s, c]])


def mirrored(half: ArrayLike) -> np.ndarray:
    """Joins the right half of an outline [n, 2], from top to bottom, and its mirror image."""
    half = np.asarray(half, float)
    inner = half[1:-1] if abs(half[-1, 0]) < 1e-6 else half[1:]
    return np.concatenate([half, (inner * (-1, 1))[::-1]])


class Pen:
    """Draws closed shapes, given in fractions of the image, with colors or, for a map of labels, with their classes."""

    def __init__(self, size: int, labels: bool = False, outline: float = 0.0) -> None:
        full = (size * FINE, size * FINE)
        self.image = Image.new("L" if labels else "RGB", full)
        self.labels, self.outline = labels, outline
        self._scale, self._draw = size * FINE, ImageDraw.Draw(self.image)

    def fill(self, points: np.ndarray, color: Color, label: int | None = None, line: float = 1.0) -> None:
        """Fills a shape [n, 2]; label None: no class of its own; line: width of its outline, if there are outlines."""
        if self.labels and label is None:
            return
        pixels = (points * self._scale).ravel().tolist()
        self._draw.polygon(pixels, fill=label if self.labels else color)
        if self.outline and line:
            width = max(1, round(line * self.outline * self._scale))
            self._draw.line(pixels + pixels[:4], fill=INK, width=width, joint="curve" if len(pixels) < 40 else None)


@dataclass(frozen=True)
class Expression:
    """What a mood does to a face."""

    curve: float = 0.0  # corners of the mouth, up
    opened: float = 0.0  # mouth
    wide: float = 1.0  # mouth
    lids: float = 1.0  # how far the eyes are open
    brows: float = 0.0  # up
    brow_angle: float = 0.0  # inner ends, up


EXPRESSIONS = {
    "neutral": Expression(),
    "smiling": Expression(curve=0.075, wide=1.18, lids=0.92, brows=0.01),
    "laughing": Expression(curve=0.06, opened=0.2, wide=1.22, lids=0.78, brows=0.04),
    "sad": Expression(curve=-0.075, wide=0.95, lids=0.86, brows=0.01, brow_angle=0.09),
    "surprised": Expression(opened=0.22, wide=0.62, lids=1.18, brows=0.09),
}
_THETA = np.radians(21)  # of the head at turn 1


class Face:
    """Measures of one head. Head coordinates: the crown is near y -1, the chin near 1, x 0 the middle."""

    def __init__(self, person: Person, placement: Placement) -> None:
        p, mood = person, EXPRESSIONS[placement.expression]
        self.person, self.placement, self.mood = person, placement, mood
        self.unit = placement.scale / 2
        self._matrix, self._center = self.unit * _rotation(placement.tilt), np.array([placement.x, placement.y])
        self.turn = placement.turn
        self.width = 0.59 + 0.18 * p.face_width
        self.chin = 0.9 + 0.18 * p.face_length
        self.eye_x = 0.25 + 0.07 * p.eye_distance
        self.eye = (0.11 + 0.055 * p.eye_size, (0.076 + 0.054 * p.eye_size) * mood.lids)
        self.brow_y = -0.19 - 0.08 * p.brow_height - mood.brows
        self.nose_y = 0.25 + 0.11 * p.nose_length
        self.nose_width = 0.075 + 0.1 * p.nose_width
        self.mouth_y = self.chin * 0.62 + 0.06 * (p.mouth_height - 0.5)
        self.mouth_width = (0.17 + 0.1 * p.mouth_width) * mood.wide
        self.hairline = -0.66 + 0.2 * p.hairline
        self.skin = shaded(lit(SKIN[p.skin], 0.12 * (1 - p.skin_shade)), 0.1 * p.skin_shade)
        self.hair = mix(HAIR_COLOR[p.hair_color], (20, 10, 20), 0.16 * p.hair_shade)

    def outline(self) -> np.ndarray:
        """Returns the outline of the face without ears, up to the crown, [n, 2] in head coordinates."""
        p, w, chin = self.person, self.width, self.chin
        jaw, tip = w * (0.68 + 0.26 * p.jaw), w * (0.22 + 0.34 * p.chin)
        half = [(0, CROWN), (0.64 * w, -0.82), (0.96 * w, -0.42), (w, 0), (0.965 * w, 0.3)]
        half += [(jaw, 0.64 * chin), (tip, 0.94 * chin), (0, chin)]
        points = smooth(mirrored(half), 4)
        points[:, 0] += 0.06 * self.turn * np.clip(points[:, 1], 0, 1)
        return points

    def look(self, points: np.ndarray) -> np.ndarray:
        """Slides points on the face with the head's turn; what is on its edge or beyond stays."""
        u = points[:, 0] / self.width
        inside = np.minimum(np.maximum(u, -1), 1)
        edge = inside**4
        slid = points.copy()
        slid[:, 0] += self.width * (1 - edge) * (np.sin(np.arcsin(inside) + self.turn * _THETA) - inside)
        return slid

    def place(self, points: np.ndarray) -> np.ndarray:
        """Converts head coordinates to fractions of the image."""
        return points @ self._matrix + self._center

    def body(self, points: ArrayLike) -> np.ndarray:
        """Converts body coordinates, upright from the base of the neck, to fractions of the image."""
        return np.asarray(points, float) * self.unit + self.place(np.array([[0.0, 1.12]]))

    def nose_tip(self) -> np.ndarray:
        """Returns the nose tip, [1, 2]: it sticks out, so a turn moves it further."""
        return self.look(np.array([[0.0, self.nose_y]])) + (0.07 * self.turn, 0.0)

    def mouth_corners(self) -> np.ndarray:
        """Returns the corners of the mouth, [2, 2] in head coordinates."""
        y = self.mouth_y - self.mood.curve
        return self.look(np.array([[-self.mouth_width, y], [self.mouth_width, y]]))

    def landmarks(self) -> np.ndarray:
        """Returns eyes, nose tip and corners of the mouth, [5, 2], fractions of the image."""
        eyes = self.look(np.array([[-self.eye_x, 0.0], [self.eye_x, 0.0]]))
        return self.place(np.concatenate([eyes, self.nose_tip(), self.mouth_corners()]))

    def box(self) -> np.ndarray:
        """Returns the face's box, [4] x0 y0 x1 y1, fractions of the image: forehead to chin, without the ears."""
        points = self.outline()
        points = self.place(points[points[:, 1] > -0.7])
        return np.concatenate([points.min(0), points.max(0)])


class Sketch:
    """One head with one pen, and the side of it that is in the shadow: -1, 1 or 0."""

    def __init__(self, pen: Pen, face: Face, light: str) -> None:
        self.pen, self.face, self.person = pen, face, face.person
        self.dark_side = {"left": 1, "right": -1}.get(light, 0)

    def put(
        self, points: ArrayLike, color: Color, label: int | None = None, line: float = 1.0, look: bool = False
    ) -> None:
        """Fills a shape in head coordinates; look: on the face, so that it slides with the head's turn."""
        points = np.asarray(points, float)
        self.pen.fill(self.face.place(self.face.look(points) if look else points), color, label, line)

    def wear(self, points: ArrayLike, color: Color, line: float = 1.0, label: int = CLOTH) -> None:
        """Fills a shape in body coordinates."""
        self.pen.fill(self.face.body(points), color, label, line)
