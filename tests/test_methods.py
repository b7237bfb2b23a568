"""The methods beside PuLID: told by a file's content, equal to the official code, and bit-identical when off.

References: tests/reference/methods.safetensors, see record_methods.py there.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusionXLPipeline
from insightface.utils.face_align import norm_crop
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_pulid import methods
from lib_pulid.clip_vision import clip_input, load_clip_vision
from lib_pulid.control import draw_points
from lib_pulid.errors import MissingWeightsError, SettingError, UnsupportedModelError, WrongWeightsError
from lib_pulid.files.pickle_header import read_pickle_header
from lib_pulid.hosts.diffusers import apply
from lib_pulid.hosts.diffusers_control import identity_net, load_identity_net
from lib_pulid.identity import Identity, encode_identity
from lib_pulid.injection import DenoiseStep, compile_injection, inject
from lib_pulid.lora import PARTS, Lora
from lib_pulid.photos import Encoders, IdentityCache, make_identity
from lib_pulid.projectors import FaceProjection, ImageProjection, Resampler
from lib_pulid.readings import FaceFeatures, read_features
from lib_pulid.sites import find_sites
from lib_pulid.standalone import Workshop
from lib_pulid.stores.adapters import Adapters
from lib_pulid.stores.folder import ModelsFolder, Settings
from lib_pulid.weights import Adapter, load_adapter
from tests import layouts
from tests.fake_modules.models import count_hooks
from tests.light_webui import Detector, Recogniser, face_models
from tests.reference import cases
from tests.reference import method_cases as official
from tests.reference.cases import relative
from tests.small_models import TOKEN_WIDTH
from tests.small_models import methods as small

pytestmark = pytest.mark.usefixtures("no_grad")

PROJECTOR, EFFECT = 1e-5, 1e-3  # relative errors: of a projector, and of what is added to a whole UNet's output
REFERENCE = load_file(Path(__file__).parent / "reference" / "methods.safetensors")
WIDTHS = (16, 24, 16)
FILES = small.method_files(WIDTHS)


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_told_by_its_content(write, kind):
    """And a pickle without loading it."""
    pickle, other = write(FILES[kind], "pulid_v1.bin"), write(FILES[kind], "pulid_v1.1.safetensors")
    for adapter in map(load_adapter, (pickle, other)):
        assert adapter.method == KINDS[kind]
        assert [site.to_k.shape for site in adapter.sites] == [(width, TOKEN_WIDTH) for width in WIDTHS]
        assert {p.dtype for p in adapter.encoder.parameters()} == {torch.float32}
    header = read_pickle_header(pickle)
    shapes = {key: tuple(tensor.shape) for key, tensor in small.flat(FILES[kind]).items()}
    assert {key: info.shape for key, info in header.items()} == shapes
    assert methods.method_of(header, "file.bin") == KINDS[kind]


def test_big_g_by_the_width_of_its_embedding_plus_face_by_its_checksum(write, monkeypatch):
    """Plus and Plus Face have the same tensors."""
    state = {"image_proj": ImageProjection(1280, TOKEN_WIDTH, 4).state_dict(), "ip_adapter": small.layers(WIDTHS)}
    assert load_adapter(write(state)).method == methods.IP_ADAPTER_BIGG
    path = write(FILES["plus"])
    assert load_adapter(path).method == methods.IP_ADAPTER_PLUS
    monkeypatch.setattr(methods, "_PLUS_FACE", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert load_adapter(path).method == methods.IP_ADAPTER_PLUS_FACE


def test_plus_face_in_a_folder(tmp_path, monkeypatch):
    """A list, which reads no checksum, goes by the name in the catalog; an identity finds its file under any name."""
    folder = Adapters(ModelsFolder(lambda: Settings(tmp_path)))
    (tmp_path / "pulid").mkdir()
    path = small.write(tmp_path / "pulid" / "ip-adapter-plus-face_sdxl_vit-h.safetensors", FILES["plus"])
    assert folder.method_of(path.name) == methods.IP_ADAPTER_PLUS_FACE
    path = path.rename(path.with_name("face.safetensors"))
    monkeypatch.setattr(methods, "_PLUS_FACE", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    assert folder.method_of(path.name) == methods.IP_ADAPTER_PLUS
    plus_face, plus = methods.IP_ADAPTER_PLUS_FACE.label, methods.IP_ADAPTER_PLUS.label
    assert folder.load("auto", "sdxl", made_for=plus_face).label == plus_face
    with pytest.raises(MissingWeightsError, match=f"was made with {plus}, which is not in"):
        folder.load("auto", "sdxl", made_for=plus)


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
    "sd15": (
        small.method_files((16,), 768, only=["instantid"])["instantid"],
        r"an IP-Adapter for Stable Diffusion 1\.5",
    ),
    "kolors": (small.method_files((16,), 4096, only=["instantid"])["instantid"], "an IP-Adapter for Kolors or FLUX"),
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


PROJECTORS = {
    "resampler_face": (small.resampler(official.FACE, official.WIDTH), [official.embedding()]),
    "resampler_plus": (small.resampler(official.PATCH, official.WIDTH), [official.patches()]),
    "image_projection": (ImageProjection(official.IMAGE, official.WIDTH, official.TOKENS), [official.image()]),
    "face_projection": (
        FaceProjection(official.FACE, 2 * official.FACE, official.WIDTH, official.TOKENS),
        [official.embedding()],
    ),
    "face_projection_plus": (
        small.face_plus(official.PLUS_WIDTH, official.PATCH),
        [official.embedding(), official.patches()],
    ),
}


@pytest.mark.parametrize(("seed", "name"), enumerate(PROJECTORS, 31))
def test_projectors(seed, name):
    made, inputs = PROJECTORS[name]
    ours = type(made).from_state_dict(filled(made, seed))(*inputs)
    assert relative(ours, REFERENCE[name]) < PROJECTOR


def whole_unet_adapter(path: Path, unet: torch.nn.Module, kind: str, seed: int) -> Adapter:
    """An adapter with the layers that the official one was recorded with."""
    widths = [site.width for site in find_sites(unet).sites]
    state = small.method_files(widths, official.WIDTH, only=[kind])[kind]
    shapes = {key: tuple(tensor.shape) for key, tensor in state["ip_adapter"].items() if "_lora" not in key}
    if kind.startswith("face_id"):
        shapes |= small.lora_shapes(widths, official.WIDTH, official.RANK)
    return load_adapter(small.write(path, {**state, "ip_adapter": cases.fill_shapes(shapes, seed)}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, unet) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("whole")
    seeds = {"plus": 41, "face_id": 42, "instantid": 43}
    return {kind: whole_unet_adapter(folder / f"{kind}.bin", unet, kind, seed) for kind, seed in seeds.items()}


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


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("given", [{"projection": "ortho"}, {"num_zero": 0}])
def test_settings_that_a_method_does_not_have(adapters, given):
    identity = encode_identity([photo(1)], adapters["instantid"])
    with pytest.raises(SettingError, match=f"InstantID has no {next(iter(given))}"):
        compile_injection(adapters["instantid"], identity, **given)


# ---------------------------------------------------------------- FaceID's LoRA


@pytest.fixture
def face_id(whole) -> Adapter:
    return whole["face_id"]


def person(adapter: Adapter, seed: int = 305, **settings):
    cond, uncond = cases.tokens(seed, width=official.WIDTH, count=official.TOKENS)
    return compile_injection(adapter, Identity(cond, uncond), weight=official.SCALE, **settings)


def test_the_loras_strength(unet, face_id):
    """0 is the adapter without its LoRA; the identity's weight does not scale the LoRA; weight 0 is off."""
    bare, halved = replace(face_id, lora=None), Lora({p: (d, u / 2) for p, (d, u) in face_id.lora.layers.items()}, "x")
    none, half = (effect(unet, [person(face_id, lora_weight=strength)]) for strength in (0.0, 0.5))
    assert torch.equal(none, effect(unet, [person(bare)]))
    assert relative(half, effect(unet, [person(replace(face_id, lora=halved))])) < PROJECTOR
    weak = compile_injection(face_id, Identity(*official.tokens(4)), weight=1e-6)
    assert effect(unet, [weak]).norm() > 0.3 * half.norm()
    nobody = compile_injection(face_id, Identity(*official.tokens(4)), weight=0)
    assert not effect(unet, [nobody]).any()


