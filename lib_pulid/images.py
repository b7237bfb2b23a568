"""Reads photos of any kind: uint8 RGB [H, W, 3], 0..255, upright and opaque."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np

from lib_pulid.camera_files import camera_file, with_end_mark
from lib_pulid.errors import ImageError
from lib_pulid.wide_gray import WideGray, is_wide, layout_of, read_wide

if TYPE_CHECKING:
    from PIL import Image

ImageSource = Union[str, "os.PathLike[str]", bytes, "Image.Image", np.ndarray]

# Checked before decoding. Above PIL's warning (89 million), so that a 108-megapixel phone photo passes without one, and
# below PIL's own error (179 million), which is reported the same way.
MAX_PIXELS = 150_000_000
_TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels"
MAX_BYTES = 3 * MAX_PIXELS  # of an image file in memory: the decoded size of the largest photo

# The accepted formats; HEIF and JXL if another extension adds them to PIL. PIL reads dozens more, but EPS, for one,
# starts a PostScript interpreter.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "JXL")

_ORIENTATION = 274  # tag of Exif


def load_image(source: ImageSource, name: str = "image", background: int = 255) -> np.ndarray:
    """Reads a photo as uint8 RGB [H, W, 3], 0..255.

    `source`: a path, the bytes of an image file, a PIL image, or an array [H, W] or [H, W, 1..4], RGB order: uint8,
    uint16 (0..65535) or float (0..1). Transparency is laid over `background` (255 white, 0 black), EXIF rotation is
    applied, and the first frame of an animation is used. `name` is the image's name in an ImageError; for a file, its
    own name by default.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name, background)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _decode(path, (path.name or str(path)) if name == "image" else name, background)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) == 0:
            raise ImageError(f"{name}: the file is empty.")
        if len(source) > MAX_BYTES:
            raise ImageError(f"{name}: the file is too large (more than {MAX_BYTES // 10**6} MB).")
        return _decode(io.BytesIO(source), name, background)
    from PIL import Image

    if isinstance(source, Image.Image):
        return _from_pil(source, name, background)
    raise ImageError(f"{name}: a {type(source).__name__} is not an image; give a path, bytes, a PIL image or an array.")


def resize_long_edge(image: np.ndarray, limit: int = 1024) -> np.ndarray:
    """Shrinks an image, uint8 [H, W, 3], so that its long edge is at most `limit` (0: any); never enlarges it.

    Equal to `resize_numpy_image_long` of pulid/utils.py (1aa2fc7), which the official app calls with 1024, except that
    no edge becomes 0 (for a strip of 1 x 4000 pixels).
    """
    # int(), not round(), as in the official function.
    return image if not limit or max(image.shape[:2]) <= limit else _resized(image, limit, int, "INTER_LANCZOS4")


def thumbnail(image: np.ndarray, size: int = 96) -> np.ndarray:
    """Returns a small copy of an image, uint8 RGB [H, W, 3]: long edge at most `size`, never enlarged."""
    return image.copy() if max(image.shape[:2]) <= size else _resized(image, size, round, "INTER_AREA")


def _resized(image: np.ndarray, longest: int, whole: Callable[[float], int], interpolation: str) -> np.ndarray:
    import cv2

    height, width = image.shape[:2]
    factor = longest / max(height, width)
    size = (max(1, whole(width * factor)), max(1, whole(height * factor)))
    return cv2.resize(image, size, interpolation=getattr(cv2, interpolation))


def _decode(file: Path | io.BytesIO, name: str, background: int) -> np.ndarray:
    try:
        with _content(file) as data:
            camera = camera_file(data)
    except (OSError, ValueError):  # reported below, by PIL
        camera = None
    if camera is None:
        return _read(file, name, background)
    for content in camera.pictures:
        with contextlib.suppress(ImageError):
            return _read(io.BytesIO(content), name, background, camera.orientation)
    width, height = camera.thumbnail
    held = f"only a thumbnail of {width} x {height}" if width else "no readable preview"
    raise ImageError(f"{name}: this is a camera's raw file with {held}. Save the photo as JPEG, PNG or WebP.")


@contextlib.contextmanager
def _content(file: Path | io.BytesIO) -> Iterator[bytes | mmap.mmap]:
    if isinstance(file, io.BytesIO):
        yield file.getvalue()
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped


