"""What the WebUIs share of a method's ControlNets: the file that was loaded last, whether all of it was, and how the
networks are run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid import disk
from lib_pulid.control import LATENT_CHANNELS, LATENT_PIXEL, Control, weighted
from lib_pulid.errors import UnsupportedModelError, WrongWeightsError
from lib_pulid.injection import DenoiseStep, Injection, identity_rows

_SAMPLES = 8  # values of a tensor that are compared
Found = tuple[Any, float, list[Tensor]]  # the host's object of a ControlNet, its strength, its residuals [B, C, h, w]


class Loader:
    """Loads ControlNets; the last one stays in the computer's memory.

    build: loads a file into an object of the host's, whose `control_model` is the network.
    """

    def __init__(self, build: Callable[[Path], Any]) -> None:
        self._build = build
        self._last: tuple[Any, Any] | None = None

    def load(self, path: Path, dtype: torch.dtype | None, denoiser: nn.Module) -> Any:
        """Returns the host's object of a ControlNet for a denoiser. dtype: of the computation, see `LoadedModel`.

        Raises:
            WrongWeightsError, MissingWeightsError, UnsupportedModelError.
        """
        now = disk.stamp(path), dtype
        if self._last is None or self._last[0] != now:
            self._last = None  # first, so that two are never in memory
            self._last = now, self._build(path)
        net = self._last[1]
        ours, theirs = (getattr(one, "model_channels", None) for one in (net.control_model, denoiser))
        if None not in (ours, theirs) and ours != theirs:
            raise UnsupportedModelError(
                f"{path.name} is a ControlNet for a model of another size: its width is {ours}, the checkpoint's is "
                f"{theirs}. Use an SDXL checkpoint of the usual size."
            )
        return net


def check_whole(state: Mapping[str, Tensor], made: Mapping[str, Tensor], path: Path, loader: str) -> None:
    """Checks that a file is in a network, and nothing else is: the hosts load what they know, without a word.

    Args:
        state, made: the file's tensors and the network's, whatever their names and shapes; compared are their sizes and
            a few values of each. loader: what loaded it, for messages.

    Raises:
        UnsupportedModelError: a part of the file was left out. WrongWeightsError: the file lacks a part.
    """
    dtype = next(iter(made.values())).dtype
    wanted, found = (Counter(_mark(tensor, dtype) for tensor in part.values()) for part in (state, made))
    if left_out := (wanted - found).total():
        raise UnsupportedModelError(
            f"{loader} left out {left_out} of the {len(state)} tensors of {path.name}. Update it."
        )
    if lacking := (found - wanted).total():
        raise WrongWeightsError(f"{path.name} lacks {lacking} of {len(made)} tensors. Download it again.")


def _mark(tensor: Tensor, dtype: torch.dtype) -> tuple[float, ...]:
    """Returns the size of a tensor, and a few of its values in a dtype."""
    flat = tensor.detach().flatten()
    return flat.numel(), *flat[:: max(1, flat.numel() // _SAMPLES)].to(dtype).tolist()


class ControlNets:
    """The ControlNets of one generation."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._nets: dict[Path, Any] = {}
        self._points: dict[tuple[Control, int, int], Tensor] = {}  # drawn once for an image size

    def load(self, injections: Sequence[Injection], dtype: torch.dtype | None, denoiser: nn.Module) -> list[Any]:
        """Loads what the injections need, and returns it without what was there already. Raises: see `Loader.load`."""
        paths = dict.fromkeys(injection.control.path for injection in injections)  # type: ignore[union-attr]
        new = {path: self._loader.load(path, dtype, denoiser) for path in paths if path not in self._nets}
        self._nets |= new
        return list(new.values())

    def end(self) -> None:
        self._nets, self._points = {}, {}

    @torch.no_grad()
    def add(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        step: DenoiseStep,
        injections: Sequence[Injection],
        hooks: ExitStack,
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Runs the ControlNets that are active in a denoiser call, and adds their residuals in it.

        Args:
            args, kwargs: of the call. injections: with a Control. hooks: is closed after the call.

        Returns:
            The arguments to call the denoiser with; None: unchanged.

        Raises:
            UnsupportedModelError: the network does not fit the UNet.
        """
        x: Tensor = args[0] if args else kwargs["x"]
        timesteps = args[1] if len(args) > 1 else kwargs["timesteps"]
        found = []
        for injection in injections:
            control = injection.control
            if control is None or not injection.is_controlled(step):
                continue
            net, rows = self._nets[control.path], identity_rows(injection, step, len(x))
            latents, context = x[:, :LATENT_CHANNELS], control.context(rows).to(x.device)
            made = self.run(net, latents, self._hint(control, x), timesteps, context, kwargs.get("y"))
            found.append((net, control.weight, weighted(made, rows, injection.mask)))
        return self.put(found, args, kwargs, hooks) if found else None

    def run(self, net: Any, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None) -> Any:
        """Runs the host's object of a ControlNet, on the device of x [B, 4, h, w]. hint: [1, 3, 8h, 8w], 0..1."""
        raise NotImplementedError

    def put(self, found: Sequence[Found], args: tuple, kwargs: Mapping[str, Any], hooks: ExitStack) -> Any:
        """Adds residuals in a call; see `add`."""
        raise NotImplementedError

    def _hint(self, control: Control, x: Tensor) -> Tensor:
        """Returns what a ControlNet sees beside latents [B, C, h, w]: the points, [1, 3, 8h, 8w] RGB, 0..1."""
        height, width = (side * LATENT_PIXEL for side in x.shape[-2:])
        if (control, height, width) not in self._points:
            self._points[control, height, width] = control.image(height, width)
        return self._points[control, height, width].to(x.device)
