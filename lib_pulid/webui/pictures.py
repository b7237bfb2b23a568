"""Converts images from and to base64 text, and draws the preview."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lib_pulid.errors import ImageError
from lib_pulid.images import MAX_BYTES, load_image, resize_long_edge, thumbnail
from lib_pulid.masks import load_mask

if TYPE_CHECKING:
    from torch import Tensor

    from lib_pulid.faces import Face

NOT_OPENED = "Paths and URLs are never opened: send the image itself, as base64."
LONGEST_PATH = 200  # bytes; a longer text is not a path that happens to be base64
BLURRED = 12.0  # variance of the Laplacian of the gray crop; sharp portraits have a few hundred
DRAWN = (60, 200, 90)  # RGB of the chosen face's frame
OTHER = (160, 160, 160)


def decode(text: str, name: str, read: Callable[[bytes, str], np.ndarray] = load_image) -> np.ndarray:
    """Decodes base64 or a data URI with `read`: uint8 RGB [H, W, 3] by default.

    Never opens a path or URL: an API caller must not read files or reach other machines.

    Raises:
        ImageError: the message calls the image `name`.
    """
    from PIL import UnidentifiedImageError

    if len(text) > 2 * MAX_BYTES:  # base64 is 4 / 3 of the size
        raise ImageError(f"{name}: the file is too large (more than {MAX_BYTES // 10**6} MB).")
    # The last comma: base64 has none, but a file name before it may.
    _, comma, body = text.rpartition(",") if text[:5].lower() == "data:" else ("", ",", text)
    try:
        data = base64.b64decode("".join(body.split()), validate=True) if comma else b""
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name}: not base64 text. {NOT_OPENED}") from error
    try:
        return read(data, name)
    except ImageError as error:
        # "photos/a/b.c" is not base64, but "photos/a/b/c" is.
        if isinstance(error.__cause__, UnidentifiedImageError) and len(data) < LONGEST_PATH:
            raise ImageError(f"{error} {NOT_OPENED}") from error
        raise


def encode(image: np.ndarray, kind: str = "PNG", **how: int) -> str:
    """Encodes an image, uint8 RGB [H, W, 3], as the data URI of a PNG, JPEG or BMP. how: Pillow's options."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **how)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def small(image: np.ndarray, side: int) -> str:
    """Encodes an image, uint8 RGB [H, W, 3], for the page, at most side x side, as the data URI of a JPEG."""
    return encode(thumbnail(image, side), "JPEG", quality=85)


def packed(photo: np.ndarray) -> str:
    """Encodes a photo without loss, at its own size: each method reads it at another one."""
    return encode(photo, compress_level=1)


def region(text: str, name: str) -> Tensor:
    """Decodes a mask, base64 or a data URI, to [H, W] float32, 0..1; see `masks.load_mask`."""
    import torch

    return torch.from_numpy(decode(text, name, load_mask))


# ---------------------------------------------------------------- preview


def marked(face: Face) -> np.ndarray:
    """Frames every face of a photo, the chosen one thick and green. uint8 RGB [H, W, 3], edges of at most 1024."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(np.ascontiguousarray(face.photo_bgr[:, :, ::-1]))
    draw = ImageDraw.Draw(picture)
    thin = max(2, max(picture.size) // 300)
    for found in face.detections:
        chosen = found is face.detection
        draw.rectangle(found.box.tolist(), outline=DRAWN if chosen else OTHER, width=3 * thin if chosen else thin)
    return resize_long_edge(np.asarray(picture))


def parsed(face: Face) -> np.ndarray:
    """Returns the vision tower's input, the face in gray on white. uint8 RGB [512, 512, 3]."""
    assert face.features is not None, "PuLID's face models have a parser"
    return (face.features[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()


def warnings(face: Face) -> list[str]:
    """Lists what the user should know about a face."""
    import cv2

    grey = cv2.cvtColor(face.aligned, cv2.COLOR_RGB2GRAY)[128:448, 128:384]
    notes = list(face.notes)
    if cv2.Laplacian(grey, cv2.CV_64F).var() < BLURRED:
        notes.append("the face is blurry; a sharper photo gives a better likeness")
    return notes
