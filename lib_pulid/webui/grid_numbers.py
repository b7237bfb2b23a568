"""Writes the likeness of each image into its cell of a grid: of a batch, or of an X/Y/Z plot."""

from __future__ import annotations

from typing import Any

ATTRIBUTE = "pulid_likeness"  # of a measured image (Pillow): its likeness in words, for a grid of it
SHARE = 1 / 16  # the height of the letters, of the image's shorter side


def write_numbers(params: Any) -> None:
    """Replaces measured images by copies with numbers. params: the host's, before it lays a grid out (`.imgs`)."""
    params.imgs = [_with_number(image, getattr(image, ATTRIBUTE, "")) for image in params.imgs]


def _with_number(image: Any, words: str) -> Any:
    if not words:
        return image
    from modules.images import get_font
    from PIL import ImageDraw

    made = image.convert("RGB")
    pen, font = ImageDraw.Draw(made), get_font(max(10, round(min(made.size) * SHARE)))
    left, top, right, bottom = pen.textbbox((0, 0), words, font=font)
    edge = (bottom - top) // 2
    height = bottom - top + 2 * edge
    pen.rectangle((0, made.height - height, right - left + 2 * edge, made.height), fill="black")
    pen.text((edge - left, made.height - height + edge - top), words, fill="white", font=font)
    return made
