"""Test only. Runs before any other script: notes who first imports the heavy libraries, and times our scripts."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

WATCHED = ("insightface", "onnxruntime", "timm", "facexlib", "lib_pulid")
NOTES = "pulid_test_first_imports"


class Watcher:
    """A finder that finds nothing."""

    def __init__(self) -> None:
        self.first: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in WATCHED and name not in self.first:
            self.first[name] = [frame.filename for frame in traceback.extract_stack()[:-1]]

    def timed(self, name: str, original: Any) -> Any:
        """A function that adds up its CPU seconds, which do not depend on what else the machine does."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - start

        return run


def time_our_script(watcher: Watcher) -> None:
    from modules import script_loading

    load = script_loading.load_module
    timed = watcher.timed("script", load)
    script_loading.load_module = lambda path: (timed if "sd-webui-pulid" in Path(path).parts else load)(path)


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
        time_our_script(notes.watcher)
