"""Runs the ControlNets of a pass's injections in Forge and its successors, inside the denoiser's call.

Forge loads the file (it knows diffusers' format), keeps the network in the right memory, and merges its residuals with
those of its own ControlNets; all of that is its own machinery. The call itself is ours: in the list of Forge's
ControlNets there is no place for other rows' tokens in the place of the text, nor for a range in steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_pulid.control import weighted
from lib_pulid.errors import UnsupportedModelError
from lib_pulid.files.state_dict import check_numbers, read_state_dict
from lib_pulid.hosts.control_base import LATENT_CHANNELS, Loader, Points, check_whole
from lib_pulid.injection import DenoiseStep, Injection, identity_rows

_PARTS = ("input", "middle", "output")


class ControlNets:
    """The ControlNets of one generation."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._nets: dict[Path, Any] = {}
        self._points = Points()

    def prepare(self, patched: Any, injections: Sequence[Injection]) -> None:
        """Loads what the injections need, and tells the patcher of the pass.

        Raises:
            WrongWeightsError, MissingWeightsError, UnsupportedModelError.
        """
        self._nets, self._points = {}, Points()
        dtype = getattr(patched.model, "computation_dtype", None)
        for injection in injections:
            path = injection.control.path  # type: ignore[union-attr]
            if path not in self._nets:
                self._nets[path] = net = self._loader.load(path, dtype, patched.model.diffusion_model)
                patched.add_extra_model_patcher_during_sampling(net.control_model_wrapped)

    def end(self) -> None:
        self._nets, self._points = {}, Points()

    @torch.no_grad()
    def added(
        self, args: tuple, kwargs: Mapping[str, Any], step: DenoiseStep, injections: Sequence[Injection]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Runs the ControlNets that are active in a denoiser call; None if none is.

        Args:
            args, kwargs: of the call. injections: with a Control.

        Returns:
            The call's arguments, with the residuals added to `control`.
        """
        active = [injection for injection in injections if injection.is_controlled(step)]
        if not active:
            return None
        x: Tensor = args[0] if args else kwargs["x"]
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        merged = kwargs.get("control")
        for injection in active:
            merged = self._residuals(injection, x, timesteps, kwargs.get("y"), step, merged)
        return args, {**kwargs, "control": merged}

    def _residuals(
        self,
        injection: Injection,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        step: DenoiseStep,
        previous: Mapping[str, list] | None,
    ) -> Any:
        """Runs one ControlNet. Returns its residuals, merged with the previous ones, as the denoiser takes them."""
        control, rows = injection.control, identity_rows(injection, step, len(x))
        assert control is not None
        net = self._nets[control.path]
        dtype = net.manual_cast_dtype or net.control_model.dtype
        found = net.control_model(
            x=x[:, :LATENT_CHANNELS].to(dtype),
            hint=self._points.of(control, x).to(x.device, dtype).expand(len(x), -1, -1, -1),
            timesteps=timesteps.float(),
            context=control.context(rows).to(x.device, dtype),
            y=None if y is None else y.to(dtype),
        )
        net.strength = control.weight
        if previous is not None:
            previous = {part: list(previous.get(part, ())) for part in _PARTS}
        return net.control_merge(None, weighted(found, rows, injection.mask), previous, x.dtype)


def build(path: Path) -> Any:
    """Loads a file into Forge's object of a ControlNet.

    Raises:
        WrongWeightsError, MissingWeightsError, UnsupportedModelError.
    """
    try:
        from modules_forge.supported_controlnet import ControlNetPatcher
    except ImportError as error:
        raise UnsupportedModelError(f"This WebUI cannot load ControlNets, which {path.name} is ({error}).") from error
    state = read_state_dict(path)
    check_numbers(state, path)
    made = ControlNetPatcher.try_build_from_state_dict(dict(state), str(path))
    if made is None or not hasattr(made.model_patcher, "control_model"):
        raise UnsupportedModelError(f"This WebUI does not know the kind of ControlNet that {path.name} is.")
    check_whole(state, made.model_patcher.control_model.state_dict(), path, "This WebUI")
    return made.model_patcher
