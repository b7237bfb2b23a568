"""Draws a head: skin, features, beard and hair, each a few smooth shapes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lib_pulid.training.drawing import (
    BROW,
    EAR,
    EYE,
    GLASSES_AREA,
    INK,
    LOWER_LIP,
    MOUTH,
    NECK,
    NOSE,
    SKIN_AREA,
    UPPER_LIP,
    Sketch,
    ellipse,
    lit,
    mirrored,
    mix,
    shaded,
    smooth,
    squarish,
    turned,
)
from lib_pulid.training.hair import draw_beard, draw_hair, draw_hair_behind
from lib_pulid.training.people import EYE_COLOR, Color

WHITE: Color = (253, 250, 244)


def draw_head(sketch: Sketch, collar: Callable[[Sketch], None]) -> None:
    """Draws neck and head over a drawn body, hair behind them first; collar goes over the neck."""
    draw_hair_behind(sketch)
    _neck(sketch)
    collar(sketch)
    _skin(sketch)
    draw_beard(sketch)
    _nose(sketch)
    _mouth(sketch)
    _eyes(sketch)
    _temples(sketch)
    draw_hair(sketch)
    _brows(sketch)
    _glasses(sketch)


def _neck(sketch: Sketch) -> None:
    face, w = sketch.face, 0.36
    shape = smooth([(-w, -0.75), (w, -0.75), (w, -0.05), (w * 0.9, 0.16), (0, 0.3), (-w * 0.9, 0.16), (-w, -0.05)])
    sketch.pen.fill(face.body(shape), shaded(face.skin, 0.1), NECK)
    shadow = face.outline() * (0.86, 1.0) + (0, 0.14)
    shadow = face.place(shadow[shadow[:, 1] > 0.5])
    half = face.body(np.array([[-w, 0.0], [w, 0.0]]))[:, 0]
    shadow[:, 0] = np.clip(shadow[:, 0], *half)
    sketch.pen.fill(shadow, shaded(face.skin, 0.32), None, 0)


def _skin(sketch: Sketch) -> None:
    face, p = sketch.face, sketch.person
    for side in (-1, 1):
        size = (0.13 + 0.1 * p.ear_size) * (1 + 0.25 * min(0, side * -face.turn))
        x = side * (face.width + 0.25 * size - 0.05 * max(0, -side * face.turn))
        sketch.put(ellipse(x, 0.1, size * 0.72, size * 1.15, side * 10), face.skin, EAR)
        sketch.put(ellipse(x, 0.1, size * 0.36, size * 0.66, side * 10), shaded(face.skin, 0.22), None, 0)
    outline = face.outline()
    sketch.put(outline, face.skin, SKIN_AREA)
    if sketch.dark_side:
        half = outline[outline[:, 0] * sketch.dark_side > 0]
        half = half[np.argsort(half[:, 1])]
        inner = half[::-1] * (0.66, 0.97)
        sketch.put(np.concatenate([half, inner]), shaded(face.skin, 0.18), None, 0)
    for side in (-1, 1):
        cheek = ellipse(side * 0.4 * face.width / 0.68, 0.36, 0.13, 0.09)
        sketch.put(cheek, mix(face.skin, (232, 84, 84), 0.17), None, 0, look=True)
        if p.freckles != "none":
            spot = mix(face.skin, (66, 20, 8), 0.5)
            for x, y in ((0.24, 0.25), (0.36, 0.31), (0.48, 0.24), (0.4, 0.42)):
                sketch.put(ellipse(side * x, y, 0.036, 0.034, count=10), spot, None, 0, look=True)


def _nose(sketch: Sketch) -> None:
    face = sketch.face
    w, y = face.nose_width, face.nose_y
    tip = face.nose_tip()[0, 0]
    half = [(0, 0.02), (0.045, 0.08), (w * 0.55, y - 0.1), (w, y - 0.01), (w * 0.7, y + 0.05), (0, y + 0.065)]
    points = smooth(mirrored(half), 5)
    root = tip - 0.07 * face.turn
    down = np.clip(points[:, 1] / y, 0, 1)
    points[:, 0] += root + (tip - root) * down
    sketch.put(points, shaded(face.skin, 0.2), NOSE, 0)
    sketch.put(ellipse(tip, y - 0.035, w * 0.62, 0.062), lit(mix(face.skin, (232, 96, 84), 0.12), 0.12), None, 0)


def _mouth(sketch: Sketch) -> None:
    face, mood, p = sketch.face, sketch.face.mood, sketch.person
    t = np.linspace(-1, 1, 15)
    x, bow = face.mouth_width * t, 1 - t**2
    middle = face.mouth_y + mood.curve * (1 - 2 * t**2)
    upper, lower = middle - 0.35 * mood.opened * bow**0.6, middle + 0.65 * mood.opened * bow**0.6
    full = 0.045 + 0.065 * p.lip_fullness
    crest = upper - full * 0.85 * (1 - np.abs(t) ** 2.4) * (1 - 0.35 * np.exp(-((t / 0.2) ** 2)))
    floor = lower + full * 1.1 * bow**0.8
    rose = mix(shaded(face.skin, 0.3), (200, 58, 74), 0.25 + 0.6 * p.lip_tint)

    def band(top, bottom):
        return np.concatenate([np.stack([x, top], 1), np.stack([x, bottom], 1)[::-1]])

    sketch.put(band(middle, floor), rose, LOWER_LIP, 0.6, look=True)
    sketch.put(band(crest, middle), shaded(rose, 0.14), UPPER_LIP, 0.6, look=True)
    if mood.opened:
        sketch.put(band(upper, lower), (112, 28, 40), MOUTH, 0, look=True)
        if mood.curve > 0:
            sketch.put(band(upper, upper + 0.34 * (lower - upper)), WHITE, MOUTH, 0, look=True)
        else:
            sketch.put(ellipse(0, face.mouth_y + 0.11, 0.09, 0.035), (214, 92, 96), MOUTH, 0, look=True)
    else:
        sketch.put(band(middle - 0.022 * bow**0.5, middle + 0.022 * bow**0.5), shaded(rose, 0.62), None, 0, look=True)


def _eyes(sketch: Sketch) -> None:
    face, p = sketch.face, sketch.person
    rx, ry = face.eye
    for side in (-1, 1):
        slant = side * -14 * (p.eye_slant - 0.4)
        center = np.array([side * face.eye_x, 0.0])
        t = np.linspace(-1, 1, 11)
        top = np.stack([rx * t, -ry * 1.06 * (1 - t**2) ** 0.62], 1)
        bottom = np.stack([rx * t, ry * 0.92 * (1 - t**2) ** 0.7], 1)[::-1]
        white = turned(np.concatenate([top, bottom]), slant) + center
        sketch.put(white, WHITE, EYE if side < 0 else EYE + 1, 0.5, look=True)
        iris = 0.078 + 0.02 * p.eye_size
        tall = min(iris, ry * 0.98)
        sketch.put(ellipse(center[0], 0, iris, tall), EYE_COLOR[p.eye_color], EYE + (side > 0), 0, look=True)
        sketch.put(ellipse(center[0], 0, iris * 0.46, tall * 0.52, count=14), (24, 18, 26), None, 0, look=True)
        glint = ellipse(center[0] - iris * 0.38, -tall * 0.42, iris * 0.34, iris * 0.34, count=10)
        sketch.put(glint, (255, 255, 255), None, 0, look=True)
        outer = top * (1.1, 1.0) + (side * 0.018, 0)
        lid = np.concatenate(
            [outer - np.stack([0 * t, 0.022 + 0.03 * (1 + side * t) / 2], 1), (top + (0, 0.014))[::-1]]
        )
        sketch.put(turned(lid, slant) + center, mix(_brow_color(sketch), INK, 0.75), None, 0, look=True)


def _brows(sketch: Sketch) -> None:
    face, p = sketch.face, sketch.person
    thick = 0.035 + 0.05 * p.brow_thickness
    rise = 0.08 * (p.brow_angle - 0.45) - face.mood.brow_angle
    for side in (-1, 1):
        t = np.linspace(-1, 1, 9)  # from the nose outward
        x = side * (face.eye_x + 0.01 + 0.165 * t)
        y = face.brow_y - rise * t - 0.03 * (1 - t**2)
        half = thick * (0.62 + 0.38 * np.cos(np.pi * (t + 0.4) / 2))
        shape = np.concatenate([np.stack([x, y - half], 1), np.stack([x, y + half], 1)[::-1]])
        sketch.put(smooth(shape, 2), _brow_color(sketch), BROW + (side > 0), 0, look=True)


def _frame(sketch: Sketch) -> tuple[float, float, Color]:
    """Returns the middle of the right lens, half its width, and the frame's color."""
    face = sketch.face
    color = (38, 40, 58) if sketch.person.glasses == "square" else (150, 62, 40)
    return face.eye_x + 0.015, max(0.225, face.eye_x - 0.035), color


