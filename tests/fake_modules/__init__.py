"""Small stand-ins for what A1111 and Forge bring: `modules.*`, their models and the core of their samplers.

    with installed("a1111"):      # or "forge"
        from modules import script_callbacks

They do what the real ones do where an extension can tell the difference: callbacks' exceptions are swallowed, UNet rows
come in one piece or in several, Forge deep-copies a patcher's options.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from tests.fake_modules import callbacks
from tests.fake_modules.forge import ControlNetPatcher

COMMON = "modules modules.devices modules.script_callbacks"
HOSTS = {
    "a1111": f"{COMMON} modules.sd_hijack",
    "forge": f"{COMMON} modules_forge modules_forge.main_thread modules_forge.supported_controlnet backend",
}


@contextmanager
def installed(host: str, since_1_9: bool = True) -> Iterator[ModuleType]:
    """Makes `modules` importable, as if inside that host, and registers our callbacks there. Yields it.

    Args:
        since_1_9: callbacks as from A1111 1.9 on.
    """
    from lib_pulid import hosts
    from lib_pulid.hosts.base import add_callback

    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in _ROOTS}
    for name in before:
        del sys.modules[name]
    try:
        made = {name: _module(name) for name in HOSTS[host].split()}
        for name, module in made.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(made[parent], child, module)
        callbacks.fill(made["modules.script_callbacks"], since_1_9)
        sys.modules.update(made)
        vars(made["modules.devices"]).update(device=torch.device("cpu"), dtype_unet=torch.float32)
        if host == "forge":
            made["modules_forge.main_thread"].last_exception = None
            made["modules_forge.supported_controlnet"].ControlNetPatcher = ControlNetPatcher
        for event, callback in hosts.current().callbacks().items():
            add_callback(event, callback)
        yield made["modules"]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in _ROOTS]:
            del sys.modules[name]
        sys.modules.update(before)


_ROOTS = ("modules", "modules_forge", "backend")


def _module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    return module
