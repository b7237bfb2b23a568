"""install.py: what is missing is asked for, under constraints that keep everything else where it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[1] / "install.py"


@pytest.fixture
def run(monkeypatch):
    """Runs install.py as the host does, with these modules not found; returns pip's commands and constraints."""

    def _run(*gone: str, refuse: str = "") -> list[tuple[str, str]]:
        calls: list[tuple[str, str]] = []

        def run_pip(command: str, what: str) -> None:
            path = command.split('"')[1] if '"' in command else ""
            calls.append((command, Path(path).read_text() if path else ""))
            if refuse and refuse in command:
                raise RuntimeError("no version fits")

        launch = ModuleType("launch")
        launch.run_pip = run_pip
        monkeypatch.setitem(sys.modules, "launch", launch)
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else found(name))
        spec = importlib.util.spec_from_file_location("pulid_install", PATH)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return calls

    return _run


def test_nothing_is_done_when_nothing_is_missing(run, capsys):
    assert run() == []
    assert capsys.readouterr().out == ""


def test_what_is_missing_is_installed_and_nothing_moved(run):
    ((command, constraints),) = run("insightface", "onnxruntime")
    assert command.startswith("install insightface onnxruntime --constraint ")
    import numpy

    assert f"numpy=={numpy.__version__}\n" in constraints
    assert "torch==" in constraints


def test_insightface_without_dependencies_where_no_onnx_fits(run):
    commands = [command for command, _ in run("insightface", "timm", refuse="install insightface timm")]
    assert commands[1].startswith("install timm --constraint ")
    assert commands[2].startswith("install --no-deps --only-binary :all: insightface onnx==")


def test_another_fault_of_pip_is_not_hidden(run):
    with pytest.raises(RuntimeError):
        run("facexlib", refuse="facexlib")
