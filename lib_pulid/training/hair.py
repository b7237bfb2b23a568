"""Draws hair and beards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lib_pulid.training.drawing import HAIR, SKIN_AREA, Sketch, ellipse, lit, mirrored, mix, shaded, smooth
from lib_pulid.training.people import Color

Points = Sequence[tuple[float, float]]


def draw_hair_behind(sketch: Sketch) -> None:
    """Draws the hair behind neck and face."""
    face, v, style = sketch.face, sketch.person.hair_volume, sketch.person.hair_style
    back, slide, w = shaded(face.hair, 0.2), -0.05 * face.turn, face.width
    if style == "afro":
        rx, ry = w + 0.11 + 0.08 * v, 0.7 + 0.12 * v
        _curls(sketch, ellipse(slide, -0.42, rx - 0.1, ry - 0.1, count=15), 0.19, face.hair)
        sketch.put(ellipse(slide, -0.42, rx - 0.02, ry - 0.02), face.hair, HAIR, 0)
    elif style == "curly":
        _curls(sketch, _arc(sketch, 0.06 + 0.06 * v, 0.0, -124, 124, 11), 0.19 + 0.05 * v, back)
    elif style == "bob":
        half = [(0, -0.8), (w * 0.9, -0.6), (w + 0.1 + 0.1 * v, 0.1), (w + 0.14 + 0.14 * v, 0.6)]
        half += [(w + 0.04 + 0.06 * v, 0.86), (0.3, 0.82), (0, 0.82)]
        sketch.put(smooth(mirrored(half)) + (slide, 0), back, HAIR)
    elif style == "long":
        half = [(0, -0.8), (w * 0.9, -0.6), (w + 0.08 + 0.1 * v, 0.1), (w + 0.1 + 0.12 * v, 0.8)]
        half += [(w + 0.1 + 0.14 * v, 1.5), (w * 0.9, 1.8), (0.46, 1.66), (0.4, 1.24), (0, 1.0)]
        sketch.put(smooth(mirrored(half)) + (slide, 0), back, HAIR)
    elif style == "bun":
        size = 0.23 + 0.12 * v
        sketch.put(ellipse(1.6 * slide, -1.02 - size * 0.6, size * 1.1, size), face.hair, HAIR)
        sketch.put(ellipse(1.6 * slide, -1.02, size * 0.6, 0.07), shaded(face.hair, 0.45), HAIR, 0)


def draw_hair(sketch: Sketch) -> None:
    """Draws the hair over the face."""
    _FRONT[sketch.person.hair_style](sketch, sketch.face.width, sketch.person.hair_volume, sketch.face.hairline)


def _arc(sketch: Sketch, side: float, top: float, start: float, end: float, count: int = 21) -> np.ndarray:
    """Points [count, 2] around an enlarged skull, from start to end, degrees clockwise from the top."""
    angle = np.radians(np.linspace(start, end, count))
    across, up = np.sin(angle), np.cos(angle)
    x = (sketch.face.width + side) * np.sign(across) * np.abs(across) ** 0.86
    y = -0.1 - (0.86 + top) * np.sign(up) * np.abs(up) ** 0.86
    return np.stack([x - 0.04 * sketch.face.turn, y], 1)


def _curls(sketch: Sketch, centers: np.ndarray, radius: float, color: Color, look: bool = False) -> None:
    """Draws a row of curls; their outlines first, so that they merge."""
    for line in (2, 0) if sketch.pen.outline else (0,):
        for x, y in centers:
            sketch.put(ellipse(x, y, radius, radius, count=18), color, HAIR, line, look=look)


def _cap(sketch: Sketch, outer: np.ndarray, inner: Points, steps: int = 4, line: float = 1.0) -> None:
    """Draws hair from an outer line (left to right) down to the hairline (right to left)."""
    hairline = np.array(inner, float)
    if sketch.person.parting < 0.5:
        hairline = (hairline * (-1, 1))[::-1]
        outer = (outer * (-1, 1) - (0.08 * sketch.face.turn, 0))[::-1]
    curve = smooth(np.concatenate([hairline[:1], hairline, hairline[-1:]]), steps)[steps : -2 * steps]
    curve = sketch.face.look(curve)
    edge = curve[curve[:, 1] < -0.15]
    sketch.put(np.concatenate([edge, edge[::-1] + (0, 0.06)]), shaded(sketch.face.skin, 0.3), None, 0)
    sketch.put(np.concatenate([outer, curve]), sketch.face.hair, HAIR, line)


def _shine(sketch: Sketch, top: float) -> None:
    """Draws a lighter band where the light falls."""
    flip = -1 if sketch.dark_side < 0 else 1
    outer, inner = _arc(sketch, -0.07, top, -56, -16, 9), _arc(sketch, -0.13, top - 0.1, -52, -20, 9)
    sketch.put(np.concatenate([outer, inner[::-1]]) * (flip, 1), lit(sketch.face.hair, 0.26), None, 0)


def _balding(sketch: Sketch, w: float, v: float, line: float) -> None:
    for side in (-1, 1):
        tuft = np.array([(w * 0.95, -0.36), (w + 0.03 + 0.04 * v, -0.2), (w + 0.03 + 0.05 * v, -0.02)])
        _curls(sketch, tuft * (side, 1), 0.1 + 0.035 * v, sketch.face.hair)
    side = 1 if sketch.dark_side < 0 else -1
    sketch.put(ellipse(side * 0.24, -0.7, 0.15, 0.075, side * 24), lit(sketch.face.skin, 0.4), None, 0, look=True)


def _short(sketch: Sketch, w: float, v: float, line: float) -> None:
    lift = 0.1 + 0.2 * v
    outer = [(-w * 0.98, 0.06), (-w - 0.06, -0.3), (-w * 0.92, -0.72), (-w * 0.5, -0.96 - 0.3 * lift)]
    outer += [(0, -1 - 0.7 * lift), (w * 0.5, -1 - lift), (w * 0.92, -0.82 - 0.8 * lift), (w + 0.09, -0.42)]
    outer += [(w + 0.03, -0.1), (w * 0.98, 0.06)]
    padded = np.array([outer[0], *outer, outer[-1]]) - (0.03 * sketch.face.turn, 0)
    fringe = [
        (w * 0.9, 0.06),
        (w * 0.86, -0.3),
        (w * 0.68, line + 0.06),
        (w * 0.2, line + 0.1),
        (-w * 0.3, line + 0.04),
    ]
    fringe += [(-w * 0.58, line - 0.13), (-w * 0.8, -0.42), (-w * 0.87, -0.2), (-w * 0.9, 0.06)]
    _cap(sketch, smooth(padded, 4)[4:-8], fringe)
    _shine(sketch, 0.02 + 0.1 * v)


def _spiky(sketch: Sketch, w: float, v: float, line: float) -> None:
    outer = _arc(sketch, 0.03, 0.06, -94, 94, 15)
    outer[1::2] = _arc(sketch, 0.14 + 0.08 * v, 0.24 + 0.24 * v, -94, 94, 15)[1::2]
    fringe = [(w * 0.9, -0.08), (w * 0.82, -0.46), (0.4, line - 0.06), (0.27, line + 0.14), (0.1, line - 0.04)]
    fringe += [(-0.06, line + 0.15), (-0.22, line - 0.04), (-0.4, line + 0.1), (-w * 0.82, -0.46), (-w * 0.9, -0.08)]
    _cap(sketch, outer, fringe, 1)


def _curly(sketch: Sketch, w: float, v: float, line: float) -> None:
    color = sketch.face.hair
    _curls(sketch, _arc(sketch, 0.02 + 0.04 * v, 0.0 + 0.1 * v, -86, 86, 9), 0.19 + 0.03 * v, color)
    sketch.put(_arc(sketch, 0.02, 0.06, -70, 70), color, HAIR, 0)
    x = np.linspace(-0.7, 0.7, 5) * w
    _curls(sketch, np.stack([x, line - 0.1 + 0.3 * (x / w) ** 2], 1), 0.17, color, look=True)
    side = 1 if sketch.dark_side < 0 else -1
    sketch.put(ellipse(side * 0.28, -0.86 - 0.1 * v, 0.11, 0.07, side * 20), lit(color, 0.25), None, 0)


def _afro(sketch: Sketch, w: float, v: float, line: float) -> None:
    fringe = [(w * 0.98, -0.16), (w * 0.82, -0.46), (0.3, line + 0.04), (0, line + 0.02), (-0.3, line + 0.04)]
    _cap(sketch, _arc(sketch, 0.04, 0.1, -84, 84), [*fringe, (-w * 0.82, -0.46), (-w * 0.98, -0.16)], line=0)
    side = 1 if sketch.dark_side < 0 else -1
    sketch.put(ellipse(side * 0.42, -0.86 - 0.1 * v, 0.15, 0.09, side * 32), lit(sketch.face.hair, 0.22), None, 0)


def _bob(sketch: Sketch, w: float, v: float, line: float) -> None:
    wide, low = w + 0.04 + 0.1 * v, line + 0.24
    arc = _arc(sketch, 0.06 + 0.06 * v, 0.1 + 0.1 * v, -98, 98)
    outer = np.concatenate(
        [[(-wide + 0.06, 0.72), (-wide - 0.05, 0.62)], arc, [(wide + 0.05, 0.62), (wide - 0.06, 0.72)]]
    )
    fringe = [(w * 0.9, 0.7), (w * 0.88, 0.1), (w * 0.84, low + 0.04), (0.2, low), (-0.2, low), (-w * 0.84, low + 0.04)]
    _cap(sketch, outer, [*fringe, (-w * 0.88, 0.1), (-w * 0.9, 0.7)])
    _shine(sketch, 0.04 + 0.08 * v)


def _long(sketch: Sketch, w: float, v: float, line: float) -> None:
    wide = w + 0.06 + 0.1 * v
    arc = _arc(sketch, 0.05 + 0.06 * v, 0.1 + 0.12 * v, -98, 98)
    outer = np.concatenate([[(-wide, 0.95), (-wide - 0.04, 0.6)], arc, [(wide + 0.04, 0.6), (wide, 0.95)]])
    fringe = [(w * 0.97, 0.7), (w * 0.86, 0.05), (w * 0.74, -0.34), (w * 0.3, line - 0.06), (-w * 0.22, line - 0.24)]
    fringe += [(-w * 0.5, line + 0.0), (-w * 0.8, -0.22), (-w * 0.9, 0.1), (-w * 0.97, 0.7)]
    _cap(sketch, outer, fringe)
    _shine(sketch, 0.04 + 0.08 * v)


def _bun(sketch: Sketch, w: float, v: float, line: float) -> None:
    fringe = [(w * 0.95, -0.1), (w * 0.8, -0.44), (0.28, line - 0.04), (0, line - 0.06), (-0.28, line - 0.04)]
    _cap(sketch, _arc(sketch, 0.03, 0.1, -88, 88), [*fringe, (-w * 0.8, -0.44), (-w * 0.95, -0.1)])
    _shine(sketch, 0.0)


_FRONT = {
    "balding": _balding,
    "short": _short,
    "spiky": _spiky,
    "curly": _curly,
    "afro": _afro,
    "bob": _bob,
    "long": _long,
    "bun": _bun,
}


def draw_beard(sketch: Sketch) -> None:
    """Draws beard and mustache, below the mouth."""
    face, kind = sketch.face, sketch.person.beard
    if kind == "none":
        return
    chin, w, y, nose = face.chin, face.width, face.mouth_y, face.nose_y
    color = mix(face.hair, face.skin, 0.22 if kind == "short beard" else 0.06)
    lean = (0.06 * face.turn, 0.0)
    if kind == "full beard":
        half = [(0, nose + 0.12), (w * 0.4, nose + 0.12), (w * 0.76, y - 0.18), (w * 0.93, 0.08), (w * 1.02, 0.3)]
        half += [(w * 0.98, y + 0.1), (w * 0.78, chin + 0.04), (w * 0.36, chin + 0.24), (0, chin + 0.29)]
        sketch.put(smooth(mirrored(half), 5) + lean, color, SKIN_AREA, look=True)
    elif kind == "short beard":
        edge = face.outline()
        edge = edge[edge[:, 1] > 0.06]
        edge = edge[np.argsort(np.arctan2(edge[:, 1], edge[:, 0] - lean[0]))] * (1.02, 1.03)
        inner = [(-w * 0.86, 0.1), (-w * 0.82, 0.34), (-w * 0.6, y + 0.03), (-w * 0.3, y + 0.16), (0, y + 0.13)]
        inner += [(-x, y) for x, y in inner[-2::-1]]
        sketch.put(np.concatenate([edge, sketch.face.look(np.array(inner))]), color, SKIN_AREA)
    elif kind == "goatee":
        half = [(0, y + 0.1), (0.17, y + 0.11), (0.22, chin * 0.9), (0.14, chin + 0.1), (0, chin + 0.13)]
        sketch.put(smooth(mirrored(half), 5) + lean, color, SKIN_AREA, look=True)
    wide, top = (0.32 if kind == "mustache" else 0.28), nose + 0.07
    half = [
        (0, top + 0.02),
        (0.12, top - 0.01),
        (wide * 0.8, top + 0.05),
        (wide, y + 0.02),
        (wide * 0.62, y - 0.02),
        (0, y - 0.05),
    ]
    sketch.put(smooth(mirrored(half), 5), shaded(color, 0.1), SKIN_AREA, 0.6, look=True)