def test_a_lora_on_another_device_than_the_denoiser():
    """As PuLID's own tensors, which go where the layer is; an injection is compiled for the CPU by default."""
    down, up, x = torch.rand(2, 4), torch.rand(4, 2), torch.rand(1, 4)
    elsewhere = [SimpleNamespace(dtype=tensor.dtype, to=tensor.to) for tensor in (down, up)]
    lora = Lora(dict.fromkeys(((0, part) for part in PARTS), elsewhere), "x")
    parts = {part: torch.nn.Linear(4, 4) for part in PARTS}
    plain = {part: layer(x) for part, layer in parts.items()}
    assert len(list(lora.attach(0, parts, 1.0))) == len(PARTS)
    for part, layer in parts.items():
        assert torch.allclose(layer(x), plain[part] + x @ down.T @ up.T)


def test_two_people_with_one_file_have_one_lora(unet, face_id):
    """The stronger one."""
    first, second = person(face_id, lora_weight=0.5), person(face_id, 401)
    assert first.lora is second.lora  # one copy on the device
    strong = replace(first, lora_weight=1.0)
    alone = replace(second, lora=None, lora_weight=0.0)
    assert torch.equal(effect(unet, [first, second]), effect(unet, [strong, alone]))


def test_a_lora_beside_pulid(unet, adapter, face_id):
    """PuLID's own residual is added to the model with the LoRA in it."""
    pulid = compile_injection(adapter, Identity(*cases.tokens(77, width=official.WIDTH)), weight=0.8)
    both = effect(unet, [pulid, person(face_id)])
    assert torch.isfinite(both).all()
    assert not torch.allclose(both, effect(unet, [person(face_id)]), atol=1e-4)


