"""Likeness: whose face is whose, the number in each image's parameters, the best images; blended people's are in
test_blend.py."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageFont
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_pulid import likeness
from lib_pulid.faces import read_face
from lib_pulid.identity import Identity
from lib_pulid.likeness import UNKNOWN, Person, Recognizer, SeenFace, best, cosine, mean_embedding, measure, text
from lib_pulid.webui.pictures import decode
from tests.light_webui import PHOTOS, Recogniser, unit

SIZE = (100, 200)  # height, width
LEFT = np.repeat([[1.0, 0.0]], 100, axis=0).repeat(100, axis=1)  # a region: the left half


def face(x: float, *direction: float, side: float = 20) -> SeenFace:
    """A face around x, 50."""
    box = np.array([x - side / 2, 50 - side / 2, x + side / 2, 50 + side / 2], np.float32)
    return SeenFace(box, np.array(direction, np.float32))


def person(*direction: float, region: np.ndarray | None = None) -> Person:
    return Person(np.array(direction, np.float32), region)


# ---------------------------------------------------------------- whose face is whose


def test_the_sum_counts_not_the_first():
    """The first person is most like the second's face, but then nobody would be left for the second."""
    faces = [face(50, 1, 0.1), face(150, 0.7, -0.7)]
    people = [person(1, 0), person(1, 0.5)]
    values = measure(faces, people, SIZE)
    assert values == pytest.approx((cosine(people[0].embedding, faces[1].embedding), cosine([1, 0.5], [1, 0.1])))


def test_the_assignment_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for count in (2, 5):
        faces = [SeenFace(np.array([0, 0, 9, 9], np.float32), rng.standard_normal(4)) for _ in range(count)]
        people = [Person(rng.standard_normal(4)) for _ in range(3)]
        totals = []
        for order in itertools.permutations(range(max(count, 3)), 3):
            pairs = [(p, faces[i]) for p, i in zip(people, order) if i < count]
            totals.append(sum(cosine(p.embedding, f.embedding) for p, f in pairs))
        values = measure(faces, people, SIZE)
        assert sum(value is not None for value in values) == min(count, 3)
        assert sum(value for value in values if value is not None) == pytest.approx(max(totals))


def test_a_region_decides():
    """Two people who changed places are unlike, although each is in the image."""
    faces = [face(50, 1, 0), face(150, 0, 1)]
    anna, ben = person(0, 1, region=LEFT), person(1, 0, region=1 - LEFT)
    assert measure(faces, [anna, ben], SIZE) == pytest.approx((0, 0))
    assert measure(faces, [person(0, 1), person(1, 0)], SIZE) == pytest.approx((1, 1))
    assert measure(faces, [anna, person(0, 1)], SIZE) == pytest.approx((0, 1))  # the second is anywhere
    assert measure([face(150, 0, 1)], [anna, ben], SIZE) == (None, 0)  # nobody on the left
    small = LEFT[::10, ::10]
    assert measure(faces, [person(1, 0, region=small)], SIZE) == pytest.approx((1,))
    two_sizes = [face(30, 0, 1, side=10), face(70, 1, 0, side=30)]  # the largest face of a region
    assert measure(two_sizes, [person(1, 0, region=LEFT)], SIZE) == pytest.approx((1,))


def test_words_for_nobody_somebody_unknown_and_how_alike():
    assert measure([], [person(1, 0), person(0, 1, region=LEFT)], SIZE) == (None, None)
    values = measure([face(50, 1, 0)], [Person(None), person(1, 0)], SIZE)
    assert math.isnan(values[0])
    assert text((0.714, None, UNKNOWN)) == "0.71, no face, unknown"
    assert text((UNKNOWN, UNKNOWN)) == ""
    words = [likeness.INSIGHTFACE.verdict(value) for value in (0.2751, 0.2749, 0.1951, 0.1949)]
    assert words == ["same person", "close", "close", "another person"]


