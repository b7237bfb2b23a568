"""The other methods in a WebUI: from a photo to images, their settings on the page and in the API, their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_pulid import clip_vision, methods
from lib_pulid.disk import fingerprint
from lib_pulid.errors import MissingWeightsError, SettingError, UnsupportedModelError
from lib_pulid.files import catalog
from lib_pulid.units import PulidUnit
from lib_pulid.webui import infotext, routes
from tests.fake_modules.models import SMALL_SITES, WIDTH, CrossAttention, count_hooks, same, small_unet
from tests.light_webui import PHOTOS, unit
from tests.small_models import methods as small

FILES = {
    "instantid": "ip-adapter_instant_id_sdxl.bin",
    "portrait_unnorm": "ip-adapter-faceid-portrait_sdxl_unnorm.bin",
    "plus": "ip-adapter-plus_sdxl_vit-h.safetensors",
    "face_id": "ip-adapter-faceid_sdxl.bin",
}
CLIP = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
TEXT_WIDTH = 2048


@pytest.fixture(scope="module")
def files(light_models) -> Iterator[dict[str, Path]]:
    """The methods' files in the models folder, and what reads photos for them."""
    folder = light_models / "pulid"
    made = small.method_files([WIDTH] * SMALL_SITES, text_width=TEXT_WIDTH, gain=3.0, only=list(FILES))
    paths = {kind: small.write(folder / FILES[kind], state) for kind, state in made.items()}
    recognizer = light_models / "insightface/models/buffalo_l/w600k_r50.onnx"
    recognizer.parent.mkdir(parents=True, exist_ok=True)
    recognizer.write_text(recognizer.name)
    clip = light_models / "clip_vision" / CLIP
    clip.parent.mkdir()
    save_file(small.clip_vision(), clip)
    yield paths
    for path in (*paths.values(), clip, recognizer):
        path.unlink()


class WholeBlock(nn.Module):
    """A transformer block with self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(WIDTH), CrossAttention(TEXT_WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + 0.3 * self.attn1(x, x)
        return x + 0.3 * self.attn2(x, context)


@pytest.fixture
def whole(host) -> str:
    """A checkpoint with self-attention, which FaceID's LoRA needs."""
    torch.manual_seed(3)
    unet = small_unet()
    for part in (unet.input_blocks, unet.middle_block, unet.output_blocks):
        for i in range(len(part)):
            part[i] = WholeBlock()
    unet.requires_grad_(False)
    host.unets["whole"] = unet
    return "whole"


@pytest.mark.parametrize("kind", ["instantid", "portrait_unnorm", "plus"])
def test_a_photo_changes_the_image_and_off_is_bit_identical(host, files, kind):
    name = FILES[kind]
    plain = host.generate([], "sdxl")
    with_face = host.generate([unit("anna", model=name)], "sdxl")
    assert not same(plain, with_face)
    assert same(with_face, host.generate([unit("anna", model=name)], "sdxl"))
    assert not same(with_face, host.generate([unit("ben", model=name)], "sdxl"))
    assert same(plain, host.generate([unit("anna", model=name, weight=0)], "sdxl"))
    assert same(plain, host.generate([], "sdxl"))
    assert host.left_behind() == []


def test_face_id_with_its_lora(host, files, whole):
    """In A1111 as in Forge: hooks, not the host's own LoRA."""
    one = unit("anna", model=FILES["face_id"])
    plain = host.generate([], whole)
    before = host.fingerprint()
    with_face = host.generate([one], whole)
    bare = host.generate([{**one, "lora_weight": 0}], whole)
    assert not same(plain, with_face)
    assert not same(with_face, bare)
    assert same(plain, host.generate([{**one, "weight": 0}], whole))
    assert same(plain, host.generate([], whole))
    assert host.fingerprint() == before
    assert count_hooks(host.unets[whole]) == 0


def test_face_id_without_a_place_for_its_lora(host, files):
    with pytest.raises(UnsupportedModelError, match="no self-attention beside .* where FaceID's LoRA"):
        host.generate([unit("anna", model=FILES["face_id"])], "sdxl")


def test_two_methods_in_one_image(host, files):
    both = [unit("anna"), unit("ben", model=FILES["instantid"])]
    images = host.generate(both, "sdxl")
    assert not same(images, host.generate(both[:1], "sdxl"))
    assert not same(images, host.generate(both[1:], "sdxl"))


@pytest.mark.parametrize(("kind", "label", "given"), [
    ("instantid", "InstantID", {"projection": "ortho"}), ("instantid", "InstantID", {"num_zero": 3}),
    ("instantid", "InstantID", {"preset": "style"}), ("instantid", "InstantID", {"lora_weight": 0.5}),
    ("auto", "PuLID v1", {"lora_weight": 0.5}), ("auto", "PuLID v1", {"identity_net": 0.5}),
])  # fmt: skip
def test_a_setting_that_the_method_does_not_have(host, files, kind, label, given):
    with pytest.raises(SettingError, match=f"field {min(given)}: {label} for SDXL has no such setting"):
        host.generate([unit("anna", model=FILES.get(kind, kind), **given)], "sdxl")


