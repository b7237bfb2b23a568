"""Runs PuLID in Forge, with SDXL and FLUX.

Before each sampling, `forge_objects.unet` is cloned and gets a function wrapper, Forge's own way: Forge returns to the
unpatched object by itself. The wrapper hooks the denoiser for one call.

Rows are read from the denoiser's call, `transformer_options["cond_or_uncond"]`, not from the wrapper's: another wrapper
in between (MultiDiffusion) may cut the image into tiles and call with other batch sizes.

`clone` deep-copies a patcher's options. It keeps a function, but copies an object or bound method with all it holds;
hence the closures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid.errors import SettingError
from lib_pulid.hosts import LoadedModel, Plan, Run
from lib_pulid.hosts.webui import Injector, Progress, add_callback, family_of
from lib_pulid.injection import DenoiseStep

NAME = "Forge"
FAMILIES = ("sdxl", "flux")
_SLOT = "model_function_wrapper"
_MODIFIERS = "conditioning_modifiers"
_COND = 0


def loaded_model(p: Any) -> LoadedModel:
    """Returns the model that `p` samples with.

    Raises:
        UnsupportedModelError: it is neither SDXL nor FLUX.1.
    """
    name = getattr(getattr(p.sd_model, "sd_checkpoint_info", None), "name_for_extra", "")
    unet = _patcher(p)
    denoiser: Any = None if unet is None else unet.model.diffusion_model
    family = family_of(denoiser, name, wanted="an SDXL or FLUX.1 checkpoint")
    return LoadedModel(family, denoiser, unet.load_device, _computation_dtype(unet), name, _is_guided(p))


def less_memory() -> str:
    """Names Forge's own slider; its successors have none."""
    from modules.shared import opts

    if "forge_inference_memory" in opts.data_labels:
        return "a lower “GPU Weights” at the top of the page"
    return "a checkpoint stored in 8 bits (fp8, GGUF)"


def start(p: Any, plan: Plan) -> Run:
    """Injects into every denoiser call of `p` until `stop`. Called right before a batch is sampled."""
    stop()
    run = _Run(p, plan)
    _running.append(run)  # first, so that `stop` finds it whatever happens
    run.begin()
    return run


def before_sampling(p: Any, plan: Plan | None = None) -> None:
    """Patches the unet of the coming pass; calls `start` first, unless `p` was started or there is no plan."""
    if plan is not None and not any(run.is_of(p) for run in _running):
        start(p, plan)
    for run in _running:
        run.patch(p)


def stop() -> None:
    """Removes callback and patches, except those of an outer generation that is being sampled."""
    while _running and not _running[-1].is_sampling:
        _running.pop().end()


def tells_errors(p: Any) -> bool:
    """Whether errors reach the page. reForge and Forge Classic only print those of the generating thread, and the page
    shows a TypeError for the missing result."""
    main_thread = importlib.import_module("modules_forge.main_thread")
    return bool(getattr(p, "is_api", False)) or hasattr(main_thread, "last_exception")


# The hosts generate one image at a time, with one process-wide model. These are our runs in it, inner generations last.
_running: list[_Run] = []


def _patcher(p: Any) -> Any:
    # Before the first image, Forge has a placeholder here.
    return getattr(getattr(p.sd_model, "forge_objects", None), "unet", None)


def _is_guided(p: Any) -> bool:
    """Whether there may be negative rows. At CFG 1, Forge does not even encode the negative prompt; its forks do, and
    then it is there when a pass starts."""
    cond, scale = ("hr_uc", "hr_cfg") if getattr(p, "is_hr_pass", False) else ("uc", "cfg_scale")
    return getattr(p, cond, None) is not None or getattr(p, scale, None) != 1


def _computation_dtype(unet: Any) -> torch.dtype:
    """Returns the dtype of the computation; the weights may be stored in 8 or 4 bits."""
    model = unet.model
    return getattr(model, "computation_dtype", None) or getattr(model, "manual_cast_dtype", None) or model.get_dtype()


