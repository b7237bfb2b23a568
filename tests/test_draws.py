"""Photos drawn from the owner's folder: random by the image's seed, or in turn."""

from __future__ import annotations

import base64
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from lib_pulid.errors import NoFaceError, SettingError
from lib_pulid.fields import FIELD
from lib_pulid.units import PulidUnit
from lib_pulid.webui import settings
from lib_pulid.webui.draws import IN_TURN, RANDOM, Draws
from lib_pulid.webui.infotext import PastedField
from tests.fake_modules.models import same
from tests.light_webui import PHOTOS, unit

NAMES = ("anna.png", "ben.png", "cleo.png")
PLACE = "(PuLID unit 1, field draw|Person 1, Draw the photo): "  # to the API, in the page


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(base64.b64decode(PHOTOS[name[:-4]]))
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "._anna.png").write_bytes(b"\0\5\x16\7")  # of macOS
    (tmp_path / "sub.png").mkdir()
    return tmp_path


@pytest.fixture
def draws(folder) -> Draws:
    return Draws(lambda: folder)


# ---------------------------------------------------------------- the draw


def test_random_is_the_seed(draws):
    found = [draws.draw(1, 0, RANDOM, seed, 0).name for seed in range(60)]
    assert found == [draws.draw(1, 0, RANDOM, seed, 5).name for seed in range(60)]
    assert min(found.count(name) for name in NAMES) > 10


def test_two_people_are_two_photos(draws):
    for how in (RANDOM, IN_TURN):
        for seed in range(10):
            assert len({draws.draw(rank + 1, rank, how, seed, 0) for rank in range(3)}) == 3


def test_a_photo_less_changes_only_its_own_draws(draws, folder):
    before = {seed: draws.draw(1, 0, RANDOM, seed, 0).name for seed in range(30)}
    (folder / NAMES[0]).unlink()
    after = {seed: draws.draw(1, 0, RANDOM, seed, 0).name for seed in range(30)}
    assert all(after[seed] == name for seed, name in before.items() if name != NAMES[0])


def test_in_turn(draws):
    assert [draws.draw(1, 0, IN_TURN, 0, batch).name for batch in range(4)] == [*NAMES, NAMES[0]]
    draws.advance(4)
    assert draws.draw(1, 0, IN_TURN, 0, 0).name == NAMES[1]
    assert draws.last(1).name == NAMES[1]


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".gif", ".jp2", ".TIF"])
def test_whatever_can_be_read_can_be_drawn(tmp_path, suffix):
    (tmp_path / f"anna{suffix}").write_bytes(base64.b64decode(PHOTOS["anna"]))
    assert Draws(lambda: tmp_path).draw(1, 0, RANDOM, 0, 0).name == f"anna{suffix}"


def test_what_cannot_be_drawn(draws, tmp_path):
    with pytest.raises(SettingError, match=r"no folder of photos to draw from is allowed. Name one in Settings"):
        Draws(lambda: None).draw(1, 0, RANDOM, 0, 0)
    for empty in (tmp_path / "sub.png", tmp_path / "gone"):
        with pytest.raises(SettingError, match="there is no photo in"):
            Draws(lambda empty=empty: empty).draw(1, 0, RANDOM, 0, 0)
    with pytest.raises(SettingError, match="has 3 photos, too few for 4 people"):
        draws.draw(4, 3, RANDOM, 0, 0)
    with pytest.raises(SettingError, match="no photo was drawn"):
        draws.last(1)


# ---------------------------------------------------------------- the unit


def test_one_source_of_a_person():
    for other in ({"images": ["a"]}, {"identity": "Anna"}):
        with pytest.raises(SettingError, match="unit 1, field draw: a photo is drawn; give neither"):
            PulidUnit.from_mapping({"draw": "random", **other}, 1)
        assert PulidUnit.from_mapping({"draw": "off", **other}, 1).draw == "off"
    page = PulidUnit.from_positions(PulidUnit(images=("a",), identity="Anna", draw="random").positions(), 1)
    assert (page.images, page.identity, page.draw) == ((), "", "random")
    for change in ({"images": ("b",)}, {"identity": "Ben"}):  # an X/Y/Z axis
        changed = PulidUnit(draw="random").changed(change, 1)
        assert changed.draw == "off"
        assert getattr(changed, *change) == next(iter(change.values()))
    assert PulidUnit(identity="Anna").changed({"draw": "in turn"}, 1).identity == ""
    assert PulidUnit(identity="Anna").changed({"draw": "off"}, 1).identity == "Anna"


@pytest.mark.parametrize("name", ["pulid_photo_folder", "pulid_models_dir"])
@pytest.mark.parametrize("hidden", [False, True])
def test_folders_are_the_owners_choice(host, monkeypatch, name, hidden):
    """Not that of an API caller, nor, with --hide-ui-dir-config, of whoever sees the page."""
    monkeypatch.setattr(host.ui.modules.shared.cmd_opts, "hide_ui_dir_config", hidden, raising=False)
    settings.add_settings()
    added = host.ui.modules.shared.opts.added[name]
    assert added.restrict_api and added.component_args == {"visible": not hidden}


# ---------------------------------------------------------------- in a WebUI


@pytest.fixture
def allowed(host, folder, monkeypatch) -> Iterator[Any]:
    monkeypatch.setitem(host.ui.modules.shared.opts.data, "pulid_photo_folder", str(folder))
    return host


