"""Where and how things fail: stages of a generation, and what comes there. Used by test_faults and test_sequences."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lib_pulid import hosts
from tests.fake_modules.models import SMALL_SITES
from tests.light_webui import STEPS, Host


def of(path: str) -> Callable[[Host], tuple[Any, str]]:
    """A function or method by its name: "lib_pulid.faces.align"."""

    def find(host: Host) -> tuple[Any, str]:
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
        return hosts.current().run_class, names[0] if host.kind == "a1111" else names[-1]

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
    Stage("decode the photo", of("lib_pulid.webui.dropped.DroppedPhotos.read")),
    Stage("detect", of("tests.light_webui.Detector.detect")),
    Stage("detect, second person", of("tests.light_webui.Detector.detect"), number=3),
    Stage("align", of("lib_pulid.faces.align")), Stage("recognise", of("tests.light_webui.Recogniser.embed")),
    Stage("parse", of("tests.light_webui.Parser.labels")), Stage("vision", of("tests.light_webui.Tower.forward")),
    Stage("encode", of("lib_pulid.photos.encode_identity")), Stage("write the cache", of("pathlib.Path.write_bytes")),
    Stage("write the cache, written", of("pathlib.Path.write_bytes"), after=True),
    Stage("rename in the cache", of("os.replace")),
    Stage("rename in the cache, second person", of("os.replace"), number=2, after=True),
    Stage("compile", of("lib_pulid.webui.compiled.compile_injection")),
    Stage("compile, second person", of("lib_pulid.webui.compiled.compile_injection"), number=2),
    Stage("compile one layer", of("lib_pulid.injection.prepare_site"), number=3),
    Stage("write the parameters", of("lib_pulid.webui.infotext.write")), Stage("process_batch", of_host("begin")),
    Stage("process_batch, done", of_host("begin"), after=True),
    Stage("process_batch, second batch", of_host("begin"), number=2),
    Stage("process_before_every_sampling, or the first cfg_denoiser", of_host("open|patch")),
    Stage("process_before_every_sampling, done", of_host("open|patch"), after=True),
    Stage("cfg_denoiser callback", of_host("open|patch"), number=2),
    Stage("cfg_denoiser callback, last", of_host("open|patch"), number=STEPS, after=True),
    Stage("find the sites", of("lib_pulid.watch.Watch.over")),
    Stage("attach a hook", of("torch.nn.Module.register_forward_hook"), number=4),
    Stage("attach a hook, between the two of a layer", of("torch.nn.Module.register_forward_pre_hook"), number=4),
    Stage("before a call", of_host("enter")), Stage("before a call, hooks in place", of_host("enter"), after=True),
    Stage("before a call, last", of_host("enter"), number=STEPS),
    Stage("the residual", of("lib_pulid.injection.add_cross_attention")),
    Stage("the residual, second layer", of("lib_pulid.injection.add_cross_attention"), number=2, after=True),
    Stage("first call", CALL), Stage("first call, done", CALL, after=True), Stage("middle call", CALL, number=2),
    Stage("middle call, inside", INSIDE, number=SMALL_SITES + 2),
    Stage("last call, inside", INSIDE, number=SMALL_SITES * STEPS),
    Stage("last call, done", CALL, number=STEPS, after=True),
    Stage("first call of the second batch", CALL, number=STEPS + 1), Stage("after a call", of_host("leave")),
    Stage("after a call, last, done", of_host("leave"), number=STEPS, after=True),
    Stage("postprocess", lambda host: (type(host.script), "postprocess"), fatal=False),
    Stage("postprocess, done", lambda host: (type(host.script), "postprocess"), after=True, fatal=False),
]  # fmt: skip


def press(name: str) -> Callable[[Host], None]:
    return lambda host: setattr(host.state, name, True)


def throw(error: BaseException) -> Callable[[Host], None]:
    def act(host: Host) -> None:
        raise error

    return act


FAULTS: dict[str, Callable[[Host], None]] = {
    "error": throw(RuntimeError("injected")),
    "no memory": throw(torch.cuda.OutOfMemoryError("CUDA out of memory. Injected.")),
    "full disk": throw(OSError(28, "No space left on device")), "ctrl-c": throw(KeyboardInterrupt()),
    "exit": throw(SystemExit(1)), "thrown out": throw(GeneratorExit()), "interrupt": press("interrupted"),
    "skip": press("skipped"),
}  # fmt: skip
RARE = {"full disk": "cache", "exit": "call", "thrown out": "call"}  # only at stages with this in their name
# Everywhere comes an error, and here all of the others, too: a stage of each of our ways to clean up.
OF_EACH_KIND = (
    "process, done", "detect, second person", "rename in the cache, second person", "process_batch",
    "attach a hook, between the two of a layer", "middle call, inside", "first call of the second batch", "postprocess",
)  # fmt: skip
FULL = os.environ.get("PULID_FAULTS") == "all"  # make test-long
TABLE = [
    (stage, fault) for stage in STAGES for fault in FAULTS
    if RARE.get(fault, "") in stage.name
    and (FULL or fault in ("error", "full disk") or stage.name in OF_EACH_KIND)
]  # fmt: skip


@contextmanager
def faulty(host: Host, stage: Stage, fault: Callable[[Host], None]) -> Iterator[list[int]]:
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, run)
        yield calls