class _Run:
    """The callback, patches and hooks in the host between `start` and `stop`."""

    def __init__(self, p: Any, plan: Plan) -> None:
        self._p = p
        self._injector = Injector(plan)
        self._progress = Progress()
        self._installed = ExitStack()
        self._call = ExitStack()  # of the current denoiser call
        self._step: DenoiseStep | None = None
        self._is_hooked = False
        self._whole = (0, 0)  # height and width of the latent, while hooked
        self._negative: Tensor | None = None  # text of this step's negative rows, if it differs from the prompt's
        self._error: Exception | None = None
        self._unpatched: Exception | None = None  # why a pass could not be patched
        self.is_sampling = False

    def is_of(self, p: Any) -> bool:
        return self._p is p

    def begin(self) -> None:
        # A refiner loads another model in the middle of a pass, and a later extension may take the one slot.
        self._installed.callback(add_callback("cfg_denoiser", self.look_again))

    def end(self) -> None:
        for stack in (self._call, self._installed):
            stack.close()
        self._injector.end()
        self._unpatch()
        self._p = self._error = self._negative = None

    def check(self) -> None:
        """See `hosts.Run`."""
        if self._unpatched is not None:
            raise self._unpatched
        self._injector.check_end()

    # ------------------------------------------------------------ patching

    def patch(self, p: Any) -> None:
        """Adds the wrapper to the unet, unless it is there. Keeps exceptions for the wrapper to raise: here they would
        be printed and forgotten."""
        unet = _patcher(p)
        if p is not self._p or unet is None or self._is_patched(unet):
            return
        denoiser = unet.model.diffusion_model
        try:
            if self._injector.leaves_the_rest_to(denoiser):
                return
            self._error = None
        except SettingError as error:
            self._error = error
        patched = unet.clone()
        patched.set_model_unet_function_wrapper(_wrapper(self, denoiser, unet.model_options.get(_SLOT)))
        p.sd_model.forge_objects.unet = patched
        if self._error is None:
            self._prepare(p, patched)

    def _prepare(self, p: Any, patched: Any) -> None:
        try:
            self._injector.prepare(loaded_model(p), p)
            # The compiled tensors are on the device already; a layer needs about as much again while it computes.
            patched.add_extra_preserved_memory_during_sampling(self._injector.nbytes)
            if self._injector.cfg_start_step:
                patched.add_conditioning_modifier(_guidance(self))
        except Exception as error:
            self._error = error

    def _is_patched(self, unet: Any) -> bool:
        return getattr(unet.model_options.get(_SLOT), "run", None) is self

    def _unpatch(self) -> None:
        """Removes the wrapper early: Forge drops the patched unet only before the next sampling."""
        unet = None if self._p is None else _patcher(self._p)
        if unet is not None and self._is_patched(unet):
            previous = unet.model_options.pop(_SLOT).previous
            if previous is not None:
                unet.set_model_unet_function_wrapper(previous)
            others = unet.model_options.get(_MODIFIERS, [])
            others[:] = [modifier for modifier in others if getattr(modifier, "run", None) is not self]

    def look_again(self, params: Any) -> None:
        """Patches again before each step, after a refiner may have changed the unet."""
        if self._p is None or params.denoiser.p is not self._p:
            return
        prompt, negative = (_text(getattr(params, name, None)) for name in ("text_cond", "text_uncond"))
        self._negative = None if _is_same(negative, prompt) else negative
        try:
            self.patch(self._p)
        except Exception as error:  # here it would be printed and forgotten
            self._unpatched = error
            return
        try:
            self._injector.check_steps(params.denoiser.steps)
        except Exception as error:
            self._error = error

    def is_before_guidance(self, sigmas: Tensor) -> bool:
        """Whether this step runs without the negative prompt. sigmas: [B]."""
        return self._p is not None and self._place(sigmas, True).index < self._injector.cfg_start_step

    # ------------------------------------------------------------ one call

    @contextmanager
    def hooked(self, denoiser: nn.Module, hw: tuple[int, int]) -> Iterator[None]:
        """Injects into the denoiser's calls inside the `with`. hw: of the whole latent."""
        if self._p is None or self._is_hooked:  # ended, or called inside our own wrapper
            yield
            return
        if self._error is not None:
            raise self._error
        with ExitStack() as hooks:
            self._is_hooked, self._whole = True, hw
            hooks.callback(self._leave_all)
            hooks.callback(denoiser.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
            hooks.callback(denoiser.register_forward_hook(self.leave, always_call=True).remove)
            yield

    def _leave_all(self) -> None:
        self._is_hooked = False
        self._call.close()

    def enter(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["x"]  # [B, C, h, w]
        options = kwargs["transformer_options"]
        rows = _rows(options, len(x))
        if all(rows) and _is_same(self._negative, kwargs.get("context")):
            rows = [False] * len(x)  # SAG: an extra call with the negative prompt in place of the prompt
        images = [i % len(options["sigmas"]) for i in range(len(x))]
        self._step = replace(self._place(options["sigmas"], rows, (x.shape[-2], x.shape[-1])), images=images)
        self._call.enter_context(self._injector.around(self._step, self._whole))

    def _place(self, sigmas: Tensor, rows: bool | list[bool], hw: tuple[int, int] | None = None) -> DenoiseStep:
        denoiser = self._p.sampler.model_wrap_cfg
        return DenoiseStep(self._progress(denoiser, sigmas), rows, hw, denoiser.steps)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._call.close()
        step, self._step = self._step, None
        if step is not None and output is not None:  # None: the call raised
            self._injector.check_call(step)


def _wrapper(run: _Run, denoiser: nn.Module, previous: Callable | None) -> Callable:
    def wrapper(apply_model: Callable, args: dict) -> Tensor:
        with run.hooked(denoiser, tuple(args["input"].shape[-2:])):
            if previous is not None:
                return previous(apply_model, args)
            return apply_model(args["input"], args["timestep"], **args["c"])

    wrapper.run, wrapper.previous = run, previous  # type: ignore[attr-defined]
    return wrapper


def _guidance(run: _Run) -> Callable:
    """Returns a conditioning modifier, which Forge calls before each step; with CFG 1 it skips negative rows."""

    def modify(model, x, timestep, uncond, cond, cond_scale, model_options, seed):  # type: ignore[no-untyped-def]
        scale = 1.0 if run.is_before_guidance(timestep) else cond_scale
        return model, x, timestep, uncond, cond, scale, model_options, seed

    modify.run = run  # type: ignore[attr-defined]
    return modify


def _rows(options: Mapping[str, Any], batch: int) -> list[bool]:
    """Whether each row is cond. Tiles repeat the whole stack of chunks."""
    chunks, pictures = options["cond_or_uncond"], len(options["sigmas"])
    return [chunks[i // pictures % len(chunks)] == _COND for i in range(batch)]


def _text(cond: Any) -> Tensor | None:
    """Returns the part of a CFGDenoiserParams' text that the cross-attention reads, [B, L, C]."""
    return cond.get("crossattn") if isinstance(cond, Mapping) else cond


def _is_same(text: Tensor | None, other: Tensor | None) -> bool:
    if text is None or other is None or text.shape != other.shape:
        return False
    return torch.equal(text.to(other), other)
