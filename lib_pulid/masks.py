"""Reads masks of any kind: float32 [H, W], 0..1."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from lib_pulid.errors import ImageError
from lib_pulid.images import MAX_PIXELS, ImageSource, check_size, load_image, readable_formats, thumbnail, upright
from lib_pulid.wide_gray import WideGray, is_wide, layout_of, read_wide

if TYPE_CHECKING:
    from PIL import Image

LONGEST_SIDE = 4096  # pixels; an image's tokens are at least 8 pixels wide
DARKEST = 1 / 16  # of full strength
SMALLEST = 1 / 32**2  # of the image: a square 32 pixels wide in 1024


def load_mask(source: ImageSource, name: str = "mask") -> np.ndarray:
    """Reads a mask as float32 [H, W], 0..1: its brightness, the brightest channel of a color; 0 where transparent.

    The range follows from the values: 0..1, 0..255 or 16 bits. If a file or an integer array has only the values 0 and
    1 (a label map), or a palette only black and one color, these count as 0 and full strength.

    Raises:
        ImageError: it cannot be read; or it is black, or nearly black, so that the face would not be visible.
    """
    values, has_two_colors = _peeked(source)
    if isinstance(values, WideGray):
        plane = _of_wide(values, name)
    else:
        if values is None or values.ndim == 3 and values.shape[2] > 1:
            values = load_image(source, name, background=0).max(-1)
        plane = _scaled(values.squeeze(-1) if values.ndim == 3 else values, name)
    if has_two_colors and plane.min() == 0 < plane.max():
        plane = plane / plane.max()
    plane = thumbnail(plane, LONGEST_SIDE)
    if not plane.any():
        raise ImageError(f"{name} is entirely black. Paint the area for this face white.")
    if plane.max() < DARKEST or plane.mean() < SMALLEST:
        raise ImageError(
            f"{name} is nearly black ({plane.mean():.2%} white, {plane.max():.0%} at its brightest), so the face would "
            "not be visible. Paint the area for this face white; from a label map, use only this person's label."
        )
    return plane


def _peeked(source: ImageSource) -> tuple[np.ndarray | WideGray | None, bool]:
    """Returns what `load_image` would lose of a mask: values of other than 8 bits, and whether it is a palette image
    with two colors."""
    if isinstance(source, np.ndarray):
        return (None if source.dtype == np.uint8 and source.ndim == 3 else source), False
    from PIL import Image

    with contextlib.suppress(Exception), warnings.catch_warnings():  # load_image reports what is wrong
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if isinstance(source, Image.Image):
            return _peeked_at(source)
        file = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
        with Image.open(file, formats=readable_formats()) as image:
            return _peeked_at(image)
    return None, False


def _peeked_at(image: Image.Image) -> tuple[WideGray | None, bool]:
    if image.width * image.height > MAX_PIXELS:
        return None, False
    if is_wide(image):
        layout = layout_of(image)
        image.load()
        return read_wide(upright(image), layout), False
    return None, image.mode == "P" and len(image.getcolors() or ()) == 2


def _of_wide(wide: WideGray, name: str) -> np.ndarray:
    """Scales an image file's grayscale of more than 8 bits to float32 [H, W], 0..1."""
    if wide.ranges and wide.values.max() > 1:
        plane = np.float32(wide.values / wide.white(name))
    else:  # float, or a label map
        plane = _scaled(wide.values, name)
    plane = 1 - plane if wide.is_inverted else plane
    return plane if wide.clear is None else np.where(wide.clear, np.float32(0), plane)


def _scaled(values: np.ndarray, name: str) -> np.ndarray:
    """Scales brightness of any range, [H, W], to float32, 0..1."""
    if values.ndim != 2 or not values.size:
        raise ImageError(f"{name}: a mask has to be an array [height, width]; this one is {list(values.shape)}.")
    check_size(values.shape[1], values.shape[0], name)
    kind, low, high = values.dtype.kind, float(values.min()), float(values.max())
    if kind not in "buif" or not (low >= -1e-3 and high <= 65535):  # written so that NaN fails
        raise ImageError(f"{name}: a mask's values have to be in 0..1 or 0..255; these are in {low:g}..{high:g}.")
    full = 1.0 if high <= 1 + 1e-3 else 255.0 if high <= 255 and values.dtype != np.uint16 else 65535.0
    return (values.astype(np.float32) / np.float32(full)).clip(0, 1)