def test_fused_projections_are_refused(face_id):
    unet = layouts.unet()
    unet.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="did not run as layers of their own|bypasses|without its hooks"):
        effect(unet, [person(face_id)])


def test_a_lora_of_another_size(tmp_path, unet):
    widths = [site.width for site in find_sites(unet).sites]
    state = small.method_files(widths, official.WIDTH, text_width=32, only=["face_id"])["face_id"]
    other = load_adapter(small.write(tmp_path / "x.bin", state))
    with pytest.raises(UnsupportedModelError, match=r"LoRA in the file is for .* another size: layer 1 \(to_k\)"):
        effect(unet, [person(other)])


def test_sgm_layout(unet, face_id):
    """A1111's and Forge's names, in another order."""
    sgm = layouts.SgmUNet(unet)
    off = sgm()
    with inject(sgm, [person(face_id)], STEP):
        ours = sgm()
    assert torch.equal(ours - off, effect(unet, [person(face_id)]))


# ---------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "model.safetensors"
    save_file(small.clip_vision(), path)
    return path


@pytest.fixture(scope="module")
def clip(clip_file):
    seed = torch.get_rng_state()
    made = load_clip_vision(clip_file)
    assert torch.equal(torch.get_rng_state(), seed)  # a host's random numbers are left alone
    return made


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (224, 224), (90, 61)])
def test_clips_input(size):
    image = np.random.RandomState(1).randint(0, 256, (size[1], size[0], 3), np.uint8)
    wanted = transformers.CLIPImageProcessorPil()(images=Image.fromarray(image), return_tensors="pt").pixel_values
    assert torch.allclose(clip_input(image), wanted, atol=1e-5)


def test_what_is_read_off_clip(clip):
    pixels = cases.normal(5, 1, 3, 224, 224)
    made = clip.model(pixels, output_hidden_states=True)
    assert torch.equal(clip(pixels, pooled=True), made.image_embeds)
    patches = clip(pixels, pooled=False)
    assert patches.shape == (1, 257, small.CLIP_WIDTH)
    assert torch.equal(patches, made.hidden_states[-2])


def test_uncond_of_plus_is_an_image_of_zeros_not_black(clip):
    """Zeros after the normalization, a mean gray; other programs take a black image."""
    photo = np.full((40, 60, 3), 200, np.uint8)
    features = read_features([photo], [], methods.IP_ADAPTER_PLUS, clip)[0]
    assert torch.equal(features.patches, clip(clip_input(photo), pooled=False))
    assert torch.equal(features.nobody(methods.IP_ADAPTER_PLUS)[0], clip(torch.zeros(1, 3, 224, 224), pooled=False))
    black = clip(clip_input(np.zeros_like(photo)), pooled=False)
    assert not torch.allclose(features.no_patches, black, atol=1e-2)


