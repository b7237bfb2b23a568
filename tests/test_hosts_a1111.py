"""hosts.a1111 against a small stand-in for A1111: rows, steps, passes, other models, and nothing left behind."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from lib_pulid import hosts
from lib_pulid.errors import PulidError, SettingError, UnsupportedModelError
from lib_pulid.hosts.webui import Progress
from tests.fake_modules import installed
from tests.fake_modules.a1111 import Denoiser, P, sample
from tests.fake_modules.models import SD1_BLOCKS, SDXL_BLOCKS, Flux, UNet, count_hooks
from tests.fake_modules.plan import RandomPlan


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def modules():
    with installed("a1111") as found:
        yield found
        host().stop()


@pytest.fixture
def p(modules) -> P:
    return P(UNet())


def host():
    return hosts.current()


def text(rows: int, length: int, seed: int) -> Tensor:
    return torch.randn(rows, length, 2048, generator=torch.Generator().manual_seed(seed))


def hooks(p: P) -> int:
    return count_hooks(p.sd_model.model.diffusion_model)


def callbacks_left(modules) -> int:
    return sum(map(len, modules.script_callbacks.callback_map.values()))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_host_is_told_by_what_it_brings(modules):
    assert host().NAME == "AUTOMATIC1111"


def test_changes_the_picture_and_leaves_nothing(p, modules):
    conds, unconds = text(1, 77, 1), text(1, 77, 2)
    before = sample(p, conds, unconds)
    host().start(p, RandomPlan())
    with_face = sample(p, conds, unconds)
    host().stop()
    assert not torch.allclose(with_face[0], before[0])
    assert hooks(p) == 0 and callbacks_left(modules) == 0
    assert same(sample(p, conds, unconds), before)


def test_in_hosts_that_do_not_cache_callbacks():
    with installed("a1111", cached=False) as modules:
        test_changes_the_picture_and_leaves_nothing(P(UNet()), modules)


def test_weight_zero_is_bit_identical(p):
    before = sample(p, text(1, 77, 1), text(1, 77, 2))
    host().start(p, RandomPlan(weight=0.0))
    assert same(sample(p, text(1, 77, 1), text(1, 77, 2)), before)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("pictures, ands", [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("lengths", [(77, 77), (154, 77), (77, 154)])
@pytest.mark.parametrize("skip_uncond", [False, True])
def test_rows(p, together, pictures, ands, lengths, skip_uncond):
    """Only cond rows get the identity when there is no uncond identity: the others come out untouched."""
    conds, unconds = text(pictures * ands, lengths[0], 1), text(pictures, lengths[1], 2)
    mode = {"together": together, "pictures": pictures, "skip_uncond": skip_uncond}
    before = sample(p, conds, unconds, **mode)
    host().start(p, RandomPlan(has_uncond=False))
    after = sample(p, conds, unconds, **mode)
    for step in range(2):
        changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(after[step], before[step])]
        uncond = [] if skip_uncond and step == 1 else [False] * pictures
        assert changed == [True] * len(conds) + uncond


def test_rows_of_tiles_that_repeat_the_stack(p):
    """A tiling extension calls the UNet with [tile 0: cond, uncond, tile 1: cond, uncond]."""
    seen = []
    unet = p.sd_model.model.diffusion_model
    run = host()
    run.start(p, RandomPlan())
    denoiser = Denoiser(p, total_steps=1)
    from modules import script_callbacks

    params = SimpleNamespace(
        x=torch.zeros(2, 4, 8, 8), sigma=torch.ones(1), text_cond=text(1, 77, 1), text_uncond=None, denoiser=denoiser
    )
    script_callbacks.cfg_denoiser_callback(params)
    spy = unet.first.register_forward_hook(lambda *_: seen.append(run._running[0]._step.is_cond))
    for _ in range(2):
        unet(torch.randn(4, 4, 4, 4), None, torch.randn(4, 77, 2048))
    spy.remove()
    assert seen == [[True, False, True, False]] * 2


def test_masks_in_tiles_are_refused(p):
    """Tiled Diffusion calls the UNet with parts that do not tell where they lie."""
    from modules import script_callbacks

    host().start(p, RandomPlan(mask=torch.ones(4, 4)))
    call = {"x": torch.zeros(2, 4, 8, 8), "sigma": torch.ones(1), "text_cond": text(1, 77, 1), "text_uncond": None}
    script_callbacks.cfg_denoiser_callback(SimpleNamespace(**call, denoiser=Denoiser(p, total_steps=1)))
    with pytest.raises(SettingError, match="Field mask: .*Tiled Diffusion"):
        p.sd_model.model.diffusion_model(torch.zeros(2, 4, 8, 4), None, text(2, 77, 1))


def only_masked(p: P, left: int) -> None:
    """Inpainting of a 32 x 64 crop of a 128 x 64 image, from `left` on."""
    image = Image.new("RGB", (128, 64))
    vars(p).update(init_images=[image], image_mask=image, inpaint_full_res=True, resize_mode=0, width=64, height=128)
    p.paste_to = (left, 0, 32, 64)


def test_a_mask_where_only_a_crop_is_inpainted(p):
    """The crop has the mask's own part: nothing of it, all of it, its left half."""
    left_half = torch.zeros(8, 16)
    left_half[:, :8] = 1
    parts = {96: torch.zeros(8, 4), 0: torch.ones(8, 4), 48: torch.tensor([1.0, 1, 0, 0]).repeat(8, 1)}
    for left, part in parts.items():
        only_masked(p, left)
        host().start(p, RandomPlan(mask=left_half))
        found = sample(p, text(1, 77, 1), text(1, 77, 2))
        host().stop()
        whole = P(p.sd_model.model.diffusion_model)
        host().start(whole, RandomPlan(mask=part))
        assert same(found, sample(whole, text(1, 77, 1), text(1, 77, 2))), left
        host().stop()


