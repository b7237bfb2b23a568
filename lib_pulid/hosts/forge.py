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
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid.errors import SettingError, UnsupportedModelError
from lib_pulid.hosts import Host, LoadedModel, forge_control
from lib_pulid.hosts.base import Run, WebUI
from lib_pulid.hosts.families import sites_of
from lib_pulid.injection import DenoiseStep

_SLOT = "model_function_wrapper"
_MODIFIERS = "conditioning_modifiers"
_COND = 0


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


class _Run(Run):
    """Patches the unet of each pass, and hooks the denoiser while the wrapper of the patch runs."""

    _whole = (0, 0)  # height and width of the latent, while hooked
    _refusal: Exception | None = None  # why this pass may not run; raised by the wrapper
    _params: Any = None  # the host's, of this step
    _has_stepped = _has_called = False

    def end(self) -> None:
        self._unpatch()
        super().end()
        self._refusal = self._params = None

    def check(self) -> None:
        super().check()
        if self._has_stepped and not self._has_called and self._injector.has_face:
            raise UnsupportedModelError(
                "The face was never added: another extension took the place of PuLID's function wrapper. "
                "Disable that extension or PuLID."
            )

    # ------------------------------------------------------------ patching

    def patch(self, p: Any) -> None:
        """Adds the wrapper to the unet, unless it is there. Keeps exceptions for the wrapper to raise: here they would
        be printed and forgotten."""
        unet = _patcher(p)
        if p is not self.p or unet is None or self._is_patched(unet):
            return
        denoiser = unet.model.diffusion_model
        try:
            if self._injector.leaves_alone(denoiser, p):
                return
            self._refusal = None
        except SettingError as error:
            self._refusal = error
        patched = unet.clone()
        patched.set_model_unet_function_wrapper(_wrapper(self, denoiser, unet.model_options.get(_SLOT)))
        p.sd_model.forge_objects.unet = patched
        if self._refusal is None:
            self._prepare(patched)

    def _prepare(self, patched: Any) -> None:
        try:
            self._injector.prepare(self._host.loaded_model(self.p), self.p)
            # The compiled tensors are on the device already; a layer needs about as much again while it computes.
            patched.add_extra_preserved_memory_during_sampling(self._injector.nbytes)
            self._nets.prepare(patched, self._injector.controlled)
            if self._injector.cfg_start_step:
                patched.add_conditioning_modifier(_guidance(self))
        except Exception as error:
            self._refusal = error

    def _is_patched(self, unet: Any) -> bool:
        return getattr(unet.model_options.get(_SLOT), "run", None) is self

    def _unpatch(self) -> None:
        """Removes the wrapper early: Forge drops the patched unet only before the next sampling."""
        unet = None if self.p is None else _patcher(self.p)
        if unet is not None and self._is_patched(unet):
            previous = unet.model_options.pop(_SLOT).previous
            if previous is not None:
                unet.set_model_unet_function_wrapper(previous)
            others = unet.model_options.get(_MODIFIERS, [])
            others[:] = [modifier for modifier in others if getattr(modifier, "run", None) is not self]

    def open(self, params: Any) -> None:
        """Patches again before each step: a refiner loads another model in the middle of a pass, and a later extension
        may take the one slot."""
        self._params, self._has_stepped = params, True
        self.patch(self.p)
        try:
            self._injector.check_steps(params.denoiser.steps)
        except Exception as error:
            self._refusal = error

    def is_before_guidance(self, sigmas: Tensor) -> bool:
        """Whether this step runs without the negative prompt. sigmas: [B]."""
        return self.p is not None and self._place(sigmas, True).index < self._injector.cfg_start_step

    # ------------------------------------------------------------ one call

    @contextmanager
    def around(self, denoiser: nn.Module, hw: tuple[int, int]) -> Iterator[None]:
        """Injects into the denoiser's calls inside the `with`. hw: of the whole latent."""
        if self.p is None or self._hooked is not None:  # ended, or called inside our own wrapper
            yield
            return
        self._has_called = True
        if self._refusal is not None:
            raise self._refusal
        self._whole = hw
        try:
            self.hook(denoiser)
            yield
        finally:
            self.unhook()

    def read(self, x: Tensor, kwargs: Mapping[str, Any]) -> tuple[DenoiseStep, tuple[int, int]]:
        options = kwargs["transformer_options"]
        rows = _rows(options, len(x))
        if all(rows) and self._is_negative(kwargs.get("context")):
            rows = [False] * len(x)  # SAG: an extra call with the negative prompt in place of the prompt
        images = [i % len(options["sigmas"]) for i in range(len(x))]
        return replace(self._place(options["sigmas"], rows, (x.shape[-2], x.shape[-1])), images=images), self._whole

    def _is_negative(self, text: Tensor | None) -> bool:
        """Whether this is the text of the step's negative rows, and differs from the prompt's."""
        prompt, negative = (_text(getattr(self._params, name, None)) for name in ("text_cond", "text_uncond"))
        return _is_same(negative, text) and not _is_same(negative, prompt)

    def _place(self, sigmas: Tensor, rows: bool | list[bool], hw: tuple[int, int] | None = None) -> DenoiseStep:
        denoiser = self.p.sampler.model_wrap_cfg
        return DenoiseStep(self._progress(denoiser, sigmas), rows, hw, denoiser.steps)


def _wrapper(run: _Run, denoiser: nn.Module, previous: Callable | None) -> Callable:
    def wrapper(apply_model: Callable, args: dict) -> Tensor:
        with run.around(denoiser, tuple(args["input"].shape[-2:])):
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


class Forge(WebUI):
    families = ("sdxl", "flux")
    run_class, nets = _Run, forge_control

    def loaded_model(self, p: Any) -> LoadedModel:
        name = getattr(getattr(p.sd_model, "sd_checkpoint_info", None), "name_for_extra", "")
        unet = _patcher(p)
        denoiser: Any = None if unet is None else unet.model.diffusion_model
        sites = sites_of(denoiser, name, wanted="an SDXL or FLUX.1 checkpoint")
        return LoadedModel(sites, denoiser, unet.load_device, _computation_dtype(unet), name, _is_guided(p))

    def why_no_control_nets(self) -> str:
        return ""

    def less_memory(self) -> str:
        """Names Forge's own slider; its successors have none."""
        from modules.shared import opts

        if "forge_inference_memory" in opts.data_labels:
            return "a lower “GPU Weights” at the top of the page"
        return "a checkpoint stored in 8 bits (fp8, GGUF)"

    def tells_errors(self, p: Any) -> bool:
        """reForge and Forge Classic only print the errors of the generating thread, and the page shows a TypeError for
        the missing result."""
        main_thread = importlib.import_module("modules_forge.main_thread")
        return bool(getattr(p, "is_api", False)) or hasattr(main_thread, "last_exception")


HOST: Host = Forge()
