"""Runs the ControlNets of a pass's injections in Forge and its successors, inside the denoiser's call.

Forge loads the file (it knows diffusers' format), keeps the network in the right memory, and merges its residuals with
those of its own ControlNets; all of that is its own machinery. The call itself is ours: in the list of Forge's
ControlNets there is no place for other rows' tokens in the place of the text, nor for a range in steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.files.state_dict import check_numbers, read_state_dict
from lib_pulid.hosts import control_base
from lib_pulid.hosts.control_base import Found, check_whole
from lib_pulid.injection import Injection

_PARTS = ("input", "middle", "output")


class ControlNets(control_base.ControlNets):
    """The ControlNets of one generation."""

    def prepare(self, patched: Any, injections: Sequence[Injection]) -> None:
        """Loads what the injections need, and tells the patcher of the pass.

        Raises:
            WrongWeightsError, MissingWeightsError, UnsupportedModelError.
        """
        self.end()
        dtype = getattr(patched.model, "computation_dtype", None)
        for net in self.load(injections, dtype, patched.model.diffusion_model):
            patched.add_extra_model_patcher_during_sampling(net.control_model_wrapped)

    def put(
        self, found: Sequence[Found], args: tuple, kwargs: Mapping[str, Any], hooks: ExitStack
    ) -> tuple[tuple, dict[str, Any]]:
        """Merges residuals into the call's `control`, beside those of Forge's own ControlNets."""
        x: Tensor = args[0] if args else kwargs["x"]
        merged = kwargs.get("control")
        for net, weight, residuals in found:
            net.strength = weight
            previous = None if merged is None else {part: list(merged.get(part, ())) for part in _PARTS}
            merged = net.control_merge(None, residuals, previous, x.dtype)
        return args, {**kwargs, "control": merged}

    def run(self, net: Any, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None) -> Any:
        dtype = net.manual_cast_dtype or net.control_model.dtype
        return net.control_model(
            x=x.to(dtype),
            hint=hint.to(dtype).expand(len(x), -1, -1, -1),
            timesteps=timesteps.float(),
            context=context.to(dtype),
            y=None if y is None else y.to(dtype),
        )


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