def test_a_person_of_several_photos_is_between_them():
    mean = mean_embedding([np.array([10.0, 0]), np.array([0, 1.0])])
    assert cosine(mean, [1, 1]) == pytest.approx(1)
    assert cosine(mean_embedding([np.array([1.0, 0]), np.array([0, 1.0])], [3, 1]), [3, 1]) == pytest.approx(1)
    assert mean.dtype == np.float32


def test_the_best():
    images = [(0.3,), (0.9, 0.1), None, (0.5, 0.4), (None, 0.9), (UNKNOWN,)]
    assert best(images, 1) == [3, 2, 5]  # what was not measured is kept
    assert best(images, 2) == [3, 0, 2, 5]
    assert best(images, 9) == [3, 0, 1, 4, 2, 5]


def test_judges_know_people():
    first, own = (Recognizer(key, key, key == "own", Recogniser) for key in ("first", "own"))
    anna, ben = {"own": np.ones(2), "first": np.ones(2)}, {"own": np.ones(2)}
    assert likeness.choose_judge([first, own], [anna]) is first
    assert likeness.choose_judge([first, own], [anna, ben]) is own
    assert likeness.choose_judge([first, own], [{}, ben]) is own
    assert likeness.choose_judge([first, own], [{}]) is None
    assert likeness.choose_judge([], [anna]) is None


# ---------------------------------------------------------------- the saved identity


def test_the_file_keeps_embeddings(tmp_path):
    """Earlier versions read version 1 and the tensors they know."""
    made = Identity(torch.ones(1, 4, 8), info={"name": "Anna"}, embeddings={"abc": np.arange(5, dtype=np.float32)})
    made.save(tmp_path / "anna.safetensors")
    again = Identity.load(tmp_path / "anna.safetensors")
    assert list(again.embeddings) == ["abc"]
    assert np.array_equal(again.embeddings["abc"], made.embeddings["abc"])
    assert again.short_hash == Identity(made.cond).short_hash
    with safe_open(tmp_path / "anna.safetensors", "pt") as file:
        assert (file.metadata()["version"], file.metadata()["format"]) == ("1", "sd-webui-pulid identity")
        assert {"cond"} <= set(file.keys())


