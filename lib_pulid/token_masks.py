"""Computes how much of a residual each token of a layer gets, from masks of the whole image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lib_pulid.errors import SettingError


class TokenMasks:
    """The masks of several identities on the token grids of one call of the denoiser.

    Args:
        masks: [H, W] in 0..1 each; None: everywhere.
        latent_hw: height and width of the latent, not packed; None: not known, then there may be no masks.
    """

    def __init__(self, masks: Sequence[Tensor | None], family: str, latent_hw: tuple[int, int] | None) -> None:
        self._masks, self._family, self._latent_hw = masks, family, latent_hw
        self._made: dict[tuple[int, int], Tensor] = {}
        if latent_hw is None and any(mask is not None for mask in masks):
            raise ValueError("masks need DenoiseStep.latent_hw")

    def over(self, index: int, tokens: int) -> Tensor | None:
        """Returns mask number `index` as [tokens, 1]: for each token, the mean of the mask in it. None: everywhere."""
        mask = self._masks[index]
        if mask is None:
            return None
        if (index, tokens) not in self._made:
            grid = token_grid(tokens, self._latent_hw, self._family)  # type: ignore[arg-type]
            self._made[index, tokens] = F.interpolate(mask[None, None], size=grid, mode="area").flatten()[:, None]
        return self._made[index, tokens]


def token_grid(tokens: int, latent_hw: tuple[int, int], family: str) -> tuple[int, int]:
    """Returns height and width of a layer's token grid.

    An SDXL layer gets the latent, or the latent halved (rounded up) once or several times; FLUX packs it 2 x 2.

    Raises:
        SettingError: no such grid has `tokens` tokens.
    """
    height, width = latent_hw
    for _ in range(4):
        if height * width == tokens:
            return height, width
        height, width = _packed((height, width))
    raise SettingError(
        f"Field mask: a layer has {tokens} tokens, which does not fit the {family.upper()} latent {latent_hw} at any "
        "scale. Disable what changes the number of tokens (Kohya HRFix, token merging), or remove the mask."
    )


def own_tokens(tokens: int, latent_hw: tuple[int, int] | None) -> int:
    """Returns the number of a FLUX image's own tokens; reference tokens (Kontext) follow them."""
    if latent_hw is None:
        return tokens
    own = math.prod(_packed(latent_hw))
    if tokens < own:
        raise ValueError(f"latent_hw {latent_hw} means {own} image tokens, but the block has {tokens}")
    return own


def _packed(hw: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(hw[0] / 2), math.ceil(hw[1] / 2)