def test_the_pages_hidden_settings_are_no_error(host, files):
    """The positional list has a value for every widget."""
    values = PulidUnit(images=tuple(unit("anna")["images"]), model=FILES["instantid"], weight=0.8).positions()
    listed = host.generate([True, *values], "sdxl")
    assert same(listed, host.generate([unit("anna", model=FILES["instantid"], weight=0.8)], "sdxl"))


def test_auto_is_pulid_and_knows_who_made_an_identity(host, files):
    assert host.library.adapters.load("auto", "sdxl").method.name == "PuLID"
    saved = host.encode("anna", FILES["instantid"])
    host.library.identities.save("Anna", saved)
    images = host.generate([{"identity": "Anna"}], "sdxl")
    assert same(images, host.generate([unit("anna", model=FILES["instantid"])], "sdxl"))


def test_a_model_in_another_spelling(host, files):
    """The page knows the file that generating finds; of several that fit, none."""
    from lib_pulid.webui.actions import Actions

    adapters, family = host.library.adapters, Mock(return_value="")  # no checkpoint is loaded
    for name in (FILES["instantid"].upper(), "IP-Adapter_Instant_ID_SDXL"):
        assert adapters.path(name) == files["instantid"]
        assert adapters.method_of(name) == methods.INSTANTID
        photos = json.dumps([PHOTOS["anna"]])
        *_, note = Actions(host.library, family).save(f"Anna {len(name)}", photos, name, "largest", 0, "official")
        assert "for InstantID for SDXL" in note
    assert adapters.method_of("auto") is adapters.method_of("") is adapters.method_of("gone") is None
    other = host.folder / "pulid" / "more" / FILES["instantid"].upper()
    other.parent.mkdir()
    shutil.copy(files["instantid"], other)
    try:
        assert adapters.method_of(FILES["instantid"]) == methods.INSTANTID
        assert adapters.method_of(FILES["instantid"].title()) is None
        with pytest.raises(SettingError, match="could be"):
            adapters.path(FILES["instantid"].title())
    finally:
        shutil.rmtree(other.parent)


@contextmanager
def away(*paths: Path) -> Iterator[None]:
    """Inside, these files are not there."""
    for path in paths:
        path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        for path in paths:
            path.with_suffix(".away").rename(path)


def test_an_identity_whose_file_is_gone(host, files):
    host.library.identities.save("Gone", host.encode("anna", FILES["instantid"]))
    refused = pytest.raises(MissingWeightsError, match=": the identity was made with InstantID for SDXL")
    with away(files["instantid"]), refused:
        host.generate([{"identity": "Gone"}], "sdxl")


def test_only_its_own_files_are_needed(host, files):
    """InstantID needs antelopev2 alone; FaceID Portrait says which file it lacks."""
    tower = host.folder / "pulid" / "EVA02_CLIP_L_336_psz14_s6B.pt"
    with away(tower, host.folder / "insightface/models/buffalo_l/w600k_r50.onnx"):
        host.forget_photos()
        host.generate([unit("anna", model=FILES["instantid"])], "sdxl")
        with pytest.raises(MissingWeightsError, match=r"w600k_r50\.onnx \(face recognizer of FaceID"):
            host.generate([unit("anna", model=FILES["portrait_unnorm"])], "sdxl")


# ---------------------------------------------------------------- the page, the API's lists, the parameters


def test_the_page_follows_the_model(host, files):
    from lib_pulid.webui.following import FOLLOWING, Following

    following = Following(host.library, lambda name: "sdxl")
    values = {
        "weight": 0.8,
        "preset": "custom",
        "fusion": "id_mix",
        "projection": "ortho_v2",
        "num_zero": 20,
        "start_step": 0,
    }

    def follow(model: str, **changed: Any) -> list[Any]:
        given = {**values, "model": model, **changed}
        weight, *others = (given[name] for name in FOLLOWING)
        return [following.usual_weight("sdxl", weight, model), *following.follow_model("sdxl", *others)]

    weight, preset, fusion, sdxl, flux, lora, net = follow(FILES["instantid"])
    assert [one["visible"] for one in (preset, sdxl, flux, lora, net)] == [False] * 4 + [True]
    assert "value" not in weight  # 0.8 is InstantID's default, too
    assert fusion["choices"] == ["official", "average"] and fusion["value"] == "official"
    weight, preset, _, sdxl, flux, lora, net = follow(FILES["face_id"])
    assert [one["visible"] for one in (preset, sdxl, flux, lora, net)] == [False, False, False, True, False]
    assert weight["value"] == 1.0
    assert "value" not in follow(FILES["face_id"], weight=0.65)[0]  # set by hand
    weight, preset, fusion, sdxl, flux, lora, net = follow("auto", weight=1.0)
    assert [one["visible"] for one in (preset, sdxl, flux, lora, net)] == [True, True, False, False, False]
    assert (weight["value"], preset["value"]) == (0.8, "v1.1")


