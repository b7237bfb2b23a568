"""Plots likeness against change with Pillow: a line per method, a point per weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1200, 800
LEFT, RIGHT, TOP, BOTTOM = 110, 40, 120, 110
FINE = 2  # drawn at this scale, then reduced
INK, FAINT, GRID = "#1d1d26", "#72727f", "#e6e6ea"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # safe for color blindness


@dataclass(frozen=True)
class Point:
    """A point: x change, y likeness, with standard deviations, 0 if there is none."""

    x: float
    y: float
    label: str
    x_spread: float = 0.0
    y_spread: float = 0.0


@dataclass(frozen=True)
class Axes:
    """The title, a subtitle, and the labels of the axes."""

    title: str
    text: str
    x: str
    y: str


def draw_plot(curves: Sequence[tuple[str, Sequence[Point]]], axes: Axes) -> Image.Image:
    """Draws curves, each a name and its points in the order of the line."""
    points = [point for _, curve in curves for point in curve]
    high_x = max((point.x + point.x_spread for point in points), default=0.0)
    low_y = min((point.y - point.y_spread for point in points), default=0.0)
    frame = _Frame(ticks(0, high_x), ticks(min(0.0, low_y), 1))
    _axes(frame, axes)
    for number, (_, curve) in enumerate(curves):
        _curve(frame, curve, COLORS[number % len(COLORS)])
    for number, (name, _) in enumerate(curves):
        y = HEIGHT - BOTTOM - 14 - 28 * (len(curves) - number)  # the lower right corner is usually empty
        x = WIDTH - RIGHT - 16 - frame.length(name, 18)
        frame.line([(x - 44, y + 11), (x - 10, y + 11)], COLORS[number % len(COLORS)], 4)
        frame.write((x, y), name, 18, INK)
    return frame.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Returns round numbers that cover low..high, at most `most` + 1 of them."""
    reach = max(high - low, 1e-6)
    power = 10.0 ** math.floor(math.log10(reach / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if reach / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    while last - first > most:
        step *= 2
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


class _Frame:
    """A canvas in units of the finished image, with the position of values."""

    def __init__(self, xs: list[float], ys: list[float]) -> None:
        self.xs, self.ys = xs, ys
        self.image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
        self._pen = ImageDraw.Draw(self.image)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Returns the position of a value."""
        across = (x - self.xs[0]) / (self.xs[-1] - self.xs[0])
        up = (y - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def line(self, places: Sequence[tuple[float, float]], color: str, width: int) -> None:
        """Draws a line through positions."""
        self._pen.line([(x * FINE, y * FINE) for x, y in places], fill=color, width=width * FINE, joint="curve")

    def dot(self, place: tuple[float, float], color: str, radius: float = 6) -> None:
        """Draws a disk."""
        x, y = place
        self._pen.ellipse([FINE * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=color)

    def write(self, place: tuple[float, float], text: str, size: int, color: str) -> None:
        """Writes text with its upper left corner at a position."""
        font = ImageFont.load_default(size * FINE)
        self._pen.text((place[0] * FINE, place[1] * FINE), text, fill=color, font=font)

    def length(self, text: str, size: int) -> float:
        """Returns the width of a text."""
        return self._pen.textlength(text, font=ImageFont.load_default(size * FINE)) / FINE


def _axes(frame: _Frame, axes: Axes) -> None:
    frame.write((LEFT, 28), axes.title, 28, INK)
    frame.write((LEFT, 66), axes.text, 16, FAINT)
    frame.write((LEFT, TOP - 24), axes.y, 16, INK)
    frame.write((WIDTH - RIGHT - frame.length(axes.x, 16), HEIGHT - BOTTOM + 44), axes.x, 16, INK)
    for x in frame.xs:
        place, text = frame.place(x, frame.ys[0]), f"{x:.4g}"
        frame.line([place, frame.place(x, frame.ys[-1])], GRID, 1)
        frame.write((place[0] - frame.length(text, 15) / 2, place[1] + 12), text, 15, FAINT)
    for y in frame.ys:
        place, text = frame.place(frame.xs[0], y), f"{y:.4g}"
        frame.line([place, frame.place(frame.xs[-1], y)], FAINT if abs(y) < 1e-9 else GRID, 1)
        frame.write((place[0] - frame.length(text, 15) - 12, place[1] - 9), text, 15, FAINT)


def _curve(frame: _Frame, curve: Sequence[Point], color: str) -> None:
    if len(curve) > 1:
        frame.line([frame.place(point.x, point.y) for point in curve], color, 3)
    for point in curve:
        for dx, dy in ((point.x_spread, 0.0), (0.0, point.y_spread)):
            if dx or dy:
                ends = [frame.place(point.x + sign * dx, point.y + sign * dy) for sign in (-1, 1)]
                frame.line(ends, color, 1)
        place = frame.place(point.x, point.y)
        frame.dot(place, color)
        frame.write((place[0] + 10, place[1] + 7), point.label, 15, color)