@pytest.mark.parametrize(
    "wrong", [torch.tensor([1.0, math.nan]), torch.ones(2, 2), torch.ones(3).half(), torch.ones(0)]
)
def test_a_damaged_embedding_is_left_out(tmp_path, wrong):
    Identity(torch.ones(1, 4, 8)).save(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    metadata = {"format": "sd-webui-pulid identity", "version": "1"}
    save_file({**tensors, "embedding.abc": wrong}, tmp_path / "b.safetensors", metadata)
    assert Identity.load(tmp_path / "b.safetensors").embeddings == {}
    assert Identity.load(tmp_path / "a.safetensors").embeddings == {}  # a file of an earlier version


# ---------------------------------------------------------------- in a WebUI


def color(name: str) -> Image.Image:
    return Image.fromarray(decode(PHOTOS[name], name))


@pytest.fixture
def options(host, monkeypatch) -> Iterator[dict]:
    """The settings, with likeness on."""
    data = host.ui.modules.shared.opts.data
    monkeypatch.setitem(data, "pulid_likeness", True)
    return data


def generate(host: Any, args: list, *batches: list[Image.Image]) -> Any:
    """Returns what the page gets. batches: the images that the host decodes."""
    p = host.processing(batches=len(batches))
    host.state.interrupted = host.state.skipped = False
    host.ui.generate(host.script, p, args, decode=lambda batch: batches[batch])
    assert host.ui.swallowed == []
    assert host.left_behind(p) == []
    return p.processed


def fail(*_: Any) -> None:
    raise RuntimeError("the detector broke")


def number(infotext: dict[str, Any]) -> str | None:
    return infotext.get("PuLID likeness")


def test_off_is_off(host, monkeypatch):
    """No entry, no note, and nothing is loaded or run."""

    for name in ("face_models.InsightFaceDetector", "face_models.ArcFaceRecogniser", "webui.likeness.measure"):
        monkeypatch.setattr(f"lib_pulid.{name}", fail)
    monkeypatch.setattr(type(host.library.encoders), "see", fail)
    made = generate(host, [unit("anna")], [color("anna")])
    assert [number(one) for one in made.infotexts] == [None]
    assert "likeness" not in made.comments
    assert generate(host, [False], [color("anna")]).comments == ""


def test_every_image_has_its_number(host, options):
    made = generate(host, [unit("anna")], [color("anna"), color("nobody")], [color("ben")])
    values = [number(one) for one in made.infotexts]
    assert values[:2] == ["1.00", "no face"]
    assert float(values[2]) < 0.9
    assert "PuLID likeness, image 1: 1.00 (same person)." in made.comments
    assert "image 2: no face." in made.comments
    assert "the adapter's own recognizer, which overestimates" in made.comments
    assert "put buffalo_l's w600k_r50.onnx into the models folder" in made.comments
    assert " s per image" in made.comments
    assert json.loads(json.dumps(values))[0] == "1.00"  # it is text


def test_several_people_in_order(host, options):
    made = generate(host, [unit("ben"), unit("anna")], [color("anna")])
    assert number(made.infotexts[0]) == "no face, 1.00"
    assert "person 1 no face, person 2 1.00 (same person)" in made.comments


def test_an_entry_is_of_one_image_only(host, options, monkeypatch):
    """Not of a grid, and not of another image's text that is written before that image is measured."""
    p, seen, infotext = host.processing(), [], host.ui.infotext

    def and_a_grid(p: Any) -> dict:
        seen.append(infotext(p, use_main_prompt=True))
        return infotext(p)

    monkeypatch.setattr(host.ui, "infotext", and_a_grid)
    host.ui.generate(host.script, p, [unit("anna")], decode=lambda batch: [color("anna"), color("anna")])
    assert [number(one) for one in seen] == [None, None]
    assert [number(one) for one in p.processed.infotexts] == ["1.00", "1.00"]
    assert number(p.extra_generation_params) is None  # nothing for the next one
    from lib_pulid.webui.likeness import PerImage

    entry = PerImage("0.5", p)
    p.batch_index += 1
    assert (entry(p=p), entry(), str(entry)) == (None, "0.5", "0.5")


def test_a_grid_has_the_number_in_each_cell(host, options):
    """Cells are shallow copies, which share the dict of parameters."""
    p, texts = host.processing(), []
    for name in ("anna", "nobody"):
        cell = copy.copy(p)
        host.ui.generate(host.script, cell, [unit("anna")], decode=lambda batch, name=name: [color(name)])
        texts.append(number(cell.processed.infotexts[0]))
        assert number(host.ui.infotext(cell)) is None  # the grid's own text
    assert texts == ["1.00", "no face"]


def test_a_saved_identity_of_an_earlier_version(host, options):
    old = replace(host.encode("anna"), embeddings={})
    host.library.identities.save("old anna", old)
    host.forget_photos()
    made = generate(host, [{"identity": "old anna"}], [color("anna")])
    assert number(made.infotexts[0]) is None
    assert "person 1 is unknown, since the saved identity has no face embedding. Give the photo once" in made.comments
    generate(host, [unit("anna")], [color("anna")])  # the photo, once
    made = generate(host, [{"identity": "old anna"}], [color("anna")])
    assert number(made.infotexts[0]) == "1.00"
    assert "unknown" not in made.comments


def test_a_photo_of_an_earlier_cache_is_read_again(host, options):
    generate(host, [unit("anna")], [color("anna")])
    (path,) = (host.library.folder.path / "cache").glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("embedding.")}
    save_file(tensors, path, {"format": "sd-webui-pulid identity", "version": "1"})
    host.library.identities._cache = None
    assert number(generate(host, [unit("anna")], [color("anna")]).infotexts[0]) == "1.00"
    assert Identity.load(path).embeddings