def test_uncond_of_ip_adapter_is_an_embedding_of_zeros(clip, adapters):
    adapter = adapters["ip_adapter"]
    features = read_features([np.full((40, 60, 3), 200, np.uint8)], [], adapter.method, clip)
    identity = encode_identity(features, adapter)
    assert torch.equal(identity.uncond, adapter.encoder(torch.zeros(1, small.CLIP_IMAGE)))
    assert torch.equal(identity.cond, adapter.encoder(features[0].image))


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("in_model", [True, False])
def test_position_ids_of_older_files_and_older_transformers(tmp_path, monkeypatch, in_file, in_model):
    """transformers 4.30, which A1111 pins, has them in the state."""

    class Older(transformers.CLIPVisionModelWithProjection):
        def __init__(self, config):
            super().__init__(config)
            embeddings = self.vision_model.embeddings
            ids = embeddings.position_ids
            del embeddings.position_ids
            embeddings.register_buffer("position_ids", ids)

    if in_model:
        monkeypatch.setattr(transformers, "CLIPVisionModelWithProjection", Older)
    ids = {"vision_model.embeddings.position_ids": torch.arange(257)[None]} if in_file else {}
    torch.save({**small.clip_vision(), **ids}, tmp_path / "pytorch_model.bin")
    assert load_clip_vision(tmp_path / "pytorch_model.bin").model.config.num_hidden_layers == 3


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_vision_half_of_a_whole_clip(tmp_path, clip, prefix):
    """laion's file of ViT-H has the text encoder, too."""
    state = {**small.clip_vision(), "text_model.final_layer_norm.weight": torch.zeros(4), "logit_scale": torch.ones(())}
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "clip.bin")
    found = load_clip_vision(tmp_path / "clip.bin").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in clip.state_dict().items())


@pytest.mark.parametrize("what", ["text", "layer", "336"])
def test_another_clip_is_named(tmp_path, what):
    state = small.clip_vision()
    if what == "text":
        state = {"text_model.final_layer_norm.weight": torch.zeros(4)}
    elif what == "layer":
        del state["vision_model.encoder.layers.1.mlp.fc1.bias"]
    else:
        state["vision_model.embeddings.position_embedding.weight"] = torch.zeros(577, small.CLIP_WIDTH)
    torch.save(state, tmp_path / "clip.bin")
    with pytest.raises(WrongWeightsError, match=r"^clip\.bin is (a text encoder|not a CLIP image encoder)"):
        load_clip_vision(tmp_path / "clip.bin")


# ---------------------------------------------------------------- photos


def made_of(adapter: Adapter, photos, clip=None, **settings) -> Identity:
    encoders = Encoders(face_models() if "detector" in adapter.method.reads else None, clip)
    return make_identity(photos, adapter, encoders=lambda: encoders, encoders_id="e", cache=IdentityCache(), **settings)


COLOURS = np.random.RandomState(2).randint(0, 256, (300, 400, 3), np.uint8)


def test_face_id_reads_the_normalized_embedding(adapters):
    adapter = adapters["face_id"]
    embedding = torch.from_numpy(Recogniser().embed(COLOURS[:, :, ::-1], None))[None]
    wanted = adapter.encoder(embedding / embedding.norm())
    assert torch.allclose(made_of(adapter, [COLOURS]).cond, wanted, atol=1e-5)
    raw = made_of(adapters["portrait_unnorm"], [COLOURS])
    assert torch.allclose(raw.cond, adapters["portrait_unnorm"].encoder(embedding), atol=1e-5)


def test_face_id_plus_sees_the_aligned_face(adapters, clip):
    """insightface's norm_crop at 224 pixels, with OpenCV's channels, as the official example hands it to CLIP."""
    adapter = adapters["face_id_plus"]
    bgr = np.ascontiguousarray(COLOURS[:, :, ::-1])
    crop = norm_crop(bgr, Detector().detect(bgr)[0].landmarks, image_size=224)
    embedding = torch.from_numpy(Recogniser().embed(bgr, None))[None]
    unit = embedding / embedding.norm()
    identity = made_of(adapter, [COLOURS], clip)
    wanted = adapter.encoder(unit, clip(clip_input(crop), pooled=False))
    assert torch.allclose(identity.cond, wanted, atol=1e-4)
    nobody = adapter.encoder(torch.zeros(1, 512), clip(torch.zeros(1, 3, 224, 224), pooled=False))
    assert torch.allclose(identity.uncond, nobody, atol=1e-4)


def test_ip_adapter_needs_no_face(adapters, clip):
    identity = made_of(adapters["plus"], [COLOURS], clip)
    assert identity.cond.shape == (1, 16, TOKEN_WIDTH)
    assert identity.thumbnail.shape == (96, 128, 3)
    shop = Workshop(base=None, adapter=adapters["plus"], readers=None, cache=IdentityCache())
    assert shop.likeness(Image.fromarray(COLOURS), identity) == "unknown: IP-Adapter Plus for SDXL reads no face."


def test_another_image_encoder_is_refused(tmp_path, adapters):
    torch.save(small.clip_vision(width=32, image=24), tmp_path / "clip.bin")
    for kind, width in (("plus", 32), ("ip_adapter", 24)):
        with pytest.raises(WrongWeightsError, match=f"CLIP image encoder gives {width} numbers.*another CLIP"):
            made_of(adapters[kind], [COLOURS], load_clip_vision(tmp_path / "clip.bin"))


