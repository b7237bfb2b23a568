"""Shares code between A1111 and Forge: the supported models, their samplers' progress, and one denoiser call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lib_pulid.errors import SettingError, UnsupportedModelError
from lib_pulid.hosts import LoadedModel, Plan
from lib_pulid.hosts.frame import frame_of, part_of_mask
from lib_pulid.injection import DenoiseStep, Injection, inject
from lib_pulid.sites import Sites, find_sites, is_chroma
from lib_pulid.watch import Watch, uncompiled

CHROMA = "pulid_chroma"  # name of the setting
SDXL_SITES = 70
SDXL_TEXT_WIDTH, REFINER_WIDTH = 2048, 1280
# Width of the text embedding that a UNet's cross-attention reads -> the model, if it is not SDXL's base.
TEXT_WIDTHS = {
    768: "a Stable Diffusion 1.x model",
    1024: "a Stable Diffusion 2.x model",
    REFINER_WIDTH: "the SDXL refiner, which has no layers for PuLID",
}


# ---------------------------------------------------------------- which models


def family_of(denoiser: nn.Module | None, name: str, wanted: str = "an SDXL checkpoint") -> str:
    """Returns a denoiser's family, "sdxl" or "flux".

    Args:
        name: of the checkpoint. wanted: what the host could load instead, for the message.

    Raises:
        UnsupportedModelError: there is no PuLID for this model.
    """
    problem = "no checkpoint is loaded" if denoiser is None else _problem(denoiser)
    if problem is None:
        return find_sites(denoiser, chroma=True).family  # type: ignore[arg-type]
    what = f"{name}: {problem}" if name else problem[:1].upper() + problem[1:]
    hint = " To try PuLID on Chroma: Settings, PuLID." if denoiser is not None and is_chroma(denoiser) else ""
    raise UnsupportedModelError(f"{what}. PuLID needs {wanted}: select one, or disable PuLID for this image.{hint}")


def tries_chroma() -> bool:
    """Reads the setting that treats Chroma as FLUX.1."""
    from modules.shared import opts

    return bool(opts.data.get(CHROMA, False))


def is_refiner(denoiser: nn.Module | None) -> bool:
    """Whether this is SDXL's refiner. It has no layers for PuLID, so it may only finish an image that the base model
    started."""
    return denoiser is not None and hasattr(denoiser, "input_blocks") and _text_width(denoiser) == REFINER_WIDTH


def _problem(denoiser: nn.Module) -> str | None:
    try:
        sites = find_sites(denoiser, chroma=is_chroma(denoiser) and tries_chroma())
    except UnsupportedModelError as error:
        return str(error).rstrip(".")
    if sites.family == "flux":
        return None
    width = _text_width(denoiser)
    if width in TEXT_WIDTHS:
        return f"this is {TEXT_WIDTHS[width]}"
    if len(sites.sites) == SDXL_SITES:
        return None  # `check_fit` compares its sizes with the PuLID file's
    if width == SDXL_TEXT_WIDTH:
        return f"this is a shortened SDXL with {len(sites.sites)} of {SDXL_SITES} cross-attention layers"
    return f"this is an unknown UNet, with text embeddings of width {width}"


def _text_width(unet: nn.Module) -> int:
    attentions: Iterator[Any] = (module.attn2 for module in unet.modules() if hasattr(module, "attn2"))
    for attention in attentions:
        to_k = attention.to_k
        # Forge's quantised layers have no in_features, and their weight may be packed.
        return (
            getattr(to_k, "in_features", None) or (getattr(to_k.weight, "quant_state", None) or to_k.weight).shape[-1]
        )
    return 0


def chosen_checkpoint(name: str = "") -> Any:
    """Returns the host's CheckpointInfo of the checkpoint with this name, or of the selected one; None without any.

    Forge loads it only with the next image.
    """
    from modules import sd_models, shared

    known = sd_models.checkpoint_aliases.get(name) if name else None
    return known or sd_models.get_closet_checkpoint_match(shared.opts.data.get("sd_model_checkpoint") or "")


# ---------------------------------------------------------------- progress of the sampling

# Samplers whose calls per step are wrong in the hosts' `total_steps`.
_CALLS_PER_STEP = {"sample_heunpp2": 3}
_RHO = 7.0


class Progress:
    """Computes the fraction of a pass that is done, from the host's CFGDenoiser: its `step` counts calls, from 0.

    `total_steps` is the number of expected calls: twice the steps for second-order samplers. (The host's
    `state.sampling_step` is set after a step's first call, and so lags behind.)
    """

    def __init__(self) -> None:
        self._first_sigma = 0.0

    def __call__(self, denoiser: Any, sigma: Tensor) -> float:
        """Returns the fraction at this call. sigma: [B]."""
        if not denoiser.step:
            self._first_sigma = float(sigma.max())
        sampler = str(getattr(denoiser.sampler, "funcname", ""))
        if sampler == "sample_dpm_adaptive":
            return self._of_noise(float(sigma.max()), denoiser.model_wrap)
        total = (denoiser.total_steps or 1) * _CALLS_PER_STEP.get(sampler, 1)
        return min(denoiser.step / total, 1.0)

    def _of_noise(self, sigma: float, model_wrap: Any) -> float:
        """Returns where Karras' schedule has this much noise, for a sampler with any number of calls."""
        first, now, last = (s ** (1 / _RHO) for s in (self._first_sigma, sigma, float(model_wrap.sigmas[0])))
        return min(max((first - now) / (first - last), 0.0), 1.0) if first > last else 0.0


# ---------------------------------------------------------------- one call


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

    def leaves_the_rest_to(self, denoiser: nn.Module | None) -> bool:
        """Whether this is SDXL's refiner, which may finish what the base model started with the face.

        Raises:
            SettingError: it starts before the face was used.
        """
        if not self._was_ready or not is_refiner(denoiser):
            return False
        if self._has_acted or self._watch.reached or not any(injection.weight for injection in self._injections):
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
        if any(injection.mask is not None for injection in injections):
            frame = frame_of(p, hires)
            injections = [
                injection if injection.mask is None else replace(injection, mask=part_of_mask(injection.mask, frame))
                for injection in injections
            ]
        self._start_watch()
        if any(injection.weight for injection in injections):
            self._uncompiled.enter_context(uncompiled())
        self._injections = tuple(injections)
        self._sites = self._watch.over(find_sites(model.denoiser, chroma=True))
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

    def _start_watch(self) -> None:
        self._watch.check_end()
        self._has_acted |= bool(self._watch.reached)
        self._watch.begin()

    def around(self, step: DenoiseStep, whole: tuple[int, int]) -> AbstractContextManager[None]:
        """Injects into one denoiser call inside the `with`. whole: height and width of the pass's latent.

        Raises:
            SettingError: the call gets a tile, and there are masks.
        """
        assert self._sites is not None, "prepare comes first"
        if step.latent_hw != whole and any(injection.mask is not None for injection in self._injections):
            raise SettingError(
                "Field mask: masks do not work with tiled denoising (MultiDiffusion, Tiled Diffusion), which does not "
                "say where a tile is. Remove the masks, or disable tiling."
            )
        return inject(self._sites, self._injections, step)

    def check_call(self, step: DenoiseStep) -> None:
        """Checks a call that returned. Raises: UnsupportedModelError: the face was not added in it."""
        self._watch.check_call(any(injection.is_active(step) for injection in self._injections))

    def check_end(self) -> None:
        """Checks after sampling. Raises: UnsupportedModelError: the face should have been added, and never was."""
        self._watch.check_end()


# ---------------------------------------------------------------- the host's list of callbacks


def add_callback(event: str, callback: Callable, filename: str = __file__) -> Callable[[], None]:
    """Registers a script callback, for "cfg_denoiser" or another event. Returns the function that removes it.

    Does the same as the host's `on_<event>`, but passes the file name. The host would search the call stack for it,
    which takes 0.04 s in A1111 and 0.15 s in Forge each time, more than the rest of this extension's start.
    """
    from modules import script_callbacks

    listed, add = script_callbacks.callback_map[f"callbacks_{event}"], script_callbacks.add_callback
    if "filename" in inspect.signature(add).parameters:  # A1111 from 1.9 on, Forge
        add(listed, callback, filename=filename, category=event)
    else:
        listed.append(script_callbacks.ScriptCallback(filename, callback))
    _forget_order(script_callbacks)

    def remove() -> None:
        script_callbacks.remove_callbacks_for_function(callback)
        _forget_order(script_callbacks)

    return remove


def _forget_order(script_callbacks: Any) -> None:
    """Clears newer hosts' cache of sorted callbacks, which only notices when their *number* changes: after one is
    removed and another added, they would still call the old one."""
    getattr(script_callbacks, "ordered_callbacks_map", {}).clear()
