"""Draws a head: skin, features, beard and hair, each a few smooth shapes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lib_pulid.training.drawing import (
    BROW,
    EAR,
    EYE,
    GLASSES_AREA,
    HAIR,
    INK,
    LOWER_LIP,
    MOUTH,
    NECK,
    NOSE,
    SKIN_AREA,
    UPPER_LIP,
    Face,
    Pen,
    ellipse,
    lit,
    mirrored,
    mix,
    shaded,
    smooth,
    squarish,
    turned,
)
from lib_pulid.training.people import EYE_COLOR, Color

WHITE: Color = (253, 250, 244)


def draw_head(pen: Pen, face: Face, light: str, collar: Callable[[Pen, Face], None]) -> None:
    """Neck and head over a body that is there already, hair behind them first; collar goes over the neck."""
    sketch = Sketch(pen, face, light)
    sketch.hair_behind()
    sketch.neck()
    collar(pen, face)
    sketch.skin()
    sketch.beard()
    sketch.nose()
    sketch.mouth()
    sketch.eyes()
    sketch.hair_in_front()
    sketch.brows()
    sketch.glasses()


class Sketch:
    """One head with one pen."""

    def __init__(self, pen: Pen, face: Face, light: str) -> None:
        self.pen, self.face, self.person = pen, face, face.person
        self.dark_side = {"left": 1, "right": -1}.get(light, 0)
        self.brow_color = mix(face.hair, INK, 0.3)

    def put(self, points, color: Color, label: int | None = None, line: float = 1.0, look: bool = False) -> None:
        """A shape in head coordinates; look: on the face, so that it slides with the head's turn."""
        points = np.asarray(points, float)
        self.pen.fill(self.face.place(self.face.look(points) if look else points), color, label, line)

    # Skin

    def neck(self) -> None:
        face, w = self.face, 0.36
        shape = smooth([(-w, -0.75), (w, -0.75), (w, -0.05), (w * 0.9, 0.16), (0, 0.3), (-w * 0.9, 0.16), (-w, -0.05)])
        self.pen.fill(face.body(shape), shaded(face.skin, 0.1), NECK)
        shadow = face.outline() * (0.86, 1.0) + (0, 0.14)
        shadow = face.place(shadow[shadow[:, 1] > 0.5])
        half = face.body(np.array([[-w, 0.0], [w, 0.0]]))[:, 0]
        shadow[:, 0] = np.clip(shadow[:, 0], *half)
        self.pen.fill(shadow, shaded(face.skin, 0.32), None, 0)

    def skin(self) -> None:
        face, p = self.face, self.person
        for side in (-1, 1):
            size = (0.13 + 0.1 * p.ear_size) * (1 + 0.25 * min(0, side * -face.turn))
            x = side * (face.width + 0.25 * size - 0.05 * max(0, -side * face.turn))
            self.put(ellipse(x, 0.1, size * 0.72, size * 1.15, side * 10), face.skin, EAR)
            self.put(ellipse(x, 0.1, size * 0.36, size * 0.66, side * 10), shaded(face.skin, 0.22), None, 0)
        outline = face.outline()
        self.put(outline, face.skin, SKIN_AREA)
        if self.dark_side:
            half = outline[outline[:, 0] * self.dark_side > 0]
            half = half[np.argsort(half[:, 1])]
            inner = half[::-1] * (0.66, 0.97)
            self.put(np.concatenate([half, inner]), shaded(face.skin, 0.18), None, 0)
        for side in (-1, 1):
            cheek = ellipse(side * 0.4 * face.width / 0.68, 0.36, 0.13, 0.09)
            self.put(cheek, mix(face.skin, (232, 84, 84), 0.22), None, 0, look=True)
            if p.freckles != "none":
                spot = mix(face.skin, (120, 50, 20), 0.55)
                for x, y in ((0.24, 0.25), (0.36, 0.31), (0.48, 0.24), (0.40, 0.18 + 0.24)):
                    self.put(ellipse(side * x, y, 0.036, 0.034, count=10), spot, None, 0, look=True)

    # Features

    def nose(self) -> None:
        face = self.face
        w, y = face.nose_width, face.nose_y
        tip = face.nose_tip()[0, 0]
        half = [(0, 0.02), (0.045, 0.08), (w * 0.55, y - 0.1), (w, y - 0.01), (w * 0.7, y + 0.05), (0, y + 0.065)]
        points = smooth(mirrored(half), 5)
        points[:, 0] += tip * np.clip(points[:, 1] / y, 0, 1) + (tip - 0.07 * face.turn) * np.clip(
            1 - points[:, 1] / y, 0, 1
        )
        self.put(points, shaded(face.skin, 0.17), NOSE, 0)
        self.put(ellipse(tip, y - 0.035, w * 0.62, 0.062), lit(mix(face.skin, (232, 96, 84), 0.12), 0.12), None, 0)

    def mouth(self) -> None:
        face, mood, p = self.face, self.face.mood, self.person
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

        self.put(band(middle, floor), rose, LOWER_LIP, 0.6, look=True)
        self.put(band(crest, middle), shaded(rose, 0.14), UPPER_LIP, 0.6, look=True)
        if mood.opened:
            self.put(band(upper, lower), (112, 28, 40), MOUTH, 0, look=True)
            if mood.curve > 0:
                self.put(band(upper, upper + 0.34 * (lower - upper)), WHITE, MOUTH, 0, look=True)
            else:
                self.put(ellipse(0, face.mouth_y + 0.11, 0.09, 0.035), (214, 92, 96), MOUTH, 0, look=True)
        else:
            self.put(band(middle - 0.022 * bow**0.5, middle + 0.022 * bow**0.5), shaded(rose, 0.62), None, 0, look=True)

    def eyes(self) -> None:
        face, p = self.face, self.person
        rx, ry = face.eye
        for side in (-1, 1):
            slant = side * -14 * (p.eye_slant - 0.4)
            center = np.array([side * face.eye_x, 0.0])
            t = np.linspace(-1, 1, 11)
            top = np.stack([rx * t, -ry * 1.06 * (1 - t**2) ** 0.62], 1)
            bottom = np.stack([rx * t, ry * 0.92 * (1 - t**2) ** 0.7], 1)[::-1]
            white = turned(np.concatenate([top, bottom]), slant) + center
            self.put(white, WHITE, EYE if side < 0 else EYE + 1, 0.5, look=True)
            iris = 0.078 + 0.02 * p.eye_size
            tall = min(iris, ry * 0.98)
            self.put(ellipse(center[0], 0, iris, tall), EYE_COLOR[p.eye_color], EYE + (side > 0), 0, look=True)
            self.put(ellipse(center[0], 0, iris * 0.46, tall * 0.52, count=14), (24, 18, 26), None, 0, look=True)
            glint = ellipse(center[0] - iris * 0.38, -tall * 0.42, iris * 0.34, iris * 0.34, count=10)
            self.put(glint, (255, 255, 255), None, 0, look=True)
            outer = top * (1.1, 1.0) + (side * 0.018, 0)
            lid = np.concatenate(
                [outer - np.stack([0 * t, 0.022 + 0.03 * (1 + side * t) / 2], 1), (top + (0, 0.014))[::-1]]
            )
            self.put(turned(lid, slant) + center, mix(self.brow_color, INK, 0.75), None, 0, look=True)

    def brows(self) -> None:
        face, p = self.face, self.person
        thick = 0.035 + 0.05 * p.brow_thickness
        rise = 0.09 * (p.brow_angle - 0.35) - face.mood.brow_angle
        for side in (-1, 1):
            t = np.linspace(-1, 1, 9)  # from the nose outward
            x = side * (face.eye_x + 0.01 + 0.165 * t)
            y = face.brow_y - rise * t - 0.03 * (1 - t**2)
            half = thick * (0.62 + 0.38 * np.cos(np.pi * (t + 0.4) / 2))
            shape = np.concatenate([np.stack([x, y - half], 1), np.stack([x, y + half], 1)[::-1]])
            self.put(smooth(shape, 2), self.brow_color, BROW + (side > 0), 0, look=True)

    def glasses(self) -> None:
        face, kind = self.face, self.person.glasses
        if kind == "none":
            return
        color = (38, 40, 58) if kind == "square" else (150, 62, 40)
        ring, thick = max(0.225, face.eye_x - 0.035), 0.06
        for side in (-1, 1):
            x = side * (face.eye_x + 0.015)
            if kind == "round":
                outer = ellipse(x, 0.03, ring, ring * 1.02, count=36)
                inner = ellipse(x, 0.03, ring - thick, ring * 1.02 - thick, count=36)
            else:
                outer = squarish(x, 0.025, ring, 0.19)
                inner = squarish(x, 0.025, ring - thick, 0.19 - thick)
            frame = np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])
            self.put(frame, color, GLASSES_AREA, 0, look=True)
            arm = np.array(
                [
                    (x + side * (ring - 0.02), -0.03),
                    (side * face.width, -0.05),
                    (side * face.width, 0.02),
                    (x + side * (ring - 0.02), 0.04),
                ]
            )
            self.put(arm, color, GLASSES_AREA, 0, look=True)
        gap = face.eye_x + 0.015 - ring + 0.03
        self.put([(-gap, -0.03), (gap, -0.03), (gap, 0.035), (-gap, 0.035)], color, GLASSES_AREA, 0, look=True)

    # Beard

    def beard(self) -> None:
        face, kind = self.face, self.person.beard
        color = mix(face.hair, face.skin, 0.12)
        chin, w, y = face.chin, face.width, face.mouth_y
        full = kind == "full beard"
        if kind in ("short beard", "full beard"):
            grown = 0.24 if full else 0.04
            outer = face.outline()
            outer = outer[outer[:, 1] > (0.12 if full else 0.22)]
            outer = outer[np.argsort(np.arctan2(outer[:, 1] - 0.1, outer[:, 0] - 0.06 * face.turn))]
            down = np.clip((outer[:, 1:] - 0.1) / chin, 0, 1)
            outer = outer * (1 + grown * 0.35 * down) + np.concatenate([0 * down, grown * down**2], 1)
            top = y - 0.16 if full else y - 0.05
            inner = np.array(
                [
                    (-0.84 * w, 0.3),
                    (-0.66 * w, top),
                    (-0.3, top - 0.02),
                    (0, top + 0.01),
                    (0.3, top - 0.02),
                    (0.66 * w, top),
                    (0.84 * w, 0.3),
                ]
            )
            inner = face.look(inner)
            self.put(np.concatenate([outer, inner]), color, SKIN_AREA if not full else SKIN_AREA)
        elif kind == "goatee":
            half = [(0, y + 0.1), (0.17, y + 0.11), (0.22, chin * 0.9), (0.14, chin + 0.1), (0, chin + 0.13)]
            points = smooth(mirrored(half), 5) + (0.05 * face.turn, 0)
            self.put(points, color, SKIN_AREA, look=True)
        if kind != "none":
            big = 0.045 if kind == "mustache" else 0
            top, wide = face.nose_y + 0.07, 0.27 + big
            half = [
                (0, top + 0.02),
                (0.12, top - 0.01),
                (wide * 0.8, top + 0.05),
                (wide, y + 0.0),
                (wide * 0.62, y - 0.02),
                (0, y - 0.05),
            ]
            self.put(smooth(mirrored(half), 5), shaded(color, 0.06), SKIN_AREA, 0.6, look=True)

    # Hair

    def arc(self, side: float, top: float, start: float, end: float, count: int = 21) -> np.ndarray:
        """Points [count, 2] on an enlarged skull, from start to end, degrees from the top, clockwise."""
        angle = np.radians(np.linspace(start, end, count))
        x, y = (self.face.width + side) * np.sin(angle), -0.1 - (0.9 + top) * np.cos(angle)
        return np.stack([x - 0.04 * self.face.turn, y], 1)

    def bumps(self, points: np.ndarray, radius: float, color: Color, look: bool = False) -> None:
        """A row of curls; their outlines first, so that they merge."""
        if self.pen.outline:
            for x, y in points:
                self.put(ellipse(x, y, radius, radius, count=18), color, HAIR, 2, look=look)
        for x, y in points:
            self.put(ellipse(x, y, radius, radius, count=18), color, HAIR, 0, look=look)

    def hair_behind(self) -> None:
        face, v, style = self.face, self.person.hair_volume, self.person.hair_style
        back, slide, w = shaded(face.hair, 0.16), -0.05 * face.turn, face.width
        if style == "afro":
            center = (slide, -0.42)
            rx, ry = w + 0.2 + 0.12 * v, 0.78 + 0.14 * v
            self.bumps(ellipse(*center, rx - 0.1, ry - 0.1, count=15), 0.19, face.hair)
            self.put(ellipse(*center, rx - 0.02, ry - 0.02), face.hair, HAIR, 0)
        elif style == "curly":
            points = self.arc(0.08 + 0.06 * v, 0.03, -122, 122, 11)
            self.bumps(points, 0.2 + 0.04 * v, back)
        elif style == "bob":
            half = [
                (0, -0.9),
                (w * 0.9, -0.6),
                (w + 0.12 + 0.1 * v, 0.1),
                (w + 0.16 + 0.14 * v, 0.62),
                (w + 0.06, 0.86),
                (0.3, 0.84),
                (0, 0.84),
            ]
            self.put(smooth(mirrored(half)) + (slide, 0), back, HAIR)
        elif style == "long":
            half = [
                (0, -0.9),
                (w * 0.9, -0.6),
                (w + 0.1 + 0.08 * v, 0.1),
                (w + 0.14 + 0.14 * v, 0.9),
                (w + 0.2 + 0.1 * v, 1.55),
                (w * 0.6, 1.8),
                (0, 1.7),
            ]
            self.put(smooth(mirrored(half)) + (slide, 0), back, HAIR)
        elif style == "bun":
            size = 0.24 + 0.1 * v
            self.put(ellipse(1.6 * slide, -1.08 - size * 0.6, size * 1.08, size), face.hair, HAIR)
            self.put(ellipse(1.6 * slide, -1.06, size * 0.62, 0.07), shaded(face.hair, 0.4), HAIR, 0)

    def hair_in_front(self) -> None:
        getattr(self, f"_{self.person.hair_style}")(self.person.hair_volume, -0.66 + 0.2 * self.person.hairline)

    def cap(self, outer: np.ndarray, inner: list[tuple[float, float]], steps: int = 4) -> None:
        """Hair from an outer arc (left to right) down to the hairline (right to left)."""
        hairline = np.array(inner, float)
        if self.person.parting < 0.5:
            hairline = (hairline * (-1, 1))[::-1]
        line = smooth(np.concatenate([hairline[:1], hairline, hairline[-1:]]), steps)[steps : -2 * steps]
        self.put(np.concatenate([outer, self.face.look(line)]), self.face.hair, HAIR)

    def shine(self, height: float, start: float = -52, end: float = -14) -> None:
        """A lighter band where the light falls."""
        flip = -1 if self.dark_side < 0 else 1
        outer, inner = self.arc(-0.06, height, start, end, 9), self.arc(-0.12, height - 0.1, start + 4, end - 4, 9)
        self.put(np.concatenate([outer, inner[::-1]]) * (flip, 1), lit(self.face.hair, 0.26), None, 0)

    def _balding(self, v: float, line: float) -> None:
        w = self.face.width
        for side in (-1, 1):
            size = 0.13 + 0.07 * v
            points = np.array(
                [
                    (w * 0.86, -0.42),
                    (w + 0.4 * size, -0.34),
                    (w + size, -0.1),
                    (w + 0.7 * size, 0.16),
                    (w * 0.97, 0.12),
                    (w * 0.86, -0.1),
                ]
            )
            self.put(smooth(points * (side, 1)), self.face.hair, HAIR)
        self.shine_on_skin()

    def shine_on_skin(self) -> None:
        spot = ellipse(-0.24 if self.dark_side >= 0 else 0.24, -0.72, 0.15, 0.075, -24 if self.dark_side >= 0 else 24)
        self.put(spot, lit(self.face.skin, 0.4), None, 0, look=True)

    def _short(self, v: float, line: float) -> None:
        w = self.face.width
        outer = self.arc(0.04 + 0.04 * v, 0.07 + 0.16 * v, -96, 96)
        self.cap(
            outer,
            [
                (w * 0.9, -0.08),
                (w * 0.84, -0.4),
                (0.34, line + 0.02),
                (-0.1, line + 0.12),
                (-w * 0.66, line + 0.06),
                (-w * 0.86, -0.34),
                (-w * 0.9, -0.08),
            ],
        )
        self.shine(0.02 + 0.12 * v)

    def _spiky(self, v: float, line: float) -> None:
        w, count = self.face.width, 17
        outer = self.arc(0.03, 0.04, -92, 92, count)
        tips = self.arc(0.12 + 0.06 * v, 0.26 + 0.2 * v, -98, 98, count)
        outer[1::2] = tips[1::2]
        fringe = [
            (w * 0.9, -0.1),
            (w * 0.82, -0.46),
            (0.38, line - 0.06),
            (0.26, line + 0.14),
            (0.1, line - 0.04),
            (-0.06, line + 0.15),
        ]
        fringe += [(-0.22, line - 0.04), (-0.4, line + 0.1), (-w * 0.82, -0.46), (-w * 0.9, -0.1)]
        self.cap(outer, fringe, 1)

    def _curly(self, v: float, line: float) -> None:
        face, w = self.face, self.face.width
        self.bumps(self.arc(0.02 + 0.04 * v, 0.02 + 0.1 * v, -86, 86, 9), 0.19 + 0.03 * v, face.hair)
        self.put(self.arc(0.02, 0.06, -70, 70), face.hair, HAIR, 0)
        x = np.linspace(-0.7, 0.7, 5) * w
        self.bumps(np.stack([x, line - 0.1 + 0.3 * (x / w) ** 2], 1), 0.17, face.hair, look=True)
        self.put(ellipse(-0.28, -0.86 - 0.1 * v, 0.1, 0.07, -20), lit(face.hair, 0.25), None, 0)

    def _afro(self, v: float, line: float) -> None:
        w = self.face.width
        outer = self.arc(0.06, 0.1, -84, 84)
        self.cap(
            outer,
            [
                (w * 0.96, -0.2),
                (w * 0.8, -0.5),
                (0.3, line + 0.02),
                (0, line),
                (-0.3, line + 0.02),
                (-w * 0.8, -0.5),
                (-w * 0.96, -0.2),
            ],
        )

    def _bob(self, v: float, line: float) -> None:
        w = self.face.width
        outer = self.arc(0.07 + 0.06 * v, 0.08 + 0.1 * v, -104, 104)
        outer = np.concatenate([[(-w * 1.02 - 0.1 * v, 0.62)], outer, [(w * 1.02 + 0.1 * v, 0.62)]])
        low = line + 0.24
        self.cap(
            outer,
            [
                (w * 0.94, 0.6),
                (w * 0.88, 0.1),
                (w * 0.8, low + 0.02),
                (0.2, low + 0.02),
                (-0.2, low + 0.02),
                (-w * 0.8, low + 0.02),
                (-w * 0.88, 0.1),
                (-w * 0.94, 0.6),
            ],
        )
        self.shine(0.04 + 0.08 * v)

    def _long(self, v: float, line: float) -> None:
        w = self.face.width
        outer = self.arc(0.05 + 0.06 * v, 0.08 + 0.1 * v, -100, 100)
        outer = np.concatenate([[(-w - 0.08 * v, 0.7)], outer, [(w + 0.08 * v, 0.7)]])
        self.cap(
            outer,
            [
                (w * 0.97, 0.68),
                (w * 0.86, 0.1),
                (w * 0.78, -0.32),
                (0.3, line - 0.18),
                (-0.16, line - 0.24),
                (-w * 0.56, -0.5),
                (-w * 0.84, -0.06),
                (-w * 0.97, 0.68),
            ],
        )
        self.shine(0.02 + 0.08 * v)

    def _bun(self, v: float, line: float) -> None:
        w = self.face.width
        outer = self.arc(0.03, 0.05 + 0.05 * v, -88, 88)
        self.cap(
            outer,
            [
                (w * 0.95, -0.12),
                (w * 0.78, -0.46),
                (0.28, line - 0.04),
                (0, line - 0.06),
                (-0.28, line - 0.04),
                (-w * 0.78, -0.46),
                (-w * 0.95, -0.12),
            ],
        )
        self.shine(0.0)
