"""Photos of drawn people as files, for tests that give paths; people whom the miniature's training did not see."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from lib_pulid import miniature

_folder = tempfile.TemporaryDirectory(prefix="pulid-drawn-")  # goes with the process


def _write(name: str, image) -> Path:
    path = Path(_folder.name, f"{name}.png")
    Image.fromarray(image).save(path)
    return path


GROUP = _write("group", miniature.group((0, 1, 2)))
PORTRAIT = _write("portrait", miniature.portrait(3))
