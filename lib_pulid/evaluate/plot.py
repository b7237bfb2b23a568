"""Plots likeness against change: a line per method, a point per weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

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
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")  # 1200 x 800
    canvas, plot = FigureCanvasAgg(figure), figure.add_subplot()
    with rc_context({"text.parse_math": False}):  # a name may have a $
        for number, (name, curve) in enumerate(curves):
            color = COLORS[number % len(COLORS)]
            plot.plot([p.x for p in curve], [p.y for p in curve], "o-", color=color, label=f" {name}", clip_on=False)
            for p in curve:
                plot.errorbar(p.x, p.y, p.y_spread, p.x_spread, color=color, elinewidth=1)
                plot.annotate(p.label, (p.x, p.y), (7, -14), textcoords="offset points", color=color)
        lowest = min((p.y - p.y_spread for _, curve in curves for p in curve), default=0.0)
        plot.set(title=axes.text, xlabel=axes.x, ylabel=axes.y, xlim=(0, None), ylim=(min(0.0, lowest), 1))
        plot.grid(alpha=0.4)
        figure.suptitle(axes.title, size=20)
        if curves:
            plot.legend(loc="lower right", frameon=False)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
