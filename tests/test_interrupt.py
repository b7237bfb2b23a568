"""Photos that are being read: interrupted at once, whatever that waits for; and models that are kept for the next."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from lib_pulid.errors import Interrupted
from lib_pulid.stores.interruptible import Interruptible
from lib_pulid.webui import settings
from tests import light_webui
from tests.fake_modules.models import same
from tests.light_webui import unit


def never() -> bool:
    return False


class Gate:
    """Work that waits: `begun` tells that it does, `open` lets it go on. No test waits longer than it has to."""

    def __init__(self) -> None:
        self.begun, self._open = threading.Event(), threading.Event()

    def open(self) -> None:
        self._open.set()

    def wait(self) -> None:
        self.begun.set()
        assert self._open.wait(60)


def test_the_result_and_the_errors_of_the_work():
    work = Interruptible()
    assert work.run(lambda is_left: (is_left(), threading.current_thread().name), never) == (False, "PuLID")
    for error in (ValueError("x"), TimeoutError("x"), KeyboardInterrupt(), GeneratorExit()):

        def fail(is_left: Callable[[], bool], error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as raised:
            work.run(fail, never)
        assert raised.value is error
    assert not work.is_busy


def test_an_interrupt_does_not_wait_for_the_work():
    work, gate, seen = Interruptible(), Gate(), []

    def slow(is_left: Callable[[], bool]) -> None:
        gate.wait()
        seen.append(is_left())

    with pytest.raises(Interrupted):
        work.run(slow, gate.begun.is_set)  # it has begun, and ends after this only
    assert work.is_busy and seen == []
    work.settle(lambda: True)  # who is interrupted again need not wait either
    with pytest.raises(Interrupted):
        work.run(lambda is_left: None, lambda: True)
    gate.open()
    work.settle()
    assert not work.is_busy and seen == [True]
    assert work.run(lambda is_left: 1, never) == 1


# What waits, and what it does.
LOADERS: dict[str, Callable[..., Any]] = {
    "lib_pulid.face_models.load_face_models": lambda files, device: light_webui.face_models(),
    "lib_pulid.vision.load_vision_tower": lambda path: light_webui.Tower(),
}
PLACES = LOADERS | {"tests.light_webui.Detector.detect": light_webui.Detector.detect}


@pytest.mark.parametrize("place", PLACES)
def test_interrupted_while_a_photo_is_read(host, monkeypatch, place):
    """Generate ends while the model is still being loaded; the next image waits for that, and is the right one."""
    plain, faced = host.generate([]), host.generate([unit("anna")])
    host.start_anew()
    gate, p = Gate(), host.processing()

    def slow(*args: Any) -> Any:
        gate.wait()
        return PLACES[place](*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, slow)
        presses = threading.Thread(target=lambda: gate.begun.wait(60) and setattr(host.state, "interrupted", True))
        presses.start()
        assert host.generate([unit("anna")], p=p) == []
        presses.join()
        assert host.library.encoders._work.is_busy
        assert any("Interrupted" in text for text in p.comments) and host.state.textinfo is None
        host.library.encoders.release()  # waits for nothing
        gate.open()
        host.library.encoders.settle()
    assert host.left_behind(p) == []
    assert same(host.generate([]), plain)
    assert same(host.generate([unit("anna")]), faced)


def loads(monkeypatch) -> list[str]:
    """What is loaded from now on."""
    seen: list[str] = []
    for place, load in LOADERS.items():
        monkeypatch.setattr(place, lambda *args, place=place, load=load: seen.append(place) or load(*args))
    return seen


@pytest.mark.parametrize(
    ("free", "wanted", "device", "kept"),
    [
        (9e9, None, "cpu", True),
        (7e9, None, "cpu", False),
        (0, None, "cpu", False),
        (99e9, None, "cuda:0", False),  # its memory is for images
        (0, "always", "cuda:0", True),
        (99e9, "never", "cpu", False),
        (9e9, False, "cpu", True),  # what the setting was once
    ],
)
def test_models_are_kept_where_memory_suffices(host, monkeypatch, free, wanted, device, kept):
    """The second new photo finds them loaded."""
    seen = loads(monkeypatch)
    options = host.ui.modules.shared.opts.data
    monkeypatch.delitem(options, "pulid_keep_encoders")
    if wanted is not None:
        monkeypatch.setitem(options, "pulid_keep_encoders", wanted)
    monkeypatch.setattr("lib_pulid.webui.settings._free_memory", lambda: free)
    monkeypatch.setattr("lib_pulid.webui.settings.device", lambda: device)
    monkeypatch.setattr(light_webui.Tower, "to", lambda tower, device: tower)
    host.generate([unit("anna")])
    host.generate([unit("ben")])
    assert seen == list(LOADERS) * (1 if kept else 2)


def test_free_memory_is_told():
    assert 1e6 < settings._free_memory() < 1e15
