"""Whatever fails, and wherever: nothing is left behind, nothing is changed, and the next image is the right one.

One table of stages and faults, on the stand-ins of both hosts. A fault is raised, or a button is pressed, where a stage
begins; of a stage that comes often (a denoiser call, the writing of a file), in the first, a middle or the last one.
`make test-long` has every kind of fault at every stage.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from lib_pulid import hosts
from lib_pulid.errors import OutOfMemoryError, PulidError, is_out_of_memory
from lib_pulid.identity import Identity
from tests import light_webui
from tests.fake_modules.models import same
from tests.faults import FAULTS, STAGES, TABLE, Stage, faulty
from tests.light_webui import PHOTOS, Host, unit

TWO = [unit("anna"), unit("ben", weight=0.5)]
EXPECTED: dict[str, tuple[list, list]] = {}


def expected(host: Host) -> tuple[list, list]:
    """Images with PuLID off and with it, two batches, each from a fresh start of the program."""
    if host.kind not in EXPECTED:
        EXPECTED[host.kind] = host.generate([], batches=2), host.generate(TWO, batches=2)
        host.start_anew()
    return EXPECTED[host.kind]


@pytest.mark.parametrize(("stage", "fault"), TABLE, ids=[f"{stage.name}: {fault}" for stage, fault in TABLE])
def test_a_fault_leaves_nothing_and_the_next_picture_is_right(host, stage, fault):
    plain, faced = expected(host)
    assert not same(plain, faced)
    before, numbers = host.fingerprint(), torch.get_rng_state()
    p, pictures, error = host.processing(batches=2), None, None
    with faulty(host, stage, FAULTS[fault]) as calls:
        try:
            pictures = host.generate(TWO, p=p)
        except BaseException as raised:
            error = raised
    assert calls[0] >= stage.number, "the stage was not reached"
    check_the_end(host, stage, fault, pictures, error, faced)
    del error

    assert host.left_behind(p) == []
    assert host.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), numbers) and torch.is_grad_enabled()
    assert all(
        is_free(store._lock) for store in (host.library.adapters, host.library.identities, host.library.encoders)
    )
    assert all(Identity.load(path) for path in host.written())
    assert same(host.generate([]), plain[:1])
    assert same(host.generate(TWO), faced[:1])
    assert host.left_behind() == []


def check_the_end(host: Host, stage: Stage, fault: str, pictures: Any, error: Any, faced: list) -> None:
    """An error that tells, or nothing but right images; never one without the face."""
    if fault in ("interrupt", "skip"):
        assert error is None
        whole = [picture for picture in pictures if len(picture) == len(faced[0])]
        assert all(any(torch.equal(picture, right) for right in faced) for picture in whole)
    elif fault in ("ctrl-c", "exit", "thrown out"):
        assert isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
    elif not stage.fatal or fault == "full disk":
        assert error is None and same(pictures, faced)
    elif fault == "no memory":
        assert isinstance(error, OutOfMemoryError) and "Try a smaller image" in str(error)
        assert isinstance(error.__cause__, torch.cuda.OutOfMemoryError)
    else:
        assert str(error) == "injected"


def is_free(lock: Any) -> bool:
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(lock.acquire(timeout=1) and not lock.release()))
    thread.start()
    thread.join()
    return taken == [True]


def test_reload_ui_lets_go_of_what_was_loaded(host):
    """Models and compiled identities go with the script that loaded them, whatever callbacks it registered."""
    gone = []
    for _ in range(3):
        host.generate(TWO)
        host.script.ui(False)
        host.ui.modules.script_callbacks.callback_map["callbacks_before_ui"][0].callback()  # the axes of a grid
        gone.append(weakref.ref(host.library))
        host.start_anew()
    gc.collect()
    assert [one() for one in gone] == [None] * 3


def killed_in_a_child(work: Callable[[], None]) -> None:
    """Runs it in a copy of this process, which it has to kill."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)  # it was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write(share: float) -> Callable[[Path, bytes], None]:
    def act(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: int(share * len(data))])
        kill()

    return act


