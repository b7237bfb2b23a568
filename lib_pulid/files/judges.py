"""Finds recognizers other than the adapter's own, to judge likeness with, where other programs keep them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lib_pulid import disk

BUFFALO, FACENET = "w600k_r50.onnx", "20180402-114759-vggface2.pt"


def find(name: str, models_dir: Path) -> Path | None:
    """Returns the path of a judge's file, or None."""
    return next((folder / name for folder in _folders(models_dir) if disk.is_file(folder / name)), None)


def _folders(models_dir: Path) -> Iterator[Path]:
    pack = Path("models") / "buffalo_l"
    yield models_dir
    for root in (models_dir / "insightface", disk.user_path("~/.insightface")):
        yield from (root, root / pack, root / pack / "buffalo_l")
    home = os.environ.get("TORCH_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "torch")
    yield from (disk.user_path(home) / deeper for deeper in ("checkpoints", "hub/checkpoints"))
