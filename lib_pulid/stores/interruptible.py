"""Runs work in a thread of its own, which is abandoned when the user interrupts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from lib_pulid.errors import Interrupted

POLL = 0.1  # seconds until an interrupt is noticed
MESSAGE = "Interrupted while reading photos."
Result = TypeVar("Result")


class Interruptible:
    """Runs one piece of work at a time."""

    def __init__(self) -> None:
        self._left: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether abandoned work is still running."""
        return self._left is not None and self._left.is_alive()

    def settle(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits until abandoned work is done, or until `stop` returns True."""
        while self._left is not None and self.is_busy and not stop():
            self._left.join(POLL)

    def run(self, work: Callable[[Callable[[], bool]], Result], stop: Callable[[], bool]) -> Result:
        """Does the work and returns its result, or raises its error.

        Args:
            work: is given a function that says whether it was abandoned, to end early.
            stop: whether the user has interrupted.

        Raises:
            Interrupted: they have. The work continues for a while; `settle` waits for its end.
        """
        self.settle(stop)
        if self.is_busy:
            raise Interrupted(MESSAGE)
        outcome: Future[Result] = Future()
        left = threading.Event()

        def do() -> None:
            try:
                outcome.set_result(work(left.is_set))
            except BaseException as error:  # SystemExit, too: it is raised in the thread that asked for the work
                outcome.set_exception(error)

        thread = threading.Thread(target=do, name="PuLID", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL)
                if thread.is_alive() and stop():
                    raise Interrupted(MESSAGE)
        except BaseException:  # Ctrl-C, too
            self._left = thread
            left.set()
            raise
        return outcome.result()
