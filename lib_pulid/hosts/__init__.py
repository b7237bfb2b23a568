"""Connects PuLID to the programs it runs inside, one file each. The WebUIs' files share this interface:

    NAME, FAMILIES              the host's name, for messages, and the model families it can load
    loaded_model(p)             returns the loaded denoiser, or raises UnsupportedModelError
    less_memory()               says how to save video memory there, for messages
    start(p, plan) -> Run       makes every denoiser call of `p` inject what the plan says
    before_sampling(p, plan)    is called before a pass is sampled, in case another script bypassed `start`
    stop()                      removes everything; may be called at any time
    tells_errors(p)             whether the user sees what is raised while `p` is processed

`p` is the host's StableDiffusionProcessing. A batch is sampled between `start` and `stop`. Other generations may run
between its batches (a detailer that repaints faces), and even while it is sampled; each has its own start and stop, and
`stop` does not touch an outer generation that is being sampled.

Exceptions of a Plan are raised from the denoiser call, the one place where the hosts let them end the generation: in
script hooks and callbacks they are printed and forgotten, and the image is made without the face.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.injection import Injection


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A denoiser inside a host.

    Args:
        family: "sdxl" or "flux".
        denoiser: the UNet or transformer.
        device, dtype: of its computation (its weights may be stored elsewhere, in fewer bits).
        name: the checkpoint's, for messages.
        guided: whether there may be negative rows.
    """

    family: str
    denoiser: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    name: str
    guided: bool = True


class Plan(Protocol):
    """Tells what a generation injects."""

    def injections(self, model: LoadedModel, *, hires: bool) -> Sequence[Injection]:
        """Returns the injections, compiled for the model's family, device and dtype, and keeps them.

        Called once per model and pass, even in the middle of a generation (refiner, hires checkpoint).

        Raises:
            PulidError: why no image may be generated.
        """
        ...

    def check_steps(self, model: LoadedModel, steps: int, *, hires: bool) -> None:
        """Raises: SettingError: in a pass of so many steps, a requested face would never be used."""
        ...

    def cfg_start_step(self, model: LoadedModel, *, hires: bool) -> int:
        """Returns the first step of the pass that uses the negative prompt."""
        ...


class Run(Protocol):
    """What `start` installed. is_sampling: set by the caller; while it is True, `stop` skips this run."""

    is_sampling: bool

    def check(self) -> None:
        """Called after sampling. Raises what the host swallowed, since a step may have run without the face."""
        ...


def current() -> ModuleType:
    """Returns `hosts.forge` or `hosts.a1111`, by the modules that the program has; imports none of them.

    Raises:
        UnsupportedModelError: it is neither.
    """
    if _has("modules_forge"):
        return importlib.import_module("lib_pulid.hosts.forge")
    if _has("modules") and _has("modules.sd_hijack"):
        return importlib.import_module("lib_pulid.hosts.a1111")
    raise UnsupportedModelError("PuLID runs in AUTOMATIC1111's Stable Diffusion WebUI and in Forge. This is neither.")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