def test_start_and_end_follow_the_step(p):
    conds, unconds = text(1, 77, 1), text(1, 77, 2)
    before = sample(p, conds, unconds, steps=4)
    host().start(p, RandomPlan(start=0.25, end=0.75))
    after = sample(p, conds, unconds, steps=4)
    assert [not torch.equal(a, b) for a, b in zip(after, before)] == [False, True, True, False]


def test_a_face_that_would_never_act_ends_the_generation(p, monkeypatch):
    error = SettingError("never")
    monkeypatch.setattr(RandomPlan, "check_steps", lambda *_, **__: (_ for _ in ()).throw(error))
    host().start(p, RandomPlan())
    with pytest.raises(SettingError, match="never"):
        sample(p, text(1, 77, 1), text(1, 77, 2))
    host().stop()
    assert hooks(p) == 0


def test_asks_once_for_each_pass(p):
    plan = RandomPlan()
    host().start(p, plan)
    sample(p, text(1, 77, 1), text(1, 77, 2))
    p.is_hr_pass = True
    sample(p, text(1, 77, 1), text(1, 77, 2), hw=(16, 16))
    assert plan.asked == [("some-sdxl", "sdxl", False), ("some-sdxl", "sdxl", True)]


def test_looks_at_a_unet_once(p, monkeypatch):
    """Not before every call of the sampler: it goes through all of its layers."""
    seen, look = [], host().loaded_model
    monkeypatch.setattr(host(), "loaded_model", lambda p: seen.append(p) or look(p))
    host().start(p, RandomPlan())
    sample(p, text(1, 77, 1), text(1, 77, 2), steps=5)
    assert len(seen) == 1
    p.sd_model = P(UNet(seed=3)).sd_model  # as a refiner comes
    sample(p, text(1, 77, 1), text(1, 77, 2), steps=5)
    assert len(seen) == 2


def test_follows_a_refiner(p, modules):
    first, second = p.sd_model.model.diffusion_model, UNet(seed=3)
    switch = {1: lambda: p.load(second, "refined")}
    mode = {"before_step": lambda step: switch.get(step, lambda: None)()}
    before = sample(p, text(1, 77, 1), text(1, 77, 2), **mode)
    p.load(first, "base")
    plan = RandomPlan()
    host().start(p, plan)
    after = sample(p, text(1, 77, 1), text(1, 77, 2), **mode)
    assert not torch.allclose(after[1], before[1])
    assert [name for name, *_ in plan.asked] == ["base", "refined"]
    assert count_hooks(first) == 0 and count_hooks(second) == 2
    host().stop()
    assert count_hooks(second) == 0


def refiner_unet():
    """Reads its own, narrower text, as the hosts would hand it."""
    unet = UNet(1280, seed=3)
    whole = unet.forward
    unet.forward = lambda x, timestep, context, **rest: whole(x, timestep, context[..., :1280], **rest)
    return unet


