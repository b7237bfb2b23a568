"""scripts/pulid.py and what it is put together from, inside a small stand-in for the WebUI, on stand-in weights."""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lib_pulid import hosts
from lib_pulid.errors import ImageError, MissingWeightsError, NoFaceError, PulidError, SettingError
from lib_pulid.fields import FAMILIES, FIELDS, MOST_PHOTOS, PRESETS
from lib_pulid.images import load_image
from lib_pulid.sites import Sites
from lib_pulid.stores.encoders import Listener
from lib_pulid.units import PulidUnit, default_args
from lib_pulid.webui import infotext, settings, xyz
from lib_pulid.webui.plan import UnitPlan
from tests import small_models
from tests.face_standins import packed, photo
from tests.fake_modules.models import SD1_BLOCKS, SMALL_SITES, WIDTH, UNet, same, small_unet
from tests.fake_webui import AxisOption, Generation, webui
from tests.test_imports import ROOT, printed

pytest.importorskip("insightface")
pytest.importorskip("facexlib")


class TestAGeneration:
    def test_parameters_are_written_and_removed(self, ui, script, one):
        p = Generation()
        ui.generate(script, p, [{"images": [one], "weight": 0.7}])
        assert "weight: 0.7, " in p.extra_generation_params["PuLID 1"]
        ui.hook("process", script, p, *default_args(3))  # another cell of a grid
        assert p.extra_generation_params == {}

    def test_a_detailers_calls_in_between_leave_the_parameters(self, ui, script, one):
        """Of a batch of images ADetailer calls `postprocess` at the first and `process` at the last, both with a
        copy of `p`; the others get their parameters in between."""
        p, args = Generation(batches=2), [{"images": [one]}]
        seen = []

        def detail(batch: int) -> None:
            ui.hook("postprocess", script, copy(p), SimpleNamespace(), *args)
            seen.append(set(p.extra_generation_params))
            ui.hook("process", script, copy(p), *args)
            seen.append(set(p.extra_generation_params))

        ui.generate(script, p, args, between=detail)
        assert seen == [{"PuLID 1"}] * 4

    def test_the_progress_line_is_told_and_cleared(self, ui, script, weights):
        state = ui.modules.shared.state
        ui.generate(script, Generation(), [{"images": [packed(photo((300, 180), shade=7))]}])
        assert "PuLID: unit 1, loading the face models" in state.told
        assert "PuLID: unit 1, photo 1 read" in state.told
        assert state.textinfo is None


BROKEN = [
    ([{"images": ["%%%"]}], ImageError, "unit 1, field images"),
    ([{"images": ["aGVsbG8="]}], ImageError, "unit 1, field images"),
    ([{}], SettingError, "unit 1, field images"),
    ([{"wieght": 1}], SettingError, "unit 1, field wieght"),
    ([{"identity": "nobody"}], PulidError, "unit 1, field identity"),
    ([{"images": ["ONE"], "model": "gone.bin"}], MissingWeightsError, "unit 1, field model"),
    ([{"images": ["ONE"], "model": "standin_pulid_flux"}], PulidError, "unit 1, field model"),
    ([{"images": ["ONE"]}, {"images": ["NOBODY"]}], NoFaceError, "unit 2, field images"),
    ([{"images": ["ONE"], "face_index": 3}], NoFaceError, "unit 1, field images"),
    ([{"images": ["ONE"], "mask": "%%%"}], ImageError, "unit 1, field mask"),
    ([{"images": ["ONE"], "mask": "BLACK"}], ImageError, "unit 1, field mask"),
    ([{"images": ["ONE"], "fusion": "id_mix"}], SettingError, "unit 1, field fusion"),
]


