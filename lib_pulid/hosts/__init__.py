"""Connects PuLID to the programs it runs inside, one file each; the WebUIs' files have a `Host`.

A batch is sampled inside `Host.sampling`. Other generations may run between the batches of one (a detailer that
repaints faces), and even while it is sampled; each has its own, and `stop` leaves an outer one alone.

Exceptions of a Plan are raised from the denoiser call, the one place where the hosts let them end the generation: in
script hooks and callbacks they are printed and forgotten, and the image is made without the face. After an exception
the hosts call no script.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.injection import Injection
from lib_pulid.sites import Sites


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A denoiser inside a host.

    Args:
        sites: of the denoiser.
        denoiser: the UNet or transformer.
        device, dtype: of its computation (its weights may be stored elsewhere, in fewer bits).
        name: the checkpoint's, for messages.
        guided: whether there may be negative rows.
    """

    sites: Sites
    denoiser: torch.nn.Module
    device: torch.device
    dtype: torch.dtype
    name: str
    guided: bool = True

    @property
    def family(self) -> str:
        """ "sdxl" or "flux"."""
        return self.sites.family


class Plan(Protocol):
    """Tells what a generation injects."""

    def has_face(self, *, hires: bool) -> bool:
        """Whether a face is to be added in this pass. If not, the pass may have any model."""

    def injections(self, model: LoadedModel, *, hires: bool) -> Sequence[Injection]:
        """Returns the injections, compiled for the model's family, device and dtype, and keeps them.

        Called once per model and pass, even in the middle of a generation (refiner, hires checkpoint).

        Raises:
            PulidError: why no image may be generated.
        """

    def check_steps(self, model: LoadedModel, steps: int, *, hires: bool) -> None:
        """Raises: SettingError: in a pass of so many steps, a requested face would never be used."""

    def cfg_start_step(self, model: LoadedModel, *, hires: bool) -> int:
        """Returns the first step of the pass that uses the negative prompt."""


class Host(Protocol):
    """A WebUI that PuLID runs inside. `p` is its StableDiffusionProcessing.

    Attributes:
        families: the model families it can load.
    """

    families: tuple[str, ...]

    def loaded_model(self, p: Any) -> LoadedModel:
        """Returns the model that `p` samples with. Raises: UnsupportedModelError: there is no PuLID for it."""

    def why_no_control_nets(self) -> str:
        """Says why a method's ControlNet cannot run there, and what to do; "" if it can."""

    def less_memory(self) -> str:
        """Says how to save video memory there, for messages."""

    def tells_errors(self, p: Any) -> bool:
        """Whether the user sees what is raised while `p` is processed."""

    def callbacks(self) -> Mapping[str, Callable[..., None]]:
        """Returns the script callbacks to register, once, by their events."""

    def sampling(self, p: Any, plan: Plan) -> AbstractContextManager[None]:
        """Makes every denoiser call of `p` inside the `with` inject what the plan says.

        Raises:
            Exception: at the end, what the host swallowed, since a step may have run without the face.
        """

    def before_sampling(self, p: Any, plan: Plan) -> None:
        """Is called before a pass is sampled; injects until `stop`, in case another script bypassed `sampling`."""

    def stop(self) -> None:
        """Removes everything, but for an outer generation that is being sampled. May be called at any time."""


def current() -> Host:
    """Returns the WebUI around us, by the modules that it has; imports none of them.

    Raises:
        UnsupportedModelError: it is neither A1111 nor Forge.
    """
    if _has("modules_forge"):
        return importlib.import_module("lib_pulid.hosts.forge").HOST
    if _has("modules") and _has("modules.sd_hijack"):
        return importlib.import_module("lib_pulid.hosts.a1111").HOST
    raise UnsupportedModelError("PuLID runs in AUTOMATIC1111's Stable Diffusion WebUI and in Forge. This is neither.")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