def test_models_lists_the_methods(host, files):
    listed = {one["name"]: one for one in routes.models(host.library)["models"]}
    assert listed[FILES["instantid"]]["method"] == "InstantID"
    assert listed[FILES["face_id"]]["method"] == "IP-Adapter FaceID"
    assert {file["name"]: file["restricted"] for file in routes.models(host.library)["files"]}[FILES["instantid"]]
    described = routes.describe()["methods"]
    assert described["IP-Adapter FaceID for SDXL"] == {"family": "sdxl", "weight": 1.0, "settings": ["lora_weight"]}


def test_parameters_have_the_methods_own_settings(host, files):
    p = host.processing("sdxl")
    host.generate([unit("anna", model=FILES["instantid"])], p=p)
    entries = infotext.read(p.extra_generation_params["PuLID 1"])
    assert entries["method"] == "InstantID for SDXL"
    assert (entries["weight"], entries["model"]) == ("0.8", FILES["instantid"])
    assert not {"projection", "num_zero", "preset", "lora_weight"} & set(entries)


def measured(host: Any, model: str) -> str:
    """Returns the notes below an image whose likeness is measured."""
    p = host.processing("sdxl")
    image = Image.new("RGB", (8, 8))
    host.ui.generate(host.script, p, [unit("anna", model=model)], decode=lambda batch: [image])
    return p.processed.comments


def test_likeness_of_a_method_that_reads_no_face(host, files, monkeypatch):
    """The photo is read only once, and the note says why the likeness is unknown."""
    monkeypatch.setitem(host.ui.modules.shared.opts.data, "pulid_likeness", True)
    load = Mock(wraps=clip_vision.load_clip_vision)
    monkeypatch.setattr(clip_vision, "load_clip_vision", load)
    for _ in range(2):
        why = "person 1 is unknown, since IP-Adapter Plus for SDXL reads no face."
        assert measured(host, FILES["plus"]) == f"PuLID likeness: {why}\n"
    assert load.call_count == 1


def test_likeness_of_a_method_whose_only_judge_fails(host, files, monkeypatch):
    """Plus Face has no recognizer of its own."""
    monkeypatch.setitem(host.ui.modules.shared.opts.data, "pulid_likeness", True)
    monkeypatch.setattr(methods, "_PLUS_FACE", fingerprint(files["plus"])[:8])
    monkeypatch.setattr("lib_pulid.face_models.ArcFaceRecogniser", Mock(side_effect=OSError("truncated")))
    for _ in range(2):
        assert measured(host, FILES["plus"]) == (
            "PuLID unit 1: w600k_r50 cannot be used to measure likeness (truncated).\n"
            "PuLID likeness: person 1 is unknown, since w600k_r50 failed.\n"
        )


@pytest.mark.parametrize(("gone", "noted"), [("EVA02_CLIP_L_336_psz14_s6B.pt", ""), ("glintr100.onnx", "not measured")])
def test_an_identity_is_saved_without_pulids_own_files(host, files, monkeypatch, gone, noted):
    """Its likeness would be measured with antelopev2, without which it is saved all the same."""
    from lib_pulid.webui.actions import Actions

    monkeypatch.setitem(host.ui.modules.shared.opts.data, "pulid_likeness", True)
    photos, name = json.dumps([PHOTOS["anna"]]), f"Anna without {gone[:4]}"
    lost = [*host.folder.rglob(gone), *(host.folder.rglob("w600k_r50.onnx") if noted else ())]
    with away(*lost):
        host.forget_photos()
        *_, note = Actions(host.library, Mock(return_value="sdxl")).save(
            name, photos, FILES["plus"], "largest", 0, "official"
        )
    assert f"Saved {name}" in note and (noted or "Saved") in note
    assert bool(noted) == ("likeness" in note)


def test_missing_files_are_pulids_all_the_same(host, files):
    """InstantID's file does not count as a PuLID file."""
    from lib_pulid.webui.missing import Missing

    with away(*host.folder.glob("pulid/pulid_v1*")):
        missing = Missing("txt2img", host.library, lambda: "sdxl")
        assert [file.name for file in missing.files()] == ["pulid_v1.1.safetensors"]


def test_every_method_can_be_had():
    """Its file and what reads photos for it are in the catalog, under its license."""
    roles = {file.role for file in catalog.CATALOG}
    for method in methods.METHODS:
        assert {*method.reads, *filter(None, [method.control])} <= roles, method.label
    for name in FILES.values():
        file = catalog.named(name)
        assert file.restricted == (file.source != "h94/IP-Adapter"), name
