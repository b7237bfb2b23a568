"""Whatever fails, and wherever: nothing is left behind, nothing is changed, and the next picture is the right one.

One table of stages and faults, on the stand-ins of both hosts. A fault is raised, or a button is pressed, where a stage
begins; of a stage that comes often (a denoiser call, the writing of a file), in the first, a middle or the last one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lib_pulid import hosts
from lib_pulid.errors import OutOfMemoryError, PulidError, is_out_of_memory
from lib_pulid.identity import Identity
from lib_pulid.photos import IdentityCache
from tests import light_webui
from tests.light_webui import PHOTOS, STEPS, Host, Light, write_models

ANNA = {"images": [PHOTOS["anna"]]}
TWO = [ANNA, {"images": [PHOTOS["ben"]], "weight": 0.5}]
KINDS = ("a1111", "forge")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("light") / "models"
    write_models(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def program(request, models) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch, Light(request.param, models, patch).running() as running:
        yield running


@pytest.fixture
def host(program) -> Host:
    """As after a fresh start: nothing is loaded, nothing is remembered."""
    program.start_anew()
    return program


# ---------------------------------------------------------------- stages


def of(path: str) -> Callable[[Host], tuple[Any, str]]:
    """A function or method by its name: "lib_pulid.faces.align"."""

    def find(host: Host) -> tuple[Any, str]:
        import importlib

        module, _, name = path.rpartition(".")
        try:
            return importlib.import_module(module), name
        except ModuleNotFoundError:
            module, _, owner = module.rpartition(".")
            return getattr(importlib.import_module(module), owner), name

    return find


def of_host(name: str) -> Callable[[Host], tuple[Any, str]]:
    """A method of what the host's file puts into it; which of the two names depends on the host."""

    def find(host: Host) -> tuple[Any, str]:
        names = name.split("|")
        return hosts.current()._Run, names[0] if host.kind == "a1111" else names[-1]

    return find


@dataclass(frozen=True)
class Stage:
    """name: for people. place: gives the owner and the name of what fails. number: which call of it, from 1 on.
    after: it fails when it has done its work. fatal: whether an Exception there ends the request."""

    name: str
    place: Callable[[Host], tuple[Any, str]]
    number: int = 1
    after: bool = False
    fatal: bool = True


CALL = of("tests.fake_modules.models.UNet.forward")
INSIDE = of("tests.fake_modules.models.Block.forward")
STAGES = [
    Stage("process", of("lib_pulid.webui.plan.UnitPlan.prepare")),
    Stage("process, done", of("lib_pulid.webui.plan.UnitPlan.prepare"), after=True),
    Stage("read the settings", of("lib_pulid.webui.xyz.changes_of")),
    Stage("load adapter", of("lib_pulid.weights.load_adapter")),
    Stage("load face models", of("lib_pulid.face_models.load_face_models")),
    Stage("load vision tower", of("lib_pulid.vision.load_vision_tower")),
    Stage("decode the photo", of("lib_pulid.webui.plan.decode")),
    Stage("detect", of("tests.light_webui.Detector.detect")),
    Stage("detect, second person", of("tests.light_webui.Detector.detect"), number=3),
    Stage("align", of("lib_pulid.faces.align")),
    Stage("recognise", of("tests.light_webui.Recogniser.embed")),
    Stage("parse", of("tests.light_webui.Parser.labels")),
    Stage("vision", of("tests.light_webui.Tower.forward")),
    Stage("encode", of("lib_pulid.photos.encode_identity")),
    Stage("write the cache", of("pathlib.Path.write_bytes")),
    Stage("write the cache, written", of("pathlib.Path.write_bytes"), after=True),
    Stage("rename in the cache", of("os.replace")),
    Stage("rename in the cache, second person", of("os.replace"), number=2, after=True),
    Stage("compile", of("lib_pulid.webui.plan.compile_injection")),
    Stage("compile, second person", of("lib_pulid.webui.plan.compile_injection"), number=2),
    Stage("compile one layer", of("lib_pulid.injection.prepare_site"), number=3),
    Stage("write the parameters", of("lib_pulid.webui.infotext.write")),
    Stage("process_batch", of_host("begin")),
    Stage("process_batch, done", of_host("begin"), after=True),
    Stage("process_batch, second batch", of_host("begin"), number=2),
    Stage("process_before_every_sampling, or the first cfg_denoiser", of_host("_opened|patch")),
    Stage("process_before_every_sampling, done", of_host("_opened|patch"), after=True),
    Stage("cfg_denoiser callback", of_host("_opened|patch"), number=2),
    Stage("cfg_denoiser callback, last", of_host("_opened|patch"), number=STEPS, after=True),
    Stage("find the sites", of("lib_pulid.hosts.webui._watched")),
    Stage("attach a hook", of("torch.nn.Module.register_forward_hook"), number=4),
    Stage("attach a hook, between the two of a layer", of("torch.nn.Module.register_forward_pre_hook"), number=4),
    Stage("before a call", of_host("enter")),
    Stage("before a call, hooks in place", of_host("enter"), after=True),
    Stage("before a call, last", of_host("enter"), number=STEPS),
    Stage("the residual", of("lib_pulid.injection.cross_attention_residual")),
    Stage("the residual, second person", of("lib_pulid.injection.cross_attention_residual"), number=2, after=True),
    Stage("first call", CALL),
    Stage("first call, done", CALL, after=True),
    Stage("middle call", CALL, number=2),
    Stage("middle call, inside", INSIDE, number=light_webui.SITES + 2),
    Stage("last call, inside", INSIDE, number=light_webui.SITES * STEPS),
    Stage("last call, done", CALL, number=STEPS, after=True),
    Stage("first call of the second batch", CALL, number=STEPS + 1),
    Stage("after a call", of_host("leave")),
    Stage("after a call, last, done", of_host("leave"), number=STEPS, after=True),
    Stage("postprocess", of("lib_pulid.webui.infotext.clear"), number=2, fatal=False),
]


