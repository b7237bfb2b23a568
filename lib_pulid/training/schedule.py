"""Defines noise schedules and their prediction targets: SDXL's with v, FLUX's rectified flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """x_t = alpha x + sigma noise, of which a denoiser predicts v = a noise - b x.

    Args:
        alphas, sigmas: [T], from hardly any noise to noise alone.
        flow: rectified flow (Liu et al., arXiv 2209.03003): a = b = 1, and alpha + sigma = 1. Otherwise v-prediction
            (Salimans and Ho, arXiv 2202.00512): a = alpha, b = sigma, and their squares add up to 1.
    """

    alphas: Tensor
    sigmas: Tensor
    flow: bool = False

    def __len__(self) -> int:
        return len(self.alphas)

    def noisy(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents [B, C, h, w] at steps t [B]."""
        alpha, sigma = self._at(t)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Computes the prediction target at steps t [B]."""
        alpha, sigma = self._at(t)
        return noise - clean if self.flow else alpha * noise - sigma * clean

    def split(self, noisy: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Splits a prediction v [B, C, h, w] at steps t [B] into clean latents and noise."""
        alpha, sigma = self._at(t)
        if self.flow:
            return noisy - sigma * v, noisy + alpha * v
        return alpha * noisy - sigma * v, sigma * noisy + alpha * v

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (row.to(t.device)[t][:, None, None, None] for row in (self.alphas, self.sigmas))
        return alpha, sigma


def sdxl() -> Schedule:
    """Returns SDXL's: betas whose square roots lie evenly between those of 0.00085 and 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return Schedule(kept.sqrt().float(), (1 - kept).sqrt().float())


def flux() -> Schedule:
    """Returns FLUX's: a straight way from image to noise."""
    sigmas = torch.arange(1, STEPS + 1) / STEPS
    return Schedule(1 - sigmas, sigmas, flow=True)
