"""What the WebUIs share of a method's ControlNet: the file that was loaded last, whether all of it was, and the points
drawn for a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid import disk
from lib_pulid.control import Control
from lib_pulid.errors import UnsupportedModelError, WrongWeightsError

LATENT_CHANNELS = 4  # an inpainting model's input has more after them
_LATENT_PIXEL = 8
_SAMPLES = 8  # values of a tensor that are compared


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


class Points:
    """The drawn points of the faces of one generation, each drawn once for an image size."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[Control, int, int], Tensor] = {}

    def of(self, control: Control, x: Tensor) -> Tensor:
        """Returns what a ControlNet sees beside latents [B, C, h, w], [1, 3, 8h, 8w] float32 RGB, 0..1."""
        height, width = (side * _LATENT_PIXEL for side in x.shape[-2:])
        if (control, height, width) not in self._drawn:
            self._drawn[control, height, width] = control.image(height, width)
        return self._drawn[control, height, width]