class TestNeverAStranger:
    @pytest.mark.parametrize(("args", "kind", "place"), BROKEN, ids=[f"{i} {b[-1]}" for i, b in enumerate(BROKEN)])
    def test_what_is_wrong_ends_the_request(self, ui, script, one, nobody, args, kind, place):
        text, p = json.dumps(args), Generation()
        for name, picture in {"ONE": one, "NOBODY": nobody, "BLACK": packed(np.zeros((8, 8, 3), np.uint8))}.items():
            text = text.replace(f'"{name}"', f'"{picture}"')
        with pytest.raises(kind, match=place):
            ui.generate(script, p, json.loads(text))
        assert place in p.comments[0]
        assert ui.swallowed == []
        assert ui.modules.shared.state.textinfo is None

    def test_the_page_gets_its_own_words(self, ui, script, nobody):
        p = Generation()
        p.is_api = False
        with pytest.raises(NoFaceError, match="^Person 1, Photos: photo 1: no face was found"):
            ui.generate(script, p, [{"images": [nobody]}])
        assert p.comments[0].startswith("Person 1, Photos: ")

    @pytest.mark.parametrize("unet", [UNet(768, SD1_BLOCKS), UNet(1280)], ids=["SD 1.5", "refiner"])
    def test_a_model_that_cannot(self, ui, script, one, unet):
        with pytest.raises(PulidError, match="unit 1, field model: old: this is"):
            ui.generate(script, Generation(unet, "old"), [{"images": [one]}])
        ui.generate(script, Generation(unet, "old"), default_args(3))

    def test_where_the_page_is_not_told_there_is_no_picture(self, ui, script, nobody, monkeypatch):
        """The comment is below a result without images; an exception would only be printed."""
        monkeypatch.setattr(hosts.current(), "tells_errors", lambda p: False)
        p = Generation()
        assert ui.generate(script, p, [{"images": [nobody]}]) == [] and "no face" in p.comments[0]

    def test_missing_files_are_named_with_their_folder(self, tmp_path, one):
        with webui("a1111", tmp_path) as ui:
            script = ui.script()
            (tmp_path / "pulid").mkdir()
            words = r"no PuLID file for SDXL in .*\s+pulid_v1.1.safetensors .*pulid "
            with pytest.raises(MissingWeightsError, match=words):
                ui.generate(script, Generation(), [{"images": [one]}])
            small_models.write_files(tmp_path / "pulid", [WIDTH] * SMALL_SITES, 64)
            with pytest.raises(MissingWeightsError, match="scrfd_10g_bnkps.onnx .*antelopev2"):
                ui.generate(script, Generation(), [{"images": [one]}])


class TestTheAccordion:
    @pytest.mark.parametrize("tab", ["txt2img", "img2img"])
    @pytest.mark.parametrize("version", ["3.41.2", "4.40.0"])
    def test_its_values_are_the_positional_list(self, weights, version, tab):
        with webui("a1111", weights, version) as ui:
            script = ui.script()
            assert script.title() == "PuLID"
            values = [widget.value for widget in script.ui(tab == "img2img")]
            assert json.loads(json.dumps(values)) == values
            assert len(values) == 1 + 3 * len(FIELDS)
            plain = ui.generate(script, Generation(), values)
            assert same(plain, ui.generate(script, Generation(), default_args(3)))
            ids = [widget.elem_id for widget in script.ui(tab == "img2img")]
            assert all(name and name.startswith(f"pulid_{tab}") for name in ids)
            assert len(set(ids)) == len(ids)

    def test_building_it_reads_no_file_of_the_models_folder(self, script, monkeypatch):
        """Headers of large files on a slow disk would delay the program's start."""
        read = []
        monkeypatch.setattr(type(script.library.folder), "remembered", lambda self, path, read_it: read.append(path))
        script.ui(False)
        assert read == []
        script.library.adapters.listed()
        assert read

    def test_answers_are_remembered_while_it_is_built(self, ui, monkeypatch):
        widgets = importlib.import_module("lib_pulid.webui.widgets")
        blocks = SimpleNamespace(get_upload_folder=object)
        monkeypatch.setattr(widgets.gr, "blocks", blocks, raising=False)
        originals = inspect.signature, inspect.getfullargspec, typing.get_type_hints

        class NoHash:
            __hash__ = None

            def __call__(self, one: int) -> None: ...

        def function(one: int, two=2) -> None: ...

        with pytest.raises(KeyError), widgets.remembered_answers():
            assert inspect.getfullargspec(function) is inspect.getfullargspec(function)
            assert inspect.getfullargspec(function) == originals[1](function)
            assert inspect.signature(NoHash()) == originals[0](NoHash())
            assert typing.get_type_hints(function) == {"one": int, "return": type(None)}
            assert blocks.get_upload_folder() is blocks.get_upload_folder()
            with pytest.raises(TypeError, match="not a callable"):
                inspect.signature(3)
            raise KeyError
        assert (inspect.signature, inspect.getfullargspec, typing.get_type_hints) == originals
        assert blocks.get_upload_folder is object

    def test_each_persons_settings_have_labels_of_their_own(self, ui, script):
        """The hosts keep them in ui-config.json by their labels. How many people there are, is a setting."""
        for tab in (False, True):
            labels = [one.label for one in script.ui(tab) if not getattr(one, "do_not_save_to_config", False)]
            assert len(labels) == len(set(labels)) > 30
            assert {"Weight", "Weight (person 2)", "Weight (person 3)"} <= set(labels)
        ui.modules.shared.opts.data["pulid_units"] = 5
        assert len(script.ui(False)) == 1 + 5 * len(FIELDS)

    def test_fields_are_pasted_into_and_sent_by_name(self, script):
        script.ui(False)
        names = [str(name) for _, name in script.infotext_fields]
        assert script.paste_field_names == names
        assert names[:3] == ["PuLID on", "PuLID 1 enabled", "PuLID 1 images"]
        assert len(names) == 1 + 3 * len(FIELDS)


