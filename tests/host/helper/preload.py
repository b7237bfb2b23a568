"""Test only. Runs before any other script: notes who first imports the heavy libraries."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from types import ModuleType

WATCHED = ("insightface", "onnxruntime", "timm", "facexlib", "lib_pulid")
NOTES = "pulid_test_first_imports"


class Watcher:
    """A finder that finds nothing."""

    def __init__(self) -> None:
        self.first: dict[str, list[str]] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in WATCHED and name not in self.first:
            self.first[name] = [frame.filename for frame in traceback.extract_stack()[:-1]]


def preload(parser: object) -> None:
    # Forge Neo's ControlNet imports from this built-in extension, which is off: it installs from the network.
    preprocessors = Path("extensions-builtin", "forge_legacy_preprocessors").resolve()
    if preprocessors.is_dir() and str(preprocessors) not in sys.path:
        sys.path.append(str(preprocessors))
    if NOTES not in sys.modules:
        notes = ModuleType(NOTES)
        notes.watcher = Watcher()
        sys.modules[NOTES] = notes
        sys.meta_path.insert(0, notes.watcher)
