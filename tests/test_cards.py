"""The tab Faces: a card per saved identity, what a click writes, notes and weight; and deleting an identity."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from lib_pulid.methods import METHODS
from lib_pulid.tags import find_tags, parse_tag
from lib_pulid.units import PulidUnit
from tests.fake_modules.extra_networks import UserMetadataEditor


@pytest.fixture
def saved(host):
    host.save(**{"Anna": "anna", "ben's 2.0": "ben"})
    return host


@pytest.fixture
def page(saved):
    (page,) = saved.ui.modules.ui_extra_networks.extra_pages
    return page


def written(item) -> str:
    """What a click on the card writes: the host evaluates the text as JavaScript."""
    return json.loads(item["prompt"])


class TestCards:
    def test_every_saved_identity_has_one(self, saved, page):
        assert page.title == "Faces"
        cards = page.create_html()
        assert list(cards) == [one.name for one in saved.library.identities.listed()] == ["Anna", "ben's 2.0"]
        for one in saved.library.identities.listed():
            item = cards[one.name]
            assert item["shorthash"] == one.short_hash and one.short_hash in item["search_terms"]
            assert item["filename"] == str(one.path) and item["metadata"]["photos"] == "1"
            assert {"default", "name"} <= set(item["sort_keys"])
        assert page.allowed_directories_for_previews() == [str(saved.library.identities.folder)]

    def test_a_click_writes_a_tag_that_works(self, saved, page):
        for name, item in page.create_html().items():
            assert written(item) == f"<pulid:{name}:0.8>"
            p = saved.processing()
            p.prompt = written(item)
            saved.generate([], p=p)
            assert f"identity: {name}" in p.extra_generation_params["PuLID tag 1"]

    @pytest.mark.parametrize("name", ["Anna>b", "Anna:b"])
    def test_a_name_that_a_tag_cannot_hold_is_written_as_its_hash(self, saved, page, name):
        """Of a file that was renamed by hand. In a tag it would be another person's name: Anna's."""
        folder = saved.library.identities.folder
        try:
            (folder / "ben's 2.0.safetensors").rename(folder / f"{name}.safetensors")
        except OSError:
            pytest.skip("this file system has no such names")
        item = page.create_html()[name]
        assert written(item) == f"<pulid:{item['shorthash']}:0.8>"
        p = saved.processing()
        p.prompt = written(item)
        saved.generate([], p=p)
        assert f"hash: {item['shorthash']}" in p.extra_generation_params["PuLID tag 1"]

    def test_the_image_is_the_identitys_own_or_the_one_beside_it(self, saved, page):
        assert page.create_html()["Anna"]["preview"].startswith("data:image/jpeg;base64,")
        (saved.library.identities.folder / "Anna.png").write_bytes(b"")
        assert page.create_html()["Anna"]["preview"].endswith("Anna.png")
        assert page.items["Anna"]["local_preview"].endswith("Anna.png")

    def test_without_an_image_if_the_settings_say_so(self, saved, page, monkeypatch):
        identity = saved.encode("cleo")
        assert identity.thumbnail is not None
        monkeypatch.setitem(saved.ui.modules.shared.opts.data, "pulid_portraits", False)
        saved.library.identities.save("Cleo", identity)
        assert page.create_html()["Cleo"]["preview"] == ""
        assert saved.library.identities.load("Cleo").thumbnail is None

    def test_one_card_again(self, saved, page):
        assert page.create_item("Anna", enable_filter=False)["name"] == "Anna"
        assert page.create_item("gone", enable_filter=False) is None

    def test_the_weight_is_the_methods(self, saved):
        """As in a tag without one; that of PuLID where the method is not known."""
        from lib_pulid.webui.cards import default_weight

        for method in METHODS:
            assert default_weight({"adapter": method.label}) == PulidUnit().on(method.family, method).weight
        assert default_weight({"adapter": "PuLID for FLUX"}) == 1.0 and default_weight({}) == 0.8

    def test_opening_the_tab_lists_those_saved_since(self, saved, page):
        """The host lists once for all pages of a browser, and again only with its own button."""
        cards = MagicMock()
        page.create_user_metadata_editor(SimpleNamespace(pages=[cards]), "txt2img")
        (listing, inputs, outputs), _ = cards.parent.select.call_args
        assert inputs == [] and list(listing()) == ["Anna", "ben's 2.0"] and outputs == [cards]
        saved.save(Cleo="cleo")
        assert "Cleo" in listing()


class TestTheEditor:
    def test_notes_and_weight_are_kept_beside_the_file(self, saved, page):
        page.create_html()
        editor = page.create_user_metadata_editor(MagicMock(), "txt2img")
        assert isinstance(editor, UserMetadataEditor)
        editor.save_with_weight("Anna", "from the trip", "left profile", 1.2)
        assert json.loads((saved.library.identities.folder / "Anna.json").read_text())["preferred weight"] == 1.2
        item = page.create_html()["Anna"]
        assert (written(item), item["description"]) == ("<pulid:Anna:1.2>", "from the trip")
        assert editor.put_values_into_components("Anna")[-2:] == ["left profile", 1.2]
        editor.save_with_weight("Anna", "", "", 0)
        assert written(page.create_html()["Anna"]) == "<pulid:Anna:0.8>"

    @pytest.mark.parametrize("text", ["{", '{"preferred weight": "much"}', '{"preferred weight": 1e9}'])
    def test_a_file_that_someone_edited(self, saved, page, text):
        (saved.library.identities.folder / "Anna.json").write_text(text)
        assert parse_tag(*find_tags(written(page.create_html()["Anna"])), 1).values == {"weight": 0.8}


class TestDeleting:
    def test_at_the_second_click_with_all_beside_it(self, saved, actions):
        folder = saved.library.identities.folder
        for name in ("Anna.json", "Anna.png", "Anna.preview.jpg", "Anna.txt"):
            (folder / name).write_text("")
        _, asked, note = actions.delete("Anna", "")
        assert asked == "Anna" and "Click again to delete" in note and "Anna.safetensors" in note
        assert len(saved.library.identities.listed()) == 2
        listed, asked, note = actions.delete("Anna", asked)
        assert "Deleted Anna" in note and asked == ""
        assert (listed["choices"], listed["value"]) == (["None", "ben's 2.0"], "None")
        assert sorted(path.name for path in folder.iterdir()) == ["Anna.txt", "ben's 2.0.safetensors"]

    def test_not_another_one_than_asked(self, saved, actions):
        _, asked, _ = actions.delete("ben's 2.0", "Anna")
        assert asked == "ben's 2.0" and len(saved.library.identities.listed()) == 2

    def test_what_is_not_saved(self, saved, actions):
        """The cache has identities as well, which have no names."""
        saved.encode("anna")
        cached = next((saved.library.folder.path / "cache").glob("*.safetensors"))
        for name, words in (("None", "Select"), ("gone", "is not in"), ("../cache/x", "is not in")):
            _, asked, note = actions.delete(name, name)
            assert words in note and asked == ""
        assert cached.exists()