class TestFamilies:
    @pytest.mark.parametrize("host", ["a1111", "forge"])
    def test_where_there_is_no_flux_nothing_of_it_is_shown(self, weights, host):
        """Forge shows all until it has said which."""
        with webui(host, weights) as ui:
            (preset,) = [one for one in ui.script().ui(False) if one.elem_id == "pulid_txt2img_1_preset"]
        of_flux = PRESETS["flux"] if host == "forge" else ()
        assert preset.kwargs["choices"] == ["v1.1", "fidelity", "style", "neutral", *of_flux, "custom"]

    def test_of_the_chosen_checkpoint(self, weights, tmp_path):
        """By its file, until it is loaded; by what is loaded then."""
        from tests.fake_modules.forge import P
        from tests.fake_modules.models import Flux
        from tests.test_checkpoint_header import FLUX, SDXL, gguf, rooted, safetensors

        files = {
            "flux": safetensors(tmp_path / "a.safetensors", FLUX),
            "flux gguf": gguf(tmp_path / "b.gguf", FLUX),
            "sdxl": safetensors(tmp_path / "c.safetensors", rooted(SDXL)),
            "pickle": tmp_path / "d.ckpt",
            "gone": tmp_path / "e.safetensors",
        }
        with webui("forge", weights) as ui:
            known, opts, door = ui.modules.sd_models.checkpoint_aliases, ui.modules.shared.opts, ui.door()
            assert door.checkpoint_family() == ""
            known.update({name: SimpleNamespace(filename=str(path)) for name, path in files.items()})
            opts.data["sd_model_checkpoint"] = "sdxl"
            families = {name: door.checkpoint_family(name) for name in ("", "half typed", *files)}
            assert families == {"": "sdxl", "half typed": "sdxl", "flux": "flux", "flux gguf": "flux", "sdxl": "sdxl",
                                "pickle": "", "gone": ""}  # fmt: skip
            loaded = P(Flux(), "d").sd_model
            loaded.sd_checkpoint_info.filename = str(files["pickle"])
            ui.modules.sd_models.model_data.sd_model = loaded
            assert door.checkpoint_family("pickle") == "flux"
            assert door.checkpoint_family("sdxl") == "sdxl"


