"""inject(): when it acts, on which rows and tokens, and that it leaves nothing behind."""

from __future__ import annotations

from functools import partial

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid import attention
from lib_pulid.attention import SiteIdentity, add_cross_attention
from lib_pulid.errors import ImageError, SettingError, UnsupportedModelError
from lib_pulid.identity import Identity
from lib_pulid.injection import DenoiseStep, compile_injection, inject
from lib_pulid.sites import cross_attention_site, find_sites
from lib_pulid.token_masks import token_grid
from lib_pulid.weights import ImageStreamWeights
from tests import layouts
from tests.fake_modules.models import count_hooks
from tests.reference import cases

pytestmark = pytest.mark.usefixtures("no_grad")

TOKENS = cases.UNET["cross_attention_dim"]
BOTH = DenoiseStep(0.0, [False, True], (16, 16))
FLUX_HW = (2 * cases.FLUX_GRID[0], 2 * cases.FLUX_GRID[1])


def person(seed: int = 77, width: int = TOKENS) -> Identity:
    return Identity(*cases.tokens(seed, width=width))


def run(unet: nn.Module, injections: list, step: DenoiseStep = BOTH) -> Tensor:
    with inject(unet, injections, step):
        return layouts.run_unet(unet)


def run_flux(flux: nn.Module, injections: list, is_cond: bool | list[bool] = True) -> Tensor:
    with inject(flux, injections, DenoiseStep(0.0, is_cond, FLUX_HW)):
        return layouts.run_flux(flux)


def effect(with_identity: Tensor, without: Tensor) -> Tensor:
    return (with_identity - without).flatten(1).norm(dim=1)


# ---------------------------------------------------------------- nothing where there should be nothing


@pytest.mark.parametrize(
    ("settings", "progress"),
    [({"weight": 0.0}, 0.0), ({"start": 0.4}, 0.3), ({"end": 0.4}, 0.4), ({"start_step": 2}, 0.25)],
)
def test_inactive_is_bit_identical_and_hooks_nothing(unet, adapter, settings, progress):
    plain = layouts.run_unet(unet)
    injection = compile_injection(adapter, person(), **settings)
    with inject(unet, [injection], DenoiseStep(progress, [False, True], (16, 16), steps=4)):
        assert count_hooks(unet) == 0
        assert torch.equal(layouts.run_unet(unet), plain)


def test_range_is_half_open_and_reaches_the_last_step(adapter):
    injection = compile_injection(adapter, person(), start=0.2, end=0.6)
    assert [injection.is_active(DenoiseStep(i / 10, True)) for i in range(10)] == [i in (2, 3, 4, 5) for i in range(10)]
    assert compile_injection(adapter, person(), start=0.9).is_active(DenoiseStep(1.0, True))
    # 3 / 10 typed by a user and 0.1 + 0.2 made by a sampler are the same step
    assert compile_injection(adapter, person(), start=0.1 + 0.2).is_active(DenoiseStep(0.3, True))


