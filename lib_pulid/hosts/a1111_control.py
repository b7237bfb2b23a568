"""Runs the ControlNets of a pass's injections in A1111, around the UNet's call, with the extension sd-webui-controlnet.

The extension has the network, and knows diffusers' format: one function of it is used, `build_model_by_guess`. The rest
is ours. The residuals are added where they belong in any UNet of this layout, by hooks on its blocks: to the skip
connection that ends each input of an output block, and to the output of the middle block. The extension does the same
in a forward of its own, so that units of its page act beside ours, and nothing there is changed.

Its list of units has no place for ours: a unit for InstantID needs one for an IP-Adapter before it, whose tokens it
reads, and its range is one of the host's sampling steps. Seen in 56cec5b2 (1.1.455); the function has been the same
since the extension knows SDXL (1d540232, 2023-09-04).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.files.state_dict import check_numbers, read_state_dict
from lib_pulid.hosts import control_base
from lib_pulid.hosts.control_base import Found, check_whole
from lib_pulid.injection import Injection

EXTENSION = "sd-webui-controlnet"
# A1111 imports the scripts of extensions by these names; of one that is not enabled, or fails, there is no module.
_MODULE, _BUILDER, _VERSION = "scripts.controlnet_model_guess", "build_model_by_guess", "scripts.controlnet_version"
_MOST_TOLD = 200  # characters of an error; it may name hundreds of tensors
_CPU = torch.device("cpu")


def why_none() -> str:
    """Says why there are no ControlNets, and what to do; "" if there are."""
    if _MODULE not in sys.modules:
        return (
            f"A1111 needs the extension {EXTENSION} for it, which is not installed, not enabled, too old, or failed to "
            "load. Install, enable or update it, and restart the WebUI."
        )
    if not callable(getattr(sys.modules[_MODULE], _BUILDER, None)):
        return f"this version of the extension {_name()} has no {_BUILDER}. Update it, and restart the WebUI."
    return ""


def build(path: Path) -> Any:
    """Loads a file into the extension's object of a ControlNet, on the CPU.

    Raises:
        WrongWeightsError, MissingWeightsError. UnsupportedModelError: the extension is not there, or it is a version
            that cannot load the file.
    """
    if why_not := why_none():
        raise UnsupportedModelError(f"{path.name} cannot be loaded: {why_not}")
    state = read_state_dict(path)
    check_numbers(state, path)
    try:
        made = getattr(sys.modules[_MODULE], _BUILDER)(dict(state), None, str(path))
    except Exception as error:  # whatever another version raises
        told = " ".join(str(error).split())[:_MOST_TOLD]
        raise UnsupportedModelError(f"The extension {_name()} cannot load {path.name} ({told}). Update it.") from error
    net = getattr(made, "model", made)  # older versions return the network alone
    if not isinstance(net, nn.Module) or not isinstance(getattr(net, "control_model", None), nn.Module):
        raise UnsupportedModelError(
            f"The extension {_name()} made no ControlNet of {path.name}, but {type(net).__name__}. Update it."
        )
    network: Any = net.control_model
    check_whole(state, network.state_dict(), path, f"The extension {_name()}")
    return net.to(_CPU)


class ControlNets(control_base.ControlNets):
    """The ControlNets of one generation. They are in the UNet's memory until its end."""

    _unet: nn.Module | None = None
    _has_run = _has_acted = False

    def prepare(self, unet: nn.Module, dtype: torch.dtype, injections: Sequence[Injection]) -> None:
        """Loads what the injections need, once for a UNet. dtype: of its computation.

        Raises:
            WrongWeightsError, MissingWeightsError, UnsupportedModelError.
        """
        if unet is not self._unet:
            self.end()
            self._unet = unet
        self.load(injections, dtype, unet)

    def end(self) -> None:
        for net in self._nets.values():
            net.to(_CPU)
        self._unet = None
        super().end()

    def check_end(self) -> None:
        """Checks after sampling. Raises: UnsupportedModelError: the residuals were never added."""
        if self._has_run and not self._has_acted:
            raise UnsupportedModelError(
                "Field identity_net: the pose was never added: something runs instead of the UNet's blocks "
                "(TensorRT, or an extension that replaces the UNet). Disable that, or set identity_net to 0."
            )

    def run(self, net: Any, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None) -> Any:
        if next(net.parameters()).device != x.device:
            net.to(x.device)
        self._has_run = True
        return net(x=x, hint=hint.to(x.dtype), timesteps=timesteps, context=context.to(x.dtype), y=y)

    def put(self, found: Sequence[Found], args: tuple, kwargs: Mapping[str, Any], hooks: ExitStack) -> None:
        """Hooks the UNet's blocks. The residuals are those of the input blocks, in order, and that of the middle
        block."""
        each = ([residual * weight for residual in residuals] for _, weight, residuals in found)
        *skips, middle = (torch.stack(same).sum(0) for same in zip(*each))
        blocks: Any = getattr(self._unet, "output_blocks", ())
        if len(skips) != len(blocks):
            raise UnsupportedModelError(
                f"The ControlNet gives {len(skips)} residuals for the {len(blocks)} output blocks of the checkpoint's "
                "UNet. Use an SDXL checkpoint of the usual size."
            )

        def add_to_middle(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            self._has_acted = True
            return output + _fitted(middle, output)

        hooks.callback(self._unet.middle_block.register_forward_hook(add_to_middle).remove)  # type: ignore
        for block, skip in zip(blocks, reversed(skips)):
            hooks.callback(block.register_forward_pre_hook(self._adding(skip)).remove)

    def _adding(self, skip: Tensor) -> Any:
        """Returns a hook for an output block, whose input ends with the skip connection."""

        def add_to_skip(module: nn.Module, args: tuple) -> tuple:
            self._has_acted = True
            h, own = args[0], args[0].shape[1] - skip.shape[1]
            return torch.cat((h[:, :own], h[:, own:] + _fitted(skip, h)), dim=1), *args[1:]

        return add_to_skip


def _fitted(residual: Tensor, h: Tensor) -> Tensor:
    """Resizes a residual to h [B, C, H, W], as the extension does where another one resizes inside the UNet."""
    if residual.shape[-2:] != h.shape[-2:]:
        residual = F.interpolate(residual, h.shape[-2:], mode="nearest")
    return residual.to(h)


def _name() -> str:
    """Returns the extension's name and version."""
    return f"{EXTENSION} {getattr(sys.modules.get(_VERSION), 'version_flag', '')}".rstrip()