class TestPlan:
    @pytest.fixture
    def model(self) -> hosts.LoadedModel:
        return hosts.LoadedModel(Sites("flux", ()), torch.nn.Identity(), torch.device("cpu"), torch.float32, "x")

    def plan(self, library, one, *units):
        made = [PulidUnit.from_mapping({"images": [one], **values}, n) for n, values in enumerate(units, 1)]
        return UnitPlan(list(enumerate(made, 1)), library)

    def test_settings_by_family(self, library, one, model):
        plan = self.plan(library, one, {"start_step": 3}, {"weight": 0.3})
        sdxl = replace(model, sites=Sites("sdxl", ()))
        flux = plan.injections(model, hires=False)
        assert [(i.family, i.weight, i.start_step) for i in flux] == [("flux", 1.0, 3), ("flux", 0.3, 0)]
        assert [(i.weight, i.start_step) for i in plan.injections(sdxl, hires=False)] == [(0.8, 0), (0.3, 0)]

    def test_chroma_is_called_an_experiment(self, library, one, model):
        plan, notes, chroma = self.plan(library, one, {}), [], torch.nn.Module()
        plan.listener, chroma.distilled_guidance_layer = Listener(warn=notes.append), torch.nn.Identity()
        assert "experiment" not in plan.prepare(model)[1] and notes == []
        facts = plan.prepare(replace(model, denoiser=chroma))[1]
        plan.injections(replace(model, denoiser=chroma), hires=False)
        assert len(notes) == 1 and "not trained for Chroma" in notes[0]
        assert infotext.read(infotext.write(plan.units[0][1], "flux", facts))["experiment"] == "Chroma"

    def test_without_negative_rows_half_is_compiled(self, library, one, model):
        plan = self.plan(library, one, {})
        (half,) = plan.injections(replace(model, guided=False), hires=False)
        (whole,) = plan.injections(model, hires=True)
        assert (half.has_uncond, whole.has_uncond) == (False, True)
        assert 2 * half.nbytes == whole.nbytes
        assert plan.injections(replace(model, guided=False), hires=False)[0] is whole  # not a third time
        for one_site, two_sites in zip(half.sites, whole.sites):
            assert torch.equal(one_site.score[0], two_sites.score[0])

    def test_the_largest_first_step_with_a_negative_prompt(self, library, one, model):
        plan = self.plan(
            library,
            one,
            {"cfg_start_step": 1},
            {"cfg_start_step": 3, "hires": "second"},
            {"cfg_start_step": 9, "weight": 0},
        )
        assert plan.cfg_start_step(model, hires=False) == 1
        assert plan.cfg_start_step(model, hires=True) == 3
        assert plan.cfg_start_step(replace(model, sites=Sites("sdxl", ())), hires=True) == 0
        assert self.plan(library, one, {"weight": 0, "cfg_start_step": 1}).cfg_start_step(model, hires=False) == 0

    def test_a_face_that_would_never_act(self, library, one, model):
        plan = self.plan(library, one, {}, {"start_step": 4})
        plan.check_steps(model, 5, hires=False)
        with pytest.raises(SettingError, match="unit 2, field start_step: .*step 4, but there are only 4 steps"):
            plan.check_steps(model, 4, hires=False)
        plan.check_steps(model, 2, hires=True)  # a face that the first pass has made
        with pytest.raises(SettingError, match="unit 1, field start_step"):
            self.plan(library, one, {"start_step": 4, "hires": "second"}).check_steps(model, 2, hires=True)
        self.plan(library, one, {"start_step": 4, "weight": 0}).check_steps(model, 2, hires=False)
        self.plan(library, one, {"start_step": 4}).check_steps(replace(model, sites=Sites("sdxl", ())), 2, hires=False)


class TestInfotext:
    def pasted(self, library, parameters: dict) -> dict:
        fields = [infotext.PastedField(number, field, library) for number in (1, 2) for field in FIELDS]
        return {str(field): field(parameters) for field in [infotext.PastedField(1, None, library), *fields]}

    def test_a_picture_without_it_switches_it_off_and_leaves_the_rest(self, library):
        pasted = self.pasted(library, {"Steps": "20", "PuLID weight": "0.8"})  # another program's
        assert pasted.pop("PuLID on") is False
        assert set(pasted.values()) == {None}

    def test_another_programs_entry_stays(self):
        from lib_pulid.webui.infotext import clear

        entries = dict.fromkeys(("PuLID 1", "PuLID tag 1", "PuLID hires tag 2", "PuLID likeness", "PuLID weight"), "x")
        clear(entries)
        assert list(entries) == ["PuLID weight"]

    def test_an_identity_is_found_by_its_hash(self, ui, script, one, library):
        p = Generation()
        ui.hook("process", script, p, {"images": [one]})
        parameters = dict(p.extra_generation_params)
        from_cache = self.pasted(library, parameters)
        short_hash = from_cache["PuLID 1 identity"]
        assert len(short_hash) == 10
        assert from_cache["PuLID 1 images"] == ""
        assert [from_cache[name] for name in ("PuLID on", "PuLID 1 enabled", "PuLID 2 enabled")] == [True, True, False]
        gone = self.pasted(library, {"PuLID 1": parameters["PuLID 1"].replace(short_hash, "0123456789")})
        assert (gone["PuLID 1 identity"], gone["PuLID 1 images"]) == ("None", None)  # whatever photos are there stay
        library.identities.save("Found again", library.identities.load(short_hash))
        assert self.pasted(library, parameters)["PuLID 1 identity"] == "Found again"
        unet = small_unet()
        by_name = ui.generate(script, Generation(unet), [{"identity": "Found again"}])
        for other in ({"identity": short_hash}, {"images": [one]}):
            assert same(by_name, ui.generate(script, Generation(unet), [other]))