def test_photos_keep_their_size_where_the_official_code_keeps_it(adapters, monkeypatch):
    sizes, detect = [], Detector.detect
    monkeypatch.setattr(Detector, "detect", lambda self, image: sizes.append(image.shape[1]) or detect(self, image))
    for kind in ("instantid", "face_id"):
        made_of(adapters[kind], [np.full((1000, 2000, 3), 90, np.uint8)])
    assert sizes == [1280, 1280, 2000, 2000]  # for the detector, and for the landmarks


# ---------------------------------------------------------------- InstantID's ControlNet


def test_points_to_the_pixel():
    ours = draw_points(np.array(official.CONTROL_POINTS), official.CONTROL_SIZE)
    assert np.array_equal(ours, REFERENCE["points"].numpy())
    with pytest.raises(SettingError, match="five points"):
        draw_points(np.zeros((4, 2)), (8, 8))


@pytest.fixture(scope="module")
def pipeline():
    made = StableDiffusionXLPipeline(**official.parts(), add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def net(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "control.safetensors"
    save_file(official.identity_net(pipeline.unet).state_dict(), path)
    return load_identity_net(path, pipeline)


@pytest.fixture(scope="module")
def instant(whole) -> tuple[Adapter, Identity]:
    """The official pipeline's adapter and the identity of its face."""
    encoder = Resampler.from_state_dict(filled(small.resampler(official.FACE, official.WIDTH), 31))
    with torch.no_grad():
        cond, uncond = encoder(official.embedding()).split(1)
    return whole["instantid"], Identity(cond, uncond)


def generate(pipeline, injections=(), **changes) -> Tensor:
    inputs = {**official.pipeline_inputs(), "height": official.SIDE, "width": official.SIDE, **changes}
    with apply(pipeline, list(injections)):
        return pipeline(
            **inputs, num_inference_steps=official.STEPS, guidance_scale=official.GUIDANCE, output_type="latent"
        ).images


POINTS = (np.array(official.CONTROL_POINTS), (official.SIDE, official.SIDE))


def test_the_whole_official_pipeline(pipeline, net, instant):
    """Adapter and IdentityNet, three steps with guidance, against the official pipeline's final latents."""
    adapter, identity = instant
    injection = compile_injection(adapter, identity, weight=official.SCALE)
    off = generate(pipeline, [injection])
    assert relative(off, REFERENCE["identity_net_off"]) < 1e-4
    with identity_net(pipeline, net, identity, draw_points(*POINTS), weight=official.CONTROL_SCALE):
        ours = generate(pipeline, [injection])
    wanted = REFERENCE["identity_net_on"] - REFERENCE["identity_net_off"]
    assert wanted.norm() > 0.01 * REFERENCE["identity_net_off"].norm()
    assert relative(ours - off, wanted) < EFFECT
    assert torch.equal(generate(pipeline, [injection]), off)


def test_identity_nets_settings(pipeline, net, instant):
    _, identity = instant
    points, off = draw_points(*POINTS), generate(pipeline)
    with identity_net(pipeline, net, identity, points, weight=0):
        assert torch.equal(generate(pipeline), off)
    made = []
    for settings in ({}, {"start": 0.5}, {"end": 0.5}):
        with identity_net(pipeline, net, identity, points, **settings):
            made.append(generate(pipeline))
    assert len({round(float((one - off).norm()), 6) for one in (*made, off)}) == 4
    small_points = identity_net(pipeline, net, identity, draw_points(POINTS[0], (64, 64)))
    with pytest.raises(SettingError, match="is 64 x 64 pixels, but the image is 128 x 128"), small_points:
        generate(pipeline)
    for wrong in ({"weight": 3}, {"weight": float("nan")}, {"start": 0.9, "end": 0.1}):
        with pytest.raises(SettingError), identity_net(pipeline, net, identity, points, **wrong):
            raise AssertionError
    with (
        pytest.raises(SettingError, match="uncond tokens"),
        identity_net(pipeline, net, Identity(identity.cond), points),
    ):
        raise AssertionError
    assert torch.equal(generate(pipeline), off)
    assert count_hooks(pipeline.unet) == 0


def test_another_file_as_identity_net(tmp_path, pipeline):
    for key, shape, words in (
        ("control_model.input_blocks.0.0.weight", (2,), r"\. Needed: InstantID's ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", (16, 3, 3, 3), " for another model"),
    ):
        torch.save({key: torch.zeros(shape)}, tmp_path / "x.pth")
        with pytest.raises(WrongWeightsError, match=rf"^x\.pth is a ControlNet{words}"):
            load_identity_net(tmp_path / "x.pth", pipeline)