def _temples(sketch: Sketch) -> None:
    """Draws the arms of the glasses, below the hair."""
    if sketch.person.glasses == "none":
        return
    x, ring, color = _frame(sketch)
    near, far = x + ring - 0.02, sketch.face.width
    for side in (-1, 1):
        arm = np.array([(near, -0.03), (far, -0.05), (far, 0.02), (near, 0.04)]) * (side, 1)
        sketch.put(arm, color, GLASSES_AREA, 0, look=True)


def _glasses(sketch: Sketch) -> None:
    if sketch.person.glasses == "none":
        return
    (x, ring, color), thick = _frame(sketch), 0.06
    for center in (-x, x):
        if sketch.person.glasses == "round":
            outer, inner = (ellipse(center, 0.03, r, r * 1.02, count=36) for r in (ring, ring - thick))
        else:
            outer, inner = (squarish(center, 0.025, ring - t, 0.19 - t) for t in (0, thick))
        frame = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])
        sketch.put(frame, color, GLASSES_AREA, 0, look=True)
    gap = x - ring + 0.03
    sketch.put([(-gap, -0.03), (gap, -0.03), (gap, 0.035), (-gap, 0.035)], color, GLASSES_AREA, 0, look=True)


def _brow_color(sketch: Sketch) -> Color:
    return mix(sketch.face.hair, INK, 0.3)