def test_sdxls_own_refiner_finishes_what_the_face_began(p):
    """It has no place for a face; its steps are those without one, on what the base model made of the face."""
    refiner = refiner_unet()
    switch = {1: lambda: p.load(refiner, "sd_xl_refiner")}
    plan = RandomPlan()
    host().start(p, plan)
    sample(p, text(1, 77, 1), text(1, 77, 2), before_step=lambda step: switch.get(step, lambda: None)())
    assert [name for name, *_ in plan.asked] == ["some-sdxl"]
    host().stop()
    assert count_hooks(refiner) == 0


def test_sdxls_own_refiner_where_no_face_is_to_act(p):
    """Weight 0: the image is that without PuLID, to the bit."""
    refiner, first = refiner_unet(), p.sd_model.model.diffusion_model

    def drawn() -> list[Tensor]:
        p.load(first)
        switch = {1: lambda: p.load(refiner, "sd_xl_refiner")}
        return sample(p, text(1, 77, 1), text(1, 77, 2), before_step=lambda step: switch.get(step, lambda: None)())

    before = drawn()
    host().start(p, RandomPlan(weight=0.0))
    assert same(drawn(), before)


def test_sdxls_own_refiner_before_the_face_is_refused_with_the_reason(p):
    switch = {1: lambda: p.load(refiner_unet(), "sd_xl_refiner")}
    host().start(p, RandomPlan(start=0.5))
    with pytest.raises(SettingError, match="Field start: SDXL's refiner takes over before PuLID starts"):
        sample(p, text(1, 77, 1), text(1, 77, 2), before_step=lambda step: switch.get(step, lambda: None)())


def test_sdxls_own_refiner_from_the_first_step_is_refused(p):
    p.load(UNet(1280, seed=3), "sd_xl_refiner")
    host().start(p, RandomPlan())
    with pytest.raises(UnsupportedModelError, match="refiner"):
        sample(p, text(1, 77, 1), text(1, 77, 2))


def test_a_switch_to_an_unsupported_model_ends_the_generation(p):
    host().start(p, RandomPlan())
    switch = {1: lambda: p.load(UNet(768, SD1_BLOCKS), "old-model")}
    with pytest.raises(UnsupportedModelError, match="old-model: this is a Stable Diffusion 1.x model"):
        sample(p, text(1, 77, 1), text(1, 77, 2), before_step=lambda step: switch.get(step, lambda: None)())


def test_the_plans_error_comes_out_of_the_unet(p, modules):
    host().start(p, RandomPlan(error=PulidError("unit 2: no")))
    with pytest.raises(PulidError, match="unit 2: no"):
        sample(p, text(1, 77, 1), text(1, 77, 2))
    host().stop()
    assert hooks(p) == 0 and callbacks_left(modules) == 0


def test_nothing_stays_after_an_exception_or_an_interruption(p):
    class Interrupted(BaseException):
        """Not an Exception: PyTorch does not call the hooks that are always called."""

    unet, conds, unconds = p.sd_model.model.diffusion_model, text(1, 77, 1), text(1, 77, 2)
    before = sample(p, conds, unconds)
    for error in (RuntimeError, Interrupted):

        def fail(*_, error=error):
            raise error

        host().start(p, RandomPlan())
        failing = unet.last.register_forward_pre_hook(fail)
        with pytest.raises(error):
            sample(p, conds, unconds)
        failing.remove()
        host().stop()
        assert hooks(p) == 0
        assert same(sample(p, conds, unconds), before)


def test_another_generation_is_left_alone(p):
    conds, unconds = text(1, 77, 1), text(1, 77, 2)
    inner = P(p.sd_model.model.diffusion_model)
    before = sample(inner, conds, unconds)
    host().start(p, RandomPlan())
    assert same(sample(inner, conds, unconds), before)
    assert not torch.allclose(sample(p, conds, unconds)[0], before[0])
    assert same(sample(inner, conds, unconds), before)


def test_another_generation_does_not_inherit_an_error(p):
    conds, unconds = text(1, 77, 1), text(1, 77, 2)
    inner = P(p.sd_model.model.diffusion_model)
    host().start(p, RandomPlan(error=PulidError("no")))
    with pytest.raises(PulidError):
        sample(p, conds, unconds)
    sample(inner, conds, unconds)  # no script of ours has run since


