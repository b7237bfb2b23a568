"""Downloads files for the page and the API in the background, one after another, even if the page is closed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lib_pulid.errors import PulidError
from lib_pulid.files import catalog
from lib_pulid.files.catalog import WeightFile
from lib_pulid.stores.folder import ModelsFolder


@dataclass(frozen=True)
class State:
    """The progress of the downloads.

    running: whether one is in progress. name: of the current file; done, total: its bytes. note: what it waits for.
    waiting: names of the files to come. problems: messages of those that failed.
    """

    running: bool = False
    name: str = ""
    done: int = 0
    total: int = 0
    note: str = ""
    waiting: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class _Stopped(Exception):
    pass


class Downloads:
    """A queue of downloads with one background thread."""

    def __init__(self, folder: ModelsFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._state = State()
        self._queue: list[WeightFile] = []
        self._stop = False

    @property
    def state(self) -> State:
        return replace(self._state, waiting=tuple(file.name for file in self._queue))

    def start(self, files: Sequence[WeightFile]) -> None:
        """Adds files to the queue, and starts it."""
        with self._lock:
            queued = [file.name for file in self._queue] + [self._state.name]
            self._queue += [file for file in files if file.name not in queued]
            self._stop = False
            if self._state.running or not self._queue:
                return
            self._state = State(running=True)
        threading.Thread(target=self._work, name="PuLID download", daemon=True).start()

    def stop(self) -> None:
        """Ends at the next block; what was received is kept, and the next start resumes there."""
        with self._lock:
            self._queue.clear()
            self._stop = True

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._state = State(problems=self._state.problems)
                    return
                file = self._queue.pop(0)
                self._state = State(running=True, name=file.name, total=file.size, problems=self._state.problems)
            try:
                catalog.download(file, self._folder.models_dir, self._progress)
            except _Stopped:
                pass
            except PulidError as error:
                self._failed(str(error))
            except Exception as error:  # a fault of ours: shown here, or nobody would ever see it
                self._failed(f"{file.name}: {type(error).__name__}: {error}")

    def _failed(self, problem: str) -> None:
        with self._lock:
            self._state = replace(self._state, problems=(*self._state.problems, problem))

    def _progress(self, done: int, total: int, note: str) -> None:
        if self._stop:
            raise _Stopped
        with self._lock:
            self._state = replace(self._state, done=done, total=total or self._state.total, note=note)