KILLS = {
    "before a byte is written": (("pathlib.Path.write_bytes",), kill),
    "half-written": (("pathlib.Path.write_bytes",), write(0.5)),
    "written, not renamed": (("pathlib.Path.write_bytes",), write(1)),
    "when it gets its name": (("os.link", "os.replace"), kill),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")
class TestKill:
    @pytest.mark.parametrize("moment", KILLS)
    def test_while_an_identity_is_saved(self, host, moment):
        identity = host.encode("anna")
        places, act = KILLS[moment]

        def save() -> None:
            for place in places:
                pytest.MonkeyPatch().setattr(place, act)
            host.library.identities.save("Anna", identity)

        killed_in_a_child(save)
        assert host.library.identities.listed() == [] and host.library.identities.find("Anna") is None
        saved = host.library.identities.save("Anna", identity)
        assert [one.name for one in host.library.identities.listed()] == ["Anna"]
        assert torch.equal(Identity.load(saved.path).cond, identity.cond)

    @pytest.mark.parametrize("moment", KILLS)
    def test_while_a_photo_is_remembered(self, host, moment):
        _, faced = expected(host)
        places, act = KILLS[moment]

        def generate() -> None:
            for place in places:
                pytest.MonkeyPatch().setattr(place, act)
            host.generate(TWO)

        killed_in_a_child(generate)
        assert [path for path in host.written() if path.suffix == ".safetensors"] == []
        assert same(host.generate(TWO), faced[:1])

    def test_after_a_photo_was_remembered(self, host):
        _, faced = expected(host)

        def generate() -> None:
            place = hosts.current().run_class
            pytest.MonkeyPatch().setattr(place, "begin", kill)
            host.generate(TWO)

        killed_in_a_child(generate)
        assert len([Identity.load(path) for path in host.written()]) == 2
        assert same(host.generate(TWO), faced[:1])


def onnx_error(text: str) -> Exception:
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    return state.RuntimeException(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code: {text}")


LACKS: dict[str, Callable[[], Exception]] = {
    "CUDA": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA, by the driver": lambda: RuntimeError("CUDA error: out of memory"),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    "DirectML": lambda: RuntimeError("Could not allocate tensor with 9 bytes. There is not enough GPU video memory!"),
    "CPU": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    "ONNX Runtime": lambda: onnx_error("Failed to allocate memory for requested buffer of size 1073741824"),
    "cuBLAS in ONNX Runtime": lambda: onnx_error("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
    "Python": lambda: MemoryError(),
}
OTHERS = [
    RuntimeError("CUDA error: device-side assert triggered"), ValueError("memory"), KeyError("x"), PulidError("no"),
]  # fmt: skip


@pytest.mark.parametrize("lack", LACKS)
def test_a_lack_of_memory_is_recognised(lack):
    error = LACKS[lack]()
    outer = PulidError("it may be truncated")
    outer.__cause__ = error
    assert is_out_of_memory(error) and is_out_of_memory(outer)
    assert not any(map(is_out_of_memory, OTHERS))


class Gpu:
    """A device that has no memory left at a stage, seen by where the models are loaded to."""

    def __init__(self, patch: pytest.MonkeyPatch, stage: str, error: Exception) -> None:
        self.fail, self.loaded = Mock(side_effect=error), []
        patch.setattr("lib_pulid.webui.settings.device", lambda: "cuda:0")
        patch.setattr("lib_pulid.face_models.load_face_models", lambda files, device: self._load(stage, device))
        patch.setattr("tests.light_webui.Tower.to", lambda tower, device: self._move(tower, stage, device))

    def _load(self, stage: str, device: str) -> Any:
        if stage == "load" and device != "cpu":
            self.fail()
        self.loaded.append(device)
        models = light_webui.face_models()
        if stage == "detect" and device != "cpu":
            models.detector.detect = self.fail
        return models

    def _move(self, tower: nn.Module, stage: str, device: str) -> nn.Module:
        self.loaded.append(device)
        if stage == "vision" and device != "cpu":
            tower.forward = self.fail
        return tower


@pytest.mark.parametrize(
    ("stage", "lack"), [("load", "CUDA, by the driver"), ("detect", "cuBLAS in ONNX Runtime"), ("vision", "CUDA")]
)
def test_photos_are_read_on_the_cpu_where_the_gpu_has_no_memory(host, monkeypatch, stage, lack):
    _, faced = expected(host)
    gpu = Gpu(monkeypatch, stage, LACKS[lack]())
    p = host.processing(batches=2)
    assert same(host.generate(TWO, p=p), faced)
    assert [text.split(":")[0] for text in p.comments if "read on the CPU" in text] == ["PuLID unit 1"]  # told once
    assert gpu.fail.call_count == 1 and gpu.loaded[-2:] == ["cpu", "cpu"]
    assert host.left_behind() == []
    host.forget_photos()
    host.generate(TWO)
    assert gpu.fail.call_count == 2  # the next time the GPU may have room


def test_another_fault_of_the_gpu_is_no_reason_to_move(host, monkeypatch):
    gpu = Gpu(monkeypatch, "detect", RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side"):
        host.generate(TWO)
    assert "cpu" not in gpu.loaded and host.left_behind() == []


def test_previews_tell_it_too(host, monkeypatch):
    from lib_pulid.webui.routes import detect

    Gpu(monkeypatch, "detect", LACKS["CUDA"]())
    assert "read on the CPU" in detect({"images": [PHOTOS["anna"]]}, host.library)["photos"][0]["warnings"][-1]
    images = json.dumps([PHOTOS["anna"]])
    assert "read on the CPU" in host.actions().preview(images, "None", "largest", 0)[1]
    assert "read on the CPU" in host.actions().save("Anna", images, "auto", "largest", 0, "official")[2]


def test_what_would_help_is_told_as_the_host_calls_it(host, monkeypatch):
    stage = next(stage for stage in STAGES if stage.name == "middle call, inside")
    p = host.processing()
    with faulty(host, stage, FAULTS["no memory"]), pytest.raises(OutOfMemoryError) as raised:
        host.generate(TWO, p=p)
    assert ("--medvram" if host.kind == "a1111" else "GPU Weights") in str(raised.value)
    assert "CUDA not enough memory. Injected." in str(raised.value)
    assert "out of memory" not in str(raised.value).lower()  # Forge Neo would show "OOM" in the message's place
    with faulty(host, stage, FAULTS["no memory"]), pytest.raises(torch.cuda.OutOfMemoryError):
        host.generate([])  # without PuLID the error is the host's own
    monkeypatch.setattr(host.ui.modules.shared.opts, "data_labels", {})  # as in Forge Neo, which has no slider for it
    assert "GPU Weights" not in hosts.current().less_memory()
