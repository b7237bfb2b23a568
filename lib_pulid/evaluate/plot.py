"""Plots likeness against change: a curve per method, a point per weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lib_pulid.evaluate.report import Line
from lib_pulid.evaluate.trial import WITHOUT

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # safe for color blindness
TITLE = "More likeness, fewer side effects: upper left is better"


def draw_plot(lines: Sequence[Line], change: str, likeness: str, text: str, labels: tuple[str, str]) -> Image.Image:
    """Draws the curve of each method, which starts with the images without an identity.

    Args:
        change, likeness: names of figures, on the x-axis and the y-axis. labels: of the axes. text: below the title.
    """
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")  # 1200 x 800
    canvas, plot, lowest = FigureCanvasAgg(figure), figure.add_subplot(), 0.0
    methods = list(dict.fromkeys(line.method for line in lines if line.method != WITHOUT))
    with rc_context({"text.parse_math": False}):  # a name may have a $
        for number, name in enumerate(methods or [WITHOUT]):
            color = COLORS[number % len(COLORS)]
            curve = [line for line in lines if line.method in (WITHOUT, name)]
            curve = [line for line in curve if None not in (line.figures[change], line.figures[likeness])]
            xs: list[float] = [line.figures[change] for line in curve]  # type: ignore[misc]
            xs = [1 - x for x in xs] if change == "CLIP-I" else xs
            ys: list[float] = [line.figures[likeness] for line in curve]  # type: ignore[misc]
            plot.plot(xs, ys, "o-", color=color, label=f" {name}", clip_on=False)
            for line, x, y in zip(curve, xs, ys):
                y_spread = line.spreads[likeness] or 0.0
                lowest = min(lowest, y - y_spread)
                plot.errorbar(x, y, y_spread, line.spreads[change] or 0.0, color=color, elinewidth=1)
                words = f"{line.weight:g}" if line.method != WITHOUT else WITHOUT * (number == 0)
                plot.annotate(words, (x, y), (7, -14), textcoords="offset points", color=color)
        plot.set(title=text, xlabel=labels[0], ylabel=labels[1], xlim=(0, None), ylim=(lowest, 1))
        plot.grid(alpha=0.4)
        plot.legend(loc="lower right", frameon=False)
        figure.suptitle(TITLE, size=20)
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
