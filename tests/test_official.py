"""This project's numbers against those of the official code, frozen in tests/reference (see record.py there)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import Tensor

from lib_pulid import attention, sites
from lib_pulid.encoders import IDEncoder, IDFormer
from lib_pulid.identity import FaceFeatures, Identity, encode_identity
from lib_pulid.injection import DenoiseStep, compile_injection, inject
from lib_pulid.vision import load_vision_tower, tower_shapes
from lib_pulid.weights import CrossAttentionWeights
from tests import layouts
from tests.reference import cases
from tests.reference.cases import relative
from tests.small_models import cross_attention_pair, image_stream

pytestmark = pytest.mark.usefixtures("no_grad")

LAYER = 1e-5  # relative error of a single module, float32
# CPUs differ in the last bit of exp, which FLUX's embedding of the timestep, 0.7 * 1000, multiplies: one bit changes
# the official result by 9e-5 without any face.
TIMESTEP = 700 * torch.finfo(torch.float32).eps
REFERENCE = load_file(Path(__file__).parent / "reference" / "official.safetensors")


def test_id_encoder():
    encoder = IDEncoder.from_state_dict(layouts.v1_encoder())
    assert relative(encoder(*cases.faces(1)), REFERENCE["v1"]) < LAYER


def test_id_former():
    encoder = IDFormer.from_state_dict(layouts.v11_encoder())
    assert relative(encoder(*cases.faces(1)), REFERENCE["v11"]) < LAYER


def test_several_photos_in_one_pass(flux_adapter):
    """v1.1's way, through encode_identity: id_cond stacked, hidden states joined; uncond of one photo of zeros."""
    photos = [FaceFeatures(c[:1], tuple(h[:1] for h in hidden)) for c, hidden in map(cases.faces, (1, 21, 41))]
    identity = encode_identity(photos, flux_adapter)
    assert relative(identity.cond, REFERENCE["v11_three_photos"]) < LAYER
    assert relative(identity.uncond, REFERENCE["v11"][1:]) < LAYER


def test_vision_tower(tmp_path):
    state = cases.fill_shapes(tower_shapes(cases.VISION_WIDTH, 32), 13)
    torch.save(cases.prefixed(state, "visual."), tmp_path / "eva.pt")
    seed = torch.get_rng_state()
    tower = load_vision_tower(tmp_path / "eva.pt")
    assert torch.equal(torch.get_rng_state(), seed)  # a host's random numbers are left alone
    token, hidden = tower(cases.normal(61, 1, 3, 336, 336))
    assert relative(token, REFERENCE["tower"]) < LAYER
    assert hidden[0].shape == (1, 577, cases.VISION_WIDTH)
    for i in range(5):
        assert relative(hidden[i][:, ::24], REFERENCE[f"tower_hidden_{i}"]) < LAYER


@pytest.mark.parametrize(("projection", "num_zero"), cases.SETTINGS)
def test_cross_attention_layer(projection, num_zero):
    layer = cases.fill(Attention(**cases.CROSS_ATTENTION), 14)
    pair = cases.fill(cross_attention_pair(128, 64), 15)
    stored = CrossAttentionWeights(pair["id_to_k"].weight, pair["id_to_v"].weight)
    site = attention.prepare_cross_attention(stored, torch.cat(cases.tokens(73))).weighted(0.8)
    identity = attention.SiteIdentity(site, [0, 1], None, projection, num_zero)

    def add(q: Tensor, h: Tensor) -> Tensor:
        return attention.add_cross_attention(q, h, [identity], heads=2)

    handles = list(sites.cross_attention_site("layer", layer).attach(add))
    x, text = cases.normal(71, 2, 40, 128), cases.normal(72, 2, 7, 48)
    ours = layer(x, text)
    for handle in handles:
        handle.remove()
    off, official = REFERENCE["attention_off"], REFERENCE[f"attention_{projection}_{num_zero}"]
    assert relative(ours - off, official - off) < LAYER
    assert relative(layer(x, text), off) < 1e-6


def test_image_stream_layer():
    module = cases.fill(image_stream(cases.IMAGE_STREAM["dim"], cases.IMAGE_STREAM["kv_dim"], inner=256), 16)
    site = attention.fold_image_stream(layouts.image_stream_weights(module), cases.tokens(75)[0])
    image = cases.normal(76, 1, 40, 96)
    ours = torch.zeros_like(image)
    attention.add_image_stream(ours, image, [attention.SiteIdentity(site, [0])])
    assert relative(ours, REFERENCE["image_stream"]) < LAYER


@pytest.mark.parametrize(("projection", "num_zero"), cases.SETTINGS)
def test_whole_unet(unet, adapter, projection, num_zero):
    identity = Identity(*cases.tokens(77, width=cases.UNET["cross_attention_dim"]))
    injection = compile_injection(adapter, identity, weight=0.8, projection=projection, num_zero=num_zero)
    with inject(unet, [injection], DenoiseStep(0.0, [False, True], (16, 16))):
        ours = layouts.run_unet(unet)
    off, official = REFERENCE["unet_off"], REFERENCE[f"unet_{projection}_{num_zero}"]
    assert relative(layouts.run_unet(unet), off) < 1e-5
    for row in (0, 1):  # uncond, cond
        assert relative(ours[row] - off[row], official[row] - off[row]) < 1e-3


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_whole_flux(flux, flux_adapter, layout):
    """The official weights in diffusers' blocks, called as diffusers and as BFL's code calls them."""
    bfl = layouts.BflFlux(flux)
    denoiser, run = (flux, lambda: layouts.run_flux(flux)) if layout == "diffusers" else (bfl, bfl)
    injection = compile_injection(flux_adapter, Identity(*cases.tokens(79)), weight=0.9)
    rows, columns = cases.FLUX_GRID
    with inject(denoiser, [injection], DenoiseStep(0.0, [True, False], (2 * rows, 2 * columns))):
        ours = run()
    off, official = REFERENCE["flux_off"], REFERENCE["flux_on"]
    assert relative(run(), off) < TIMESTEP
    for row in (0, 1):
        assert relative(ours[row] - off[row], official[row] - off[row]) < 1e-4