def press(name: str) -> Callable[[Host], None]:
    return lambda host: setattr(host.state, name, True)


def throw(error: BaseException) -> Callable[[Host], None]:
    def act(host: Host) -> None:
        raise error

    return act


FAULTS: dict[str, Callable[[Host], None]] = {
    "error": throw(RuntimeError("injected")),
    "no memory": throw(torch.cuda.OutOfMemoryError("CUDA out of memory. Injected.")),
    "full disk": throw(OSError(28, "No space left on device")),
    "ctrl-c": throw(KeyboardInterrupt()),
    "exit": throw(SystemExit(1)),
    "thrown out": throw(GeneratorExit()),
    "interrupt": press("interrupted"),
    "skip": press("skipped"),
}
RARE = {"full disk": "cache", "exit": "call", "thrown out": "call"}  # only at stages with this in their name
TABLE = [(stage, fault) for stage in STAGES for fault in FAULTS if RARE.get(fault, "") in stage.name]


@contextmanager
def faulty(host: Host, stage: Stage, fault: Callable[[Host], None], monkeypatch) -> Iterator[list[int]]:
    """Inside, the fault comes at the stage, once. Yields the number of calls seen."""
    owner, name = stage.place(host)
    original, calls = getattr(owner, name), [0]

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        hit = calls[0] == stage.number
        if hit and not stage.after:
            fault(host)
        result = original(*args, **kwargs)
        if hit and stage.after:
            fault(host)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, run)
        yield calls


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


class Expected:
    """Of one host: pictures with PuLID off and with it, two batches, each from a fresh start of the program."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[list, list]] = {}

    def of(self, host: Host) -> tuple[list, list]:
        if host.kind not in self._made:
            self._made[host.kind] = host.generate([], batches=2), host.generate(TWO, batches=2)
            host.start_anew()
        return self._made[host.kind]


EXPECTED = Expected()


@pytest.mark.parametrize(("stage", "fault"), TABLE, ids=[f"{stage.name}: {fault}" for stage, fault in TABLE])
def test_a_fault_leaves_nothing_and_the_next_picture_is_right(host, stage, fault, monkeypatch):
    plain, faced = EXPECTED.of(host)
    assert not equal(plain, faced)
    before, numbers = host.fingerprint(), torch.get_rng_state()
    pictures, error = None, None
    with faulty(host, stage, FAULTS[fault], monkeypatch) as calls:
        try:
            pictures = host.generate(TWO, batches=2)
        except BaseException as raised:
            error = raised
    assert calls[0] >= stage.number, "the stage was not reached"
    check_the_end(host, stage, fault, pictures, error, faced)
    del error

    assert host.left_behind() == []
    assert host.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), numbers) and torch.is_grad_enabled()
    assert is_free(host.library._lock)
    assert all(Identity.load(path) for path in host.written())
    assert equal(host.generate([], batches=2), plain)
    assert equal(host.generate(TWO, batches=2), faced)
    assert host.left_behind() == []


def check_the_end(host: Host, stage: Stage, fault: str, pictures: Any, error: Any, faced: list) -> None:
    """An error that tells, or nothing but right pictures; never one without the face."""
    if fault in ("interrupt", "skip"):
        assert error is None
        whole = [picture for picture in pictures if len(picture) == len(faced[0])]
        assert all(any(torch.equal(picture, right) for right in faced) for picture in whole)
    elif fault in ("ctrl-c", "exit", "thrown out"):
        assert isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
    elif not stage.fatal or fault == "full disk":
        assert error is None and equal(pictures, faced)
    elif fault == "no memory":
        assert isinstance(error, OutOfMemoryError) and "What helps: a smaller picture" in str(error)
        assert isinstance(error.__cause__, torch.cuda.OutOfMemoryError)
    else:
        assert str(error) == "injected"


def is_free(lock: Any) -> bool:
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(lock.acquire(timeout=1) and not lock.release()))
    thread.start()
    thread.join()
    return taken == [True]
