"""Implements Muon, momentum with orthogonal steps (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

torch.optim.Muon takes only matrices; here convolutions count as matrices [out, in x k x k], and the rest
(gains, biases, tables) is AdamW's. What it is worth here: docs/training.md.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, Jordan's
RMS = 0.2  # of a step, as AdamW's, so that one learning rate suits both (Liu et al., arXiv 2502.16982)


class Muon(torch.optim.Optimizer):
    """Steps of `rate` for weights of two and more dimensions."""

    def __init__(self, parameters: Iterable[Tensor], rate: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps every parameter with a gradient; those of one shape together."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for shape, parameters in alike.items():
                steps = orthogonal(torch.stack([self._ahead(p, group["momentum"]) for p in parameters]))
                torch._foreach_add_(
                    parameters,
                    [step.view_as(p) for step, p in zip(steps, parameters)],
                    alpha=-group["lr"] * RMS * max(shape) ** 0.5,
                )

    def _ahead(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum, [out, in]."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["average"] = torch.zeros_like(parameter)
        average = state["average"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum).flatten(1)


def orthogonal(matrices: Tensor) -> Tensor:
    """Brings the singular values of matrices [B, m, n] near 1, by five Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that require gradients, AdamW for all else, embedding tables among it."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [p for p in wanted if p.ndim > 1 and id(p) not in tables]
    rest = [p for p in wanted if p.ndim <= 1 or id(p) in tables]
    found: list[torch.optim.Optimizer] = [Muon(matrices, rate)] if matrices else []
    return found + ([torch.optim.AdamW(rest, rate, betas=(0.9, 0.99), weight_decay=0.0)] if rest else [])