class TestXYZ:
    def axes(self, ui, library) -> dict:
        xyz.add_axes(2, library, FAMILIES)
        xyz.add_axes(2, library, FAMILIES)  # Reload UI
        options = ui.modules.scripts.scripts_data[0].module.axis_options
        assert all(isinstance(option, AxisOption) for option in options)
        assert len({option.label for option in options}) == len(options)
        return {option.label: option for option in options}

    def test_only_what_the_host_can_load(self, library):
        labels = {axis.label for axis in xyz.axes(AxisOption, 1, library, ("sdxl",))}
        assert "[PuLID 1] Projection" in labels
        assert "[PuLID 1] Start step" not in labels

    def test_every_setting_of_the_first_unit_and_the_main_ones_of_the_second(self, ui, library):
        fields = [field for field in FIELDS if field.kind not in ("images", "image")]
        first = {f"[PuLID 1] {field.label}" for field in fields}
        second = {f"[PuLID 2] {field.label}" for field in fields if not field.advanced}
        photos = {"[PuLID 1] Photo file", "[PuLID 2] Photo file"}
        labels = {label for label in self.axes(ui, library) if label.startswith(("[PuLID 1]", "[PuLID 2]"))}
        assert labels == first | second | photos
        assert "[PuLID 2] Weight" in second and "[PuLID 2] Start" not in second

    def test_cells(self, ui, script, library, one, tmp_path, monkeypatch):
        axes, calls = self.axes(ui, library), []
        readers, read = library.encoders, library.encoders._encoders
        monkeypatch.setattr(readers, "_encoders", lambda *args: (calls.append(1), read(*args))[1])
        path = tmp_path / "photo.png"
        Image.fromarray(photo((330, 210), shade=5)).save(path)
        p, pictures = Generation(small_unet()), {}
        p.is_api = False  # the axis Photo file is for the page
        for weight in (0.0, 0.5, 1.0):
            for preset in PRESETS["sdxl"]:
                cell = copy(p)
                axes["[PuLID 1] Weight"].apply(cell, weight, [])
                axes["[PuLID 1] Preset"].apply(cell, preset, [])
                axes["[PuLID 1] Photo file"].apply(cell, str(path), [])
                pictures[weight, preset] = ui.generate(script, cell, default_args(3))[0]
        assert len(calls) == 1  # one photo, read once
        assert len({picture.sum().item() for picture in pictures.values()}) == 1 + 2 * len(PRESETS["sdxl"])
        assert not hasattr(p, "pulid_changes")
        assert ui.swallowed == []

    def test_a_cells_photo_has_the_files_pixels(self, ui, library, tmp_path):
        """Shrunk like every photo, and quickly encoded."""
        path = tmp_path / "large.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 5000, 3), np.uint8)).save(path)
        p = SimpleNamespace()
        self.axes(ui, library)["[PuLID 1] Photo file"].apply(p, str(path), [])
        (text,) = p.pulid_changes[1]["images"]
        assert text.startswith("data:image/bmp;")
        key = library.photos.add(load_image(path))
        assert np.array_equal(library.photos.read(text, "photo"), library.photos.read(key, "photo"))

    def test_slips_show_before_the_grid_begins(self, ui, library):
        axes = self.axes(ui, library)
        wrong = {"Weight": 9.0, "Preset": "best", "Photo file": "/nowhere.png", "Saved identity": "ana"}
        for label, value in {**wrong, "PuLID model": "x"}.items():
            with pytest.raises(PulidError):
                axes[f"[PuLID 1] {label}"].confirm(None, [value])
        axes["[PuLID 1] Use this person"].confirm(None, ["yes", "no"])
        axes["[PuLID 1] Saved identity"].confirm(None, ["", "None"])
        axes["[PuLID 1] PuLID model"].confirm(None, ["auto", library.adapters.listed()[0].path.stem])
        assert axes["[PuLID 1] Saved identity"].choices() == []
        assert axes["[PuLID 1] PuLID model"].choices()[0] == "auto"


