"""hosts.a1111 against a small stand-in for A1111: rows, steps, passes, other models, and nothing left behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lib_pulid import hosts
from lib_pulid.errors import UnsupportedModelError
from lib_pulid.hosts.base import Progress
from tests.fake_modules import installed
from tests.fake_modules.a1111 import Denoiser, P, sample
from tests.fake_modules.models import SD1_BLOCKS, SDXL_BLOCKS, Flux, UNet, small_unet, text
from tests.fake_modules.plan import RandomPlan

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def modules():
    with installed("a1111") as found:
        yield found
        host().stop()


@pytest.fixture
def p(modules, small_sdxl) -> P:
    return P(small_unet())


def host():
    return hosts.current()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("pictures, ands", [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("lengths", [(77, 77), (154, 77), (77, 154)])
@pytest.mark.parametrize("skip_uncond", [False, True])
def test_rows(p, together, pictures, ands, lengths, skip_uncond):
    """Only cond rows get the identity when there is no uncond identity: the others come out untouched."""
    conds, unconds = text(lengths[0], 1, pictures * ands), text(lengths[1], 2, pictures)
    mode = {"together": together, "pictures": pictures, "skip_uncond": skip_uncond}
    before = sample(p, conds, unconds, **mode)
    host().start(p, RandomPlan(has_uncond=False))
    after = sample(p, conds, unconds, **mode)
    for step in range(2):
        changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(after[step], before[step])]
        uncond = [] if skip_uncond and step == 1 else [False] * pictures
        assert changed == [True] * len(conds) + uncond


def test_rows_of_tiles_that_repeat_the_stack(p, modules):
    """A tiling extension calls the UNet with [tile 0: cond, uncond, tile 1: cond, uncond]."""
    seen, unet = [], p.denoiser
    host().start(p, RandomPlan())
    call = {"x": torch.zeros(2, 4, 8, 8), "sigma": torch.ones(1), "text_cond": text(), "text_uncond": None}
    modules.script_callbacks.cfg_denoiser_callback(SimpleNamespace(**call, denoiser=Denoiser(p, total_steps=1)))
    spy = unet.first.register_forward_hook(lambda *_: seen.append(host().running[0]._step.is_cond))
    for _ in range(2):
        unet(torch.randn(4, 4, 4, 4), None, torch.randn(4, 77, 2048))
    spy.remove()
    assert seen == [[True, False, True, False]] * 2


def test_asks_once_for_each_pass(p):
    plan = RandomPlan()
    host().start(p, plan)
    sample(p, text(), text(seed=2))
    p.is_hr_pass = True
    sample(p, text(), text(seed=2), hw=(16, 16))
    assert plan.asked == [("some-sdxl", "sdxl", False), ("some-sdxl", "sdxl", True)]


def test_refuses_when_the_layers_do_not_run(p):
    """TensorRT and the like take the UNet's place."""
    unet = p.denoiser
    unet.forward = lambda x, *_: x
    host().start(p, RandomPlan())
    with pytest.raises(UnsupportedModelError, match="TensorRT"):
        sample(p, text(), text(seed=2))
    host().start(p, RandomPlan(start=0.9))  # not active, so nothing is missing
    sample(p, text(), text(seed=2))


def test_refuses_what_is_not_a_samplers_call(p):
    with host().sampling(p, RandomPlan()), pytest.raises(UnsupportedModelError, match="img2img alternative"):
        p.denoiser(torch.zeros(2, 4, 8, 8), None, text(77, 1, 2))


@pytest.mark.parametrize("model, message", [
    (UNet(768, SD1_BLOCKS), "Stable Diffusion 1.x"), (UNet(1024, SD1_BLOCKS), "Stable Diffusion 2.x"),
    (UNet(1280, SDXL_BLOCKS), "SDXL refiner"), (UNet(2048, (12, 0, 22)), "shortened SDXL with 34 of 70"),
    (UNet(64, SD1_BLOCKS), "unknown UNet, with text embeddings of width 64"),
    (torch.nn.Linear(2, 2), "neither an SDXL UNet"), (Flux(8, 38), "this model 8 and 38"),
    (Flux(19, 37), "this model 19 and 37"),
])  # fmt: skip
def test_unsupported_models_are_named(modules, model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        host().loaded_model(P(model, "x.safetensors"))
    # Whether the sizes of one with all of the sites fit is between it and the PuLID file.
    assert host().loaded_model(P(UNet(64, SDXL_BLOCKS), "small.safetensors")).family == "sdxl"


def shares(sampler: str, steps: int, calls: int, sigmas: list[float] | None = None) -> list[float]:
    denoiser = Denoiser(None, total_steps=steps, sampler=SimpleNamespace(funcname=sampler))
    progress, told = Progress(), []
    for step in range(calls):
        denoiser.step = step
        told.append(progress(denoiser, torch.tensor([14.6 if sigmas is None else sigmas[step]])))
    return told


@pytest.mark.parametrize(("given", "every", "told"), [
    (("sample_euler", 4, 4), 1, [0, 0.25, 0.5, 0.75]),
    (("sample_heun", 8, 7), 1, [0, 0.125, 0.25]),  # two calls a step, which total_steps knows
    (("sample_heunpp2", 4, 9), 3, [0, 0.25, 0.5]),  # three calls a step
])  # fmt: skip
def test_progress_is_the_share_of_calls(given, every, told):
    assert shares(*given)[::every][: len(told)] == told


def test_progress_without_a_number_of_steps_is_told_by_the_noise():
    told = shares("sample_dpm_adaptive", 2, 4, [14.6, 14.6, 1.0, 0.03])
    assert told[:2] == [0, 0] and 0.4 < told[2] < 0.7 and told[3] == pytest.approx(1)
    assert max(shares("somebody's", 2, 9)) == 1  # never more
