"""apply() on whole diffusers pipelines: what changes, what does not, what each call gets, what is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.hosts import diffusers as host
from lib_pulid.hosts.diffusers import apply, denoiser_of
from lib_pulid.hosts.diffusers_base import Base, paint
from lib_pulid.identity import Identity
from lib_pulid.injection import DenoiseStep, Injection, compile_injection
from lib_pulid.sites import find_sites
from lib_pulid.weights import Adapter
from tests.fake_modules.models import UNet, count_hooks
from tests.small_models import TOKEN_WIDTH, normal
from tests.small_models.bases import POOLED_WIDTH, TEXT_WIDTH, small_base, small_parts

FAMILIES = ("sdxl", "flux")
STEPS = 4


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    return {family: small_parts(family)[0] for family in FAMILIES}


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {family: small_parts(family)[1] for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def base(bases, family) -> Base:
    return bases[family]


@pytest.fixture
def made(adapters, family) -> Callable[..., Injection]:
    """Compiles a person, number 1 with the negative tokens 2 by default, for the family's file."""
    return lambda seed=1, **settings: compile_injection(adapters[family], person(seed), **settings)


def tokens(seed: int) -> Tensor:
    return normal(seed, 1, 32, TOKEN_WIDTH)


def person(seed: int = 1, uncond: int | None = 2) -> Identity:
    return Identity(tokens(seed), None if uncond is None else tokens(uncond))


def text(family: str, batch: int = 1) -> dict[str, Tensor]:
    named = {"prompt_embeds": normal(21, batch, 8, TEXT_WIDTH), "pooled_prompt_embeds": normal(22, batch, POOLED_WIDTH)}
    return {**named, **negative(batch)} if family == "sdxl" else named


def negative(batch: int = 1) -> dict[str, Tensor]:
    shapes = {"negative_prompt_embeds": (8, TEXT_WIDTH), "negative_pooled_prompt_embeds": (POOLED_WIDTH,)}
    return {name: normal(23 + i, batch, *shape) for i, (name, shape) in enumerate(shapes.items())}


def draw(base: Base, injections: list[Injection] | None = None, **options: Any) -> Tensor:
    """The final latents. `injections` None: without apply()."""
    settings = {
        "num_inference_steps": STEPS,
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
        **(options if "prompt_embeds" in options else {**text(base.family), **options}),
    }
    if injections is None:
        return base.pipeline(**settings).images
    with apply(base.pipeline, injections):
        return base.pipeline(**settings).images


@dataclass
class Calls:
    """What `inject` got for each call, and the text of the call."""

    steps: list[DenoiseStep] = field(default_factory=list)
    texts: list[Tensor] = field(default_factory=list)

    @property
    def progress(self) -> list[float]:
        return [round(step.progress, 6) for step in self.steps]

    @property
    def is_cond(self) -> list:
        return [step.is_cond for step in self.steps]


@pytest.fixture
def calls(monkeypatch, bases) -> Calls:
    recorded, real = Calls(), host.inject

    def recording(sites, injections, step):
        recorded.steps.append(step)
        return real(sites, injections, step)

    def keep_text(module, args, kwargs):
        recorded.texts.append(kwargs["encoder_hidden_states"])

    monkeypatch.setattr(host, "inject", recording)
    handles = [denoiser_of(b.pipeline).register_forward_pre_hook(keep_text, with_kwargs=True) for b in bases.values()]
    yield recorded
    for handle in handles:
        handle.remove()


# ---------------------------------------------------------------- the image


def test_nothing_asked_nothing_changed(base, made):
    """Bit for bit: weight 0, a window without a step, no injection at all."""
    plain = draw(base)
    for setting in ({"weight": 0.0}, {"start": 0.8, "end": 1.0}):
        assert torch.equal(draw(base, [made(**setting)]), plain), setting
    assert torch.equal(draw(base, []), plain)


def test_masks(base, made):
    """On an image that is not square: white is no mask, black is no identity, a part is neither."""
    size = {"height": 64, "width": 128}
    left = torch.zeros(16, 32)
    left[:, :8] = 1
    masks = {"none": None, "white": torch.ones(5, 7), "black": torch.zeros(64, 128), "left": left}
    drawn = {name: draw(base, [replace(made(), mask=mask)], **size) for name, mask in masks.items()}
    assert torch.allclose(drawn["white"], drawn["none"], atol=1e-4)
    assert torch.allclose(drawn["black"], draw(base, **size), atol=1e-5)
    for name in ("none", "black"):
        assert (drawn["left"] - drawn[name]).abs().max() > 1e-3