AS_IT_IS = {"__type__": "update"}  # a widget that stays


class TestActions:
    @pytest.fixture
    def actions(self, library):
        from lib_pulid.webui.actions import Actions

        return Actions(library, lambda name: name or "sdxl")

    @pytest.fixture
    def save(self, actions, one):
        """Saves a photo, or what is chosen, under a name."""
        return lambda name, chosen="": actions.save(
            name, "" if chosen else json.dumps([one]), "auto", "largest", 0, "official", *[chosen] * bool(chosen)
        )

    def test_photos_come_and_go(self, actions, tmp_path):
        for name, side in (("a", 100), ("b", 150)):
            Image.fromarray(photo((320, side))).save(tmp_path / f"{name}.png")
        (tmp_path / "bad.png").write_text("no image")
        dropped = [SimpleNamespace(name=str(tmp_path / f"{name}.png")) for name in ("a", "b", "bad")]
        emptied, images, ticked, note = actions.add_photos(dropped, "")
        assert (emptied, ticked["value"], len(json.loads(images))) == (None, True, 2) and "bad.png" in note
        strip = actions.show_photos(images)
        assert strip.count("<img") == strip.count("<button") == 2
        assert "data-index='1'" in strip
        assert json.loads(actions.remove_photo(images, 0)) == json.loads(images)[1:]
        assert actions.remove_photo(images, -1) == images  # a click from nowhere
        assert actions.remove_photo(actions.remove_photo(images, 1), 0) == actions.show_photos("") == ""

    def test_no_more_photos_than_a_unit_may_have(self, actions, one, tmp_path):
        full = json.dumps([one] * MOST_PHOTOS)
        Image.fromarray(photo((320, 100))).save(tmp_path / "more.png")
        _, images, _, note = actions.add_photos([SimpleNamespace(name=str(tmp_path / "more.png"))], full)
        assert json.loads(images) == json.loads(full)
        assert "more.png" in note and "50 photos" in note

    def test_preview(self, actions, two, nobody):
        gallery, note = actions.preview(json.dumps([two, nobody]), "None", "largest", 1)
        assert len(gallery["value"]) == 3
        assert gallery["value"][0][1].endswith("2 faces")
        assert "number 2" in note
        assert "photo 2: no face was found" in note
        gallery, note = actions.preview("", "None", "largest", 0)
        assert gallery["visible"] is False
        assert "No photo yet" in note
        assert actions.asked("", "None", "largest", None) and actions.preview("", "None", "largest", None)

    def test_save(self, actions, save):
        listed, name, note = save("  Anna ")
        assert listed["value"] == "Anna" and "Anna" in listed["choices"]
        assert name["value"] == ""
        assert "for PuLID v1.1 for SDXL" in note
        assert "already saved" in save("Anna")[2]
        gallery, note = actions.preview("", "Anna", "largest", 0)
        assert len(gallery["value"]) == 1
        assert "pulid-bad" in save("../x")[2]  # a name that cannot be

    def test_photos_or_a_saved_identity_one_of_them_is_there(self, actions):
        """Whichever came last counts, and the other is gone from the page."""
        chosen, note = actions.photos_count('["photo"]', "anna", "<p>before</p>")
        assert chosen["value"] == "None"
        assert "before" in note["value"] and "anna was deselected" in note["value"]
        assert actions.photos_count('["photo"]', "None", "") == (AS_IT_IS, AS_IT_IS)
        assert actions.photos_count("", "anna", "") == (AS_IT_IS, AS_IT_IS)
        assert actions.identity_counts("anna", '["photo"]') == ""
        assert actions.identity_counts("None", '["photo"]') == AS_IT_IS

    def test_a_deleted_identity_is_chosen_no_longer(self, actions, library, save):
        save("Gone")
        path = library.identities.folder / "Gone.safetensors"
        short_hash = library.identities.find("Gone") and library.identities.listed()[0].short_hash
        for chosen in ("Gone", "gone", short_hash, "None", "", None):
            assert "value" not in actions.refresh(chosen)[0]
        path.unlink()
        lists, _ = actions.refresh("Gone")
        assert lists["value"] == "None" and "Gone" not in lists["choices"]

    def test_a_preview_of_what_is_there_no_longer_goes(self, actions, one):
        asked = actions.asked(json.dumps([one]), "None", "largest", 0)
        assert actions.still_asked(json.dumps([one]), "None", "largest", 0.0, asked) == (AS_IT_IS, AS_IT_IS)
        gone = ({**AS_IT_IS, "value": [], "visible": False}, "")
        for now in (("", "None", "largest", 0), (json.dumps([one]), "anna", "largest", 0),
                    (json.dumps([one]), "None", "largest", 1)):  # fmt: skip
            assert actions.still_asked(*now, asked) == gone
        assert actions.no_preview() == gone

    def test_save_what_is_chosen_under_another_name(self, library, save):
        save("First")
        assert save("Second", "First")[0]["value"] == "Second"
        assert library.identities.load("Second").short_hash == library.identities.load("First").short_hash
        assert "is for FLUX" in save("x.pulidembd", "First")[2]
        assert "No photo to save" in save("Third", "None")[2]

    @pytest.fixture
    def following(self, library):
        from lib_pulid.webui.following import Following

        return Following(library, lambda name: name or "sdxl")

    def test_presets_and_sliders(self, following):
        assert [update.get("value") for update in following.apply_preset("style")] == ["ortho", 16, None]
        assert [update.get("value") for update in following.apply_preset("realistic")] == [None, None, 4]
        assert following.apply_preset("custom") == [AS_IT_IS] * 3
        for shown in ("", "sdxl"):
            assert following.name_preset("sdxl", shown, "ortho", 16.0, 0)["value"] == "style"
        assert following.name_preset("sdxl", "sdxl", "ortho", 17, 0)["value"] == "custom"
        assert following.name_preset("flux", "flux", "ortho", 17, 4.0)["value"] == "realistic"
        # The page shows the other family.
        assert following.name_preset("sdxl", "flux", "ortho", 16, 4) == AS_IT_IS

    def test_another_family(self, following):
        values = [0.8, "style", "id_mix", "ortho", 16, 0, "auto"]
        values += [0.5, "custom", "average", "none", 3, 4, "auto"]  # of the second unit
        family, *updates = following.follow_checkpoint("sdxl", "flux", *values)
        assert family == "flux"
        first, second = updates[:7], updates[7:]
        assert (first[0]["value"], second[0].get("value")) == (1.0, None)  # 0.5 was set by hand
        assert first[1]["choices"] == ["realistic", "stylized", "custom"]
        assert (first[1]["value"], second[1]["value"]) == ("stylized", "realistic")
        assert first[2]["choices"] == ["official", "average"]
        assert (first[2]["value"], second[2].get("value")) == ("official", None)
        assert [update["visible"] for update in first[3:]] == [False, True, False, False]
        family, *updates = following.follow_checkpoint("flux", "sdxl", 1.0, *values[1:])
        assert updates[0]["value"] == 0.8
        assert [update["visible"] for update in updates[3:5]] == [True, False]

    def test_what_stays_is_not_sent(self, following):
        """On a slow machine the answer comes after the user's next click, which it would undo."""
        values = [0.8, "v1.1", "average", "ortho_v2", 20, 0, "auto"]
        for preset, fusion in (
            following.follow_checkpoint("", "sdxl", *values)[2:4],
            following.follow_model("sdxl", *values[1:])[:2],
        ):
            assert preset["choices"] == [*PRESETS["sdxl"], "custom"]
            assert fusion["choices"] == ["official", "id_mix", "average"]
            assert "value" not in preset and "value" not in fusion
        preset = following.follow_checkpoint("flux", "sdxl", 0.8, "stylized", *values[2:])[2]
        assert preset["value"] == "v1.1"

    def test_a_weight_that_came_with_a_model_stays(self, script):
        """A preset or pasted parameters set both; only who selects a model gets the weight of its method."""
        fields = [field.name for field in FIELDS]
        made = script.ui(False)
        weight, model = (made[1 + fields.index(name)] for name in ("weight", "model"))
        _, inputs, outputs = model.events["input"]
        assert inputs[1:] == [weight, model] and outputs == [weight]

    def test_the_same_family_or_none(self, following):
        values = ["style", "official", "ortho", 16, 0, "auto"]
        assert following.follow_checkpoint("flux", "flux", 0.8, *values) == [AS_IT_IS] * 8
        following.family = lambda name: ""
        family, weight, preset, _, *lines = following.follow_checkpoint("flux", "", 1.0, *values)
        assert (family, weight) == ("", AS_IT_IS)
        assert preset["choices"] == [*PRESETS["sdxl"], *PRESETS["flux"], "custom"]
        assert preset["visible"] and "value" not in preset
        assert [line["visible"] for line in lines] == [True, True, False, False]

    def test_a_painted_region(self, library):
        from lib_pulid.webui.canvas import empty_picture, keep_region
        from lib_pulid.webui.pictures import region

        empty, strokes = empty_picture(64, 32), np.zeros((32, 64, 4), np.uint8)
        assert empty.shape == (32, 64, 3)
        assert keep_region(empty) == ""
        assert keep_region(None) == ""
        strokes[:, :32] = 255
        for painted in (keep_region(empty, strokes), keep_region({"image": empty, "mask": strokes})):
            assert region(painted, "region").mean() == 0.5
        assert region(keep_region(strokes[:, :, :3], np.zeros_like(strokes)), "region").mean() == 0.5


