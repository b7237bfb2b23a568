"""PuLID in the `diffusers` library.

    with apply(pipeline, [injection]):
        image = pipeline("portrait of a sailor").images[0]

Works with any pipeline around an SDXL UNet or a FLUX transformer, text to image, image to image, inpainting.
Nothing of the pipeline is replaced: the denoiser gets two hooks, which put `inject` around each of its calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lib_pulid.injection import DenoiseStep, Injection, inject
from lib_pulid.sites import Sites, find_sites


def denoiser_of(pipeline: Any) -> nn.Module:
    """The UNet or the transformer of a pipeline."""
    return pipeline.unet if getattr(pipeline, "unet", None) is not None else pipeline.transformer


@contextmanager
def apply(pipeline: Any, injections: Sequence[Injection], sites: Sites | None = None) -> Iterator[None]:
    """Injects into every call of the pipeline's denoiser inside the `with`. sites: the denoiser's, if found before.

    Raises:
        UnsupportedModelError: the denoiser is neither SDXL's nor FLUX.1's, or does not fit the injections.
    """
    denoiser = denoiser_of(pipeline)
    sites = sites or find_sites(denoiser)
    read_step = (_UNetCalls if sites.family == "sdxl" else _TransformerCalls)(pipeline)
    call = ExitStack()

    def enter(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        call.enter_context(inject(sites, injections, read_step(args, kwargs)))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        call.close()

    with ExitStack() as stack:
        stack.callback(call.close)
        stack.callback(denoiser.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(denoiser.register_forward_hook(leave, always_call=True).remove)
        yield


class _Calls:
    """Reads the place in the sampling off the arguments of a denoiser call."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._schedule: Tensor | None = None  # of the run under way; each run of a pipeline sets a new one
        self._first = 0

    def progress(self, timestep: float) -> float:
        """Share of the steps that are done.

        Some pipelines run only the last of the scheduler's timesteps (image to image) or only the first
        (`denoising_end`), so it is counted from the step that a run begins with.
        """
        schedule = self._pipeline.scheduler.timesteps
        index = int((schedule.float() - timestep).abs().argmin())
        if schedule is not self._schedule:
            self._schedule, self._first = schedule, index
        return min(max(0.0, (index - self._first) / self.steps), 1.0)

    @property
    def steps(self) -> int:
        return getattr(self._pipeline, "_num_timesteps", None) or len(self._pipeline.scheduler.timesteps)


class _UNetCalls(_Calls):
    """UNet2DConditionModel(sample, timestep, encoder_hidden_states, ...): rows are [uncond..., cond...] under CFG."""

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> DenoiseStep:
        sample: Tensor = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        batch = len(sample)
        guided = self._pipeline.do_classifier_free_guidance
        is_cond = [i >= batch // 2 for i in range(batch)] if guided else [True] * batch
        return DenoiseStep(self.progress(_first(timestep)), is_cond, (sample.shape[-2], sample.shape[-1]), self.steps)


class _TransformerCalls(_Calls):
    """FluxTransformer2DModel(hidden_states=, timestep= / 1000, img_ids=, ...): true CFG is a second call a step."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self._last: tuple[Tensor, Any] | None = None

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> DenoiseStep:
        # The pipeline asks with the prompt first and then, in the same step of the same run, with the negative one.
        # In half precision neighbouring timesteps may be equal, so the scheduler's own count tells the steps apart.
        scheduler = self._pipeline.scheduler
        last, self._last = self._last, (scheduler.timesteps, getattr(scheduler, "step_index", None))
        is_cond = last is None or last[0] is not self._last[0] or last[1] != self._last[1]
        ids = kwargs["img_ids"].flatten(0, -2)
        own = ids[ids[:, 0] == 0]  # Kontext's reference tokens have 1 there
        rows, columns = (int(own[:, axis].max()) + 1 for axis in (1, 2))
        progress = self.progress(1000 * _first(kwargs["timestep"]))
        return DenoiseStep(progress, is_cond, (2 * rows, 2 * columns), self.steps)


def _first(timestep: Any) -> float:
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
