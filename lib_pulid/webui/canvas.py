"""Builds the panel in which a mask is painted; every host has a different widget for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np

from lib_pulid.images import load_image
from lib_pulid.webui.pictures import encode
from lib_pulid.webui.widgets import AT_ONCE, silent

HEIGHT = 360
WHITE = "#ffffff"


def build(tab: str, number: int, mask: Any) -> None:
    """Builds the panel of a person. mask: the hidden widget with the mask as text."""
    name = f"pulid_{tab}_{number}"
    with gr.Accordion("Mask: paint where this person's face may appear", open=False, elem_id=f"{name}_region"):
        gr.HTML(
            "<p>Drop an image (white yes, black no), or start with a blank one and paint the area white. "
            "No mask: everywhere.</p>",
            elem_classes=["pulid-hint"],
        )
        values, events, picture = _canvas(f"{name}_canvas")
        blank = gr.Button("Blank image to paint on", size="sm", elem_id=f"{name}_blank")
    for changed in events:
        changed(keep_region, values, [mask], **AT_ONCE)
    labels = (f"PuLID {number} {side}" for side in ("width", "height"))
    width, height = (silent(gr.Number(visible=False, label=label)) for label in labels)
    blank.click(empty_picture, [width, height], [picture], _js=f"() => pulid.pictureSize('{tab}')", **AT_ONCE)


def keep_region(picture: Any, strokes: Any = None) -> str:
    """Encodes a painted mask as a data URI, or "" if there is none.

    Args:
        picture, strokes: uint8 [H, W, 3 or 4], or None; gradio 3 passes both in a dict. The strokes are the mask if
            there are any, otherwise the image's brightness is.
    """
    if isinstance(picture, dict):
        picture, strokes = picture.get("image"), picture.get("mask")
    drawn = None if strokes is None else _strokes(strokes)
    if drawn is not None and drawn.any():
        return encode(np.repeat(drawn[:, :, None], 3, axis=2))
    if picture is None:
        return ""
    loaded = load_image(np.asarray(picture), "mask", background=0)
    return encode(loaded) if loaded.any() else ""


def _strokes(layer: np.ndarray) -> np.ndarray:
    """Turns strokes, uint8 [H, W, 3 or 4], into black and white [H, W] by their alpha, or else by their brightness."""
    plane = layer[:, :, 3] if layer.ndim == 3 and layer.shape[2] == 4 else layer.reshape(*layer.shape[:2], -1).max(-1)
    return np.where(plane > 127, 255, 0).astype(np.uint8)


def empty_picture(width: float, height: float) -> np.ndarray:
    """Returns a black image of the size that will be generated."""
    return np.zeros((int(height or 512), int(width or 512), 3), np.uint8)


def _canvas(elem_id: str) -> tuple[list[Any], list[Callable[..., Any]], Any]:
    """Builds Forge's own canvas, or gradio 3's sketch pad.

    gradio 4's editor freezes the page when it is hidden in an accordion. Returns the widgets with image and strokes,
    their events, and the widget for a new image.
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
        return values, [value.change for value in values], made.background
    common = {"type": "numpy", "label": "Mask", "show_label": False, "height": HEIGHT, "elem_id": elem_id}
    sketch = gr.Image(source="upload", tool="sketch", brush_color=WHITE, **common)
    return [sketch], [sketch.change, sketch.edit], sketch
