"""A unit's settings under a name: saved once, checked like a request, and usable wherever a preset's name may stand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_pulid.errors import PulidError, SettingError
from lib_pulid.fields import FIELD, PRESET_FAMILY
from lib_pulid.stores.folder import ModelsFolder, Settings
from lib_pulid.units import PulidUnit, default_args
from lib_pulid.webui.presets import SAVED, SHIPPED, Presets
from tests.fake_modules.models import same
from tests.light_webui import unit
from tests.test_properties import valid_dicts

SOFT = {"weight": 0.4, "end": 0.7, "projection": "ortho", "num_zero": 16}


@pytest.fixture
def presets(tmp_path):
    return Presets(ModelsFolder(lambda: Settings(tmp_path)))


@pytest.fixture
def written(presets):
    def write(text, name="mine"):
        presets.folder().mkdir(parents=True, exist_ok=True)
        (presets.folder() / f"{name}.json").write_text(text, "utf-8")
        return presets

    return write


@pytest.fixture
def soft(host):
    """The program, with a saved preset and a saved identity."""
    host.library.presets.save("Soft", SOFT)
    host.save(anna="anna")
    return host


class TestFiles:
    def test_what_is_saved_is_loaded(self, presets):
        assert presets.names() == ["natural"]
        assert presets.save(" Soft ", SOFT) == "Soft"
        assert presets.load("soft") == SOFT
        assert presets.names() == ["natural", "Soft"]

    @settings(max_examples=30)
    @given(values=valid_dicts())
    def test_every_setting_but_the_face(self, tmp_path_factory, values):
        folder = tmp_path_factory.mktemp("presets")
        presets = Presets(ModelsFolder(lambda: Settings(folder)))
        presets.save("x", values)
        unit = PulidUnit.from_mapping({key: value for key, value in values.items() if key in SAVED}, 1)
        loaded = presets.load("x")
        assert loaded == {name: getattr(unit, name) for name in values if name in SAVED}
        assert not {"images", "identity", "mask", "box", "enabled"} & set(loaded)

    @pytest.mark.parametrize(("name", "words"), [
        ("SOFT", "Soft is already saved"), ("Fidelity", "official preset"), ("natural", "official preset"),
        ("stylised", "official preset"), ("auto", "official preset"),
        ("../x", "The name contains /|The name starts"), ("", "The name is empty"),
    ])  # fmt: skip
    def test_names_and_values_that_are_refused(self, presets, name, words):
        presets.save("Soft", SOFT)
        with pytest.raises(SettingError, match=words):
            presets.save(name, {"weight": 1.0})
        with pytest.raises(SettingError, match="field start"):
            presets.save("x", {"start": 0.9, "end": 0.1})
        assert presets.names() == ["natural", "Soft"] and presets.load("Soft") == SOFT

    @pytest.mark.parametrize(("text", "words"), [
        ("{", "cannot be read as JSON"), ("[" * 100_000, "too large|cannot be read"), ("[]", "not a JSON object"),
        ('{"wieght": 1}', "did you mean weight"), ('{"weight": 99}', "out of range"),
        ('{"identity": "anna"}', "a preset has no identity"), ('{"images": ["x"]}', "a preset has no images"),
        ('{"preset": "other"}', "a preset has no preset"), ('{"start": 0.5, "end": 0.2}', "below end"),
    ])  # fmt: skip
    def test_a_wrong_file_is_told(self, written, text, words):
        with pytest.raises(SettingError, match=f"unit 3, field preset: mine.json in .*(?:{words})"):
            written(text).load("mine", 3)

    @pytest.mark.parametrize("name", ["style", "Style", "stylised", "None"])
    def test_a_file_with_an_official_name_is_told(self, written, name):
        """From elsewhere: in a tag or in the API the name would mean the official preset."""
        presets = written("{}")
        presets.named("mine").rename(presets.folder() / f"{name}.json")
        with pytest.raises(SettingError, match=f"{name}.json in .* is the name of an official preset. Choose another"):
            presets.load(name)

    def test_an_unknown_name_is_answered_with_the_nearest(self, presets):
        presets.save("Soft", SOFT)
        for name, near in (("sooft", "Soft"), ("fidelty", "fidelity")):
            with pytest.raises(
                SettingError, match=f"unit 1, field preset: there is no preset '{name}'; did you mean {near}"
            ):
                presets.load(name, 1)
        with pytest.raises(SettingError, match="use one of .*style.*Soft"):
            presets.load("zzzzzzz")

    @settings(max_examples=20)
    @given(st.dictionaries(st.sampled_from(sorted(FIELD)), st.none() | st.floats() | st.text(max_size=5)))
    def test_official_names_are_left_alone(self, values):
        presets = Presets(ModelsFolder(lambda: Settings(Path())))
        for name in (*PRESET_FAMILY, "auto", "custom", "stylised", None, 5):
            assert presets.expand({**values, "preset": name}, 1) == {**values, "preset": name}


class TestUse:
    def test_in_the_api(self, soft):
        assert same(soft.generate([unit("anna", preset="soft")]), soft.generate([unit("anna", **SOFT)]))
        wanted = soft.generate([unit("anna", **SOFT | {"end": 1.0})])
        assert same(soft.generate([True, unit("anna", preset="Soft", end=1.0)]), wanted)
        with pytest.raises(PulidError, match="2, .*reset: there is no preset 'sof'; did you mean Soft"):
            soft.generate([unit("anna"), unit("ben", preset="sof")])

    def test_all_that_the_page_saves_in_the_api(self, soft):
        """Nobody asked for the settings of other methods, so they are no error."""
        values = dict(zip(FIELD, PulidUnit().positions()))
        soft.library.presets.save("All", {name: values[name] for name in SAVED})
        images = soft.generate([{"identity": "anna", "preset": "All"}], "sdxl")
        assert same(images, soft.generate([{"identity": "anna"}], "sdxl"))

    def test_in_the_prompt(self, soft):
        p = soft.processing()
        p.prompt = "<pulid:anna:preset=soft:end=0.9>"
        wanted = [{"identity": "anna", **SOFT, "end": 0.9}]
        assert same(soft.generate(default_args(3), p=p), soft.generate(wanted))
        p.prompt = "<pulid:anna:preset=sofft>"
        with pytest.raises(SettingError, match="tag 1, field preset: there is no preset 'sofft'; did you mean Soft"):
            soft.generate(default_args(3), p=p)

    def test_in_a_grid(self, soft):
        axes = {axis.label: axis for axis in soft.ui.modules.scripts.scripts_data[0].module.axis_options}
        axis, p = axes["[PuLID 1] Preset"], soft.processing()
        assert axis.choices()[-1] == "Soft" and "fidelity" in axis.choices()
        axis.confirm(p, ["Soft", "fidelity"])
        with pytest.raises(SettingError, match="no preset"):
            axis.confirm(p, ["Soft", "hard"])
        axis.apply(p, "Soft", ["Soft"])
        assert same(soft.generate([unit("anna")], p=p), soft.generate([unit("anna", **SOFT)]))

    def test_in_the_list(self, soft):
        from lib_pulid.webui.routes import presets

        folder = soft.library.presets.folder()
        (folder / "wrong.json").write_text("{}x")
        listed = presets(soft.library)
        natural, mine, wrong = listed["presets"]
        assert natural["name"] == "natural" and mine == {"name": "Soft", "settings": SOFT}
        assert "cannot be read" in wrong["problem"] and listed["folder"] == str(folder)


class TestThePage:
    @pytest.fixture
    def following(self, soft):
        from lib_pulid.webui.following import Following

        return Following(soft.library, lambda name: "sdxl")

    def test_loading_sets_the_widgets(self, following):
        *widgets, listed, name, note = following.load_preset("Soft")
        set_to = {name: one["value"] for name, one in zip(SAVED, widgets) if "value" in one}
        assert set_to == SOFT and (listed["value"], name["value"]) == ("None", "Soft") and "Soft" in note
        assert all("value" not in one for one in following.load_preset("None"))
        assert "there is no preset" in following.load_preset("gone")[-1]

    def test_one_that_comes_with_pulid(self, soft, following):
        """It sets its own settings only, and stays."""
        *widgets, _, _, note = following.load_preset("Natural")
        assert {name: one["value"] for name, one in zip(SAVED, widgets) if "value" in one} == SHIPPED["natural"]
        assert same(
            soft.generate([unit("anna", preset="natural")]), soft.generate([unit("anna", **SHIPPED["natural"])])
        )
        assert "comes with PuLID" in following.delete_preset("natural", "natural")[2]
        assert "official preset" in following.save_preset("Natural", *(getattr(PulidUnit(), n) for n in SAVED))[-1]

    def test_saving(self, soft, following):
        values = [getattr(PulidUnit(weight=0.9), name) for name in SAVED]
        listed, name, note = following.save_preset("Mine", *values)
        saved = soft.library.presets.folder() / "Mine.json"
        assert listed["choices"] == ["None", "Mine", "natural", "Soft"] and name["value"] == "" and "Saved" in note
        assert json.loads(saved.read_text())["weight"] == 0.9
        assert "already saved" in following.save_preset("mine", *values)[-1]
        assert "Enter a name" in following.save_preset(" ", *values)[-1]

    def test_deleting_is_asked_twice(self, soft, following):
        path = soft.library.presets.named("Soft")
        _, asked, note = following.delete_preset("soft", "")
        assert asked == "Soft" and "Click again" in note and path.is_file()
        assert following.delete_preset("soft", "another")[1] == "Soft" and path.is_file()
        listed, asked, note = following.delete_preset("soft", "Soft")
        assert not path.exists() and "Deleted" in note and "Soft" not in listed["choices"] and asked == ""
        assert "there is no preset" in following.delete_preset("soft", "Soft")[2]

    @pytest.mark.parametrize("people", [1, 2, 3])
    def test_the_widgets_are_wired(self, soft, people, monkeypatch):
        """Saved or deleted in one tab, a preset comes or goes in the lists of all."""
        from tests.fake_webui import Widget

        built, make = {}, Widget.__init__
        keep = lambda self, *args, **how: make(self, *args, **how) or built.update({self.elem_id: self})  # noqa: E731
        monkeypatch.setattr(Widget, "__init__", keep)
        monkeypatch.setitem(soft.ui.modules.shared.opts.data, "pulid_units", people)
        soft.script.ui(False)  # nothing is missing in the table
        lists = [built[f"pulid_txt2img_{n}_presets"] for n in range(1, people + 1)]
        for n, name in itertools.product(range(1, people + 1), ("save_preset", "delete_preset")):
            button = built[f"pulid_txt2img_{n}_{name}"]
            fn, _, others = button.events.get("click.then", (list, [], []))
            listed = fn() if len(others) != 1 else [fn()]
            assert {id(one) for one in [*button.events["click"][2][:1], *others]} == set(map(id, lists))
            assert [one["choices"] for one in listed] == [["None", "natural", "Soft"]] * len(others)
        assert set(SAVED) == set(FIELD) - {"enabled", "images", "identity", "draw", "preset", "mask", "box"}
