"""Test only: HTTP routes below /host-test that look inside the program: hooks, callbacks, memory, imports, times."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from modules import script_callbacks, scripts, shared

EXTENSION = "sd-webui-pulid"  # name of the folder that the extension is linked as


# ------------------------------------------------------------------------------------------------- time at start


def is_pulid(filename: str | None) -> bool:
    return bool(filename) and EXTENSION in Path(filename).parts


def timed(name: str, original: Any) -> Any:
    return sys.modules["pulid_test_first_imports"].watcher.timed(name, original)


def time_widgets() -> None:
    """The time of our script's ui(), of which there are three or four calls."""
    original = scripts.Script.__dict__.get("pulid_test_ui")
    if original is not None:
        return
    scripts.Script.pulid_test_ui = True
    create = scripts.ScriptRunner.create_script_ui

    def create_script_ui(self: Any, script: Any, *args: Any) -> Any:
        make = timed("ui", create) if is_pulid(script.filename) else create
        return make(self, script, *args)

    scripts.ScriptRunner.create_script_ui = create_script_ui


def time_callbacks() -> None:
    """The time of our callbacks that run once at the start. This script is loaded after ours."""
    for event in ("callbacks_before_ui", "callbacks_ui_settings", "callbacks_ui_tabs", "callbacks_app_started"):
        callbacks = script_callbacks.callback_map.get(event, [])
        for index, one in enumerate(callbacks):
            if is_pulid(one.script):
                replaced = one._replace if hasattr(one, "_replace") else None
                wrapped = timed(event, one.callback)
                if replaced is not None:
                    callbacks[index] = replaced(callback=wrapped)
                else:
                    one.callback = wrapped


# ------------------------------------------------------------------------------------------------ what is inside


def denoiser() -> torch.nn.Module:
    model = shared.sd_model
    objects = getattr(model, "forge_objects", None)
    return model.model.diffusion_model if objects is None else objects.unet.model.diffusion_model


def hooks() -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in denoiser().modules() for kind in kinds)


def patches() -> list[str]:
    """What extensions have put into Forge's UNet object, between generations."""
    objects = getattr(shared.sd_model, "forge_objects", None)
    options = {} if objects is None else objects.unet.model_options
    kept = [key for key, value in options.items() if key != "transformer_options" and is_set(value)]
    return sorted(kept + [key for key, value in options.get("transformer_options", {}).items() if is_set(value)])


def is_set(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or bool(value)  # Forge Neo leaves the last pass's sigmas there


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensors() -> tuple[int, int]:
    storages = {}
    for thing in gc.get_objects():
        try:
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        except (ReferenceError, RuntimeError, NotImplementedError):
            continue
    return len(storages), sum(storages.values())


def state() -> dict[str, Any]:
    resident = resident_bytes()
    count, size = tensors()
    return {
        "hooks": hooks(),
        "callbacks": {event: len(found) for event, found in script_callbacks.callback_map.items()},
        "patches": patches(),
        "resident_bytes": resident,
        "tensors": count,
        "tensor_bytes": size,
        "model": shared.sd_model.sd_checkpoint_info.name_for_extra,
    }


def start() -> dict[str, Any]:
    watcher = sys.modules["pulid_test_first_imports"].watcher
    loaded = {name: name in sys.modules for name in ("insightface", "onnxruntime", "timm", "facexlib")}
    return {"first_imports": watcher.first, "loaded": loaded, "seconds": watcher.seconds}


def optimisations() -> list[str]:
    """A1111's, as its setting names them."""
    from modules import sd_hijack

    return [one.title() for one in getattr(sd_hijack, "optimizers", []) if one.is_available()]


def reload_ui() -> dict[str, bool]:
    """What the button "Reload UI" does."""
    shared.state.request_restart()
    return {"ok": True}


def add_routes(demo: Any, app: Any) -> None:
    routes = {"state": state, "start": start, "optimisations": optimisations}
    for name, endpoint in routes.items():
        app.add_api_route(f"/host-test/{name}", endpoint, methods=["GET"])
    app.add_api_route("/host-test/reload-ui", reload_ui, methods=["POST"])


time_widgets()
time_callbacks()
script_callbacks.on_app_started(add_routes)
