"""What runs in the place of the denoiser's blocks: compiled code, engines, step caches. Right, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_pulid.errors import UnsupportedModelError
from lib_pulid.hosts.diffusers import apply
from lib_pulid.injection import DenoiseStep, Injection, inject
from lib_pulid.sites import find_sites
from lib_pulid.watch import Watch, uncompiled
from tests.fake_modules.models import Flux, UNet, count_hooks
from tests.fake_modules.plan import RandomPlan
from tests.small_models import normal

pytestmark = pytest.mark.usefixtures("no_grad")

STEP = DenoiseStep(0.0, True)


def face(denoiser: nn.Module, factor: float = 1.0, **settings: Any) -> Injection:
    model = SimpleNamespace(name="", guided=False, family=find_sites(denoiser).family, denoiser=denoiser)
    return RandomPlan(weight=factor, **settings).injections(model, hires=False)[0]


def small_unet() -> UNet:
    return UNet(blocks=(1, 1, 1))


def call(denoiser: nn.Module, seed: int = 1) -> Tensor:
    text_width = 2048 if find_sites(denoiser).family == "sdxl" else 6
    return denoiser(normal(seed, 1, 4, 4, 4), torch.ones(1), normal(seed, 1, 7, text_width))


def with_face(denoiser: nn.Module, injections: Sequence[Injection], seed: int = 1) -> Tensor:
    with inject(denoiser, injections, STEP):
        return call(denoiser, seed)


def whole(unet: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(unet, backend="eager", **options)


def in_place(unet: nn.Module, **options: Any) -> nn.Module:
    unet.compile(backend="eager", **options)
    return unet


def by_block(unet: nn.Module, **options: Any) -> nn.Module:
    for block in unet.middle_block:
        block.compile(backend="eager", **options)
    return unet


def test_uncompiled_in_two_threads() -> None:
    """The one that ends last does not leave everything uncompiled."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(nn.Linear(1, 1), backend=backend)
    one, other = uncompiled(), uncompiled()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    compiled(torch.ones(1))
    assert not graphs
    other.__exit__(None, None, None)
    compiled(torch.ones(1))
    assert graphs