@pytest.mark.parametrize("rows", [1, 2])
def test_what_flux_keeps_on_the_device(rows):
    """One site in the real sizes; the tensors own what they tell, no larger one stands behind them."""
    shapes = {"norm_id_weight": (2048,), "norm_id_bias": (2048,), "norm_image_weight": (3072,)}
    shapes |= {"norm_image_bias": (3072,), "to_q": (2048, 3072), "to_kv": (4096, 2048), "to_out": (3072, 2048)}
    weights = ImageStreamWeights(**{name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})
    site = attention.prepare_site(weights, torch.ones(rows, 32, 2048)).to(torch.bfloat16)
    assert 20 * site.nbytes == rows * 125_849_600  # docs/performance.md
    kept = [value for value in vars(site).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == site.nbytes


def test_start_step_counts_steps(adapter):
    """Official: `id if i >= start_step`."""
    injection = compile_injection(adapter, person(), start_step=4)
    assert [DenoiseStep(i / n, True, steps=n).index for n in range(1, 60) for i in range(n)] == [
        i for n in range(1, 60) for i in range(n)
    ]  # 15 / 22 * 22 is less than 15 in floating point
    for steps in (1, 4, 7, 20, 28):
        acts = [injection.is_active(DenoiseStep(i / steps, True, steps=steps)) for i in range(steps)]
        assert acts == [i >= 4 for i in range(steps)]
    twice = [injection.is_active(DenoiseStep(i / 20, True, steps=10)) for i in range(20)]  # of second order
    assert twice == [i >= 8 for i in range(20)]
    with pytest.raises(ValueError, match="steps"):
        injection.is_active(DenoiseStep(0.5, True))


def test_start_step_and_shares_both_have_to_allow(adapter):
    for first, start, start_step in ((5, 0.5, 2), (4, 0.1, 4)):
        both = compile_injection(adapter, person(), start=start, end=0.8, start_step=start_step)
        acts = [both.is_active(DenoiseStep(i / 10, True, steps=10)) for i in range(10)]
        assert acts == [first <= i < 8 for i in range(10)]


def test_no_hook_is_left(unet, adapter):
    plain = layouts.run_unet(unet)
    injection = compile_injection(adapter, person())
    for failure in (None, RuntimeError, KeyboardInterrupt):
        try:
            with inject(unet, [injection], BOTH):
                assert count_hooks(unet) == 140  # two at each of 70 sites
                layouts.run_unet(unet)
                if failure:
                    raise failure
        except (RuntimeError, KeyboardInterrupt):
            assert failure is not None
        assert count_hooks(unet) == 0
        assert torch.equal(layouts.run_unet(unet), plain)
    handle = unet.up_blocks[0].attentions[1].transformer_blocks[3].ff.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # in a layer
        run(unet, [injection])
    handle.remove()
    assert count_hooks(unet) == 0


# ---------------------------------------------------------------- rows


def test_rows_get_their_identity_in_any_order(unet, adapter):
    """A swapped is_cond swaps what the rows get: both rows are made equal, so the outputs swap."""
    handle = unet.register_forward_pre_hook(_same_rows, with_kwargs=True)
    try:
        injection = compile_injection(adapter, person())
        one = run(unet, [injection], DenoiseStep(0.0, [False, True], (16, 16)))
        other = run(unet, [injection], DenoiseStep(0.0, [True, False], (16, 16)))
        both = run(unet, [injection], DenoiseStep(0.0, True, (16, 16)))
    finally:
        handle.remove()
    assert torch.allclose(one[0], other[1], atol=1e-5)
    assert torch.allclose(one[1], other[0], atol=1e-5)
    assert torch.allclose(both[0], both[1], atol=1e-5)
    assert torch.allclose(both[0], one[1], atol=1e-5)
    assert not torch.allclose(one[0], one[1], atol=1e-2)


def _same_rows(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    text = args[2][:1].repeat(2, 1, 1)
    added = {key: value[:1].repeat(2, 1) for key, value in kwargs["added_cond_kwargs"].items()}
    return (args[0][:1].repeat(2, 1, 1, 1), args[1], text), {**kwargs, "added_cond_kwargs": added}


def test_without_uncond_the_other_rows_stay(unet, adapter, flux, flux_adapter):
    plain = layouts.run_unet(unet)
    changed = run(unet, [compile_injection(adapter, Identity(person().cond))])
    assert torch.allclose(changed[0], plain[0], atol=1e-5)
    assert effect(changed, plain)[1] > 1
    injection = compile_injection(flux_adapter, Identity(person(79, 64).cond))
    plain, changed = layouts.run_flux(flux), run_flux(flux, [injection], [False, True])
    assert torch.equal(changed[0], plain[0])
    assert effect(changed, plain)[1] > 1


# ---------------------------------------------------------------- several persons, regions


def residual(unet: nn.Module, injections: list) -> Tensor:
    """What is added at the first site, whose input nothing has touched yet. [2, 64, 64]"""
    layer = unet.get_submodule(find_sites(unet).sites[0].name)
    seen: list[Tensor] = []
    for chosen in ([], injections):
        with inject(unet, chosen, BOTH):  # our hook comes after the injection's and sees what that made
            handle = layer.to_out[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
            layouts.run_unet(unet)
        handle.remove()
    return seen[1] - seen[0]


def test_several_persons_add_up_from_the_same_input(unet, adapter):
    a = compile_injection(adapter, person(77), weight=0.8)
    b = compile_injection(adapter, person(177), weight=0.5, projection="ortho", num_zero=16)
    together, only_a, only_b = (residual(unet, i) for i in ([a, b], [a], [b]))
    assert torch.allclose(together, only_a + only_b, atol=1e-5)
    assert (only_a - only_b).norm() > 0.1


def test_regions(unet, adapter):
    left = torch.zeros(64, 64)
    left[:, :32] = 1
    whole, masked = (
        residual(unet, [compile_injection(adapter, person(), mask=mask)]).unflatten(1, (8, 8)) for mask in (None, left)
    )
    assert torch.allclose(masked[:, :, :4], whole[:, :, :4], atol=1e-6)
    assert masked[:, :, 4:].abs().max() == 0


@pytest.mark.parametrize(
    ("tokens", "latent", "grid"),
    [(64 * 64, (128, 128), (64, 64)), (17 * 26, (67, 101), (17, 26)), (15 * 10, (30, 20), (15, 10))],
)
def test_token_grid(tokens, latent, grid):
    assert token_grid(tokens, latent, "sdxl") == grid
    with pytest.raises(ValueError, match="does not fit the"):
        token_grid(100, (64, 64), "sdxl")


# ---------------------------------------------------------------- layouts


def test_sgm_layout_has_the_same_order(unet, adapter):
    """named_modules of the sgm layout yields the middle before the output blocks; the sites must not."""
    sgm = layouts.SgmUNet(unet)
    names = [site.name.split(".")[0] for site in find_sites(sgm).sites]
    assert names == ["input_blocks"] * 24 + ["output_blocks"] * 36 + ["middle_block"] * 10
    injection = compile_injection(adapter, person())
    with inject(sgm, [injection], BOTH):
        ours = sgm()
    assert torch.equal(ours, run(unet, [injection]))
    assert not torch.equal(ours, sgm())


def test_quantised_layers_do_not_tell_their_width():
    """As Forge's GGUF and 4-bit layers: no out_features, and a weight of another shape."""
    layer = nn.Module()
    layer.to_q, layer.to_out, layer.heads, layer.dim_head = nn.Identity(), nn.ModuleList([nn.Identity()]), 10, 64
    assert cross_attention_site("layer", layer).width == 640
    del layer.dim_head  # diffusers' attention
    layer.inner_dim = 320
    assert cross_attention_site("layer", layer).width == 320


def test_reference_tokens_get_no_identity(flux, flux_adapter):
    """Kontext appends tokens to the image; only the image's own tokens may be touched by the first site."""
    bfl, seen = layouts.BflFlux(flux), []
    injection = compile_injection(flux_adapter, person(79, 64))
    for injections in ([], [injection]):
        with inject(bfl, injections, DenoiseStep(0.0, True, FLUX_HW)):
            handle = bfl.double_blocks[0].register_forward_hook(lambda m, a, out: seen.append(out[0]))
            bfl(extra_tokens=6)
        handle.remove()
    change = (seen[1] - seen[0]).abs().amax(dim=(0, 2))
    assert (change[:24] > 0).all()
    assert (change[24:] == 0).all()


def test_masks_of_any_kind(adapter):
    """Tensors are read as arrays are: see test_bad_images.py."""
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    kinds = (torch.uint8, torch.int64, torch.float16, torch.float32)
    for mask in (*(scale * left.to(kind) for kind in kinds for scale in (1, 255)), left.bool(), left.bfloat16()):
        assert torch.equal(compile_injection(adapter, person(), mask=mask).mask, left)
    assert torch.equal(compile_injection(adapter, person(), mask=left.numpy()).mask, left)
    with pytest.raises(ImageError, match="mask is entirely black"):
        compile_injection(adapter, person(), mask=torch.zeros(8, 8, dtype=torch.bfloat16))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(("settings", "step", "words"), [
    ({}, DenoiseStep(0.0, [True, False, True], (16, 16)), "3 rows"),
    ({"mask": torch.ones(4, 4)}, DenoiseStep(0.0, [False, True]), "latent_hw"),
])  # fmt: skip
def test_steps_that_do_not_fit(unet, adapter, settings, step, words):
    """Another number of rows; a mask without the size of the latent image."""
    with pytest.raises(ValueError, match=words):
        run(unet, [compile_injection(adapter, person(), **settings)], step)


def test_family_mismatch(unet, flux, adapter, flux_adapter):
    with pytest.raises(UnsupportedModelError, match="for FLUX"):
        run(unet, [compile_injection(flux_adapter, person(79, 64))])
    with (
        pytest.raises(UnsupportedModelError, match="for SDXL"),
        inject(flux, [compile_injection(adapter, person())], BOTH),
    ):
        pass


def unet_with(**changes: object) -> nn.Module:
    return diffusers.UNet2DConditionModel(**{**cases.UNET, **changes})


NO_MIDDLE = {"mid_block_type": None}
REFUSED = {
    "fewer layers": (lambda: unet_with(transformer_layers_per_block=(1, 1, 1)), "layers for PuLID"),
    "no middle": (lambda: unet_with(**NO_MIDDLE), "layers for PuLID"),
    "wider": (lambda: unet_with(block_out_channels=(32, 64, 128)), "has width"),
    "Kolors": (
        lambda: unet_with(encoder_hid_dim=8, encoder_hid_dim_type="text_proj"),
        "has SDXL's layout, but PuLID was not trained for it",
    ),
    "Bria": (
        lambda: diffusers.BriaTransformer2DModel(attention_head_dim=8, axes_dims_rope=(2, 2, 4)),
        "has FLUX.1's layout, but PuLID was not trained for it",
    ),
    "Chroma": (lambda: nn.ModuleDict({"distilled_guidance_layer": nn.Identity()}), "Chroma"),
    "FLUX.2": (lambda: nn.ModuleDict({"double_stream_modulation_img": nn.Identity()}), "FLUX.2"),
    "Stable Cascade": (diffusers.StableCascadeUNet, "StableCascadeUNet is neither"),
    "a layer": (lambda: nn.Linear(2, 2), "Linear is neither"),
}
for width, name in ((768, "Diffusion 1.x"), (1024, "Diffusion 2.x"), (1280, "SDXL refiner")):
    for middle in ({}, NO_MIDDLE):
        make = partial(diffusers.UNet2DConditionModel, cross_attention_dim=width, **middle)
        REFUSED[f"{name}{', no middle' if middle else ''}"] = make, name


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused(adapter, kind):
    make, words = REFUSED[kind]
    with torch.device("meta"):
        model = make()
    injection = compile_injection(adapter, person())
    with pytest.raises(UnsupportedModelError, match=words), inject(model, [injection], BOTH):
        pass
    assert count_hooks(model) == 0


@pytest.mark.parametrize("settings", [
    {"weight": float("nan")}, {"projection": "orthogonal"}, {"num_zero": -1}, {"num_zero": 1.5}, {"start": -0.1},
    {"end": 1.1}, {"start_step": -1}, {"start_step": 1.5}, {"mask": torch.ones(3)},
])  # fmt: skip
def test_settings_out_of_range(adapter, settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        compile_injection(adapter, person(), **settings)


# ---------------------------------------------------------------- exactness of what was rearranged


def by_definition(q: Tensor, h: Tensor, k: Tensor, v: Tensor, num_zero: int) -> dict[str, Tensor]:
    """What each projection adds to h, in the dtype of the arguments but where the official code goes on in float32.

    Zero rows are appended to the identity, two heads, as in the official `IDAttnProcessor2_0`.
    """
    k, v = (F.pad(x, (0, 0, 0, num_zero)) for x in (k, v))
    q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
    scores, more = q @ k.transpose(-1, -2), torch.promote_types(q.dtype, torch.float32)
    share = scores.softmax(-1).mean(1)[..., :5].sum(-1, keepdim=True)
    r = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(more)
    h = h.to(more)
    p = (h * r).sum(1, keepdim=True) / (h * h).sum(1, keepdim=True) * h
    return {"none": r, "ortho": r - p, "ortho_v2": r + (share - 1) * p}


def acting(k: Tensor, v: Tensor, **settings) -> SiteIdentity:
    """With keys and values [B, N, C] of each row's own."""
    return SiteIdentity(attention.CrossAttentionTensors.joined(k, v), list(range(len(k))), **settings)


@pytest.fixture(params=[False, True], ids=["", "fused"])
def both_ways(request, monkeypatch) -> None:
    """That of the CPU and that of a GPU, on the CPU."""
    if request.param:
        monkeypatch.setattr(attention, "FUSED_ON", ("cpu",))


@pytest.mark.parametrize("num_zero", [0, 7])
def test_zero_tokens_have_a_closed_form(both_ways, num_zero):
    """Against the definition in float64, both ways; with scores so large that exp of them, or of their negatives where
    all are below zero, would overflow, too."""
    random, h, keys, v = (cases.normal(i, 2, n, 64).double() for i, n in ((1, 30), (2, 30), (3, 9), (4, 9)))
    for q, k in ((random, keys), (30 * random, keys), (30 * random.abs(), -keys.abs())):
        for projection, definition in by_definition(q, h, k, v, num_zero).items():
            person = acting(k.float(), v.float(), projection=projection, num_zero=num_zero)
            ours = add_cross_attention(q.float(), h.float(), [person], heads=2)
            size = definition.norm().clamp_min(1e-9)  # zero tokens may take nearly everything
            assert ((ours - h - definition).norm() / size).item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_is_no_less_exact_than_official(both_ways, dtype):
    """Against float64, on small, usual and large scores, where channels of h and of the values have a mean."""
    for size in (0.3, 1, 2):
        shapes = ((1, 256, size), (2, 256, 1), (3, 32, size), (4, 32, 1))
        mean = {2: cases.normal(5, 2, 1, 128), 4: cases.normal(5, 2, 1, 128)}
        inputs = [(cases.normal(i, 2, n, 128) * s + mean.get(i, 0)).to(dtype) for i, n, s in shapes]
        q, h, k, v = inputs
        exact = h + by_definition(*(x.double() for x in inputs), 20)["ortho_v2"]
        official = (h + by_definition(*inputs, 20)["ortho_v2"]).to(dtype)
        ours = add_cross_attention(q, h, [acting(k, v)], heads=2)
        assert ours.dtype == dtype
        assert (ours - exact).norm() <= (official - exact).norm()


def test_gradients_pass(both_ways):
    """Through q, h and the values, and without them the result is the same."""
    inputs = [cases.normal(i, 2, n, 64) for i, n in ((1, 32), (2, 32), (3, 9), (4, 9))]
    plain = add_cross_attention(*inputs[:2], [acting(*inputs[2:])], heads=2)
    with torch.enable_grad():
        q, h, k, v = (x.clone().requires_grad_() for x in inputs)
        ours = add_cross_attention(q, h, [acting(k, v)], heads=2)
        ours.square().sum().backward()
    assert torch.allclose(ours, plain, atol=1e-6)
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in (q, h, k, v))


def test_large_values_do_not_overflow(both_ways):
    """float16: sums over the sequence of products of 200 and 200."""
    h, v = torch.full((1, 4096, 16), 200.0).half(), torch.full((1, 9, 16), 200.0).half()
    ours = add_cross_attention(torch.ones_like(h), h, [acting(torch.ones_like(v), v, projection="ortho")], heads=2)
    assert torch.allclose(ours, h, rtol=2e-3)  # r is along h: nothing is left of it


def test_more_tokens_than_a_chunk(monkeypatch, flux, flux_adapter):
    injection = compile_injection(flux_adapter, person(79, 64))
    whole = run_flux(flux, [injection], [True, False])
    monkeypatch.setattr(attention, "CHUNK", 5)
    assert torch.allclose(run_flux(flux, [injection], [True, False]), whole, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_that_only_store_weights(adapter, flux_adapter, dtype):
    """`next(model.parameters()).dtype` of a quantized model. As integers the face would be noise."""
    for one, width in ((adapter, TOKENS), (flux_adapter, 64)):
        found, exact = (compile_injection(one, person(width=width), dtype=kind) for kind in (dtype, torch.float32))
        for ours, right in zip(found.sites, exact.sites):
            for name, value in vars(right).items():
                assert value == getattr(ours, name) if isinstance(value, int) else torch.equal(value, vars(ours)[name])
