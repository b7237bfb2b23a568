"""Draws a person's photo from the folder that the owner of the WebUI allows in its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from lib_pulid import disk
from lib_pulid.errors import SettingError
from lib_pulid.fields import DRAWS, Number
from lib_pulid.images import readable_suffixes

_, RANDOM, IN_TURN = DRAWS


class Draws:
    """The folder, and which photo was drawn last.

    Args:
        folder: returns the folder; None if the owner allows none.
    """

    def __init__(self, folder: Callable[[], Path | None]) -> None:
        self._folder = folder
        self._turn = 0
        self._last: dict[Number, Path] = {}  # by unit

    def draw(self, number: Number, rank: int, how: str, seed: int, batch: int) -> Path:
        """Draws a unit's photo.

        Args:
            number: of the unit. rank: among the units that draw, from 0 on: no photo is drawn twice for one image.
            how: RANDOM, the same for the same seed; or IN_TURN.
            seed: of the image. batch: in the request, from 0 on.

        Raises:
            SettingError: there is no folder, or too few photos are in it.
        """
        photos = self._photos()
        if rank >= len(photos):
            raise SettingError(
                f"the folder of photos to draw from has {len(photos)} photos, too few for {rank + 1} people."
            )
        if how == RANDOM:
            # By the name, so that a photo more or less changes few draws.
            photos.sort(key=lambda path: hashlib.sha256(f"{seed}:{path.name}".encode(errors="replace")).digest())
            found = photos[rank]
        else:
            found = photos[(self._turn + batch + rank) % len(photos)]
        self._last[number] = found
        return found

    def last(self, number: Number) -> Path:
        """Returns the photo that was drawn last, for a generation inside another (ADetailer). Raises: SettingError."""
        if number not in self._last:
            raise SettingError("no photo was drawn for the image that this one is a part of.")
        return self._last[number]

    def advance(self, batches: int) -> None:
        """Counts the batches of a finished request, for the turn."""
        self._turn += batches

    def _photos(self) -> list[Path]:
        folder = self._folder()
        if folder is None:
            raise SettingError(
                "no folder of photos to draw from is allowed. Name one in Settings, PuLID, Folder of photos to draw "
                "from."
            )
        photos = disk.listed(folder, readable_suffixes())
        if not photos:
            raise SettingError(f"there is no photo in {folder}, the folder of photos to draw from.")
        return photos
