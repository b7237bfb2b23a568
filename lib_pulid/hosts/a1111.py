"""Runs PuLID in AUTOMATIC1111's WebUI, 1.8 to 1.10.

    CFGDenoiser.forward           once per denoiser call of a sampler
      callback cfg_denoiser       -> _Run.open: which UNet, which step, which rows
      UNet, once or several times -> _Run.enter, _Run.leave: `inject` around each
      callback cfg_denoised       -> _Run.close

Rows: the sampler stacks [cond..., uncond...] and passes them to the UNet in one call or several, depending on options
and prompt lengths. The calls come in order, so counting rows tells which are cond. Halving the batch does not: AND
makes several cond rows per image, and some steps skip uncond.

After an exception the host calls no script: whoever started a run has to call `stop`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.hosts import LoadedModel, Plan, Run
from lib_pulid.hosts.webui import Injector, Progress, add_callback, family_of
from lib_pulid.injection import DenoiseStep

NAME = "AUTOMATIC1111"
FAMILIES = ("sdxl",)


def loaded_model(p: Any) -> LoadedModel:
    """Returns the model that `p` samples with.

    Raises:
        UnsupportedModelError: it is not SDXL.
    """
    from modules import devices

    name = getattr(getattr(p.sd_model, "sd_checkpoint_info", None), "name_for_extra", "")
    unet = _unet(p)
    return LoadedModel(family_of(unet, name), unet, devices.device, devices.dtype_unet, name)


def less_memory() -> str:
    return "starting the WebUI with --medvram-sdxl or --medvram"


def start(p: Any, plan: Plan) -> Run:
    """Injects into every UNet call of `p` until `stop`. Called right before a batch is sampled."""
    stop()
    run = _Run(p, plan)
    _running.append(run)  # first, so that `stop` finds it whatever happens
    run.begin()
    return run


def before_sampling(p: Any, plan: Plan | None = None) -> None:
    """Starts, unless `p` was started already. The UNet is checked in every call."""
    if plan is not None and not any(run.is_of(p) for run in _running):
        start(p, plan)


def stop() -> None:
    """Removes hooks and callbacks, except those of an outer generation that is being sampled."""
    while _running and not _running[-1].is_sampling:
        _running.pop().end()


def tells_errors(p: Any) -> bool:
    return True


# The hosts generate one image at a time, with one process-wide model. These are our runs in it, inner generations last.
_running: list[_Run] = []


def _unet(p: Any) -> Any:
    return getattr(getattr(p.sd_model, "model", None), "diffusion_model", None)


@dataclass
class _Window:
    """One call of the CFGDenoiser. rows: UNet rows seen so far."""

    params: Any
    progress: float
    rows: int = 0

    def take(self, batch: int) -> list[bool]:
        """Returns whether each of the next rows is cond. Tiling extensions go through the stack repeatedly."""
        first, self.rows = self.rows, self.rows + batch
        conds, stack = self.params.text_cond.shape[0], self.params.x.shape[0]
        return [i % stack < conds for i in range(first, first + batch)]

    def images(self, batch: int, count: int) -> list[int] | None:
        """Returns the image that each of the rows just taken is of. count: images in the batch.

        None: AND in a prompt makes more cond rows than images, and the host does not say which are whose.
        """
        conds, stack = self.params.text_cond.shape[0], self.params.x.shape[0]
        if conds != count or stack not in (count, 2 * count):
            return None
        return [i % stack % count for i in range(self.rows - batch, self.rows)]


class _Run:
    """The hooks and callbacks in the host between `start` and `stop`."""

    def __init__(self, p: Any, plan: Plan) -> None:
        self._p = p
        self._injector = Injector(plan)
        self._progress = Progress()
        self._installed = ExitStack()  # callbacks
        self._hooks = ExitStack()  # on the UNet
        self._hooked: nn.Module | None = None
        self._model: LoadedModel | None = None
        self._call = ExitStack()  # of the current UNet call
        self._step: DenoiseStep | None = None
        self._window: _Window | Exception | None = None  # what the next UNet calls belong to
        self._seen = False
        self._error: Exception | None = None
        self.is_sampling = False

    def is_of(self, p: Any) -> bool:
        return self._p is p

    def begin(self) -> None:
        for event, callback in (("cfg_denoiser", self.open), ("cfg_denoised", self.close)):
            self._installed.callback(add_callback(event, callback))
        self._hook(_unet(self._p))

    def end(self) -> None:
        for stack in (self._call, self._hooks, self._installed):
            stack.close()
        self._injector.end()
        self._hooked = self._model = self._window = self._p = self._error = None

    def _hook(self, unet: nn.Module | None) -> None:
        """Moves the hooks to this UNet: a refiner or hires checkpoint may have loaded another one."""
        if unet is self._hooked or unet is None:
            return
        self._call.close()
        self._hooks.close()
        self._hooks.callback(unet.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
        self._hooks.callback(unet.register_forward_hook(self.leave, always_call=True).remove)
        self._hooked = unet

    def check(self) -> None:
        """See `hosts.Run`."""
        if self._error is not None:
            raise self._error
        self._injector.check_end()

    # ------------------------------------------------------------ called by the host

    def open(self, params: Any) -> None:
        """Prepares for the UNet calls of this step. Exceptions here would be printed and forgotten: `enter` raises."""
        self._window, self._seen = None, True
        if self._p is None or params.denoiser.p is not self._p:
            return  # another generation
        try:
            self._window = self._opened(params)
        except Exception as error:
            self._window = self._error = error

    def _opened(self, params: Any) -> _Window | None:
        unet = _unet(self._p)
        self._hook(unet)  # the refiner's, too, so that its call raises an error
        if self._injector.leaves_the_rest_to(unet):
            return None
        if self._model is None or self._model.denoiser is not unet:  # `loaded_model` walks all layers
            self._model = loaded_model(self._p)
        self._injector.prepare(self._model, self._p)
        self._injector.check_steps(params.denoiser.steps)
        return _Window(params, self._progress(params.denoiser, params.sigma))

    def close(self, params: Any) -> None:
        self._window = None

    def enter(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._call.close()  # in case the last call ended with a BaseException
        if isinstance(self._window, Exception):
            raise self._window
        if self._window is None:
            self._check_seen()
            return  # not a sampler's call
        x: Tensor = args[0] if args else kwargs["x"]  # [B, C, h, w]
        params = self._window.params
        rows, steps = self._window.take(len(x)), params.denoiser.steps
        images = self._window.images(len(x), len(getattr(self._p, "prompts", None) or ()))
        self._step = DenoiseStep(self._window.progress, rows, (x.shape[-2], x.shape[-1]), steps, images)
        self._call.enter_context(self._injector.around(self._step, (params.x.shape[-2], params.x.shape[-1])))

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._call.close()
        step, self._step = self._step, None
        if step is not None and output is not None:  # None: the call raised
            self._injector.check_call(step)

    def _check_seen(self) -> None:
        if not self._seen:
            raise UnsupportedModelError(
                "The model was called outside of a sampler (as the script “img2img alternative test” does), where "
                "PuLID cannot tell the prompt's rows from the negative prompt's. Disable that script or PuLID."
            )