@pytest.mark.parametrize("how", [whole, in_place, by_block])
@pytest.mark.parametrize("options", [{}, {"fullgraph": True}], ids=["", "fullgraph"])
def test_compiled_and_warm(how: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    """Compiled by images without a face: each face acts as in the model as it was written, and only its own."""
    plain = small_unet()
    faces = [[face(plain)], [face(plain, 0.5)], [face(plain), face(plain, 0.5)]]
    expected = [call(plain), *(with_face(plain, one) for one in faces)]
    compiled = how(small_unet(), **options)
    call(compiled)
    found = [call(compiled), *(with_face(compiled, one) for one in faces)]
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(call(compiled), expected[0], atol=1e-5)
    assert (expected[1] - expected[0]).abs().max() > 1e-2


def test_compiled_and_cold() -> None:
    """A face in the very first call is not compiled into the model."""
    compiled, plain = whole(small_unet()), small_unet()
    first = with_face(compiled, [face(plain)])
    assert torch.allclose(first, with_face(plain, [face(plain)]), atol=1e-5)
    assert torch.allclose(call(compiled), call(plain), atol=1e-5)


def test_compiled_where_torch_cannot_step_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.6: refused."""
    monkeypatch.delattr(torch.compiler, "set_stance")
    compiled = whole(small_unet())
    call(compiled)
    with pytest.raises(UnsupportedModelError, match="bypasses the layers"):
        with_face(compiled, [face(small_unet())])


class Pipeline:
    """As much of a diffusers pipeline as `apply` reads."""

    do_classifier_free_guidance = False

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def __call__(self, steps: int = 2) -> Tensor:
        self.scheduler = SimpleNamespace(timesteps=torch.linspace(999, 1, steps))
        x, text = normal(1, 1, 4, 4, 4), normal(1, 1, 7, 2048)
        for t in self.scheduler.timesteps:
            x = x - self.unet(x, t, text)
        return x


def test_something_else_in_the_place_of_the_layers() -> None:
    """Of one, whose weights are used while its modules are not called; then of all."""
    unet = small_unet()
    one, layer = face(unet), unet.middle_block[0].attn2
    layer.forward = lambda x, context: nn.functional.linear(x, layer.to_q.weight)
    with pytest.raises(UnsupportedModelError, match=r"bypasses the layers PuLID needs: 2 of 3 ran"):
        with_face(unet, [one])
    unet.forward = lambda x, *_: x
    with pytest.raises(UnsupportedModelError, match="TensorRT.*bypasses the layers"):
        with_face(unet, [one])
    assert count_hooks(unet) == 0
    with inject(unet, [face(small_unet(), start=0.5)], STEP):
        call(unet)  # nothing is to act


def test_a_pipeline_with_something_else_in_the_place_of_the_layers() -> None:
    pipeline = Pipeline(small_unet())
    one, late = face(pipeline.unet), face(pipeline.unet, start=0.5)
    pipeline.unet.forward = lambda x, *_: x
    with pytest.raises(UnsupportedModelError, match="bypasses the layers"), apply(pipeline, [one]):
        pipeline()
    with pytest.raises(UnsupportedModelError, match="The face was never added"), apply(pipeline, [late]):
        pipeline()
    assert count_hooks(pipeline.unet) == 0


def run_blocks(flux: Flux, x: Tensor, text: Tensor, run: Callable[..., Any]) -> Tensor:
    """Flux.forward without its first and last layers. run: calls a block."""
    img, txt = flux.img_in(x.flatten(1).view(1, -1, 16)), flux.txt_in(text)
    for block in flux.double_blocks:
        img, txt = run(block, img=img, txt=txt, vec=None, pe=None)
    both = torch.cat((txt, img), dim=1)
    for block in flux.single_blocks:
        both = run(block, both, vec=None, pe=None)
    return both[:, txt.shape[1] :]


def test_blocks_that_are_not_called_as_modules() -> None:
    flux = Flux()
    one = face(flux)
    flux.forward = lambda x, _, text: run_blocks(
        flux, x, text, lambda block, *args, **named: block.forward(*args, **named)
    )
    with pytest.raises(UnsupportedModelError, match="ran without its hooks"):
        with_face(flux, [one])


def sampled(denoiser: nn.Module, injections: Sequence[Injection], steps: int = 3) -> list[Tensor]:
    """The denoiser's outputs in a sampling whose steps are all alike."""
    watch = Watch()
    sites, made = watch.over(find_sites(denoiser)), []
    for i in range(steps):
        step = DenoiseStep(i / steps, True)
        with inject(sites, injections, step):
            made.append(call(denoiser))
        watch.check_call(any(injection.is_active(step) for injection in injections))
    watch.check_end()
    return made


def kept(module: nn.Module, meanwhile: Callable[..., Any] = lambda *args: None) -> None:
    """Puts a cache before the module: what it returns first is returned from then on. meanwhile: what runs instead."""
    run, cache = module.forward, []

    def forward(*args: Any, **named: Any) -> Any:
        if cache:
            meanwhile(*args)
        else:
            cache.append(run(*args, **named))
        return cache[0]

    module.forward = forward


def first_block_runs(flux: Flux) -> None:
    """As in Forge's extensions: the blocks behind it are not even called."""
    first, packed = flux.double_blocks[0], lambda x: flux.img_in(x.flatten(1).view(1, -1, 16))
    kept(flux, lambda x, _, text: first(img=packed(x), txt=flux.txt_in(text), vec=None, pe=None))


CACHES = {
    "TeaCache, SDXL": (small_unet, kept), "TeaCache, FLUX": (Flux, kept), "first block": (Flux, first_block_runs),
    "DeepCache": (small_unet, lambda unet: kept(unet.middle_block[0])),
}  # fmt: skip


@pytest.mark.parametrize(("make", "put_cache"), CACHES.values(), ids=CACHES)
def test_a_cache_of_what_has_the_face(make: Callable[[], nn.Module], put_cache: Callable[[Any], None]) -> None:
    """Of whole steps or of deep blocks: what is skipped is as in the step before, with the face in it."""
    denoiser = make()
    one = face(denoiser)
    expected = with_face(copy.deepcopy(denoiser), [one])
    put_cache(denoiser)
    assert all(torch.equal(made, expected) for made in sampled(denoiser, [one]))


@pytest.mark.parametrize("make", [small_unet, Flux])
def test_a_cache_that_began_without_the_face(make: Callable[[], nn.Module]) -> None:
    denoiser = make()
    kept(denoiser)
    with pytest.raises(UnsupportedModelError, match="The face was never added: a step cache"):
        sampled(denoiser, [face(make(), start=0.5)])


def skip(block: nn.Module) -> None:
    """From the second call on a cache answers for the block, with what goes in."""
    run, seen = block.forward, []

    def forward(*args: Any, **named: Any) -> Any:
        seen.append(1)
        if len(seen) == 1:
            return run(*args, **named)
        return (named["img"], named["txt"]) if named.get("img") is not None else args[0]

    block.forward = forward


@pytest.mark.parametrize("part, number", [("double_blocks", 2), ("double_blocks", 0), ("single_blocks", 36)])
def test_a_cache_that_answers_for_a_block(part: str, number: int) -> None:
    """FirstBlockCache and its kind: its answer has the face already, or lacks it."""
    flux = Flux()
    skip(getattr(flux, part)[number])
    with pytest.raises(UnsupportedModelError, match=rf"FirstBlockCache.* output of {part}.{number}, .*TeaCache\) work"):
        sampled(flux, [face(flux)])
    assert count_hooks(flux) == 0
    sampled(flux, [])
