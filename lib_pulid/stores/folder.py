"""Knows the models folder, how its owner wants it used, and what was read of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_pulid import disk
from lib_pulid.disk import fingerprint, stamp
from lib_pulid.files import catalog, places


@dataclass(frozen=True)
class Settings:
    """What the owner of the program has chosen.

    Args:
        models_dir: the models folder, see `catalog`. device: of the encoders of photos.
        keep_encoders: whether they stay loaded. likeness: whether the likeness of images is measured.
        portraits: whether saved identities keep a small image of the face.
    """

    models_dir: Path
    device: str = "cpu"
    keep_encoders: bool = False
    likeness: bool = False
    portraits: bool = True


class ModelsFolder:
    """The models folder. What was read of a file is remembered until the file changes.

    ask: returns the settings; it is called at each use, since they may change at any time.
    """

    def __init__(self, ask: Callable[[], Settings]) -> None:
        self._ask = ask
        self._read: dict[Any, tuple[Any, Any]] = {}  # by the reader and the path: the file's stamp, and what was read

    @property
    def settings(self) -> Settings:
        return self._ask()

    @property
    def models_dir(self) -> Path:
        return self.settings.models_dir

    @property
    def path(self) -> Path:
        """The folder of PuLID files: `pulid` in the models folder, or the models folder itself if it has the files."""
        folder = self.models_dir / "pulid"
        if disk.is_folder(folder):
            return folder
        known = {file.name for file in catalog.CATALOG}
        return self.models_dir if any(path.name in known for path in disk.listed(self.models_dir)) else folder

    @property
    def folders(self) -> list[Path]:
        """The folder of PuLID files, and those below it in which users sort them."""
        return places.below(self.path, self.models_dir)

    def remembered(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """Returns `read(path)`, called once until the file changes."""
        key, now = (read, str(path)), stamp(path)
        known = self._read.get(key)
        if known is None or known[0] != now:
            known = self._read[key] = now, read(path)
        return known[1]

    def fingerprint(self, path: Path) -> str:
        """Returns a hash of a file's content, see `disk.fingerprint`."""
        return self.remembered(path, fingerprint)
