"""PuLID in Forge, SDXL and FLUX.

Before each sampling `forge_objects.unet` is cloned and gets a function wrapper, as Forge wants it: Forge goes back to
the unpatched object by itself. The wrapper hooks the denoiser for the time of one call.

Rows are read off the denoiser's own call, `transformer_options["cond_or_uncond"]`, not off the wrapper's: another
wrapper between the two (MultiDiffusion) may cut the picture into tiles and call with other batch sizes.

`clone` deep-copies a patcher's options, which for functions means the function itself, but for an object or a bound
method a copy of all it holds. Hence the closures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid.errors import SettingError
from lib_pulid.hosts import LoadedModel, Plan, Run
from lib_pulid.hosts.webui import Injector, Progress, add_callback, family_of, is_refiner
from lib_pulid.injection import DenoiseStep

NAME = "Forge"
FAMILIES = ("sdxl", "flux")
_SLOT = "model_function_wrapper"
_MODIFIERS = "conditioning_modifiers"
_COND = 0


def loaded_model(p: Any) -> LoadedModel:
    """The model that `p` samples with now.

    Raises:
        UnsupportedModelError: it is neither SDXL nor FLUX.1.
    """
    name = getattr(getattr(p.sd_model, "sd_checkpoint_info", None), "name_for_extra", "")
    unet = _patcher(p)
    denoiser: Any = None if unet is None else unet.model.diffusion_model
    family = family_of(denoiser, name, wanted="an SDXL or FLUX.1 checkpoint")
    return LoadedModel(family, denoiser, unet.load_device, _computation_dtype(unet), name, _is_guided(p))


def less_memory() -> str:
    """Only Forge itself has a slider for it; its successors decide on their own."""
    from modules.shared import opts

    if "forge_inference_memory" in opts.data_labels:
        return "a lower “GPU Weights” at the top of the page"
    return "a checkpoint stored in 8 bits (fp8, GGUF)"


def start(p: Any, plan: Plan) -> Run:
    """Injects into every denoiser call of `p` until `stop`. To be called before each batch is sampled."""
    stop()
    run = _Run(p, plan)
    _running.append(run)  # first, so that `stop` finds it whatever happens
    run.begin()
    return run


def before_sampling(p: Any) -> None:
    """Patches the unet of the coming pass. Does nothing when `p` was not started."""
    for run in _running:
        run.patch(p)


def stop() -> None:
    """Removes the callback, makes the patches idle and lets go of all, save of what is being sampled around us."""
    while _running and not _running[-1].is_sampling:
        _running.pop().end()


def tells_errors(p: Any) -> bool:
    """The page's pictures are made in another thread, whose exceptions reForge and Forge Classic only print: the page
    then tells of a TypeError, since there is no result."""
    main_thread = importlib.import_module("modules_forge.main_thread")
    return bool(getattr(p, "is_api", False)) or hasattr(main_thread, "last_exception")


# The hosts make one picture at a time, in one process-wide model: this is what we put into it, inner generations last.
_running: list[_Run] = []


def _patcher(p: Any) -> Any:
    # Before its first picture, Forge has a stand-in for a model here.
    return getattr(getattr(p.sd_model, "forge_objects", None), "unet", None)


def _is_guided(p: Any) -> bool:
    """Whether negative rows may come. At CFG 1 Forge does not even read the negative prompt; others of its kind do,
    and then it is there when a pass begins."""
    cond, scale = ("hr_uc", "hr_cfg") if getattr(p, "is_hr_pass", False) else ("uc", "cfg_scale")
    return getattr(p, cond, None) is not None or getattr(p, scale, None) != 1


def _computation_dtype(unet: Any) -> torch.dtype:
    """Not that of the weights, which may be stored in 8 or 4 bits."""
    model = unet.model
    return getattr(model, "computation_dtype", None) or getattr(model, "manual_cast_dtype", None) or model.get_dtype()


class _Run:
    """What is put into the host between `start` and `stop`."""

    def __init__(self, p: Any, plan: Plan) -> None:
        self._p = p
        self._injector = Injector(plan)
        self._progress = Progress()
        self._installed = ExitStack()
        self._call = ExitStack()  # of the denoiser call under way
        self._step: DenoiseStep | None = None
        self._is_hooked = False
        self._whole = (0, 0)  # height and width of the latent, while hooked
        self._error: Exception | None = None
        self._unpatched: Exception | None = None  # why a pass could not be patched
        self.is_sampling = False

    def begin(self) -> None:
        # The refiner brings another model in the middle of a pass, and a later extension may take the one slot.
        self._installed.callback(add_callback("cfg_denoiser", self.look_again))

    def end(self) -> None:
        for stack in (self._call, self._installed):
            stack.close()
        self._injector.end()
        self._unpatch()
        self._p = self._error = None

    def check(self) -> None:
        """See `hosts.Run`."""
        if self._unpatched is not None:
            raise self._unpatched

    # ------------------------------------------------------------ patching

    def patch(self, p: Any) -> None:
        """Puts the wrapper into the unet that is sampled with, unless it is there. Exceptions wait for the wrapper:
        here they would be printed and forgotten."""
        unet = _patcher(p)
        if p is not self._p or unet is None or self._is_patched(unet):
            return
        if self._injector.has_acted and is_refiner(unet.model.diffusion_model):
            return
        wrapper = _wrapper(self, unet.model.diffusion_model, unet.model_options.get(_SLOT))
        patched = unet.clone()
        patched.set_model_unet_function_wrapper(wrapper)
        p.sd_model.forge_objects.unet = patched
        try:
            self._injector.prepare(loaded_model(p), hires=bool(getattr(p, "is_hr_pass", False)))
            # What was compiled is on the device already; about as much is needed while a layer computes with it.
            patched.add_extra_preserved_memory_during_sampling(self._injector.nbytes)
            if self._injector.cfg_start_step:
                patched.add_conditioning_modifier(_guidance(self))
            self._error = None
        except Exception as error:
            self._error = error

    def _is_patched(self, unet: Any) -> bool:
        return getattr(unet.model_options.get(_SLOT), "run", None) is self

    def _unpatch(self) -> None:
        """Forge drops the patched unet before the next sampling; until then it need not keep us."""
        unet = None if self._p is None else _patcher(self._p)
        if unet is not None and self._is_patched(unet):
            previous = unet.model_options.pop(_SLOT).previous
            if previous is not None:
                unet.set_model_unet_function_wrapper(previous)
            others = unet.model_options.get(_MODIFIERS, [])
            others[:] = [modifier for modifier in others if getattr(modifier, "run", None) is not self]

    def look_again(self, params: Any) -> None:
        """Before each step, after the refiner's turn: the unet may be another one."""
        if self._p is None or params.denoiser.p is not self._p:
            return
        try:
            self.patch(self._p)
        except Exception as error:  # it would be printed and forgotten here
            self._unpatched = error
            return
        try:
            self._injector.check_steps(params.denoiser.steps)
        except Exception as error:
            self._error = error

    def is_before_guidance(self, sigmas: Tensor) -> bool:
        """Whether this step is to run without the negative prompt. sigmas: [B]."""
        return self._p is not None and self._place(sigmas, True).index < self._injector.cfg_start_step

    # ------------------------------------------------------------ one call

    @contextmanager
    def hooked(self, denoiser: nn.Module, hw: tuple[int, int]) -> Iterator[None]:
        """Injects into the denoiser's calls inside the `with`. hw: of the whole latent."""
        if self._p is None or self._is_hooked:  # over, or our own wrapper is further out
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
        self._step = self._place(options["sigmas"], _rows(options, len(x)), (x.shape[-2], x.shape[-1]))
        if self._injector.has_regions and self._step.latent_hw != self._whole:
            raise SettingError(
                "Field mask: a region cannot be used while the picture is made in tiles (MultiDiffusion), which do not "
                "know where they lie. Remove the regions, or switch the tiles off."
            )
        self._call.enter_context(self._injector.around(self._step))

    def _place(self, sigmas: Tensor, rows: bool | list[bool], hw: tuple[int, int] | None = None) -> DenoiseStep:
        denoiser = self._p.sampler.model_wrap_cfg
        return DenoiseStep(self._progress(denoiser, sigmas), rows, hw, denoiser.steps)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._call.close()
        step, self._step = self._step, None
        if step is not None and output is not None:  # None: an exception is under way
            self._injector.check_reached(step)


def _wrapper(run: _Run, denoiser: nn.Module, previous: Callable | None) -> Callable:
    def wrapper(apply_model: Callable, args: dict) -> Tensor:
        with run.hooked(denoiser, tuple(args["input"].shape[-2:])):
            if previous is not None:
                return previous(apply_model, args)
            return apply_model(args["input"], args["timestep"], **args["c"])

    wrapper.run, wrapper.previous = run, previous  # type: ignore[attr-defined]
    return wrapper


def _guidance(run: _Run) -> Callable:
    """Forge asks such functions before each step; with a CFG of 1 it then leaves the negative rows out."""

    def modify(model, x, timestep, uncond, cond, cond_scale, model_options, seed):  # type: ignore[no-untyped-def]
        scale = 1.0 if run.is_before_guidance(timestep) else cond_scale
        return model, x, timestep, uncond, cond, scale, model_options, seed

    modify.run = run  # type: ignore[attr-defined]
    return modify


def _rows(options: Mapping[str, Any], batch: int) -> list[bool]:
    """Whether each row is cond. Tiles repeat the whole stack of chunks."""
    chunks, pictures = options["cond_or_uncond"], len(options["sigmas"])
    return [chunks[i // pictures % len(chunks)] == _COND for i in range(batch)]
