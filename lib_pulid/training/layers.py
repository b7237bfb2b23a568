"""Defines the layers of the miniature's small convolutional networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions beside a shortcut: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int, separable: bool) -> None:
        super().__init__()
        if separable:
            layers = [
                nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.Conv2d(width, 2 * width, 1),
                nn.SiLU(),
                nn.Conv2d(2 * width, width, 1, bias=False),
                nn.BatchNorm2d(width),
            ]
        else:
            layers = [*conv(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        self.body = nn.Sequential(*layers)
        self.separable = separable

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x)
        return x if self.separable else F.relu(x)


def conv(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Builds a convolution with norm and ReLU."""
    layer = nn.Conv2d(before, after, kernel, stride, padding=(kernel - 1) // 2, bias=False)
    return [layer, nn.BatchNorm2d(after), nn.ReLU()]


def to_input(crops: np.ndarray) -> Tensor:
    """Converts uint8 RGB [B, H, W, 3] to float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def settle_norms(module: nn.Module, inputs: Iterable[Tensor], call: Callable[[Tensor], object] | None = None) -> None:
    """Measures the batch norms' statistics again, since averaged weights have others than those of training.

    call: what was trained, if that is not the whole module.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean
    module.train()
    for images in inputs:
        (call or module)(images.to(memory_format=torch.channels_last))
    module.eval()
