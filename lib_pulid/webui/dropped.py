"""Keeps the photos that were dropped on the page: the page holds their hashes, and the server their pixels.

So each is decoded once, when it is dropped, and no request carries it again. A hash is of the pixels, like the key of
an identity in the cache. Whoever knows it can use the photo; it cannot be guessed, and only the photo tells it.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import numpy as np

from lib_pulid.errors import ImageError
from lib_pulid.images import load_image, resize_long_edge
from lib_pulid.webui import pictures

HASH = "sha256:"  # begins a hash, and no base64 or data URI
MOST = 2_000_000_000  # bytes; more than a person's 50 photos of 12 megapixels
THUMBNAIL = 192  # pixels
LONGEST = 4096  # pixels; each method shrinks a photo to its own size, so only what is far larger is shrunk here


def load_photo(path: Path) -> np.ndarray:
    """Loads a photo as `DroppedPhotos.read` returns it. Raises: ImageError."""
    return resize_long_edge(load_image(path), LONGEST)


class DroppedPhotos:
    """The photos of this process; the least recently used ones go when they take more than `most` bytes."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[np.ndarray, str]] = {}  # by hash: pixels and thumbnail; most recently used last

    def add(self, image: np.ndarray) -> str:
        """Keeps a photo, uint8 RGB [H, W, 3], as `read` returns it. Returns its hash."""
        image = resize_long_edge(image, LONGEST)
        digest = hashlib.sha256(repr(image.shape).encode())
        digest.update(np.ascontiguousarray(image).data)
        key, thumbnail = HASH + digest.hexdigest(), pictures.small(image, THUMBNAIL)
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = image, thumbnail
            taken = sum(image.nbytes + len(small) for image, small in self._kept.values())
            while taken > self._most and len(self._kept) > 1:
                image, small = self._kept.pop(next(iter(self._kept)))
                taken -= image.nbytes + len(small)
        return key

    def read(self, text: str, name: str) -> np.ndarray:
        """Returns a photo, uint8 RGB [H, W, 3] with edges of at most LONGEST, by its hash or from base64.

        name: for messages.

        Raises:
            ImageError: it is not kept any more, or cannot be read.
        """
        if text.startswith(HASH):
            return self._find(text, name)[0]
        return resize_long_edge(pictures.decode(text, name), LONGEST)

    def sendable(self, text: str, name: str) -> str:
        """Returns a photo as base64, for another machine. Raises: as `read`."""
        return pictures.packed(self._find(text, name)[0]) if text.startswith(HASH) else text

    def thumbnail(self, text: str, name: str) -> str:
        """Returns a photo's thumbnail, a data URI. Raises: as `read`."""
        if text.startswith(HASH):
            return self._find(text, name)[1]
        return pictures.small(pictures.decode(text, name), THUMBNAIL)

    def _find(self, key: str, name: str) -> tuple[np.ndarray, str]:
        with self._lock:
            photo = self._kept.pop(key, None)
            if photo is None:
                raise ImageError(
                    f"{name} is not on the server any more, which was restarted, or had no room for more photos. "
                    "Remove it here and add it again."
                )
            self._kept[key] = photo
            return photo