def test_paint(base, made):
    """The image itself, as the command line makes it."""

    def painted(prompt: str = "a sailor", seed: int = 1, **settings: Any) -> np.ndarray:
        return np.asarray(paint(base, [prompt], [seed], steps=2, size=64, **settings)[0])

    plain = painted()
    assert plain.shape == (64, 64, 3)
    assert np.array_equal(plain, painted())
    for other in (painted(seed=2), painted("a baker"), painted(guidance=2)):
        assert not np.array_equal(plain, other)
    with apply(base.pipeline, [made()]):
        assert not np.array_equal(plain, painted())


def test_each_image_of_a_batch_has_its_own_people(base, made):
    """As if they were made one by one, each with its prompt and seed."""
    one, other = made(1), made(5)
    people, prompts, seeds = [[one], [], [other, one]], ["a sailor", "a baker", "a sailor"], [1, 1, 2]
    own = [replace(who, images=frozenset({i})) for i, group in enumerate(people) for who in group]
    with apply(base.pipeline, own):
        together = np.array([np.asarray(image) for image in paint(base, prompts, seeds)])
    for group, prompt, seed, image in zip(people, prompts, seeds, together):
        plain = np.asarray(paint(base, [prompt], [seed])[0])
        with apply(base.pipeline, group):
            alone = np.asarray(paint(base, [prompt], [seed])[0])
        assert bool(group) == (np.abs(alone.astype(int) - plain).max() > 2)
        assert np.abs(alone.astype(int) - image).max() <= 1


# ---------------------------------------------------------------- what each call gets


def test_progress_over_the_steps(base, calls):
    for steps in (1, 4, 5):
        calls.steps.clear()
        draw(base, [], num_inference_steps=steps, height=64, width=128)
        assert calls.progress == [round(i / steps, 6) for i in range(steps)]
        assert {step.latent_hw for step in calls.steps} == {(8, 16)}


SCHEDULERS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_progress_with_other_schedulers(bases, calls, monkeypatch, name):
    pipeline = bases["sdxl"].pipeline
    monkeypatch.setattr(pipeline, "scheduler", getattr(diffusers, name).from_config(pipeline.scheduler.config))
    draw(bases["sdxl"], [])
    assert calls.progress == [0.0, 0.25, 0.5, 0.75]


def test_progress_with_a_second_order_scheduler(bases, calls, monkeypatch):
    """Heun asks twice a step; progress never goes back and covers the whole range."""
    pipeline = bases["sdxl"].pipeline
    heun = diffusers.HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    monkeypatch.setattr(pipeline, "scheduler", heun)
    draw(bases["sdxl"], [], num_inference_steps=8)
    assert len(calls.steps) == 15
    assert calls.progress == sorted(calls.progress)
    assert calls.progress[0] == 0
    assert 0.85 < calls.progress[-1] < 1


@pytest.mark.parametrize("batch", [1, 2])
def test_sdxl_rows(bases, calls, batch):
    draw(bases["sdxl"], [], **text("sdxl", batch))
    assert calls.is_cond == [[False] * batch + [True] * batch] * STEPS
    prompt, wrong = text("sdxl", batch)["prompt_embeds"], negative(batch)["negative_prompt_embeds"]
    for rows in calls.texts:
        assert torch.equal(rows, torch.cat((wrong, prompt)))
    calls.steps.clear()
    draw(bases["sdxl"], [], guidance_scale=1.0, **text("sdxl", batch))
    assert calls.is_cond == [[True] * batch] * STEPS
    calls.steps.clear()
    draw(bases["sdxl"], [], num_images_per_prompt=3, num_inference_steps=1, **text("sdxl", batch))
    assert calls.is_cond == [[False] * 3 * batch + [True] * 3 * batch]


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("images", [1, 2])
def test_rows_of_perturbed_attention_guidance(bases, calls, guidance, images):
    """PAG's own rows read the prompt once more, and so have its identity."""
    base = bases["sdxl"]
    parts = {**base.pipeline.components, "unet": copy.deepcopy(base.pipeline.unet)}
    pipeline = diffusers.StableDiffusionXLPAGPipeline(**parts, pag_applied_layers=["mid"], add_watermarker=False)
    settings = {"guidance_scale": guidance, "num_images_per_prompt": images, "num_inference_steps": 1}
    draw(replace(base, pipeline=pipeline), [], **settings, pag_scale=3.0)
    assert calls.is_cond == [[False] * images * (guidance > 1) + [True] * 2 * images]


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_rows_of_instruct_pix2pix(bases, calls, guidance):
    parts = bases["sdxl"].pipeline.components
    config = {name: value for name, value in parts["unet"].config.items() if not name.startswith("_")}
    unet = diffusers.UNet2DConditionModel(**{**config, "in_channels": 8})
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    pipeline = diffusers.StableDiffusionXLInstructPix2PixPipeline(
        unet=unet, add_watermarker=False, **{name: parts[name] for name in names}
    )
    picture = {"image": torch.rand(1, 3, 64, 64), "image_guidance_scale": 1.5}
    draw(Base(pipeline, "sdxl", True), [], guidance_scale=guidance, num_inference_steps=1, **picture)
    assert calls.is_cond == [[True, False, False] if guidance > 1 else [True]]


