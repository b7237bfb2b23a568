"""Builds a widget for an image that one can paint on; every host has a different one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

HEIGHT = 360
WHITE = "#ffffff"


@dataclass(frozen=True)
class Canvas:
    """Args: values: widgets with image and strokes. changed: gradio's events. picture: the widget for a new image."""

    values: list[Any]
    changed: list[Callable[..., Any]]
    picture: Any


def build(elem_id: str) -> Canvas:
    """Builds Forge's own canvas, or gradio 3's sketch pad, or else an upload without a brush.

    gradio 4's editor freezes the page when it is hidden in an accordion.
    """
    try:
        from modules_forge.forge_canvas.canvas import ForgeCanvas
    except ImportError:
        pass
    else:
        made = ForgeCanvas(
            height=HEIGHT,
            scribble_color=WHITE,
            scribble_color_fixed=True,
            scribble_width=6,
            scribble_alpha_fixed=True,
            scribble_softness_fixed=True,
            numpy=True,
            elem_id=elem_id,
        )
        values = [made.background, made.foreground]
        return Canvas(values, [value.change for value in values], made.background)
    common = {"type": "numpy", "label": "Mask", "show_label": False, "height": HEIGHT, "elem_id": elem_id}
    if gr.__version__.startswith("3."):
        sketch = gr.Image(source="upload", tool="sketch", brush_color=WHITE, **common)
        return Canvas([sketch], [sketch.change, sketch.edit], sketch)
    upload = gr.Image(**common)
    return Canvas([upload], [upload.change], upload)
