"""Reads grayscale of more than 8 bits: PNG, TIFF and PIL images whose mode is I, I;16 or F."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lib_pulid.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

_PHOTOMETRIC = 262  # tag of TIFF; 0: white is zero


class Layout(NamedTuple):
    """How a file stores an image, which PIL's image no longer says once it is decoded or rotated.

    Args:
        stored: PIL's name for it, "L;2", "RGB;16B"; or "". is_inverted: whether 0 is white.
        has_known_range: whether white is 65535, as in PNG.
    """

    stored: str
    is_inverted: bool
    has_known_range: bool


@dataclass(frozen=True)
class WideGray:
    """Grayscale of more than 8 bits.

    Args:
        values: [H, W]. ranges: white, if all values are at most that, the smallest first; () for float.
        is_inverted: whether 0 is white. clear: [H, W] bool, where it is transparent; or None.
    """

    values: np.ndarray
    ranges: tuple[int, ...]
    is_inverted: bool
    clear: np.ndarray | None

    def white(self, name: str) -> int:
        """Returns the value of white, of integers. A wide range needs a value above a 16th of it.

        Raises:
            ImageError: it is not known which value is white.
        """
        low, high = int(self.values.min()), int(self.values.max())
        top = next((top for top in self.ranges if high <= top), 0)
        if low < 0 or not top or (len(self.ranges) > 1 and top > 255 and 16 * high <= top):
            raise ImageError(
                f"{name}: its values are in {low}..{high}, so it is not known which value is white. Save it with 8 "
                "bits."
            )
        return top


def layout_of(image: Image.Image) -> Layout:
    """Reads the layout of an image that is not decoded yet."""
    tiles, tags = getattr(image, "tile", None), getattr(image, "tag_v2", {})
    layout = tiles[0][3] if tiles else ""
    names = (part for part in (layout if isinstance(layout, tuple) else (layout,)) if isinstance(part, str))
    has_known_range = image.format == "PNG" or (image.mode != "I" and not tags)
    # PIL applies "white is zero" to 8 bits only.
    return Layout(next(names, ""), tags.get(_PHOTOMETRIC) == 0, has_known_range)


def is_wide(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def read_wide(image: Image.Image, layout: Layout) -> WideGray:
    """Reads a decoded image, see `is_wide`. PIL's own conversion would clip everything above 255 to white."""
    values = np.asarray(image)
    if image.mode == "F":
        return WideGray(values, (), layout.is_inverted, None)
    if image.mode == "I" and "32N" in layout.stored:  # unsigned
        values = values.view(np.uint32)
    ranges: tuple[int, ...] = (65535,)
    if not layout.has_known_range:
        top = 32767 if "16S" in layout.stored else 65535
        ranges = (255, top, 2**32 - 1 if values.dtype == np.uint32 else 2**31 - 1)
    clear = image.info.get("transparency")
    return WideGray(values, ranges, layout.is_inverted, values == clear if isinstance(clear, int) else None)
