"""Injects what a plan says into a WebUI's denoiser, pass by pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from lib_pulid.errors import SettingError
from lib_pulid.hosts import LoadedModel, Plan
from lib_pulid.hosts.families import is_refiner
from lib_pulid.hosts.frame import REMEDIES, THINGS, Frame, frame_of, part_of_mask
from lib_pulid.injection import DenoiseStep, Injection, inject
from lib_pulid.sites import Sites
from lib_pulid.watch import Watch, uncompiled


class Injector:
    """Injects a plan into the loaded denoiser's calls; asks the plan again when the denoiser or the pass changes."""

    def __init__(self, plan: Plan) -> None:
        self._plan: Plan | None = plan
        self._ready_for: tuple | None = None
        self._model: LoadedModel | None = None
        self._hires = self._checked = self._was_ready = self._has_acted = False
        self._watch = Watch()
        self._sites: Sites | None = None
        self._injections: Sequence[Injection] = ()
        self._uncompiled = ExitStack()

    @property
    def nbytes(self) -> int:
        """Bytes of the compiled injections."""
        return sum(injection.nbytes for injection in self._injections)

    @property
    def has_face(self) -> bool:
        """Whether any injection of the current pass has an effect."""
        return any(injection.has_effect for injection in self._injections)

    @property
    def controlled(self) -> Sequence[Injection]:
        """The injections of the current pass with a ControlNet."""
        return [injection for injection in self._injections if injection.control is not None]

    def leaves_alone(self, denoiser: nn.Module | None, p: Any) -> bool:
        """Whether the denoiser may run as it is: no face is to be added in the current pass of `p`; or this is SDXL's
        refiner, which may finish what the base model started with the face.

        Raises:
            SettingError: the refiner starts before the face was used.
        """
        if self._plan is not None and not self._plan.has_face(hires=bool(getattr(p, "is_hr_pass", False))):
            return True
        if not self._was_ready or not is_refiner(denoiser):
            return False
        if self._has_acted or self._watch.reached or not self.has_face:
            return True
        raise SettingError(
            "Field start: SDXL's refiner takes over before PuLID starts, and PuLID does not work in the refiner. "
            "Start PuLID earlier, or the refiner later."
        )

    def prepare(self, model: LoadedModel, p: Any) -> None:
        """Prepares for the current pass of `p`. Raises: PulidError."""
        hires = bool(getattr(p, "is_hr_pass", False))
        wanted = (model.denoiser, model.device, model.dtype, hires)
        if self._ready_for == wanted:
            return
        assert self._plan is not None, "the generation has ended"
        self._release()
        injections = self._plan.injections(model, hires=hires)
        if field := _placed(injections):
            frame = frame_of(p, hires, field)
            injections = [_in_frame(injection, frame) for injection in injections]
        self._watch.check_end()
        self._has_acted |= bool(self._watch.reached)
        self._watch.begin()
        self._injections = tuple(injections)
        if self.has_face:
            self._uncompiled.enter_context(uncompiled())
        self._sites = self._watch.over(model.sites)
        self._model, self._hires, self._ready_for, self._was_ready = model, hires, wanted, True

    def check_steps(self, steps: int | None) -> None:
        """Checks once per pass, when its number of steps is known. Raises: PulidError, see Plan."""
        if self._plan is not None and self._model is not None and steps and not self._checked:
            self._checked = True
            self._plan.check_steps(self._model, steps, hires=self._hires)

    @property
    def cfg_start_step(self) -> int:
        """See Plan; for the current pass."""
        assert self._plan is not None and self._model is not None, "prepare comes first"
        return self._plan.cfg_start_step(self._model, hires=self._hires)

    def end(self) -> None:
        """Releases the plan, the denoiser, and what was compiled for it."""
        self._plan = None
        self._release()

    def _release(self) -> None:
        self._uncompiled.close()
        self._ready_for = self._sites = self._model = None
        self._injections, self._checked = (), False

    def around(self, step: DenoiseStep, whole: tuple[int, int]) -> AbstractContextManager[None]:
        """Injects into one denoiser call inside the `with`. whole: height and width of the pass's latent.

        Raises:
            SettingError: the call gets a tile, and there are masks or ControlNets.
        """
        assert self._sites is not None, "prepare comes first"
        if step.latent_hw != whole and (field := _placed(self._injections)):
            raise SettingError(
                f"Field {field}: {THINGS[field]} do not work with tiled denoising (MultiDiffusion, Tiled Diffusion), "
                f"which does not say where a tile is. {REMEDIES[field]}, or disable tiling."
            )
        self._has_acted |= any(injection.is_controlled(step) for injection in self._injections)
        return inject(self._sites, self._injections, step)

    def check_call(self, step: DenoiseStep) -> None:
        """Checks a call that returned. Raises: UnsupportedModelError: the face was not added in it."""
        self._watch.check_call(any(injection.is_active(step) for injection in self._injections))

    def check_end(self) -> None:
        """Checks after sampling. Raises: UnsupportedModelError: the face should have been added, and never was."""
        self._watch.check_end()


def _placed(injections: Sequence[Injection]) -> str:
    """Returns the field that belongs to a place in the image, if there is one; "" if there is none."""
    if any(injection.mask is not None for injection in injections):
        return "mask"
    return "identity_net" if any(injection.control is not None for injection in injections) else ""


def _in_frame(injection: Injection, frame: Frame) -> Injection:
    """Cuts the part of the image that is denoised out of what belongs to the whole image."""
    mask, control = injection.mask, injection.control
    return replace(
        injection,
        mask=None if mask is None else part_of_mask(mask, frame),
        control=None if control is None else replace(control, part=frame),
    )
