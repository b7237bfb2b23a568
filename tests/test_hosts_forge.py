"""hosts.forge against a small stand-in for Forge: SDXL and FLUX, wrappers of others, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import weakref
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from lib_pulid import hosts
from lib_pulid.errors import UnsupportedModelError
from tests.fake_modules import installed, kinds
from tests.fake_modules.forge import P, sample
from tests.fake_modules.models import Flux, pack_layers, same, small_unet, text
from tests.fake_modules.plan import RandomPlan

pytestmark = pytest.mark.usefixtures("no_grad")

SLOT = "model_function_wrapper"


@pytest.fixture(autouse=True)
def modules():
    with installed("forge") as found:
        yield found
        host().stop()


@pytest.fixture
def p(small_sdxl) -> P:
    return P(small_unet())


def host():
    return hosts.current()


run = kinds.Forge().run


def unet(p: P):
    return p.sd_model.forge_objects.unet


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("lengths", [(77, 77), (154, 77), (77, 154)])
@pytest.mark.parametrize("guided", [True, False])
def test_rows(p, family, pictures, lengths, guided):
    """Only cond rows get the identity when there is no uncond identity. Calls are [uncond, cond], or two."""
    p, width = (p, 2048) if family == "sdxl" else (P(Flux(), "flux-dev"), 6)
    conds = [text(lengths[0], seed, pictures, width) for seed in (1, 3)]
    unconds = [text(lengths[1], 2, pictures, width)] if guided else []
    before, after = (
        run(p, plan, conds=conds, unconds=unconds, steps=1) for plan in (None, RandomPlan(has_uncond=False))
    )
    changed = [not torch.allclose(x, y, atol=1e-3) for x, y in zip(torch.cat(after), torch.cat(before))]
    cond, uncond = [True] * 2 * pictures, [False] * pictures * len(unconds)
    assert changed == (uncond + cond if lengths[0] == lengths[1] else cond + uncond)


def test_chroma_passes_for_flux_where_it_is_asked_for(modules, monkeypatch):
    """Refused unless the setting is on; the message names the setting."""
    chroma = Flux()
    chroma.distilled_guidance_layer = torch.nn.Identity()
    p, settings = P(chroma, "chroma"), ModuleType("modules.shared")
    settings.opts = SimpleNamespace(data={})
    monkeypatch.setitem(sys.modules, "modules.shared", settings)
    with pytest.raises(UnsupportedModelError, match="chroma: Chroma has.*Settings, PuLID"):
        host().loaded_model(p)
    settings.opts.data["pulid_chroma"] = True
    assert host().loaded_model(p).family == "flux"
    before, after = (run(p, plan, unconds=[], **FLUX) for plan in (None, RandomPlan()))
    assert not torch.allclose(after[0], before[0])
    assert same(before, run(p, RandomPlan(weight=0.0), unconds=[], **FLUX))


FLUX = {"conds": [text(256, width=6)], "channels": 4}


def flux_steps(plan: RandomPlan | None, steps: int = 4, calls: int = 1, **how) -> list[Tensor]:
    return run(P(Flux(), "flux-dev"), plan, unconds=[], steps=steps, calls_per_step=calls, **FLUX, **how)


@pytest.mark.parametrize("calls", [1, 2])
def test_start_step(calls):
    """The random latents of these calls do not depend on one another, so each tells whether the face acted."""
    plan = RandomPlan()
    plain, whole = flux_steps(None, calls=calls), flux_steps(plan, calls=calls)
    assert plan.steps == [4]  # once a pass it is asked whether the face acts in so many steps
    for start in range(4):
        made = flux_steps(RandomPlan(start_step=start), calls=calls)
        for i in range(4 * calls):
            assert torch.equal(made[i], (plain if i // calls < start else whole)[i])


def true_cfg(plan: RandomPlan | None, before_sampling=None, **settings) -> list[int]:
    """Rows in each step's call with two images: two where the negative prompt is left out, else four."""
    p = P(Flux(), "flux-dev")
    vars(p).update(settings)
    if plan is not None:
        host().start(p, plan)
    try:
        before = before_sampling or host().before_sampling
        conds, unconds = [text(256, 1, 2, 6)], [text(256, 2, 2, 6)]
        return [len(out) for out in sample(p, conds, unconds, before_sampling=before, steps=4)]
    finally:
        host().stop()
        assert unet(p).model_options.get("conditioning_modifiers", []) == []