@pytest.fixture
def buffalo(host, tmp_path) -> Iterator[Path]:
    path = host.folder / "insightface" / "w600k_r50.onnx"
    path.write_text("another recognizer")
    yield path
    path.unlink()


def judge_file(monkeypatch, load: Callable[[], Any], buffalo: Path) -> list[Path]:
    """What buffalo_l's file is loaded as. Returns the files that are loaded from now on."""
    loaded: list[Path] = []

    def open_file(path: Path, device: str) -> Any:
        loaded.append(path)
        return load() if path == buffalo else Recogniser()

    monkeypatch.setattr("lib_pulid.face_models.ArcFaceRecogniser", open_file)
    return loaded


def test_another_recognizer_is_the_judge(host, options, buffalo, monkeypatch):
    class Reversed(Recogniser):
        def embed(self, *args: Any) -> np.ndarray:
            return super().embed(*args)[::-1]

    loaded = judge_file(monkeypatch, Reversed, buffalo)
    made = generate(host, [unit("anna")], [color("anna")])
    assert number(made.infotexts[0]) == "1.00"
    assert "Judged by w600k_r50, in " in made.comments
    assert "overestimates" not in made.comments
    assert set(loaded) == {buffalo}
    # Who is saved without it is known to the adapter's own recognizer only.
    host.library.identities.save("anna", host.encode("ben"))
    made = generate(host, [{"identity": "anna"}], [color("ben")])
    assert number(made.infotexts[0]) == "1.00"
    assert "the adapter's own recognizer, which overestimates" in made.comments
    assert "w600k_r50 does not know person 1 yet. Give the photo once" in made.comments


def test_a_judge_that_is_broken_costs_its_number_only(host, options, buffalo, monkeypatch):
    """The user is told why each time, but the photo is read only once."""
    judge_file(monkeypatch, fail, buffalo)
    for times in (1, 0):
        read = Mock(wraps=read_face)
        monkeypatch.setattr("lib_pulid.photos.read_face", read)
        made = generate(host, [unit("anna")], [color("anna")])
        assert number(made.infotexts[0]) == "1.00"
        assert "the adapter's own recognizer" in made.comments
        assert "PuLID unit 1: w600k_r50 cannot be used to measure likeness (the detector broke)." in made.comments
        assert "Give the photo" not in made.comments
        assert read.call_count == times


def test_a_grid_shows_the_number_of_each_cell(host, options, monkeypatch):
    """On copies; what was not measured, as the grid of a grid, stays as it is."""
    monkeypatch.setitem(sys.modules, "modules.images", SimpleNamespace(get_font=ImageFont.load_default))
    made = generate(host, [unit("anna")], [color("anna"), color("nobody")])
    before = [image.copy() for image in made.images]
    params = SimpleNamespace(imgs=[*made.images, before[0]])
    for registered in host.ui.modules.script_callbacks.callback_map["callbacks_image_grid"]:
        registered.callback(params)
    first, second, other = params.imgs
    for image, kept in zip((first, second), before):
        corner = ImageChops.difference(image, kept).getbbox()
        assert corner is not None and corner[0] < image.width / 4 and corner[1] > image.height / 2
    assert other is before[0] and made.images == before
    assert [number(one) for one in made.infotexts] == ["1.00", "no face"]


# ---------------------------------------------------------------- the best of n


def saved(image: Image.Image, folder: Path, name: str) -> Image.Image:
    path = folder / f"{name}.png"
    path.write_bytes(b"image")
    path.with_suffix(".txt").write_text("parameters")
    image.already_saved_as = str(path)
    return image


