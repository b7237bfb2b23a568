"""Runs PuLID in AUTOMATIC1111's WebUI, 1.8 to 1.10.

    CFGDenoiser.forward           once per denoiser call of a sampler
      callback cfg_denoiser       -> _Run.open: which UNet, which step, which rows
      UNet, once or several times -> _Run.enter, _Run.leave: `inject` around each
      callback cfg_denoised       -> _Run.close

Rows: the sampler stacks [cond..., uncond...] and passes them to the UNet in one call or several, depending on options
and prompt lengths. The calls come in order, so counting rows tells which are cond. Halving the batch does not: AND
makes several cond rows per image, and some steps skip uncond.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.hosts import Host, LoadedModel, a1111_control
from lib_pulid.hosts.base import Run, WebUI
from lib_pulid.hosts.families import sites_of
from lib_pulid.injection import DenoiseStep


def _unet(p: Any) -> Any:
    return getattr(getattr(p.sd_model, "model", None), "diffusion_model", None)


@dataclass
class _Window:
    """One call of the CFGDenoiser. rows: UNet rows seen so far."""

    params: Any
    rows: int = 0

    def take(self, rows: int, images: int) -> tuple[list[bool], list[int] | None]:
        """Returns, of each of the next rows, whether it is cond, and the image that it is of. images: of the batch.

        Tiling extensions go through the stack repeatedly. No images: AND in a prompt makes more cond rows than images,
        and the host does not say which are whose.
        """
        conds, stack = self.params.text_cond.shape[0], self.params.x.shape[0]
        places = [i % stack for i in range(self.rows, self.rows + rows)]
        self.rows += rows
        is_known = conds == images and stack in (images, 2 * images)
        return [place < conds for place in places], [place % images for place in places] if is_known else None


class _Run(Run):
    """Hooks the UNet from the first step, or from the beginning of the sampling, to the end."""

    _model: LoadedModel | None = None
    _window: _Window | None = None  # what the next UNet calls belong to
    _seen = False  # whether a sampler has called the UNet

    def begin(self) -> None:
        self._follow(_unet(self.p))

    def end(self) -> None:
        super().end()
        self._model = self._window = None

    def check(self) -> None:
        super().check()
        self._nets.check_end()

    def _follow(self, unet: nn.Module | None) -> None:
        """Moves the hooks to this UNet: a refiner or hires checkpoint may have loaded another one."""
        if unet is not self._hooked and unet is not None:
            self.unhook()
            self.hook(unet)

    def before_step(self, params: Any) -> None:
        self._seen = True
        super().before_step(params)

    def open(self, params: Any) -> None:
        """Exceptions here would be printed and forgotten: `read` raises them."""
        unet = _unet(self.p)
        self._window = _Window(params)
        self._follow(unet)  # the refiner's, too, so that its call raises an error
        if self._injector.leaves_alone(unet, self.p):
            self._window = None
            self._nets.end()  # their memory is the refiner's
            return
        if self._model is None or self._model.denoiser is not unet:  # `loaded_model` walks all layers
            self._model = self._host.loaded_model(self.p)
        self._injector.prepare(self._model, self.p)
        self._nets.prepare(unet, self._model.dtype, self._injector.controlled)
        self._injector.check_steps(params.denoiser.steps)

    def close(self) -> None:
        self._window = None

    def read(self, x: Tensor, kwargs: Mapping[str, Any]) -> tuple[DenoiseStep, tuple[int, int]] | None:
        if self._window is None:  # not a sampler's call
            if not self._seen:
                raise UnsupportedModelError(
                    "The model was called outside of a sampler (as the script “img2img alternative test” does), where "
                    "PuLID cannot tell the prompt's rows from the negative prompt's. Disable that script or PuLID."
                )
            return None
        if self._error is not None:
            raise self._error
        params = self._window.params
        progress = self._progress(params.denoiser, params.sigma)
        rows, images = self._window.take(len(x), len(getattr(self.p, "prompts", None) or ()))
        step = DenoiseStep(progress, rows, (x.shape[-2], x.shape[-1]), params.denoiser.steps, images)
        return step, (params.x.shape[-2], params.x.shape[-1])


class A1111(WebUI):
    families = ("sdxl",)
    run_class, nets = _Run, a1111_control

    def loaded_model(self, p: Any) -> LoadedModel:
        from modules import devices

        name = getattr(getattr(p.sd_model, "sd_checkpoint_info", None), "name_for_extra", "")
        unet = _unet(p)
        return LoadedModel(sites_of(unet, name), unet, devices.device, devices.dtype_unet, name)

    def why_no_control_nets(self) -> str:
        return a1111_control.why_none()

    def less_memory(self) -> str:
        return "starting the WebUI with --medvram-sdxl or --medvram"

    def tells_errors(self, p: Any) -> bool:
        return True


HOST: Host = A1111()
