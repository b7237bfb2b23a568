"""Runs PuLID in the `diffusers` library.

    with apply(pipeline, [injection]):
        image = pipeline("portrait of a sailor").images[0]

Works with any pipeline around an SDXL UNet or a FLUX transformer: text to image, image to image, inpainting. No part of
the pipeline is replaced: two hooks on the denoiser put `inject` around each of its calls.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid.control import LATENT_CHANNELS
from lib_pulid.errors import UnsupportedModelError
from lib_pulid.injection import DenoiseStep, Injection, inject
from lib_pulid.sites import Sites, find_sites
from lib_pulid.watch import Watch, WatchedSites, uncompiled


def denoiser_of(pipeline: Any) -> nn.Module:
    """Returns a pipeline's UNet or transformer."""
    return pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer


@contextmanager
def apply(pipeline: Any, injections: Sequence[Injection], sites: Sites | None = None) -> Iterator[None]:
    """Injects into every call of the pipeline's denoiser inside the `with`.

    A compiled denoiser (torch.compile) runs uncompiled there, since compiled code ignores the hooks. Several persons
    belong into one list: of nested `with`s, the inner one reads what the outer one added. Other pipelines may share the
    denoiser: they get the face in this thread, and not in others.

    Args:
        sites: the denoiser's, if known; those of a Watch record which of them were reached.

    Raises:
        UnsupportedModelError: the denoiser is neither SDXL's nor FLUX.1's, or does not fit the injections; or, from the
            pipeline or at the end, the face could not be added.
    """
    denoiser = denoiser_of(pipeline)
    sites = sites or find_sites(denoiser)
    sites = sites if isinstance(sites, WatchedSites) else Watch().over(sites)
    watch = sites.watch
    read_step = (UNetCalls if sites.family == "sdxl" else _TransformerCalls)(pipeline)
    call, acts, thread = ExitStack(), False, 0

    def enter(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        nonlocal acts, thread
        if not read_step.follows(module):
            return
        call.close()  # in case the last call ended with a BaseException
        thread = get_ident()
        step = read_step(args, kwargs)
        if read_step.is_first:
            watch.check_end()
            watch.begin()
        acts = any(injection.is_active(step) for injection in injections)
        call.enter_context(inject(sites, injections, step))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal thread
        if thread != get_ident():
            return
        call.close()
        thread = 0
        if output is not None:  # None: the call raised
            watch.check_call(acts)

    has_face = any(injection.weight for injection in injections)
    with ExitStack() as stack:
        if has_face:
            stack.enter_context(uncompiled())
            stack.callback(_forget_steps, denoiser)
        stack.callback(call.close)
        stack.callback(denoiser.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_hook(leave, always_call=True).remove)
        yield
    watch.check_end()
    now = denoiser_of(pipeline)
    if has_face and getattr(now, "_orig_mod", now) is not getattr(denoiser, "_orig_mod", denoiser):
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} got another {type(now).__name__} inside of `apply`, which has no face. "
            "Replace the model before `apply`."
        )


def _forget_steps(denoiser: Any) -> None:
    """Resets diffusers' step caches (PyramidAttentionBroadcast and others): what a run that broke off left
    there has the face in it, and the next run would reuse it."""
    reset = getattr(denoiser, "_reset_stateful_cache", None)
    if reset is not None:
        reset()


