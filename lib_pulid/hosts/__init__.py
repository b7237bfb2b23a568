"""The programs that PuLID runs inside, one file each. What the WebUIs' files have in common:

    NAME, FAMILIES              the host's name, for messages, and which models it can load
    loaded_model(p)             the denoiser that is loaded now, or UnsupportedModelError
    less_memory()               what helps there against a lack of video memory, for messages
    start(p, plan) -> Run       from now on every denoiser call of `p` injects what the plan says
    before_sampling(p)          a pass is about to be sampled
    stop()                      takes everything out again; may be called at any time
    tells_errors(p)             whether the user is told what is raised while `p` is made

`p` is the host's StableDiffusionProcessing. A batch of `p` lies between `start` and `stop`. Other generations may run
between its batches (a detailer that repaints faces), and even while it is sampled; each has a start and a stop of its
own, and `stop` leaves alone what is being sampled around it.

Exceptions of a Plan come out of the denoiser call, since that is the one place from where the hosts let them end the
generation: in script hooks and callbacks they are printed and forgotten, and the picture is made without the face.
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
        device, dtype: of its computation (its weights may be stored elsewhere and smaller).
        name: the checkpoint's, for messages.
        guided: whether negative rows may come.
    """

    family: str
    denoiser: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    name: str
    guided: bool = True


class Plan(Protocol):
    """What a generation injects."""

    def injections(self, model: LoadedModel, *, hires: bool) -> Sequence[Injection]:
        """Compiled for the model's family, device and dtype; kept by the plan.

        It is asked once for each model and pass, also in the middle of a generation (refiner, hires checkpoint).

        Raises:
            PulidError: no picture is to be made, with the reason.
        """
        ...

    def check_steps(self, model: LoadedModel, steps: int, *, hires: bool) -> None:
        """Raises: SettingError: in a pass of so many steps a face would never act, though it was asked for."""
        ...

    def cfg_start_step(self, model: LoadedModel, *, hires: bool) -> int:
        """The steps of the pass before this one run without the negative prompt."""
        ...


class Run(Protocol):
    """What `start` has put in. is_sampling: set by the caller; as long as it is, `stop` passes it over."""

    is_sampling: bool

    def check(self) -> None:
        """After sampling. Raises: whatever went wrong where the host does not let it out, so that a step may have been
        made without the face."""
        ...


def current() -> ModuleType:
    """`hosts.forge` or `hosts.a1111`, whichever this program is. Told by what the host brings, nothing is imported.

    Raises:
        UnsupportedModelError: it is neither.
    """
    if _has("modules_forge"):
        return importlib.import_module("lib_pulid.hosts.forge")
    if _has("modules") and _has("modules.sd_hijack"):
        return importlib.import_module("lib_pulid.hosts.a1111")
    raise UnsupportedModelError("PuLID runs in AUTOMATIC1111's Stable Diffusion WebUI and in Forge; this is neither.")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
