"""A1111's side of a generation: `p`, and the way from a CFGDenoiser to the UNet; and its extension for ControlNets."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.fake_modules.forge import ControlModel
from tests.small_models import normal


class Cond(dict):
    """{"crossattn": [B, L, 2048], "vector": ...} with a shape, like the host's DictWithShape."""

    @property
    def shape(self) -> torch.Size:
        return self["crossattn"].shape


@dataclass
class Denoiser:
    """CFGDenoiser."""

    p: Any
    total_steps: int
    step: int = 0
    sampler: Any = field(default_factory=lambda: SimpleNamespace(funcname="sample_euler"))
    model_wrap: Any = field(default_factory=lambda: SimpleNamespace(sigmas=torch.tensor([0.03, 14.6])))

    @property
    def steps(self) -> int:
        return self.total_steps


class P:
    """StableDiffusionProcessing. `sd_model` may be exchanged in the middle, as by a refiner."""

    def __init__(self, unet: nn.Module, name: str = "some-sdxl") -> None:
        self.load(unet, name)
        self.is_hr_pass = False

    def load(self, unet: nn.Module, name: str = "another") -> None:
        info = SimpleNamespace(name_for_extra=name)
        self.sd_model = SimpleNamespace(model=SimpleNamespace(diffusion_model=unet), sd_checkpoint_info=info)

    @property
    def denoiser(self) -> nn.Module:
        return self.sd_model.model.diffusion_model


def sample(
    p: P,
    conds: Tensor,
    unconds: Tensor,
    *,
    steps: int = 2,
    together: bool = True,
    pictures: int = 1,
    skip_uncond: bool = False,
    hw: tuple[int, int] = (8, 8),
    before_step: Any = None,
) -> list[Tensor]:
    """CFGDenoiser.forward, `steps` times: the UNet's outputs [R, 4, h, w] of each step.

    Args:
        conds: [n, L, W], with AND more than one per picture. unconds: [pictures, L', W].
        together: the option batch_cond_uncond. skip_uncond: NGMS, in odd steps.
    """
    from modules import script_callbacks

    denoiser = Denoiser(p, total_steps=steps)
    outputs = []
    for step in range(steps):
        if before_step is not None:
            before_step(step)
        unet, count = p.denoiser, len(conds) + pictures
        x = normal(step, count, 4, *hw)
        params = SimpleNamespace(
            x=x, sigma=torch.full((pictures,), 14.6 / (step + 1)), text_cond=Cond(crossattn=conds),
            text_uncond=Cond(crossattn=unconds), denoiser=denoiser,
        )  # fmt: skip
        script_callbacks.cfg_denoiser_callback(params)
        skip = skip_uncond and step % 2 == 1
        pieces = [unet(*piece) for piece in _pieces(params, x, conds, unconds, together, pictures, skip)]
        script_callbacks.cfg_denoised_callback(SimpleNamespace(x=torch.cat(pieces)))
        outputs.append(torch.cat(pieces))
        denoiser.step += 1
    return outputs


def _pieces(params: Any, x: Tensor, conds: Tensor, unconds: Tensor, together: bool, pictures: int, skip: bool) -> list:
    if skip or conds.shape[1] == unconds.shape[1]:
        context = conds if skip else torch.cat((conds, unconds))
        size = len(context) if together else pictures
        spans = [(i, min(i + size, len(context))) for i in range(0, len(context), size)]
        return [(x[a:b], params.sigma[:1].expand(b - a), context[a:b]) for a, b in spans]
    size = 2 * pictures if together else pictures
    spans = [(i, min(i + size, len(conds))) for i in range(0, len(conds), size)]
    pieces = [(x[a:b], params.sigma[:1].expand(b - a), conds[a:b]) for a, b in spans]
    return [*pieces, (x[-pictures:], params.sigma, unconds)]


# ---------------------------------------------------------------- the extension sd-webui-controlnet


class PlugableControlModel(nn.Module):
    """Its object of a ControlNet."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.control_model = ControlModel(state)

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return self.control_model(*args, **kwargs)


class Guess(NamedTuple):
    model: nn.Module
    type: str


@contextmanager
def controlnet() -> Iterator[ModuleType]:
    """Enables it. Yields its module that loads files; `built` counts them."""
    made = ModuleType("scripts.controlnet_model_guess")
    made.built = 0

    def build_model_by_guess(state_dict: dict[str, Tensor], unet: Any, model_path: str) -> Guess:
        made.built += 1
        return Guess(PlugableControlModel(state_dict), "InstantID")

    made.build_model_by_guess = build_model_by_guess
    version = ModuleType("scripts.controlnet_version")
    version.version_flag = "v1.1.455"
    modules = {one.__name__: one for one in (made, version)}
    sys.modules.update(modules)
    try:
        yield made
    finally:
        for name in modules:
            del sys.modules[name]
