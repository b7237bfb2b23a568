"""Defines Control: what a method's ControlNet is given of one face, and how its residuals are weighted.

The ControlNet reads the face's tokens in the place of the text, and the face's five points as its image. Official:
`pipeline_stable_diffusion_xl_instantid.py`, `__call__` (instantX-research/InstantID, 2145b67f).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_pulid.identity import Identity
from lib_pulid.identity_net import WHOLE, Pose

MOST_WEIGHT = 2.0


@dataclass(frozen=True, eq=False)
class Control:
    """One face for a ControlNet.

    Args:
        path: of the ControlNet's file.
        tokens: [R, N, D], those of cond rows and, if there are any, of uncond rows.
        pose: gives the image that the ControlNet sees.
        weight: the official controlnet_conditioning_scale, above 0.
        part: of the image, that is denoised; see `Pose.drawn`.
    """

    path: Path
    tokens: Tensor
    pose: Pose
    weight: float
    part: tuple[float, float, float, float] = WHOLE

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def to(self, device: torch.device) -> Control:
        return replace(self, tokens=self.tokens.to(device))

    def image(self, height: int, width: int) -> Tensor:
        """Draws the face's points, [1, 3, height, width] float32 RGB, 0..1."""
        drawn = self.pose.drawn((width, height), self.part)
        return torch.from_numpy(drawn).permute(2, 0, 1)[None].float() / 255

    def context(self, rows: Sequence[int | None]) -> Tensor:
        """Returns the tokens of each row, [B, N, D]. rows: see `injection.identity_rows`."""
        return self.tokens[[row or 0 for row in rows]]


def control_of(
    identity: Identity, pose: Pose, path: Path, weight: float, device: str | torch.device, dtype: torch.dtype
) -> Control:
    """Makes a Control of an identity. device, dtype: of the ControlNet's computation."""
    rows = [identity.cond] if identity.uncond is None else [identity.cond, identity.uncond]
    return Control(path, torch.cat(rows).to(device, dtype), pose, weight)


def weighted(residuals: Sequence[Tensor], rows: Sequence[int | None], mask: Tensor | None) -> list[Tensor]:
    """Leaves a ControlNet's residuals [B, C, h, w] only in the rows and the region of a face.

    Args:
        rows: see `injection.identity_rows`. mask: [H, W], 0..1; None: everywhere.
    """
    if mask is None and None not in rows:
        return list(residuals)
    found = []
    for residual in residuals:
        own = torch.tensor([row is not None for row in rows]).to(residual)[:, None, None, None]
        area = 1 if mask is None else F.interpolate(mask[None, None].to(residual), residual.shape[-2:], mode="area")
        found.append(residual * (own * area))
    return found