def test_settings_and_flags(ui, script, tmp_path):
    settings.add_settings()
    added = ui.modules.shared.opts.added
    assert {info.section for info in added.values()} == {("pulid", "PuLID")}
    assert settings.units() == 3
    for value, count in (("five", 3), (None, 3), (0, 3), (float("nan"), 3), (2.0, 2), (float("inf"), 10)):
        ui.modules.shared.opts.data["pulid_units"] = value
        assert settings.units() == count
    ui.modules.shared.cmd_opts.pulid_models_dir = None
    ui.modules.shared.opts.data["pulid_models_dir"] = str(tmp_path)
    assert settings.models_dir() == tmp_path
    ui.modules.shared.opts.data["pulid_models_dir"] = ""
    assert str(settings.models_dir()) == ui.modules.paths.models_path


def test_the_folder_for_temporary_images_is_made(ui, tmp_path):
    """A fresh Forge Neo names one that is not there; a place where none can be made is no reason to fail."""
    settings.make_temp_folder()  # the host's default: none
    for folder in (tmp_path / "data" / "tmp", tmp_path / "data" / "tmp"):
        ui.modules.shared.opts.temp_dir = str(folder)
        settings.make_temp_folder()
        assert folder.is_dir()
    (tmp_path / "file").touch()
    ui.modules.shared.opts.temp_dir = str(tmp_path / "file" / "tmp")
    settings.make_temp_folder()


def test_the_page_script_is_one_class():
    text = (ROOT / "javascript" / "pulid.js").read_text(encoding="utf-8")
    assert text.count("\nclass ") == 1


def test_heavy_libraries_wait_for_the_first_photo(weights):
    code = (
        "import sys; from pathlib import Path; from tests.fake_webui import webui\n"
        f"with webui('a1111', Path({str(weights)!r})) as ui:\n"
        "    ui.script().ui(False)\n"
        "    print(*({m.split('.')[0] for m in sys.modules} & {'insightface', 'onnxruntime', 'timm', 'facexlib'}))"
    )
    assert printed(code) == []
