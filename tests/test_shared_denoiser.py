"""apply() where a denoiser has other users: pipelines, threads, runs that broke off, another model in its place."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.hosts.diffusers import apply, denoiser_of
from lib_pulid.hosts.diffusers_base import Base
from lib_pulid.injection import Injection, compile_injection
from tests.fake_modules.models import count_hooks
from tests.small_models.bases import small_parts
from tests.test_diffusers_host import FAMILIES, draw, image_to_image, of_image, person, text

LAST_STEPS = of_image(0.5, 8)


@pytest.fixture(params=FAMILIES)
def base(request) -> Base:
    return small_parts(request.param)[0]


@pytest.fixture
def faces(base) -> list[Injection]:
    adapter = small_parts(base.family)[1]
    return [compile_injection(adapter, person(seed)) for seed in (1, 9)]


def with_own_scheduler(base: Base) -> Base:
    """The same models in another pipeline."""
    scheduler = base.pipeline.scheduler
    pipeline = copy.copy(base.pipeline)
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    return replace(base, pipeline=pipeline)


def in_the_middle(base: Base, hook: Callable[..., Any]) -> Any:
    """Calls the hook in the middle of each denoiser call."""
    denoiser = denoiser_of(base.pipeline)
    inner = denoiser.mid_block if base.family == "sdxl" else denoiser.transformer_blocks[5]
    return inner.register_forward_pre_hook(hook)


@pytest.mark.parametrize("own", [True, False], ids=["own scheduler", "same scheduler"])
def test_another_pipeline_around_the_denoiser(base, faces, own):
    """Its own schedule and guidance count, not those of the pipeline that apply() was given."""
    other = image_to_image(base)
    if own:
        other = with_own_scheduler(other)
    expected = draw(other, faces[:1], **LAST_STEPS)
    draw(base, guidance_scale=1.0)  # a state that is not the other's
    with apply(base.pipeline, faces[:1]):
        assert torch.equal(draw(other, None, **LAST_STEPS), expected)
    assert not torch.equal(draw(other, **LAST_STEPS), expected)


def test_two_threads(base, faces):
    """Two pipelines are in the middle of the same denoiser at once: each has its own people, or none."""
    bases, both = [base, with_own_scheduler(base)], threading.Barrier(2)
    for people in ([[], faces[:1]], [faces[:1], faces[1:]]):
        expected = [draw(one, who) for one, who in zip(bases, people)]
        with in_the_middle(base, lambda *_: both.wait(timeout=60) * 0 or None), ThreadPoolExecutor(2) as pool:
            drawn = pool.map(draw, bases, [who or None for who in people])
        assert all(map(torch.equal, drawn, expected))
    assert not torch.equal(*expected)
    assert count_hooks(denoiser_of(base.pipeline)) == 0


def test_a_thread_that_runs_the_pipeline_for_us(base, faces):
    expected = draw(base, faces)
    with apply(base.pipeline, faces), ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(draw, base, None).result()
    assert torch.equal(drawn, expected)


def test_a_keyboard_interrupt_and_once_more(base, faces):
    """In one `with`, as in a notebook: the face does not act twice."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = draw(base, faces[:1])
    with apply(base.pipeline, faces[:1]):
        with in_the_middle(base, stop), pytest.raises(KeyboardInterrupt):
            draw(base, None)
        assert torch.equal(draw(base, None), expected)
    assert count_hooks(denoiser_of(base.pipeline)) == 0


def test_another_model_in_the_denoisers_place(base, faces):
    """It has no hooks, so the face would be missing."""
    pipeline = copy.copy(base.pipeline)
    name, other = "unet" if base.family == "sdxl" else "transformer", copy.deepcopy(denoiser_of(pipeline))
    moved = replace(base, pipeline=pipeline)
    with pytest.raises(UnsupportedModelError, match="got another .* inside of `apply`"), apply(pipeline, faces):
        setattr(pipeline, name, other)
        draw(moved, None)
    with apply(pipeline, faces):
        setattr(pipeline, name, torch.compile(other, backend="eager"))  # the same model
        assert torch.equal(draw(moved, None), draw(base, faces))


@pytest.mark.parametrize("config", ["FirstBlockCacheConfig", "PyramidAttentionBroadcastConfig"])
def test_a_run_that_broke_off_leaves_no_face_in_a_step_cache(config):
    """The first is refused in its second step; in the second cache, it is the caller who stops."""
    base, adapter, _ = small_parts("flux")
    pipeline = copy.copy(base.pipeline)
    pipeline.transformer = copy.deepcopy(pipeline.transformer)
    base, one = replace(base, pipeline=pipeline), compile_injection(adapter, person())
    options = {
        "FirstBlockCacheConfig": {"threshold": 1e9},
        "PyramidAttentionBroadcastConfig": {
            "spatial_attention_block_skip_range": 3,
            "spatial_attention_timestep_skip_range": (-1, 2000),
            "current_timestep_callback": lambda: 500,
        },
    }
    pipeline.transformer.enable_cache(getattr(diffusers, config)(**options[config]))
    plain = draw(base)

    def stop(*_: Any) -> None:
        raise UnsupportedModelError("stopped")

    with pytest.raises(UnsupportedModelError):
        draw(base, [one], callback_on_step_end=stop if config.startswith("Pyramid") else None)
    assert torch.equal(draw(base), plain)


def test_compiled_for_another_dtype(base):
    """The model was moved since: computed in its dtype."""
    adapter, pipeline = small_parts(base.family)[1], copy.deepcopy(base.pipeline).to(torch.bfloat16)
    moved, prompt = replace(base, pipeline=pipeline), {k: t.bfloat16() for k, t in text(base.family).items()}
    plain, right, found = (
        draw(moved, people, **prompt)
        for people in (
            [],
            [compile_injection(adapter, person(), dtype=torch.bfloat16)],
            [compile_injection(adapter, person())],
        )
    )
    assert (found - right).abs().max() < 0.1 * (right - plain).abs().max()


def test_autocast(base, faces):
    with torch.autocast("cpu", torch.bfloat16):
        effect = (draw(base, faces[:1]) - draw(base)).float()
    expected = draw(base, faces[:1]) - draw(base)
    assert (effect - expected).abs().max() < 0.2 * expected.abs().max()
