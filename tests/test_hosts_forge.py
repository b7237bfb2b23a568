"""hosts.forge against a small stand-in for Forge: SDXL and FLUX, wrappers of others, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_pulid import hosts
from lib_pulid.errors import UnsupportedModelError
from lib_pulid.injection import DenoiseStep
from tests.fake_modules import installed
from tests.fake_modules.forge import P, sample
from tests.fake_modules.models import Flux, pack_layers, same, small_unet, text
from tests.fake_modules.plan import RandomPlan

pytestmark = pytest.mark.usefixtures("no_grad")

SLOT = "model_function_wrapper"
FLUX_TEXT = text(256, width=6)


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


def unet(p: P):
    return p.sd_model.forge_objects.unet


def run(
    p: P,
    plan: RandomPlan | None = None,
    conds: Sequence[Tensor] = (text(),),
    unconds: Sequence[Tensor] = (text(seed=2),),
    before: Callable[[P], Any] = lambda p: None,
    after: Callable[[P], Any] = lambda p: None,
    **how: Any,
) -> list[Tensor]:
    """A generation. before, after: what another extension does before and after our `before_sampling`."""

    def before_sampling(p: P) -> None:
        for act in (before, host().before_sampling, after):
            act(p)

    with nullcontext() if plan is None else host().sampling(p, plan):
        return sample(p, list(conds), list(unconds), before_sampling=before_sampling, **how)


def run_flux(plan: RandomPlan | None, p: P | None = None, **how: Any) -> list[Tensor]:
    """Without a negative prompt."""
    return run(p or P(Flux(), "flux-dev"), plan, [FLUX_TEXT], [], **how)


def set_wrapper(wrapper: Callable) -> Callable[[P], None]:
    return lambda p: unet(p).set_model_unet_function_wrapper(wrapper)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("lengths", [(77, 77), (154, 77), (77, 154)])
@pytest.mark.parametrize("guided", [True, False])
def test_rows(p, family, pictures, lengths, guided):
    """Only cond rows get the identity when there is no uncond identity. Calls are [uncond, cond], or two."""
    p, width = (p, 2048) if family == "sdxl" else (P(Flux(), "flux-dev"), 6)
    conds = [text(lengths[0], seed, pictures, width) for seed in (1, 3)]
    unconds = [text(lengths[1], 2, pictures, width)] if guided else []
    before, after = (run(p, plan, conds, unconds, steps=1) for plan in (None, RandomPlan(has_uncond=False)))
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
    before, after = (run_flux(plan, p) for plan in (None, RandomPlan()))
    assert not torch.allclose(after[0], before[0])
    assert same(before, run_flux(RandomPlan(weight=0.0), p))


@pytest.mark.parametrize("calls", [1, 2])
def test_start_step(calls):
    """The random latents of these calls do not depend on one another, so each tells whether the face acted."""
    plan, how = RandomPlan(), {"steps": 4, "calls_per_step": calls}
    plain, whole = run_flux(None, **how), run_flux(plan, **how)
    assert plan.steps == [4]  # once a pass it is asked whether the face acts in so many steps
    for start in range(4):
        made = run_flux(RandomPlan(start_step=start), **how)
        for i in range(4 * calls):
            assert torch.equal(made[i], (plain if i // calls < start else whole)[i])


def true_cfg(plan: RandomPlan | None, **settings) -> list[int]:
    """Rows in each step's call with two images: two where the negative prompt is left out, else four."""
    p = P(Flux(), "flux-dev")
    vars(p).update(settings)
    made = run(p, plan, [text(256, 1, 2, 6)], [text(256, 2, 2, 6)], steps=4)
    assert unet(p).model_options.get("conditioning_modifiers", []) == []
    return [len(out) for out in made]


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

    def count(p):
        assert len(unet(p).model_options["conditioning_modifiers"]) == 2

    p, negative = P(Flux(), "flux-dev"), text(256, 2, width=6)
    add = lambda p: unet(p).add_conditioning_modifier(other)  # noqa: E731
    run(p, RandomPlan(cfg_from=2), [FLUX_TEXT], [negative], before=add, after=count, steps=3)
    assert seen == [7.0] * 3
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


@pytest.mark.parametrize("denoiser, width, family", [(small_unet, 2048, "sdxl"), (Flux, 6, "flux")])
def test_packed_weights_are_not_taken_for_sizes(small_sdxl, denoiser, width, family):
    """nf4: family and image are those of the same layers in 16 bits; those of GGUF lack in_features."""
    seen = []
    for packed in (False, True):
        p = P(denoiser(), "nf4")
        if packed:
            pack_layers(unet(p).model)
        seen.append(run(p, RandomPlan(), [text(width=width)], [], steps=1))
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
        calls.clear()
        turn = {"before" if first else "after": partial(set_other, chain=chain)}
        assert same(run(p, RandomPlan(), **turn), expected)
        assert len(calls) == 2


def test_another_wrapper_in_the_place_of_ours_in_every_step_is_refused(p, modules):
    """One that is put there after our callback, and does not call what it found."""

    def other(apply_model, args):
        return apply_model(args["input"], args["timestep"], **args["c"])

    modules.script_callbacks.on_cfg_denoiser(lambda _: set_wrapper(other)(p))
    assert same(run(p, RandomPlan(weight=0.0)), run(p))
    with pytest.raises(UnsupportedModelError, match="wrapper"):
        run(p, RandomPlan())


def steps_seen(p: P, wrapper: Callable, pictures: int = 1) -> list[DenoiseStep]:
    """Of each denoiser call, with a wrapper between ours and the denoiser."""
    seen, first = [], p.denoiser.first
    spy = first.register_forward_hook(lambda *_: seen.append(host().running[0]._step))
    texts = [text(pictures=pictures)], [text(seed=2, pictures=pictures)]
    run(p, RandomPlan(), *texts, before=set_wrapper(wrapper), steps=1)
    spy.remove()
    return seen


def test_tiles(p):
    """MultiDiffusion repeats the stack of rows for each of three tiles."""

    def tiled(apply_model, args):
        c = {**args["c"], "c_crossattn": args["c"]["c_crossattn"].repeat(3, 1, 1)}
        parts = apply_model(args["input"][..., :4].repeat(3, 1, 1, 1), args["timestep"].repeat(3), **c)
        return torch.cat((parts[:4], parts[4:8]), dim=3)

    (step,) = steps_seen(p, tiled, pictures=2)
    assert step.is_cond == [False, False, True, True] * 3
    assert step.latent_hw == (8, 4)


def test_a_guidance_that_calls_with_the_negative_prompt_alone(p):
    """Self-attention guidance does so in the prompt's place: those rows are negative ones all the same."""

    def guided(apply_model, args):
        again = {**args["c"], "c_crossattn": text(seed=2)}
        again["transformer_options"] = {**args["c"]["transformer_options"], "cond_or_uncond": [0]}
        apply_model(args["input"][:1], args["timestep"][:1], **again)
        return apply_model(args["input"], args["timestep"], **args["c"])

    assert [step.is_cond for step in steps_seen(p, guided)] == [[False], [False, True]]


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
