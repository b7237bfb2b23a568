"""A Plan without files: seeded random tensors in the place of a compiled identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lib_pulid.attention import CrossAttentionTensors, ImageStreamTensors
from lib_pulid.hosts import LoadedModel
from lib_pulid.injection import Injection
from lib_pulid.sites import Site, find_sites


@dataclass
class RandomPlan:
    """Args: asked: what the host asked for, as (name, family, hires). error: raised in the place of an answer.
    guided, steps: of the passes, as the host told."""

    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    has_uncond: bool = True
    mask: torch.Tensor | None = None
    start_step: int = 0
    cfg_from: int = 0
    error: Exception | None = None
    guided: list[bool] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    asked: list[tuple[str, str, bool]] = field(default_factory=list)

    def has_face(self, *, hires: bool) -> bool:
        return self.weight != 0

    def injections(self, model: LoadedModel, *, hires: bool) -> Sequence[Injection]:
        self.asked.append((model.name, model.family, hires))
        self.guided.append(model.guided)
        if self.error is not None:
            raise self.error
        generator = torch.Generator().manual_seed(1)
        make = _cross_attention if model.family == "sdxl" else _image_stream
        sites = tuple(make(site, self.weight, generator) for site in find_sites(model.denoiser, chroma=True).sites)
        settings = (self.has_uncond, self.weight, "ortho_v2", 20, self.start, self.end, self.mask)
        return [Injection(model.family, sites, *settings, self.start_step)]

    def check_steps(self, model: LoadedModel, steps: int, *, hires: bool) -> None:
        self.steps.append(steps)

    def cfg_start_step(self, model: LoadedModel, *, hires: bool) -> int:
        return self.cfg_from


def _cross_attention(site: Site, weight: float, generator: torch.Generator) -> CrossAttentionTensors:
    k, v = (torch.randn(2, 6, site.width, generator=generator) for _ in range(2))
    return CrossAttentionTensors.joined(k, v * weight)


def _image_stream(site: Site, weight: float, generator: torch.Generator) -> ImageStreamTensors:
    score, value = (
        torch.randn(2, site.width, 6, generator=generator),
        torch.randn(2, 6, site.width, generator=generator),
    )
    return ImageStreamTensors(score, torch.zeros(2, 6), value * weight, heads=2)
