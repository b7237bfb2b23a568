"""Pictures as they travel (base64 text, plain JSON) and as they are shown in the preview."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lib_pulid.errors import ImageError
from lib_pulid.images import MAX_BYTES, load_image, load_region, resize_long_edge

if TYPE_CHECKING:
    from torch import Tensor

    from lib_pulid.faces import Detection, Face

NOT_OPENED = "Paths and addresses (URLs) are never opened: send the picture itself, as base64."
LONGEST_PATH = 200  # bytes that a path could be the base64 of
BLURRED = 12.0  # variance of the Laplacian of the grey crop; sharp portraits have some hundred
DRAWN = (60, 200, 90)  # RGB of the chosen face's frame
OTHER = (160, 160, 160)


def decode(text: str, name: str, read: Callable[[bytes, str], np.ndarray] = load_image) -> np.ndarray:
    """base64 or a data URI -> what `read` makes of it: uint8 RGB [H, W, 3]. Never a path or an address: an API caller
    must not read files or reach other machines.

    Raises:
        ImageError: it calls the image `name`.
    """
    from PIL import UnidentifiedImageError

    if len(text) > 2 * MAX_BYTES:  # base64 takes 4 / 3 of it
        raise ImageError(f"{name}: the file is too large (more than {MAX_BYTES // 10**6} MB).")
    # The last comma: base64 has none, the name of a file in front of it may.
    _, comma, body = text.rpartition(",") if text[:5].lower() == "data:" else ("", ",", text)
    try:
        data = base64.b64decode("".join(body.split()), validate=True) if comma else b""
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name}: this is not base64 text. {NOT_OPENED}") from error
    try:
        return read(data, name)
    except ImageError as error:
        # "photos/a/b.c" is no base64, "photos/a/b/c" is.
        if isinstance(error.__cause__, UnidentifiedImageError) and len(data) < LONGEST_PATH:
            raise ImageError(f"{error} {NOT_OPENED}") from error
        raise


def encode(image: np.ndarray) -> str:
    """uint8 RGB [H, W, 3] -> data URI of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def packed(photo: np.ndarray) -> str:
    """As `encode`, but no larger than the photo chain reads it: the identity stays the same, the request small."""
    return encode(resize_long_edge(photo))


def photo(text: str, name: str) -> np.ndarray:
    """base64 or a data URI -> uint8 RGB [H, W, 3], no larger than the photo chain reads it."""
    return resize_long_edge(decode(text, name))


def region(text: str, name: str) -> Tensor:
    """A region's image, base64 or a data URI -> [H, W] float32, 0..1; see `images.load_region`."""
    import torch

    return torch.from_numpy(decode(text, name, load_region))


def drawn_region(picture: np.ndarray | None, strokes: np.ndarray | None = None) -> str:
    """What was painted -> data URI, or "" where nothing is there.

    Args:
        picture, strokes: uint8 [H, W, 3 or 4]. The strokes, if there are any, are the region, otherwise the picture's
            brightness is.
    """
    drawn = None if strokes is None else _strokes(strokes)
    if drawn is not None and drawn.any():
        return encode(np.repeat(drawn[:, :, None], 3, axis=2))
    if picture is None:
        return ""
    loaded = load_image(np.asarray(picture), "region", background=0)
    return encode(loaded) if loaded.any() else ""


def _strokes(layer: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3 or 4] -> [H, W]: its alpha, or where it has none its brightness, as black or white."""
    plane = layer[:, :, 3] if layer.ndim == 3 and layer.shape[2] == 4 else layer.reshape(*layer.shape[:2], -1).max(-1)
    return np.where(plane > 127, 255, 0).astype(np.uint8)


# ---------------------------------------------------------------- preview


def marked(photo: np.ndarray, face: Face) -> np.ndarray:
    """The photo with a frame around every face, the chosen one's thick and green. uint8 RGB [H, W, 3]."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(resize_long_edge(photo))
    draw = ImageDraw.Draw(picture)
    thin = max(2, max(picture.size) // 300)
    for found in face.detections:
        chosen = found is face.detection
        draw.rectangle(_corners(found), outline=DRAWN if chosen else OTHER, width=3 * thin if chosen else thin)
    return np.asarray(picture)


def parsed(face: Face) -> np.ndarray:
    """What the vision tower is shown: the face in grey on white. uint8 RGB [512, 512, 3]."""
    return (face.features[0].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()


def warnings(face: Face) -> list[str]:
    """What the user should know of a face, in plain words."""
    import cv2

    grey = cv2.cvtColor(face.aligned, cv2.COLOR_RGB2GRAY)[128:448, 128:384]
    notes = list(face.notes)
    if cv2.Laplacian(grey, cv2.CV_64F).var() < BLURRED:
        notes.append("the face is blurred; a sharper photo gives a better likeness")
    return notes


def _corners(found: Detection) -> list[float]:
    return [float(x) for x in found.box]