def test_the_first_steps_without_negative_prompt():
    assert true_cfg(None) == true_cfg(RandomPlan()) == [4, 4, 4, 4]
    assert true_cfg(RandomPlan(cfg_from=1)) == [2, 4, 4, 4]
    assert true_cfg(RandomPlan(cfg_from=3)) == [2, 2, 2, 4]
    assert true_cfg(RandomPlan(cfg_from=9)) == [2, 2, 2, 2]
    assert true_cfg(RandomPlan(cfg_from=1), is_hr_pass=True, cfg_scale=1) == [2, 4, 4, 4]


def test_others_may_change_the_guidance_too():
    seen = []

    def other(model, x, timestep, uncond, cond, cond_scale, model_options, seed):
        seen.append(cond_scale)
        return model, x, timestep, uncond, cond, cond_scale, model_options, seed

    def both(p):
        unet(p).add_conditioning_modifier(other)
        host().before_sampling(p)

    p = P(Flux(), "flux-dev")
    host().start(p, RandomPlan(cfg_from=2))
    sample(p, [text(256, width=6)], [text(256, 2, width=6)], before_sampling=both, steps=3)
    assert seen == [7.0] * 3
    assert len(unet(p).model_options["conditioning_modifiers"]) == 2
    host().stop()
    assert unet(p).model_options["conditioning_modifiers"] == [other]


@pytest.mark.parametrize(
    ("settings", "guided"),
    [
        ({"cfg_scale": 7.0}, True),
        ({"cfg_scale": 1}, False),
        ({"cfg_scale": 1.0, "uc": "negative prompt"}, True),  # a host that reads it all the same
        ({"cfg_scale": 1, "hr_cfg": 3.0, "is_hr_pass": True}, True),
        ({"cfg_scale": 3.0, "uc": "of the first pass", "hr_cfg": 1.0, "is_hr_pass": True}, False),
    ],
)
def test_tells_whether_negative_rows_may_come(settings, guided):
    p = P(Flux(), "flux-dev")
    vars(p).update(settings)
    plan = RandomPlan()
    host().start(p, plan)
    host().before_sampling(p)
    assert plan.guided == [guided]


