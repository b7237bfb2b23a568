"""Adds an adapter's LoRA to the attention layers of a denoiser, for one call and without a change to its weights.

IP-Adapter FaceID was trained with a LoRA of rank 128 in all attention layers, cross- and self-attention: official
`LoRAAttnProcessor2_0` and `LoRAIPAttnProcessor2_0` in `ip_adapter/attention_processor_faceid.py`, 62e4af9d.

    to_x(y) + strength up(down(y))        x = q, k, v, out; k and v of a cross-attention read the text only

As hooks it works on any host and on quantized weights, costs two small products per layer (of 0.2 to 0.4 times a
layer's own), and leaves nothing to undo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.sites import in_this_thread

PARTS = ("q", "k", "v", "out")


class Lora:
    """The LoRA of a file, on a device.

    Args:
        layers: (number of the attention layer, part) -> down [rank, in], up [out, rank]. Layers are counted as in the
            files: 2 n is the self-attention before the n-th cross-attention, and 2 n + 1 that cross-attention.
        name: identifies the file's LoRA: several persons with one file have one LoRA.
    """

    def __init__(self, layers: Mapping[tuple[int, str], tuple[Tensor, Tensor]], name: str) -> None:
        self.layers, self.name = layers, name
        self._copies: WeakValueDictionary[Any, Lora] = WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self.layers.values() for tensor in pair)

    def to(self, device: torch.device, dtype: torch.dtype) -> Lora:
        """Returns it there; the same one for all who ask, since it takes some hundred megabytes."""
        key = (str(device), dtype)
        if (copy := self._copies.get(key)) is None:
            layers = {place: tuple(t.to(*key) for t in pair) for place, pair in self.layers.items()}
            copy = Lora(layers, self.name)  # type: ignore[arg-type]
            copy._copies = self._copies
            self._copies[key] = copy
        return copy

    def check_fit(self, n: int, parts: Mapping[str, nn.Module]) -> None:
        """Raises: UnsupportedModelError: attention layer `n` has other widths."""
        for part, layer in parts.items():
            down, up = self.layers[n, part]
            sizes = getattr(layer, "in_features", down.shape[1]), getattr(layer, "out_features", up.shape[0])
            if sizes != (down.shape[1], up.shape[0]):
                raise UnsupportedModelError(
                    f"The LoRA in the file is for a model of another size: layer {n} (to_{part}) is {sizes[0]} to "
                    f"{sizes[1]}, not {down.shape[1]} to {up.shape[0]}. Use an SDXL model of the usual size."
                )

    def attach(self, n: int, parts: Mapping[str, nn.Module], strength: float) -> Iterator[RemovableHandle]:
        """Hooks attention layer `n` and yields each handle. parts: its layers by the names of PARTS."""
        ran: set[str] = set()
        for part in PARTS:
            yield parts[part].register_forward_hook(in_this_thread(self._hook(n, part, strength, ran)))

    def _hook(self, n: int, part: str, strength: float, ran: set[str]) -> Callable[..., Tensor]:
        down, up = self.layers[n, part]

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            ran.add(part)
            if part == "out" and len(ran) < len(PARTS):
                raise UnsupportedModelError(
                    f"FaceID's LoRA cannot be added: in attention layer {n}, {', '.join(sorted(set(PARTS) - ran))} did "
                    "not run as layers of their own (fused projections?). Disable what fuses them, or PuLID."
                )
            if part == "out":
                ran.clear()
            x, (a, b) = args[0].to(down.dtype), (t.to(args[0].device) for t in (down, up))
            return torch.add(output, F.linear(F.linear(x, a), b).to(output.dtype), alpha=strength)

        return add


def strongest(loras: Sequence[tuple[Lora, float]]) -> list[tuple[Lora, float]]:
    """Returns each LoRA once, with the largest strength: that of a file is one change of the model, for all persons."""
    found: dict[str, tuple[Lora, float]] = {}
    for lora, strength in loras:
        if lora.name not in found or strength > found[lora.name][1]:
            found[lora.name] = lora, strength
    return [pair for pair in found.values() if pair[1]]
