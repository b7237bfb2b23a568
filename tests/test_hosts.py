"""What holds in A1111 and Forge alike, on small stand-ins for both: what a face changes, what ends a generation, and
that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from lib_pulid import hosts
from lib_pulid.errors import PulidError, SettingError, UnsupportedModelError
from tests.fake_modules import installed
from tests.fake_modules.kinds import A1111, Forge, Kind
from tests.fake_modules.models import SD1_BLOCKS, UNet, count_hooks, same, small_unet
from tests.fake_modules.plan import RandomPlan


@pytest.fixture(params=[("a1111", True), ("a1111", False), ("forge", True)], ids=["a1111", "a1111 1.8", "forge"])
def kind(request, small_sdxl) -> Iterator[Kind]:
    name, since_1_9 = request.param
    with installed(name, since_1_9), torch.no_grad():
        yield {"a1111": A1111, "forge": Forge}[name]()
        hosts.current().stop()


@pytest.fixture
def p(kind) -> Any:
    return kind.P(small_unet(), "base")


def test_a_face_changes_its_steps_and_leaves_nothing(kind, p):
    before = kind.run(p, steps=4)
    after = kind.run(p, RandomPlan(start=0.25, end=0.75), steps=4)
    assert [not torch.equal(a, b) for a, b in zip(after, before)] == [False, True, True, False]
    assert not torch.allclose(after[1], before[1])
    assert kind.left(p) == 0
    assert same(kind.run(p, steps=4), before)
    assert same(kind.run(p, RandomPlan(weight=0.0), steps=4), before)


def test_a_mask_where_only_a_crop_is_inpainted(kind, p):
    """The crop has the mask's own part: nothing of it, all of it, its left half."""
    image, mask, half = Image.new("RGB", (128, 64)), torch.zeros(8, 16), torch.zeros(8, 8)
    mask[:, :8] = half[:, :4] = 1
    vars(p).update(init_images=[image], image_mask=image, inpaint_full_res=True, resize_mode=0, width=64, height=64)
    for left, part in {64: torch.zeros(8, 8), 0: torch.ones(8, 8), 32: half}.items():
        p.paste_to = (left, 0, 64, 64)
        found = kind.run(p, RandomPlan(mask=mask))
        assert same(found, kind.run(kind.P(p.denoiser), RandomPlan(mask=part))), left


def test_masks_in_tiles_are_refused(kind, p):
    """Tiled Diffusion and MultiDiffusion call the denoiser with parts that do not tell where they lie."""
    first = p.denoiser.register_forward_pre_hook(lambda module, args: (args[0][..., :4], *args[1:]))
    with pytest.raises(SettingError, match="Field mask: .*MultiDiffusion, Tiled Diffusion"):
        kind.run(p, RandomPlan(mask=torch.ones(4, 4)))
    first.remove()
    assert kind.left(p) == 0
    assert not same(kind.run(p, RandomPlan(mask=torch.ones(4, 4))), kind.run(p))


@pytest.mark.parametrize("change", [lambda x: x.repeat(2, 1, 1), lambda x: x[:1]], ids=["couple", "regional"])
def test_prompts_by_region_that_change_the_rows_of_a_layer_are_refused(kind, p, change):
    """Forge Couple repeats the prompt's rows inside a layer, Regional Prompter calls it with half of them."""
    layer = p.denoiser.middle_block[0].attn2
    forward = type(layer).forward
    layer.forward = lambda x, context: forward(layer, change(x), change(context))[:1].expand(len(x), -1, -1)
    assert kind.run(p)
    with pytest.raises(SettingError, match="Forge Couple, Regional Prompter.*regions of its own"):
        kind.run(p, RandomPlan())
    assert kind.left(p) == 0