@pytest.mark.parametrize("hw", [(8, 8), (6, 10)])
def test_reference_tokens_of_kontext_get_no_identity(hw):
    p, seen = P(Flux(reference=5), "kontext"), []
    block = unet(p).model.diffusion_model.double_blocks[1]
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["img"]), with_kwargs=True)
    for plan in (None, RandomPlan()):
        run(p, plan, conds=[text(256, width=6)], unconds=[], steps=1, hw=hw)
    handle.remove()
    changed = (seen[1] != seen[0]).any(2)[0]
    assert changed.tolist() == [True] * (hw[0] * hw[1] // 4) + [False] * 5


@pytest.mark.parametrize("denoiser, width, family", [(small_unet, 2048, "sdxl"), (Flux, 6, "flux")])
def test_packed_weights_are_not_taken_for_sizes(small_sdxl, denoiser, width, family):
    """nf4: family and image are those of the same layers in 16 bits; those of GGUF lack in_features."""
    seen = []
    for packed in (False, True):
        p = P(denoiser(), "nf4")
        if packed:
            pack_layers(unet(p).model)
        seen.append(run(p, RandomPlan(), conds=[text(width=width)], unconds=[], steps=1))
        assert host().loaded_model(p).family == family
    assert same(*seen)
    p = P(denoiser(), "gguf")
    for layer in unet(p).model.modules():
        vars(layer).pop("in_features", None)
    assert host().loaded_model(p).family == family


@pytest.mark.parametrize("first", [True, False])
def test_chains_another_wrapper(p, first):
    """Ours lies around the one that is there; one that comes later calls ours or does not."""
    calls = []

    def set_other(p, chain: bool) -> None:
        patched = unet(p).clone()
        previous = patched.model_options.get(SLOT)

        def other(apply_model, args):
            calls.append(args["cond_or_uncond"])
            if chain and previous is not None:
                return previous(apply_model, args)
            return apply_model(args["input"], args["timestep"], **args["c"])

        patched.set_model_unet_function_wrapper(other)
        p.sd_model.forge_objects.unet = patched

    expected = run(p, RandomPlan())
    for chain in (True, False):

        def both(p, chain=chain):
            steps = [lambda: host().before_sampling(p), lambda: set_other(p, chain)]
            for step in steps[::-1] if first else steps:
                step()

        host().start(p, RandomPlan())
        calls.clear()
        found = sample(p, [text()], [text(seed=2)], before_sampling=both)
        assert same(found, expected)
        assert len(calls) == 2
        host().stop()


def test_another_wrapper_in_the_place_of_ours_in_every_step_is_refused(p, modules):
    """One that is put there after our callback, and does not call what it found."""

    def other(apply_model, args):
        return apply_model(args["input"], args["timestep"], **args["c"])

    modules.script_callbacks.on_cfg_denoiser(lambda _: unet(p).set_model_unet_function_wrapper(other))
    plain = run(p, None)
    for weight, expected in ((0.0, nullcontext()), (1.0, pytest.raises(UnsupportedModelError, match="wrapper"))):
        with expected, host().sampling(p, RandomPlan(weight=weight)):
            assert same(sample(p, [text()], [text(seed=2)], before_sampling=host().before_sampling), plain)


def tiled(apply_model, args):
    """As MultiDiffusion, between our wrapper and the denoiser: repeats the stack of rows for each of three tiles."""
    c = {**args["c"], "c_crossattn": args["c"]["c_crossattn"].repeat(3, 1, 1)}
    parts = apply_model(args["input"][..., :4].repeat(3, 1, 1, 1), args["timestep"].repeat(3), **c)
    return torch.cat((parts[:4], parts[4:8]), dim=3)


def sample_tiled(p):
    def before(p):
        unet(p).set_model_unet_function_wrapper(tiled)
        host().before_sampling(p)

    sample(p, [text(pictures=2)], [text(seed=2, pictures=2)], before_sampling=before, steps=1)


def test_tiles(p):
    seen = []
    host().start(p, RandomPlan())
    denoiser = unet(p).model.diffusion_model
    spy = denoiser.first.register_forward_hook(lambda *_: seen.append(host().running[0]._step))
    sample_tiled(p)
    spy.remove()
    del unet(p).model_options[SLOT]
    assert seen[0].is_cond == [False, False, True, True] * 3
    assert seen[0].latent_hw == (8, 4)


def test_a_guidance_that_calls_with_the_negative_prompt_alone(p, modules):
    """Self-attention guidance does so in the prompt's place: those rows are negative ones all the same."""
    seen, negative = [], text(seed=2)

    def guided(apply_model, args):
        again = {**args["c"], "c_crossattn": negative}
        again["transformer_options"] = {**args["c"]["transformer_options"], "cond_or_uncond": [0]}
        apply_model(args["input"][:1], args["timestep"][:1], **again)
        return apply_model(args["input"], args["timestep"], **args["c"])

    def before(p):
        unet(p).set_model_unet_function_wrapper(guided)
        host().before_sampling(p)

    host().start(p, RandomPlan())
    layer = unet(p).model.diffusion_model.first
    spy = layer.register_forward_hook(lambda *_: seen.append(host().running[0]._step.is_cond))
    sample(p, [text()], [negative], before_sampling=before, steps=1)
    spy.remove()
    assert seen == [[False], [False, True]]


def test_patches_once_a_pass_and_tells_the_memory(p):
    """Whoever kept the patched unet finds it without effect after `stop`, which lets go of the plan."""
    plan, before = RandomPlan(), run(p, None)
    host().start(p, plan)
    for _ in range(2):
        host().before_sampling(p)
    patched = unet(p)
    assert patched.preserved > 0
    assert patched.model_options[SLOT].previous is None
    clone = patched.clone()
    assert clone.model_options[SLOT] is patched.model_options[SLOT]  # deep-copied, but not what it holds
    assert copy.deepcopy(patched.model_options)[SLOT] is patched.model_options[SLOT]
    sample(p, [text()], [text(seed=2)], before_sampling=host().before_sampling)
    kept, held = weakref.ref(plan), unet(p).clone()
    host().stop()

    def put_back(p):
        p.sd_model.forge_objects.unet = held

    assert same(sample(p, [text()], [text(seed=2)], before_sampling=put_back), before)
    del plan
    gc.collect()
    assert kept() is None and SLOT in held.model_options


def test_whether_the_page_tells_errors(p):
    """reForge and Forge Classic lose what is raised in their main thread; the API does not go through it."""
    main_thread = importlib.import_module("modules_forge.main_thread")
    assert host().tells_errors(p)
    del main_thread.last_exception
    assert not host().tells_errors(p)
    p.is_api = True
    assert host().tells_errors(p)