def test_another_extensions_callback_does_not_hide_ours(p, modules):
    """Later hosts keep sorted callbacks until their number changes."""
    script_callbacks = modules.script_callbacks

    def other(params):
        pass

    script_callbacks.on_cfg_denoiser(other)
    sample(p, text(1, 77, 1), text(1, 77, 2))  # the list of one is kept
    script_callbacks.remove_callbacks_for_function(other)
    plan = RandomPlan()
    host().start(p, plan)
    sample(p, text(1, 77, 1), text(1, 77, 2))
    assert plan.asked


def test_refuses_when_the_layers_do_not_run(p):
    """TensorRT and the like take the UNet's place."""
    unet = p.sd_model.model.diffusion_model
    unet.forward = lambda x, *_: x
    host().start(p, RandomPlan())
    with pytest.raises(UnsupportedModelError, match="TensorRT"):
        sample(p, text(1, 77, 1), text(1, 77, 2))
    host().start(p, RandomPlan(start=0.9))  # not active, so nothing is missing
    sample(p, text(1, 77, 1), text(1, 77, 2))


def test_refuses_what_is_not_a_samplers_call(p):
    host().start(p, RandomPlan())
    with pytest.raises(UnsupportedModelError, match="img2img alternative"):
        p.sd_model.model.diffusion_model(torch.zeros(2, 4, 8, 8), None, text(2, 77, 1))


def test_stop_lets_go_of_the_plan(p):
    plan = RandomPlan()
    host().start(p, plan)
    sample(p, text(1, 77, 1), text(1, 77, 2))
    kept = weakref.ref(plan)
    host().stop()
    host().stop()
    del plan
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "model, message",
    [
        (UNet(768, SD1_BLOCKS), "Stable Diffusion 1.x"),
        (UNet(1024, SD1_BLOCKS), "Stable Diffusion 2.x"),
        (UNet(1280, SDXL_BLOCKS), "SDXL refiner"),
        (UNet(2048, (12, 0, 22)), "shortened SDXL with 34 of 70"),
        (UNet(64, SD1_BLOCKS), "unknown UNet, with text embeddings of width 64"),
        (torch.nn.Linear(2, 2), "neither an SDXL UNet"),
        (Flux(8, 38), "this model 8 and 38"),
        (Flux(19, 37), "this model 19 and 37"),
    ],
)
def test_unsupported_models_are_named(modules, model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        host().loaded_model(P(model, "x.safetensors"))


def test_a_small_unet_with_all_of_the_sites(modules):
    """Whether its sizes fit is between it and the PuLID file."""
    assert host().loaded_model(P(UNet(64, SDXL_BLOCKS), "small.safetensors")).family == "sdxl"


def test_loaded_model(p):
    model = host().loaded_model(p)
    assert (model.family, model.name) == ("sdxl", "some-sdxl")
    assert model.denoiser is p.sd_model.model.diffusion_model
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_no_model(modules):
    with pytest.raises(UnsupportedModelError, match="No checkpoint is loaded"):
        host().loaded_model(SimpleNamespace(sd_model=None))


# ---------------------------------------------------------------- progress


def shares(sampler: str, steps: int, calls: int, sigmas: list[float] | None = None) -> list[float]:
    denoiser = Denoiser(None, total_steps=steps, sampler=SimpleNamespace(funcname=sampler))
    progress, told = Progress(), []
    for step in range(calls):
        denoiser.step = step
        told.append(progress(denoiser, torch.tensor([14.6 if sigmas is None else sigmas[step]])))
    return told


def test_progress_is_the_share_of_calls():
    assert shares("sample_euler", 4, 4) == [0, 0.25, 0.5, 0.75]
    assert shares("sample_heun", 8, 7)[:3] == [0, 0.125, 0.25]  # two calls a step, which total_steps knows


def test_progress_of_three_calls_a_step():
    assert shares("sample_heunpp2", 4, 9)[::3] == [0, 0.25, 0.5]


def test_progress_without_a_number_of_steps_is_told_by_the_noise():
    told = shares("sample_dpm_adaptive", 2, 4, [14.6, 14.6, 1.0, 0.03])
    assert told[:2] == [0, 0] and 0.4 < told[2] < 0.7 and told[3] == pytest.approx(1)


def test_progress_never_passes_one():
    assert max(shares("somebody's", 2, 9)) == 1