class Unknown:
    """A pipeline that guides in three parts, which it does not tell."""

    scheduler = SimpleNamespace(timesteps=torch.tensor([500.0]))
    do_classifier_free_guidance = True

    def __init__(self, unet):
        self.unet = unet

    def __call__(self, rows):
        return self.unet(rows, torch.ones(1), torch.ones(len(rows), 7, 2048))


def test_rows_of_a_pipeline_that_is_not_known():
    pipeline, noise = Unknown(UNet(blocks=(1, 1, 1))), normal(1, 2, 4, 4, 4)
    pipeline(noise)
    for rows in (noise[:1], noise, noise.repeat(3, 1, 1, 1)):
        with pytest.raises(UnsupportedModelError, match="cannot tell which rows of Unknown"), apply(pipeline, []):
            pipeline(rows)
    with apply(pipeline, []):
        pipeline(noise.repeat(2, 1, 1, 1))
    del Unknown.do_classifier_free_guidance
    with pytest.raises(UnsupportedModelError, match="kind of guidance is not known"), apply(pipeline, []):
        pipeline(noise)
    assert count_hooks(pipeline.unet) == 0


def test_a_step_cache_that_keeps_blocks_is_refused(bases, adapters):
    """diffusers' own: a step that it takes from the cache has the face already."""
    base = bases["flux"]
    transformer, before = base.pipeline.transformer, draw(base)
    transformer.enable_cache(diffusers.hooks.FirstBlockCacheConfig(threshold=1e9))
    try:
        with pytest.raises(UnsupportedModelError, match="block cache .* replaced the output"):
            draw(base, [compile_injection(adapters["flux"], person())])
    finally:
        transformer.disable_cache()
    assert torch.equal(draw(base), before)


TRUE_CFG = {"true_cfg_scale": 3.0, **negative()}


def test_flux_true_cfg_rows(bases, calls):
    """The call with the prompt is cond, the one with the negative prompt is not; progress is that of the step."""
    draw(bases["flux"], [], **text("flux"), **TRUE_CFG)
    assert calls.is_cond == [True, False] * STEPS
    assert calls.progress == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    prompt, wrong = text("flux")["prompt_embeds"], TRUE_CFG["negative_prompt_embeds"]
    for is_cond, used in zip(calls.is_cond, calls.texts):
        assert torch.equal(used, prompt if is_cond else wrong)


class Breaking(Exception):
    pass


def test_flux_true_cfg_after_a_run_that_broke_off(bases, calls):
    """A run that stops between its two calls does not turn the next one's around."""
    base = bases["flux"]
    broken = base.pipeline.transformer.proj_out.register_forward_hook(_raise_at(1))
    with apply(base.pipeline, []):
        with pytest.raises(Breaking):
            _unwrapped(base, **TRUE_CFG)
        broken.remove()
        assert calls.is_cond == [True]
        calls.steps.clear()
        _unwrapped(base, **TRUE_CFG)
    assert calls.is_cond == [True, False] * STEPS


def _unwrapped(base: Base, **options: Any) -> Tensor:
    """An image inside an apply() of the caller's."""
    return draw(base, None, **text(base.family), **options)


def _raise_at(call: int) -> Mock:
    """A hook."""
    return Mock(side_effect=[*[None] * (call - 1), Breaking("in the denoiser")])


