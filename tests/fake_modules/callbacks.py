"""`modules.script_callbacks`: the three callbacks of the CFGDenoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

EVENTS = ("cfg_denoiser", "cfg_denoised", "cfg_after_cfg")
AT_START = ("app_started", "ui_settings", "before_ui", "script_unloaded", "image_grid")


@dataclass
class ScriptCallback:
    script: str
    callback: Callable
    name: str = "unnamed"


def fill(module: ModuleType, cached: bool) -> None:
    """cached: as from A1111 1.9 on, the sorted list is made anew only when its length changes."""
    listed: dict[str, list[ScriptCallback]] = {f"callbacks_{event}": [] for event in EVENTS + AT_START}
    ordered: dict[str, list[ScriptCallback]] = {}

    def in_order(event: str) -> list[ScriptCallback]:
        callbacks = listed[f"callbacks_{event}"]
        if not cached:
            return callbacks
        if event not in ordered or len(ordered[event]) != len(callbacks):
            ordered[event] = callbacks.copy()
        return ordered[event]

    def remove_callbacks_for_function(function: Callable) -> None:
        for callbacks in listed.values():
            for callback in [c for c in callbacks if c.callback == function]:
                callbacks.remove(callback)

    def clear_callbacks() -> None:
        for callbacks in listed.values():
            callbacks.clear()
        ordered.clear()

    def call(event: str) -> Callable[[Any], None]:
        def run(params: Any) -> None:
            for callback in in_order(event):
                try:
                    callback.callback(params)
                except Exception as error:
                    module.reported.append(error)  # the real ones print it

        return run

    def add_callback(callbacks: list, function: Callable) -> None:
        callbacks.append(ScriptCallback("test", function))

    def add_callback_from_1_9_on(callbacks: list, fun: Callable, *, name=None, category="", filename=None) -> None:
        callbacks.append(ScriptCallback(filename, fun, f"{filename}/{category}"))

    def on(event: str) -> Callable[[Callable], None]:
        return lambda function: add_callback(listed[f"callbacks_{event}"], function)

    module.callback_map, module.reported, module.ScriptCallback = listed, [], ScriptCallback
    module.add_callback = add_callback_from_1_9_on if cached else add_callback
    module.remove_callbacks_for_function = remove_callbacks_for_function
    module.clear_callbacks = clear_callbacks
    for event in EVENTS:
        setattr(module, f"on_{event}", on(event))
        setattr(module, f"{event}_callback", call(event))
