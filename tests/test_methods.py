"""The methods beside PuLID: told by a file's content, equal to the official code, and bit-identical when off.

References: tests/reference/methods.safetensors, see record_methods.py there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib_pulid import methods
from lib_pulid.errors import IdentityMismatchError, SettingError, WrongWeightsError
from lib_pulid.files.pickle_header import read_pickle_header
from lib_pulid.identity import Identity, encode_identity
from lib_pulid.injection import DenoiseStep, compile_injection, inject
from lib_pulid.projectors import FacePlusProjection, FaceProjection, ImageProjection, Resampler
from lib_pulid.readings import FaceFeatures
from lib_pulid.sites import find_sites
from lib_pulid.weights import Adapter, load_adapter
from tests import layouts
from tests.reference import cases
from tests.reference import method_cases as official
from tests.small_models import TOKEN_WIDTH
from tests.small_models import methods as small

PROJECTOR, EFFECT = 1e-5, 1e-3  # relative errors: of a projector, and of what is added to a whole UNet's output
REFERENCE = load_file(Path(__file__).parent / "reference" / "methods.safetensors")
WIDTHS = (16, 24, 16)
FILES = small.method_files(WIDTHS)


def relative(ours: Tensor, official: Tensor) -> float:
    assert ours.shape == official.shape
    return ((ours - official).norm() / official.norm()).item()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def write(tmp_path):
    return lambda state, name="file.bin": small.write(tmp_path / name, state)


# ---------------------------------------------------------------- which method a file is

KINDS = {
    "instantid": methods.INSTANTID,
    "ip_adapter": methods.IP_ADAPTER_H,
    "plus": methods.IP_ADAPTER_PLUS,
    "face_id": methods.FACEID,
    "face_id_plus": methods.FACEID_PLUS,
    "portrait": methods.PORTRAIT,
    "portrait_unnorm": methods.PORTRAIT_UNNORM,
}


@pytest.mark.parametrize("name", ["pulid_v1.bin", "pulid_v1.1.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_told_by_its_content(write, kind, name):
    adapter = load_adapter(write(FILES[kind], name))
    assert adapter.method == KINDS[kind]
    assert [site.to_k.shape for site in adapter.sites] == [(width, TOKEN_WIDTH) for width in WIDTHS]
    assert {p.dtype for p in adapter.encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_told_without_loading_it(write, kind):
    header = read_pickle_header(write(FILES[kind]))
    assert {key: info.shape for key, info in header.items()} == {
        key: tuple(tensor.shape) for key, tensor in small.flat(FILES[kind]).items()
    }
    assert methods.method_of(header, "file.bin") == KINDS[kind]


def test_big_g_by_the_width_of_its_embedding(write):
    state = {"image_proj": ImageProjection(1280, TOKEN_WIDTH, 4).state_dict(), "ip_adapter": small.layers(WIDTHS)}
    assert load_adapter(write(state)).method == methods.IP_ADAPTER_BIGG


def test_plus_face_by_its_checksum(write, monkeypatch):
    """Plus and Plus Face have the same tensors."""
    path = write(FILES["plus"])
    assert load_adapter(path).method == methods.IP_ADAPTER_PLUS
    monkeypatch.setattr(methods, "_PLUS_FACE", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert load_adapter(path).method == methods.IP_ADAPTER_PLUS_FACE


def test_no_program_of_a_pickle_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("made").mkdir, ())

    torch.save({"image_proj": Evil(), "x": torch.zeros(1)}, tmp_path / "evil.bin")
    assert read_pickle_header(tmp_path / "evil.bin") == {}
    assert not (tmp_path / "made").exists()


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def changed(kind: str, table: str, **tensors: Tensor) -> dict:
    state = FILES[kind]
    return {**state, table: {**state[table], **{name.replace("__", "."): t for name, t in tensors.items()}}}


REFUSED = {
    "another precision": (
        {table: small.half(state) for table, state in FILES["instantid"].items()},
        "InstantID or IP-Adapter FaceID Portrait .* another precision",
    ),
    "sd15": (small.method_files((16,), 768)["instantid"], r"an IP-Adapter for Stable Diffusion 1\.5"),
    "kolors": (small.method_files((16,), 4096)["instantid"], "an IP-Adapter for Kolors or FLUX"),
    "full face": (
        changed("instantid", "image_proj", proj__3__weight=torch.zeros(8)),
        r"IP-Adapter Full Face, which exists for Stable Diffusion 1\.5 only",
    ),
    "infinite you": (
        {"image_proj": small.resampler(512, output_dim=4096).state_dict()},
        r"InfiniteYou's projector for FLUX.*InfuseNet",
    ),
    "photomaker": (
        {"id_encoder": {"visual_projection.weight": torch.zeros(2, 2)}, "lora_weights": {"unet.x": torch.zeros(2, 2)}},
        "PhotoMaker, which changes the prompt",
    ),
    "xlabs": (
        {"double_blocks": {"0.processor.ip_adapter_double_stream_k_proj.weight": torch.zeros(2, 2)}},
        "an IP-Adapter for FLUX",
    ),
    "face id without its lora": (
        {**FILES["face_id"], "ip_adapter": small.layers(WIDTHS)},
        "IP-Adapter FaceID without its LoRA",
    ),
    "half a lora": (
        {**FILES["face_id"], "ip_adapter": without(FILES["face_id"]["ip_adapter"], "4.to_out_lora.up.weight")},
        r"its LoRA is incomplete \(layer 4\)",
    ),
    "a lora of another width": (
        changed("face_id", "ip_adapter", **{"2__to_q_lora__up__weight": torch.zeros(8, 4)}),
        r"its LoRA of layer 2 \(to_q\) does not fit a width of 24",
    ),
    "a layer is missing": (
        {**FILES["instantid"], "ip_adapter": small.layers(WIDTHS[1:]) | {"7.to_k_ip.weight": torch.zeros(16, 64)}},
        r"InstantID for SDXL, but incomplete \(layer 7\)|incomplete \(layer 5\)",
    ),
    "projector": (
        changed("instantid", "image_proj", layers__1__0__to_q__weight=torch.zeros(3, 3)),
        r"the identity encoder \(Resampler\) is incomplete or has other shapes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_relatives_that_do_not_work_are_named(write, what):
    state, words = REFUSED[what]
    with pytest.raises(WrongWeightsError, match=rf"(?s)^file\.bin(:| is).*({words})"):
        load_adapter(write(state))


# ---------------------------------------------------------------- equal to the official code


def filled(module: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    return cases.fill(module, seed).state_dict()


def test_resampler_of_a_face():
    state = filled(small.resampler(official.FACE, official.WIDTH), 31)
    assert relative(Resampler.from_state_dict(state)(official.embedding()), REFERENCE["resampler_face"]) < PROJECTOR


def test_resampler_of_patches():
    state = filled(small.resampler(official.PATCH, official.WIDTH), 32)
    assert relative(Resampler.from_state_dict(state)(official.patches()), REFERENCE["resampler_plus"]) < PROJECTOR


def test_image_projection():
    state = filled(ImageProjection(official.IMAGE, official.WIDTH, official.TOKENS), 33)
    ours = ImageProjection.from_state_dict(state)(official.image())
    assert relative(ours, REFERENCE["image_projection"]) < PROJECTOR


def test_face_projection():
    state = filled(FaceProjection(official.FACE, 2 * official.FACE, official.WIDTH, official.TOKENS), 34)
    ours = FaceProjection.from_state_dict(state)(official.embedding())
    assert relative(ours, REFERENCE["face_projection"]) < PROJECTOR


def test_face_projection_plus():
    state = filled(small.face_plus(official.PLUS_WIDTH, official.PATCH), 35)
    ours = FacePlusProjection.from_state_dict(state)(official.embedding(), official.patches())
    assert relative(ours, REFERENCE["face_projection_plus"]) < PROJECTOR


def whole_unet_adapter(path: Path, unet: torch.nn.Module, kind: str, seed: int) -> Adapter:
    """An adapter with the layers that the official one was recorded with."""
    widths = [site.width for site in find_sites(unet).sites]
    state = small.method_files(widths, official.WIDTH)[kind]
    shapes = {key: tuple(tensor.shape) for key, tensor in state["ip_adapter"].items() if "_lora" not in key}
    if kind.startswith("face_id"):
        shapes |= small.lora_shapes(widths, official.WIDTH, official.RANK)
    return load_adapter(small.write(path, {**state, "ip_adapter": cases.fill_shapes(shapes, seed)}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, unet) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("whole")
    seeds = {"plus": 41, "face_id": 42, "instantid": 43}
    return {kind: whole_unet_adapter(folder / f"{kind}.bin", unet, kind, seed) for kind, seed in seeds.items()}


@pytest.fixture
def instantid(whole) -> Adapter:
    return whole["instantid"]


STEP = DenoiseStep(0.0, [False, True], (16, 16))  # the rows of `cases.unet_inputs`


def effect(unet, injections, step=STEP) -> Tensor:
    off = layouts.run_unet(unet)
    with inject(unet, injections, step):
        return layouts.run_unet(unet) - off


WHOLE = {"instantid": "unet_instantid", "plus": "unet_ip_adapter", "face_id": "unet_face_id"}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_unet(unet, whole, kind):
    """All 70 sites, cond and uncond rows; FaceID with its LoRA in all 140 attention layers."""
    count = official.TOKENS if kind == "face_id" else 16
    injection = compile_injection(whole[kind], Identity(*official.tokens(count)), weight=official.SCALE)
    assert (injection.projection, injection.num_zero) == ("none", 0)
    ours, wanted = effect(unet, [injection]), REFERENCE[WHOLE[kind]] - layouts.run_unet(unet)
    for row in (0, 1):  # uncond, cond
        assert relative(ours[row], wanted[row]) < EFFECT


# ---------------------------------------------------------------- identities


def photo(seed: int) -> FaceFeatures:
    return FaceFeatures(embedding=cases.normal(seed, 1, 512))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("methods")
    return {kind: load_adapter(small.write(folder / f"{kind}.bin", state)) for kind, state in FILES.items()}


def test_uncond_is_the_projector_of_zeros(adapters):
    adapter = adapters["instantid"]
    identity = encode_identity([photo(1)], adapter)
    assert torch.equal(identity.cond, adapter.encoder(photo(1).embedding))
    assert torch.equal(identity.uncond, adapter.encoder(torch.zeros(1, 512)))
    assert identity.info["adapter"] == "InstantID for SDXL"
    assert identity.family == "sdxl"


def test_portraits_faces_are_joined(adapters):
    adapter = adapters["portrait_unnorm"]
    identity = encode_identity([photo(seed) for seed in (1, 2, 3)], adapter)
    each = [adapter.encoder(photo(seed).embedding) for seed in (1, 2, 3)]
    assert torch.equal(identity.cond, torch.cat(each, dim=1))
    assert identity.uncond.shape == (1, 3 * 16, TOKEN_WIDTH)


def test_several_photos_without_an_official_way(adapters):
    two = [photo(1), photo(2)]
    with pytest.raises(SettingError, match="InstantID has no official way to use several photos.*average"):
        encode_identity(two, adapters["instantid"])
    mean = encode_identity(two, adapters["instantid"], fusion="average").cond
    each = [encode_identity([one], adapters["instantid"]).cond for one in two]
    assert torch.allclose(mean, sum(each) / 2, atol=1e-6)
    with pytest.raises(SettingError, match="id_mix works with PuLID v1 only"):
        encode_identity(two, adapters["instantid"], fusion="id_mix")


def test_an_identity_of_another_method(adapters):
    identity = encode_identity([photo(1)], adapters["instantid"])
    with pytest.raises(IdentityMismatchError, match="made with InstantID for SDXL"):
        compile_injection(adapters["portrait_unnorm"], identity)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("given", [{"projection": "ortho"}, {"num_zero": 0}])
def test_settings_that_a_method_does_not_have(adapters, given):
    identity = encode_identity([photo(1)], adapters["instantid"])
    with pytest.raises(SettingError, match=f"InstantID has no {next(iter(given))}"):
        compile_injection(adapters["instantid"], identity, **given)


def test_off_is_bit_identical(unet, instantid):
    off = layouts.run_unet(unet)
    identity = Identity(*official.tokens(16))
    for settings in ({"weight": 0.0}, {"start": 0.5}):
        with inject(unet, [compile_injection(instantid, identity, **settings)], STEP):
            assert torch.equal(layouts.run_unet(unet), off)
    assert torch.equal(layouts.run_unet(unet), off)