def test_flux_in_half_precision_with_many_steps(calls, monkeypatch):
    """In bfloat16 neighbouring timesteps become equal; without a negative prompt every call is cond all the same."""
    pipeline, steps = small_base("flux").pipeline, 120
    pipeline.transformer.to(torch.bfloat16)
    monkeypatch.setattr(pipeline.transformer, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    half = {name: value.bfloat16() for name, value in text("flux").items()}
    draw(Base(pipeline, "flux"), [], num_inference_steps=steps, **half)
    assert len(calls.steps) == steps
    assert calls.is_cond == [True] * steps
    for i, progress in enumerate(calls.progress):
        assert abs(progress - i / steps) < 0.02


# ---------------------------------------------------------------- image to image


def image_to_image(base: Base) -> Base:
    kind = {"sdxl": diffusers.StableDiffusionXLImg2ImgPipeline, "flux": diffusers.FluxImg2ImgPipeline}[base.family]
    keep = {} if base.family == "flux" else {"add_watermarker": False}
    pipeline = kind(**base.pipeline.components, **keep)
    pipeline.set_progress_bar_config(disable=True)
    return Base(pipeline, base.family)


def of_image(strength: float, steps: int) -> dict[str, Any]:
    picture = normal(31, 1, 3, 64, 64).clamp(-1, 1) / 2 + 0.5
    return {"image": picture, "strength": strength, "num_inference_steps": steps}


@pytest.mark.parametrize(("strength", "steps", "run"), [(0.5, 8, 4), (1.0, 4, 4), (0.3, 10, 3)])
def test_image_to_image_progress(base, calls, strength, steps, run):
    """Only the last of the scheduler's timesteps are run; progress goes over those."""
    draw(image_to_image(base), [], **of_image(strength, steps))
    assert calls.progress == [round(i / run, 6) for i in range(run)]


def test_progress_with_denoising_end(bases, calls):
    """The base of a base-and-refiner pair runs only the first of the scheduler's timesteps."""
    draw(bases["sdxl"], [], num_inference_steps=10, denoising_end=0.5)
    count = len(calls.steps)
    assert 4 <= count <= 6
    # Whether as a share of the steps that are run or of all of them: it grows from the first step on.
    assert calls.progress in ([round(i / count, 6) for i in range(count)], [round(i / 10, 6) for i in range(count)])


# ---------------------------------------------------------------- what is left behind


def test_no_hook_is_left(base, made):
    denoiser, during = denoiser_of(base.pipeline), []
    before = count_hooks(denoiser)
    handle = list(denoiser.children())[-1].register_forward_hook(lambda *_: during.append(count_hooks(denoiser)))
    with apply(base.pipeline, [made()]):
        assert count_hooks(denoiser) == before + 3  # two on the denoiser itself, and the one above
        draw(base, None)
        assert count_hooks(denoiser) == before + 3
    handle.remove()
    # While it runs: two hooks a site (on FLUX one of the two sees whether the block ran).
    assert set(during) == {before + 3 + 2 * len(find_sites(denoiser).sites)}
    assert count_hooks(denoiser) == before


def test_no_hook_is_left_after_an_exception(base, made):
    """In the midst of the denoiser; what comes after it, inside the `with` and outside, is as if nothing had been."""
    denoiser, injection = denoiser_of(base.pipeline), made()
    before, plain, changed = count_hooks(denoiser), draw(base), draw(base, [injection])
    inner = denoiser.mid_block if base.family == "sdxl" else denoiser.transformer_blocks[-1]
    with apply(base.pipeline, [injection]):
        handle = inner.register_forward_hook(_raise_at(3))
        with pytest.raises(Breaking, match="in the denoiser"):
            draw(base, None)
        handle.remove()
        assert count_hooks(denoiser) == before + 2
        assert torch.equal(draw(base, None), changed)
    assert count_hooks(denoiser) == before
    handle = inner.register_forward_hook(_raise_at(3))
    with pytest.raises(Breaking):
        draw(base, [injection])
    handle.remove()
    with pytest.raises(Breaking):
        draw(base, [injection], callback_on_step_end=_raise_at(1))
    assert count_hooks(denoiser) == before
    assert torch.equal(draw(base), plain)


def test_another_denoiser_is_refused():
    pipeline = SimpleNamespace(unet=torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="Linear is neither"), apply(pipeline, []):
        raise AssertionError


def test_several_pictures_in_one_with(base, made, calls):
    """Each as if alone, also with the same number of steps, and with one step only."""
    injection = made(start=0.25)
    options = [{}, {}, {"num_inference_steps": 1}, {"num_inference_steps": 1}, {"num_inference_steps": 3}]
    alone = [draw(base, [injection], **o) for o in options]
    calls.steps.clear()
    with apply(base.pipeline, [injection]):
        together = [draw(base, None, **o) for o in options]
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    expected = [i / n for n in (4, 4, 1, 1, 3) for i in range(n)]
    assert calls.progress == [round(p, 6) for p in expected]
    assert calls.is_cond == [[False, True] if base.family == "sdxl" else True] * len(expected)


def test_one_with_inside_another(base, made):
    one, other = made(1), made(9)
    before = count_hooks(denoiser_of(base.pipeline))
    with apply(base.pipeline, [one]):
        inner = draw(base, [other])
        assert torch.equal(draw(base, None), draw(base, []))
    assert count_hooks(denoiser_of(base.pipeline)) == before
    assert not torch.equal(inner, draw(base, [one]))