def drawn(host: Any, how: str, seeds: list[int], **unit_settings: Any) -> tuple[list[str], list[torch.Tensor]]:
    """Returns the photo in each image's parameters, and the latents."""
    p = host.processing(batches=len(seeds))
    p.all_seeds, p.n_iter = seeds, len(seeds)
    host.state.interrupted = host.state.skipped = False
    args = [{"draw": how, **unit_settings}]
    made = host.ui.generate(host.script, p, args, decode=lambda batch: [Image.new("RGB", (8, 8))])
    assert host.ui.swallowed == []
    assert host.left_behind(p) == []
    texts = [text["PuLID 1"] for text in p.processed.infotexts]
    return [re.search(r"photo: (\S+\.png)", text)[1] for text in texts], made


def test_every_image_has_its_own_photo(allowed):
    seeds = [3, 4, 5, 6, 7]
    names, latents = drawn(allowed, "random", seeds)
    assert len(set(names)) > 1
    assert drawn(allowed, "random", seeds)[0] == names
    for name, seed, made in zip(names, seeds, latents):
        alone, (image,) = drawn(allowed, "random", [seed])
        assert alone == [name]
        assert same([image], [made])
        assert same(allowed.generate([unit(name[:-4])]), [made])  # as with the photo itself


def test_it_is_read_as_the_photo_itself(allowed, folder, monkeypatch):
    """One larger than what is kept of a photo, and nothing is encoded on the way."""
    for name in NAMES:
        (folder / name).unlink()
    Image.new("RGB", (4200, 48), (200, 80, 60)).save(folder / "large.png")
    allowed.forget_photos()
    with monkeypatch.context() as patch:
        patch.setattr("lib_pulid.webui.pictures.encode", Mock(side_effect=AssertionError))
        p = allowed.processing()
        made = allowed.generate([{"draw": "random"}], p=p)
    assert "photo: large.png, photos: 1" in p.extra_generation_params["PuLID 1"]
    text = base64.b64encode((folder / "large.png").read_bytes()).decode()
    assert same(allowed.generate([{"images": [text]}]), made)
    assert len(list((allowed.library.folder.path / "cache").iterdir())) == 1


def test_turns_go_on(allowed):
    assert drawn(allowed, "in turn", [1, 1])[0] == ["anna.png", "ben.png"]
    assert drawn(allowed, "in turn", [1, 1])[0] == ["cleo.png", "anna.png"]


def test_a_generation_inside_another_has_its_photo(allowed):
    """ADetailer's: it draws nothing itself, and takes no turn."""
    drawn(allowed, "in turn", [1])
    p = allowed.processing()
    p._ad_inner, p.all_seeds = True, [99]
    allowed.ui.generate(allowed.script, p, [{"draw": "in turn"}], decode=lambda batch: [object()])
    assert "photo: anna.png" in p.extra_generation_params["PuLID 1"]
    assert drawn(allowed, "in turn", [1])[0] == ["ben.png"]


def test_between_the_images_the_parameters_stay(allowed):
    """ADetailer runs `process` again, with a copy, after it has repainted an image and before its text is written."""
    seen: list[str] = []
    for first in (0, 2):  # a request may come with the number of the last batch of the one before
        p = allowed.processing(batches=3)
        p.all_seeds, p.n_iter, p.iteration = [1, 2, 3], 3, first

        def decode(batch: int, p: Any = p) -> list[Image.Image]:
            p.iteration = batch
            allowed.ui.hook("process", allowed.script, copy.copy(p), {"draw": "in turn"})
            seen.append(re.search(r"photo: (\w+)", p.extra_generation_params["PuLID 1"])[1])
            return [Image.new("RGB", (8, 8))]

        allowed.ui.generate(allowed.script, p, [{"draw": "in turn"}], decode=decode)
    assert seen == ["anna", "ben", "cleo"] * 2


def test_pasted_it_is_the_same_person(allowed):
    p = allowed.processing()
    allowed.generate([{"draw": "random"}], p=p)
    parameters = dict(p.extra_generation_params)
    text = parameters["PuLID 1"]
    assert "draw: random" in text
    pasted = {name: PastedField(1, FIELD[name], allowed.library)(parameters) for name in ("draw", "identity")}
    assert pasted["draw"] == "off"
    assert pasted["identity"] in text
    allowed.forget_photos()
    assert PastedField(1, FIELD["draw"], allowed.library)(parameters) == "random"


def test_errors_name_the_photo(allowed, folder):
    (folder / "ben.png").write_bytes(base64.b64decode(PHOTOS["nobody"]))
    with pytest.raises(NoFaceError, match=r"ben\.png"):  # in a later batch
        allowed.generate([{"draw": "in turn"}], batches=2)
    assert allowed.left_behind() == []
    for name in NAMES:
        (folder / name).write_bytes(base64.b64decode(PHOTOS["nobody"]))
    with pytest.raises(NoFaceError, match=PLACE + r"(anna|ben|cleo)\.png: photo 1: no face was found"):
        allowed.generate([{"draw": "random"}])
    for name in NAMES:
        (folder / name).write_text("no image")
    with pytest.raises(Exception, match=PLACE + r"(anna|ben|cleo)\.png"):
        allowed.generate([{"draw": "random"}])


def test_a_batch_has_one_person(allowed):
    p = allowed.processing()
    p.batch_size = 2
    with pytest.raises(SettingError, match=PLACE + "a batch has one person: set the batch size to 1"):
        allowed.generate([{"draw": "random"}], p=p)


def test_one_source_in_the_page(actions):
    images, identity, enabled = actions.draw_counts("random", "[...]", "Anna")
    assert (images, identity["value"], enabled["value"]) == ("", "None", True)
    assert all("value" not in update for update in actions.draw_counts("off", "[...]", "Anna"))
    assert actions.draw_counts_no_more("[...]", "None", "random")["value"] == "off"
    assert actions.draw_counts_no_more("", "Anna", "in turn")["value"] == "off"
    assert "value" not in actions.draw_counts_no_more("", "None", "random")
