"""What A1111 and Forge have in common: how their samplers count, which models PuLID knows, and one denoiser call."""

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
# Width of the text that a UNet's cross-attention reads -> what else than SDXL's base it is then.
TEXT_WIDTHS = {
    768: "a Stable Diffusion 1.x model",
    1024: "a Stable Diffusion 2.x model",
    REFINER_WIDTH: "the SDXL refiner, which does not read the prompt as SDXL does",
}


# ---------------------------------------------------------------- which models


def family_of(denoiser: nn.Module | None, name: str, wanted: str = "an SDXL checkpoint") -> str:
    """ "sdxl" or "flux".

    Args:
        name: of the checkpoint. wanted: what the host could load instead, for the message.

    Raises:
        UnsupportedModelError: PuLID does not exist for this model.
    """
    problem = "no checkpoint is loaded" if denoiser is None else _problem(denoiser)
    if problem is None:
        return find_sites(denoiser, chroma=True).family  # type: ignore[arg-type]
    what = f"{name}: {problem}" if name else problem[:1].upper() + problem[1:]
    hint = " To try it with Chroma: Settings, PuLID." if denoiser is not None and is_chroma(denoiser) else ""
    raise UnsupportedModelError(
        f"{what}. PuLID needs {wanted}: choose one, or switch PuLID off for this picture.{hint}"
    )


def tries_chroma() -> bool:
    """The setting that lets Chroma pass for FLUX.1."""
    from modules.shared import opts

    return bool(opts.data.get(CHROMA, False))


def is_refiner(denoiser: nn.Module | None) -> bool:
    """Whether this is SDXL's refiner. After a face has acted in the base model it may end the picture without one; it
    has no place for a face, and paints over what is there."""
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
        return None  # whether its sizes fit is between it and the PuLID file
    if width == SDXL_TEXT_WIDTH:
        return f"this is a shortened SDXL with {len(sites.sites)} of {SDXL_SITES} cross-attention layers"
    return f"this is a UNet that reads text {width} wide, which is none that I know"


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
    """The host's CheckpointInfo of the checkpoint of this name, else of the one that is chosen; None without any.

    Forge loads it at the next picture only.
    """
    from modules import sd_models, shared

    known = sd_models.checkpoint_aliases.get(name) if name else None
    return known or sd_models.get_closet_checkpoint_match(shared.opts.data.get("sd_model_checkpoint") or "")


# ---------------------------------------------------------------- how far the sampling is

# Samplers whose calls per step the hosts' `total_steps` does not know.
_CALLS_PER_STEP = {"sample_heunpp2": 3}
_RHO = 7.0


class Progress:
    """Share of a pass that is done, told from the host's CFGDenoiser: `step` counts its calls, from 0 in every pass.

    `total_steps` is the number of calls that are expected: twice the steps for samplers of second order. (The host's
    `state.sampling_step` is of no use: it is set after a step's first call, and so lags.)
    """

    def __init__(self) -> None:
        self._first_sigma = 0.0

    def __call__(self, denoiser: Any, sigma: Tensor) -> float:
        """sigma: [B], of this call."""
        if not denoiser.step:
            self._first_sigma = float(sigma.max())
        sampler = str(getattr(denoiser.sampler, "funcname", ""))
        if sampler == "sample_dpm_adaptive":
            return self._of_noise(float(sigma.max()), denoiser.model_wrap)
        total = (denoiser.total_steps or 1) * _CALLS_PER_STEP.get(sampler, 1)
        return min(denoiser.step / total, 1.0)

    def _of_noise(self, sigma: float, model_wrap: Any) -> float:
        """For a sampler that makes as many calls as it likes: where Karras' schedule would have this much noise."""
        first, now, last = (s ** (1 / _RHO) for s in (self._first_sigma, sigma, float(model_wrap.sigmas[0])))
        return min(max((first - now) / (first - last), 0.0), 1.0) if first > last else 0.0


# ---------------------------------------------------------------- one call


class Injector:
    """Puts a plan into the calls of the denoiser that is loaded; asks again when that or the pass changes."""

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
        """Of what was compiled."""
        return sum(injection.nbytes for injection in self._injections)

    def leaves_the_rest_to(self, denoiser: nn.Module | None) -> bool:
        """Whether this is SDXL's refiner, which may end what the base model has begun with the face.

        Raises:
            SettingError: it comes before the face has acted.
        """
        if not self._was_ready or not is_refiner(denoiser):
            return False
        if self._has_acted or self._watch.reached or not any(injection.weight for injection in self._injections):
            return True
        raise SettingError(
            "Field start: SDXL's refiner takes over before the face begins to act, and PuLID cannot act in the "
            "refiner. Let the face start earlier, or the refiner later."
        )

    def prepare(self, model: LoadedModel, p: Any) -> None:
        """Gets ready for the pass that `p` is in. Raises: PulidError."""
        hires = bool(getattr(p, "is_hr_pass", False))
        wanted = (model.denoiser, model.device, model.dtype, hires)
        if self._ready_for == wanted:
            return
        assert self._plan is not None, "the generation is over"
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
        """Once per pass, when its number of steps is known. Raises: PulidError, see Plan."""
        if self._plan is not None and self._model is not None and steps and not self._checked:
            self._checked = True
            self._plan.check_steps(self._model, steps, hires=self._hires)

    @property
    def cfg_start_step(self) -> int:
        """See Plan; of the pass that this is ready for."""
        assert self._plan is not None and self._model is not None, "prepare comes first"
        return self._plan.cfg_start_step(self._model, hires=self._hires)

    def end(self) -> None:
        """Lets go of the plan, of the denoiser and of what was compiled for it."""
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
        """Injects into the one denoiser call inside the `with`. whole: height and width of the pass's latent.

        Raises:
            SettingError: it is called with a tile, and there are masks.
        """
        assert self._sites is not None, "prepare comes first"
        if step.latent_hw != whole and any(injection.mask is not None for injection in self._injections):
            raise SettingError(
                "Field mask: a mask cannot be used while the image is denoised in tiles (MultiDiffusion, Tiled "
                "Diffusion), which do not tell where they lie. Remove the masks, or disable the tiles."
            )
        return inject(self._sites, self._injections, step)

    def check_call(self, step: DenoiseStep) -> None:
        """After a call that has ended well. Raises: UnsupportedModelError: the face could not act in it."""
        self._watch.check_call(any(injection.is_active(step) for injection in self._injections))

    def check_end(self) -> None:
        """After sampling. Raises: UnsupportedModelError: the face was to act, and never did."""
        self._watch.check_end()


# ---------------------------------------------------------------- the host's list of callbacks


def add_callback(event: str, callback: Callable, filename: str = __file__) -> Callable[[], None]:
    """Registers for a script callback, "cfg_denoiser" or the like. Returns the function that removes it.

    Does what the host's `on_<event>` does, but tells the file's name. The host would look for it on the call stack,
    which takes 0.04 s in A1111 and 0.15 s in Forge each time, more than all else that this extension does at start.
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
    """Later hosts keep the sorted callbacks until their *number* changes: after one is removed and another added, they
    would go on calling the old one."""
    getattr(script_callbacks, "ordered_callbacks_map", {}).clear()