def test_the_best_are_kept(host, tmp_path):
    """With the setting off, too: who asks for the best asks for the measuring."""
    names = ["nobody", "anna", "ben", "anna"]
    images = [saved(color(name), tmp_path, str(i)) for i, name in enumerate(names)]
    made = generate(host, [unit("anna", keep_best=2)], images[:2], images[2:])
    assert made.images == [images[1], images[3]]
    assert [number(one) for one in made.infotexts] == ["1.00", "1.00"]
    assert made.all_seeds == [1, 3]
    assert made.seed == 1
    assert "PuLID kept 2 of 4 images. Not kept: image 1 (no face), image 3 (" in made.comments
    assert f"They are in {tmp_path / 'not kept'}." in made.comments
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["1.png", "1.txt", "3.png", "3.txt"]
    assert sorted(path.name for path in (tmp_path / "not kept").iterdir()) == ["0.png", "0.txt", "2.png", "2.txt"]


def test_names_that_are_taken(host, tmp_path):
    for _ in range(2):
        images = [saved(color(name), tmp_path, name) for name in ("nobody", "anna")]
        generate(host, [unit("anna", keep_best=1)], images)
    assert {path.name for path in (tmp_path / "not kept").glob("*.png")} == {"nobody.png", "nobody-1.png"}


def test_fewer_images_than_to_keep_are_sorted(host):
    images = [color("nobody"), color("anna")]
    made = generate(host, [unit("anna", keep_best=2)], images)
    assert made.images == images[::-1] and [number(one) for one in made.infotexts] == ["1.00", "no face"]
    assert made.all_seeds == [1, 0]
    assert "PuLID sorted the images by likeness, the best first." in made.comments and "kept" not in made.comments


def test_nothing_is_thrown_away_unmeasured(host, monkeypatch):
    monkeypatch.setattr("lib_pulid.face_models.InsightFaceDetector", fail)
    made = generate(host, [unit("anna", keep_best=1)], [color("nobody"), color("anna")])
    assert len(made.images) == 2
    assert [number(one) for one in made.infotexts] == [None, None]
    assert made.comments.count("PuLID likeness: not measured. RuntimeError: the detector broke") == 1
    assert "PuLID kept all 2 images" in made.comments


def test_masks_follow_their_image(host):
    from lib_pulid.webui import likeness as web

    images = [color(name) for name in ("nobody", "anna", "ben")]
    masks = [Image.new("L", (4, 4)) for _ in images]
    grid, pose = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))  # the pose: ControlNet adds it
    measured = [web.Measured(image, i, (None,), (1,)) for i, image in enumerate(images)]

    def made(shown, **more):
        usual = {"infotexts": ["a", "b", "c"], "all_seeds": [5, 6, 7], "index_of_first_image": 0}
        return SimpleNamespace(images=shown, **{**usual, **more})

    result = made([*images, pose])
    assert web._arrange(result, measured, [0, 1])
    assert result.images == [*images[:2], pose] and result.infotexts == ["a", "b"]
    result = made([image for pair in zip(images, masks) for image in pair])
    assert web._arrange(result, measured, [2, 1])
    assert result.images == [images[2], masks[2], images[1], masks[1]]
    assert (result.infotexts, result.all_seeds, result.info, result.seed) == (["c", "b"], [7, 6], "c", 7)
    assert not web._arrange(result, measured, [0])  # somebody has exchanged an image
    result = made(images[::-1])
    assert not web._arrange(result, measured, [0]) and result.images == images[::-1]  # somebody has moved them
    result = made([grid, *images], infotexts=["grid", "a", "b", "c"], index_of_first_image=1)
    assert web._arrange(result, measured, [2, 0])
    assert result.images == [grid, images[2], images[0]] and result.infotexts == ["grid", "c", "a"]
    result = made([*images], infotexts=[], all_seeds=[])
    assert web._arrange(result, measured, [1]) and result.images == [images[1]]