class _Calls:
    """Reads the step from a denoiser call's arguments. is_first: whether it is the first call of a pipeline run."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline  # that calls
        self._given, self._thread = pipeline, get_ident()
        self._schedule: Tensor | None = None  # of the current run; each run of a pipeline sets a new one
        self._first = 0
        self.is_first = False

    def follows(self, denoiser: nn.Module) -> bool:
        """Finds the pipeline whose call this is. Returns whether the call is ours, and not another thread's.

        Pipelines share a denoiser (`from_pipe`), and only the one that calls knows its schedule and its guidance.
        """
        callers = _callers(denoiser)
        self._pipeline = self._given if self._given in callers or not callers else callers[0]
        return self._pipeline is self._given or get_ident() == self._thread

    def progress(self, timestep: float) -> float:
        """Returns the fraction of the steps that are done.

        Some pipelines run only the last of the scheduler's timesteps (image to image) or only the first
        (`denoising_end`), so it counts from the first step of the run.
        """
        schedule = self._pipeline.scheduler.timesteps
        index = int((schedule.float() - timestep).abs().argmin())
        self.is_first = schedule is not self._schedule
        if self.is_first:
            self._schedule, self._first = schedule, index
        return min(max(0.0, (index - self._first) / self.steps), 1.0)

    @property
    def steps(self) -> int:
        return getattr(self._pipeline, "_num_timesteps", None) or len(self._pipeline.scheduler.timesteps)


class UNetCalls(_Calls):
    """Reads UNet2DConditionModel(sample, timestep, encoder_hidden_states, ...): every image once per guidance part."""

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> DenoiseStep:
        sample: Tensor = args[0] if args else kwargs["sample"]  # [B, C, h, w]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        progress = self.progress(_first(timestep))
        groups = self._groups(sample)
        images, rest = divmod(len(sample), len(groups))
        if rest or (self.is_first and not _is_repeated(sample[:, :LATENT_CHANNELS], images)):
            raise _unknown_rows(self._pipeline, f"{len(sample)} rows are not {len(groups)} equal parts")
        is_cond = [cond for cond in groups for _ in range(images)]
        which = [*range(images)] * len(groups)
        return DenoiseStep(progress, is_cond, (sample.shape[-2], sample.shape[-1]), self.steps, which)

    def _groups(self, sample: Tensor) -> list[bool]:
        """Returns, for each part of the rows (one row per image in each), whether it uses the prompt."""
        pipeline = self._pipeline
        if any("InstructPix2Pix" in kind.__name__ for kind in type(pipeline).__mro__):
            # [prompt and image, image only, neither]; in the last, the image's channels are zero.
            third, rest = divmod(len(sample), 3)
            is_guided = not rest and not sample[2 * third :, LATENT_CHANNELS:].any()
            return [True, False, False] if is_guided else [True]
        guided = getattr(pipeline, "do_classifier_free_guidance", None)
        if guided is None or getattr(pipeline, "enabled_editing_prompts", False):
            raise _unknown_rows(pipeline, "its kind of guidance is not known, or another pipeline was called")
        perturbed = getattr(pipeline, "do_perturbed_attention_guidance", False)  # PAG: the prompt's rows again
        return ([False, True] if guided else [True]) + ([True] if perturbed else [])


def _is_repeated(latents: Tensor, images: int) -> bool:
    """Whether the rows are the first `images` rows repeated."""
    return torch.equal(latents, latents[:images].repeat(len(latents) // images, 1, 1, 1))


def _unknown_rows(pipeline: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"PuLID cannot tell which rows of {type(pipeline).__name__}'s UNet calls belong to the prompt: {why}. Pass the "
        "SDXL pipeline that you call to `apply`, or put `lib_pulid.injection.inject` around each UNet call."
    )


class _TransformerCalls(_Calls):
    """Reads FluxTransformer2DModel(hidden_states=, timestep= / 1000, img_ids=, ...): true CFG is a second call."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._last: tuple[Tensor, Any] | None = None

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> DenoiseStep:
        # The pipeline calls with the prompt first and then, in the same step of the same run, with the negative prompt.
        # In half precision adjacent timesteps may be equal, so the scheduler's own index distinguishes the steps.
        scheduler = self._pipeline.scheduler
        last, self._last = self._last, (scheduler.timesteps, getattr(scheduler, "step_index", None))
        is_cond = last is None or last[0] is not self._last[0] or last[1] != self._last[1]
        ids = kwargs["img_ids"].flatten(0, -2)
        own = ids[ids[:, 0] == 0]  # Kontext's reference tokens have 1 there
        rows, columns = (int(own[:, axis].max()) + 1 for axis in (1, 2))
        progress = self.progress(1000 * _first(kwargs["timestep"]))
        images = range(len(kwargs["hidden_states"]))
        return DenoiseStep(progress, is_cond, (2 * rows, 2 * columns), self.steps, images)


def _callers(denoiser: nn.Module) -> list[Any]:
    """Returns the pipelines around this denoiser whose methods are being executed in this thread, inner ones first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            one = frame.f_locals.get("self")
            is_pipeline = not isinstance(one, nn.Module) and hasattr(one, "scheduler")
            if is_pipeline and any(getattr(one, name, None) is denoiser for name in ("unet", "transformer")):
                found.append(one)
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _first(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