def test_the_layers_are_gone_through_once_for_a_model(kind, p, monkeypatch):
    """Not in each step: that takes milliseconds. To the first cross-attention is not far."""
    unet, walks, named_modules = p.denoiser, [], nn.Module.named_modules
    tops = {unet, *unet.children()}

    def counted(module: nn.Module, *args: Any, **how: Any) -> Iterator[tuple[str, nn.Module]]:
        yield from named_modules(module, *args, **how)
        if module in tops:
            walks.append(module)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    counts = []
    for steps in (2, 6):
        walks.clear()
        kind.run(p, RandomPlan(), steps=steps)
        counts.append(len(walks))
    assert counts[0] == counts[1] > 0


# ---------------------------------------------------------------- another model in the middle


def switch(p: Any, denoiser: nn.Module, name: str) -> Callable[[int], None]:
    """Exchanges the model before the second step."""
    return lambda step: p.load(denoiser, name) if step == 1 else None


def refiner_unet() -> UNet:
    """SDXL's own; reads a narrower text, as the hosts would hand it."""
    unet = small_unet(1280, seed=3)
    whole = unet.forward
    unet.forward = lambda x, timesteps, context, **rest: whole(x, timesteps, context[..., :1280], **rest)
    return unet


def test_follows_a_refiner(kind, p):
    first, second, plan = p.denoiser, small_unet(seed=3), RandomPlan()
    before = kind.run(p, before_step=switch(p, second, "refined"))
    p.load(first, "base")
    after = kind.run(p, plan, before_step=switch(p, second, "refined"))
    assert not torch.allclose(after[1], before[1])
    assert [name for name, *_ in plan.asked] == ["base", "refined"]
    assert count_hooks(first) == count_hooks(second) == 0


def test_sdxls_own_refiner_finishes_what_the_face_began(kind, p):
    """It has no place for a face; its steps are those without one, on what the base model made of the face. At weight 0
    the image is that without PuLID, to the bit."""
    plan, refiner, first = RandomPlan(), refiner_unet(), p.denoiser
    made = []
    for one in (None, RandomPlan(weight=0.0), plan):
        p.load(first, "base")
        made.append(kind.run(p, one, before_step=switch(p, refiner, "sd_xl_refiner")))
    assert same(made[0], made[1]) and not same(made[0], made[2])
    assert [name for name, *_ in plan.asked] == ["base"]
    assert count_hooks(refiner) == 0


def test_a_switch_to_a_model_without_a_place_for_the_face_ends_the_generation(kind, p):
    """Before the face began, or to an unsupported model."""
    first = p.denoiser
    with pytest.raises(SettingError, match="Field start: SDXL's refiner takes over before PuLID starts"):
        kind.run(p, RandomPlan(start=0.5), before_step=switch(p, refiner_unet(), "sd_xl_refiner"))
    p.load(first)
    with pytest.raises(UnsupportedModelError, match="old-model: this is a Stable Diffusion 1.x model"):
        kind.run(p, RandomPlan(), before_step=switch(p, UNet(768, SD1_BLOCKS), "old-model"))


def test_the_plans_error_comes_out_of_the_denoiser_and_meets_nobody_else(kind, p):
    other = kind.P(p.denoiser)
    hosts.current().start(p, RandomPlan(error=PulidError("unit 2: no")))
    with pytest.raises(PulidError, match="unit 2: no"):
        kind.sample(p)
    kind.sample(other)  # no script of ours has run since
    hosts.current().stop()
    assert kind.left(p) == 0


def test_loaded_model(kind, p):
    model = hosts.current().loaded_model(p)
    assert (model.family, model.name) == ("sdxl", "base")
    assert model.denoiser is p.denoiser
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    with pytest.raises(UnsupportedModelError, match="No checkpoint is loaded"):
        hosts.current().loaded_model(SimpleNamespace(sd_model=None))
    with pytest.raises(UnsupportedModelError, match="SDXL or FLUX.1 checkpoint|an SDXL checkpoint"):
        hosts.current().loaded_model(kind.P(UNet(1280), "refiner"))
