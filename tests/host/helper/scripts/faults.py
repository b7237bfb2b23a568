"""Test only: POST /host-test/fail lets something fail, once, and says whether the last one came."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from modules import script_callbacks, scripts, shared

_undo: list[Callable[[], None]] = []
_came: list[str] = []
ERRORS = {
    "RuntimeError": lambda: RuntimeError("injected"),
    "OutOfMemoryError": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Injected."),
    "OSError": lambda: OSError(28, "No space left on device"),
}


def fail(body: dict[str, Any]) -> dict[str, bool]:
    """body: place, call (its number, from 1 on), after (it has done its work), error. Empty: nothing fails any more."""
    came = bool(_came)
    while _undo:
        _undo.pop()()
    _came.clear()
    if body:
        forget_photos()
        replace(*owner_of(body["place"]), body["call"], body["after"], ERRORS[body["error"]])
    return {"came": came}


def replace(owner: Any, name: str, number: int, after: bool, error: Callable[[], Exception]) -> None:
    original, calls = getattr(owner, name), [0]

    def run(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        hit = calls[0] == number
        if hit and not after:
            _came.append(name)
            raise error()
        result = original(*args, **kwargs)
        if hit:
            _came.append(name)
            raise error()
        return result

    setattr(owner, name, run)
    _undo.append(lambda: setattr(owner, name, original))


def owner_of(place: str) -> tuple[Any, str]:
    """run.x: a method of what our host's file puts in; denoiser.x: of the class of the UNet; else by its full name."""
    path, _, name = place.rpartition(".")
    if path == "run":
        from lib_pulid import hosts

        return hosts.current().run_class, name
    if path == "denoiser":
        objects = getattr(shared.sd_model, "forge_objects", None)
        model = shared.sd_model.model if objects is None else objects.unet.model
        return type(model.diffusion_model), name
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        module, _, owner = path.rpartition(".")
        return getattr(importlib.import_module(module), owner), name


def forget_photos() -> None:
    """So that they are read again."""
    ours = next(data.script_class for data in scripts.scripts_data if Path(data.path).name == "pulid.py")
    ours.library.identities._cache = None
    for path in (ours.library.folder.path / "cache").glob("*.safetensors"):
        path.unlink()


def add_routes(demo: Any, app: Any) -> None:
    from fastapi import Body

    def endpoint(body: dict = Body(default={})) -> dict[str, bool]:  # noqa: B006, B008
        return fail(body)

    app.add_api_route("/host-test/fail", endpoint, methods=["POST"])


script_callbacks.on_app_started(add_routes)