def _read(file: Path | io.BytesIO, name: str, background: int, orientation: int = 1) -> np.ndarray:
    """Decodes an image file. orientation: see `_from_pil`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():  # about large images, whose size is checked here
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=readable_formats()) as image:
                check_size(image.width, image.height, name)
                try:
                    return _from_pil(image, name, background, orientation)
                except ImageError:
                    whole = _without_end_mark(file) if image.format in ("JPEG", "MPO") else None
                    if whole is None:
                        raise
                    return _from_pil(whole, name, background, orientation)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name}: this is a folder, not an image.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: the image is too large ({_TOO_LARGE}).") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: this is not an image, or its format is not supported. Save it as JPEG, PNG or WebP."
        ) from error
    except Exception as error:  # PIL's decoders raise nearly anything for a damaged file
        raise ImageError(f"{name}: the image cannot be read ({error}).") from error


def readable_formats() -> list[str]:
    from PIL import Image

    Image.init()  # registers all formats, once
    return [kind for kind in FORMATS if kind in Image.OPEN]


def readable_suffixes() -> tuple[str, ...]:
    """Returns how the names of images in these formats end: ".jpg", ".jfif", ..."""
    from PIL import Image

    formats = readable_formats()
    return tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def _without_end_mark(file: Path | io.BytesIO) -> Image.Image | None:
    """Reads a JPEG that lacks nothing but its end marker."""
    from PIL import Image

    data = file.getvalue() if isinstance(file, io.BytesIO) else file.read_bytes()
    try:
        ended = with_end_mark(data) or ()
        ways = [Image.open(io.BytesIO(one), formats=["JPEG"]) for one in ended]
        same = bool(ways) and all(np.array_equal(np.asarray(ways[0]), np.asarray(one)) for one in ways[1:])
    except Exception:  # as above
        return None
    return ways[0] if same else None


def _from_pil(image: Image.Image, name: str, background: int, orientation: int = 1) -> np.ndarray:
    """Converts a PIL image. orientation: Exif's number, if the image itself has none."""
    check_size(image.width, image.height, name)
    layout = layout_of(image)
    try:
        image.load()
    except Exception as error:  # as above; a PIL image may be decoded only now
        raise ImageError(f"{name}: the image is truncated or damaged ({error}).") from error
    image = upright(image, orientation)
    if is_wide(image):
        return _from_wide(read_wide(image, layout), name, background)
    image = _with_transparent_colour(image, layout.stored)
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    transparent = "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "A" in palette
    try:
        if image.mode in ("La", "RGBa"):  # alpha already multiplied in: PIL undoes that for these modes only
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        mode = "RGBA" if transparent else "RGB"
        return _from_array(np.asarray(image if image.mode == mode else image.convert(mode)), name, background)
    except ValueError as error:
        raise ImageError(f"{name}: images of mode {image.mode} are not supported. Save it as RGB.") from error


def upright(image: Image.Image, orientation: int = 1) -> Image.Image:
    """Applies EXIF rotation to a decoded image. orientation: Exif's number, if the image itself has none."""
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # a good photo may have damaged metadata
        exif = image.getexif()
        if orientation != 1:
            exif.setdefault(_ORIENTATION, orientation)
        if exif.get(_ORIENTATION, 1) != 1:  # else it would only be copied
            return ImageOps.exif_transpose(image) or image
    return image


def _with_transparent_colour(image: Image.Image, stored: str) -> Image.Image:
    """Scales PNG's transparent color to 8 bits: PIL leaves it in the file's bit depth."""
    colour, factor = image.info.get("transparency"), {"L;2": 85, "L;4": 17, "1": 255}.get(stored)
    if isinstance(colour, int) and factor:
        image = image.convert("L") if image.mode == "1" else image
        image.info["transparency"] = min(255, colour * factor)  # newer versions already scale 1 bit to 255
    elif isinstance(colour, tuple) and stored.startswith("RGB;16"):
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return image


def _from_wide(wide: WideGray, name: str, background: int) -> np.ndarray:
    """Converts grayscale of more than 8 bits."""
    if not wide.ranges:
        return _from_array(1 - wide.values if wide.is_inverted else wide.values, name, background)
    top = wide.white(name)
    pixels = ((wide.values.astype(np.int64) * 255 + top // 2) // top).astype(np.uint8)
    pixels = 255 - pixels if wide.is_inverted else pixels
    if wide.clear is not None:
        pixels = np.dstack([pixels, np.where(wide.clear, 0, 255).astype(np.uint8)])
    return _from_array(pixels, name, background)


def _from_array(array: np.ndarray, name: str, background: int) -> np.ndarray:
    """Converts an array [H, W] or [H, W, 1..4], in any range that load_image accepts, to uint8 RGB [H, W, 3]."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise ImageError(f"{name}: an image has to be an array [height, width, 3]; this one is {list(array.shape)}.")
    check_size(array.shape[1], array.shape[0], name)
    pixels = _to_8_bit(array, name)
    colour = _opaque(pixels, background) if pixels.shape[2] in (2, 4) else pixels
    if colour.shape[2] == 1:
        colour = colour.repeat(3, axis=2)
    # A copy if needed: cv2 requires contiguous memory, and the caller keeps its array.
    return np.array(colour, dtype=np.uint8, order="C")


def _opaque(pixels: np.ndarray, background: int) -> np.ndarray:
    """Blends uint8 [H, W, 2 or 4], alpha last, over a background: [H, W, 1 or 3]."""
    opaque = np.empty((*pixels.shape[:2], pixels.shape[2] - 1), np.uint8)
    rows = max(1, 2**20 // pixels.shape[1])  # at a time: the products need more memory than the image
    for top in range(0, len(pixels), rows):
        colour, alpha = pixels[top : top + rows, :, :-1], pixels[top : top + rows, :, -1:].astype(np.uint16)
        opaque[top : top + rows] = (colour * alpha + np.uint16(background) * (255 - alpha) + 127) // 255
    return opaque


def _to_8_bit(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # either byte order
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
    if array.dtype.kind not in "uif":
        raise ImageError(f"{name}: {array.dtype} values are not an image; use uint8.")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f":
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN fails
            raise ImageError(f"{name}: a float image has to be in 0..1; this one is in {low:g}..{high:g}.")
        return (array.clip(0, 1).astype(np.float32) * 255).round().astype(np.uint8)
    if low >= 0 and high <= 255:
        return array.astype(np.uint8)
    raise ImageError(f"{name}: {array.dtype} values in {low:g}..{high:g} are not an image; use uint8.")


def check_size(width: int, height: int, name: str) -> None:
    """Checks the size of an image, in pixels. Raises: ImageError: it has none, or more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: the image is too large ({width} x {height}: {_TOO_LARGE}).")
