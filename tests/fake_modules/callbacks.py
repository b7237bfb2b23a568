"""`modules.script_callbacks`: lists of callbacks, and the calls of those of the CFGDenoiser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

EVENTS = ("cfg_denoiser", "cfg_denoised")
AT_START = ("app_started", "ui_settings", "before_ui", "script_unloaded", "image_grid")


@dataclass
class ScriptCallback:
    script: str
    callback: Callable


def fill(module: ModuleType, since_1_9: bool) -> None:
    """since_1_9: as in A1111 from that version on, and in Forge."""
    listed: dict[str, list[ScriptCallback]] = {f"callbacks_{event}": [] for event in EVENTS + AT_START}

    def add_callback(callbacks: list, function: Callable) -> None:
        callbacks.append(ScriptCallback("test", function))

    def add_callback_since_1_9(callbacks: list, fun: Callable, *, name=None, category="", filename=None) -> None:
        callbacks.append(ScriptCallback(filename, fun))

    def clear_callbacks() -> None:
        for callbacks in listed.values():
            callbacks.clear()

    def call(callbacks: list[ScriptCallback], params: Any) -> None:
        for one in callbacks:
            with suppress(Exception):  # the real ones print it
                one.callback(params)

    module.callback_map, module.ScriptCallback, module.clear_callbacks = listed, ScriptCallback, clear_callbacks
    module.add_callback = add_callback_since_1_9 if since_1_9 else add_callback
    for event in EVENTS:
        callbacks = listed[f"callbacks_{event}"]
        setattr(module, f"on_{event}", partial(add_callback, callbacks))
        setattr(module, f"{event}_callback", partial(call, callbacks))
