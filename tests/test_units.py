"""Units: every way in and out gives the same values back, and a wrong value is named with unit and field."""

from __future__ import annotations

import json
import math

import pytest

from lib_pulid.errors import NoFaceError, SettingError
from lib_pulid.fields import AUTO, CUSTOM, FAMILIES, FIELD, FIELDS, HIRES_PASSES, PRESET_FAMILY, PRESETS, check, schema
from lib_pulid.units import PulidUnit, at_unit, default_args, parse_args


def test_the_defaults_are_those_of_the_table():
    assert {field.name: getattr(PulidUnit(), field.name) for field in FIELDS} == {f.name: f.default for f in FIELDS}
    assert parse_args(default_args(3)) == []
    assert parse_args([]) == []
    shown = dict(zip(FIELD, PulidUnit().positions()))  # widgets begin as SDXL
    assert (shown["weight"], shown["preset"]) == (0.8, "v1.1")
    on = [True, *default_args(3)[1:]]
    assert [unit.on("sdxl") for _, unit in parse_args(on)] == [PulidUnit().on("sdxl")]


def test_the_default_is_the_familys():
    sdxl, flux = PulidUnit().on("sdxl"), PulidUnit().on("flux")
    assert (sdxl.weight, sdxl.preset, sdxl.projection, sdxl.num_zero) == (0.8, "v1.1", "ortho_v2", 20)
    assert (flux.weight, flux.preset, flux.start_step, flux.cfg_start_step) == (1.0, "stylized", 0, 0)
    assert PulidUnit(weight=0.3).on("flux").weight == 0.3
    assert PulidUnit.from_mapping({"weight": None}, 1) == PulidUnit()
    assert PulidUnit(weight=0.0).on("flux").weight == 0
    for family in FAMILIES:
        PulidUnit().check_family(family, 1)


@pytest.mark.parametrize("name", PRESET_FAMILY)
def test_presets(name):
    family, values = PRESET_FAMILY[name], PRESETS[PRESET_FAMILY[name]][name]
    unit = PulidUnit.from_mapping({"preset": name}, 1)
    assert {field: getattr(unit, field) for field in values} == values
    assert unit.on(family).preset == name
    assert PulidUnit.from_mapping(values, 1).on(family).preset == name
    moved = {"num_zero": 77} if family == "sdxl" else {"start_step": 7}
    assert PulidUnit.from_mapping({"preset": name, **moved}, 1).on(family).preset == CUSTOM


def test_presets_of_flux():
    """docs/pulid_for_flux.md: 4 for realistic images, 0 to 1 for stylized ones. Scripts, images and grids of earlier
    versions say "stylised"."""
    assert PRESETS["flux"]["realistic"] == {"start_step": 4}
    assert PRESETS["flux"]["stylized"]["start_step"] in (0, 1)
    old, new = ({"preset": name, "start_step": 0} for name in ("stylised", "stylized"))
    assert PulidUnit.from_mapping(old, 1) == PulidUnit.from_mapping(new, 1)
    assert PulidUnit(start_step=4).changed({"preset": "stylised"}, 1).start_step == 0
    assert "stylised" not in schema()["properties"]["preset"]["enum"]


@pytest.mark.parametrize("name", PRESET_FAMILY)
def test_a_preset_of_the_other_family_is_told(name):
    own = PRESET_FAMILY[name]
    other = next(family for family in FAMILIES if family != own)
    unit = PulidUnit.from_mapping({"preset": name}, 2)
    unit.check_family(own, 2)
    with pytest.raises(SettingError, match=f"unit 2, field preset: {name} is for {own.upper()}.*{other.upper()}"):
        unit.check_family(other, 2)
    PulidUnit.from_positions(unit.positions(), 2).check_family(other, 2)  # in the widgets it is a name only


def test_a_preset_in_the_widgets_only_names_what_they_say():
    values = PulidUnit(preset="style").positions()  # projection and zero tokens are those of v1.1
    unit = PulidUnit.from_positions(values, 1)
    assert (unit.preset, unit.projection) == (AUTO, "ortho_v2")
    assert unit.on("sdxl").preset == "v1.1"
    values[[field.name for field in FIELDS].index("preset")] = None  # a radio with nothing selected
    assert PulidUnit.from_positions(values, 1) == unit


WRONG = [
    ({"wieght": 1}, "wieght", "did you mean weight?"), ({"xyz": 1}, "xyz", "the fields are enabled, images"),
    ({"weight": math.nan}, "weight", "not a number"), ({"start_step": 11}, "start_step", "use 0 to 10"),
    ({"cfg_start_step": -1}, "cfg_start_step", "use 0 to 20"), ({"weight": 5.1}, "weight", "use 0 to 5"),
    ({"num_zero": 1.5}, "num_zero", "whole number"), ({"num_zero": 81}, "num_zero", "use 0 to 80"),
    ({"start": 0.5, "end": 0.5}, "start", "has to be below end"),
    ({"projection": "orto"}, "projection", "one of none, ortho"), ({"preset": "best"}, "preset", "one of auto, v1.1"),
    ({"hires": 1}, "hires", "one of both"), ({"enabled": 1}, "enabled", "neither true nor false"),
    ({"images": 5}, "images", "not a list"), ({"images": [5]}, "images", "is not an image"),
    ({"images": [""]}, "images", "is not an image"), ({"images": "[broken"}, "images", "not valid JSON"),
    ({"mask": 3}, "mask", "is not an image"), ({"identity": 3}, "identity", "not text"),
    ({"model": []}, "model", "not text"), ({"images": ["a"], "identity": "Anna"}, "identity", "not both"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "field", "words"), WRONG, ids=[str(w[0])[:40] for w in WRONG])
def test_errors_name_unit_and_field(values, field, words):
    with pytest.raises(SettingError) as caught:
        parse_args([{"images": ["a"]}, values])
    assert f"PuLID unit 2, field {field}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("field", ["weight", "identity_net", "images", "mask", "box"])
def test_an_emptied_field_is_the_default(field):
    assert getattr(PulidUnit.from_mapping({field: None}, 1), field) == getattr(PulidUnit(), field)


def test_a_tab_that_is_off_is_not_checked():
    args = default_args(2)
    args[0], args[1] = True, False
    args[1 + [f.name for f in FIELDS].index("weight")] = "half typed"
    assert parse_args(args) == []


def test_a_grid_changes_units():
    flat = default_args(2)
    widgets = PulidUnit(weight=0.3, identity_net=0.8)  # what the sliders show
    assert parse_args(flat, {2: {"weight": 0.3}}) == [(2, widgets)]
    assert parse_args(flat, {1: {"preset": "style"}})[0][1].num_zero == 16
    assert parse_args([{"images": ["a"]}], {1: {"identity": "Anna"}}) == [(1, PulidUnit(identity="Anna"))]
    assert parse_args([{"identity": "Anna"}], {1: {"images": ("a",)}}) == [(1, PulidUnit(images=("a",)))]
    assert parse_args([{"images": ["a"]}], {1: {"enabled": False}}) == []
    with pytest.raises(SettingError, match="unit 1, field weight"):
        parse_args(flat, {1: {"weight": 9.0}})


def test_a_saved_identity_goes_before_photos_in_the_widgets():
    """ "None" in their list is no identity."""
    unit = PulidUnit(images=("a",), identity="Anna")
    assert PulidUnit.from_positions(unit.positions(), 1).on("sdxl") == PulidUnit(identity="Anna").on("sdxl")
    assert (check(FIELD["identity"], "None", 1), check(FIELD["model"], "", 1)) == ("", "auto")


def test_hires_passes():
    passes = {name: [PulidUnit(hires=name).in_pass(hires) for hires in (False, True)] for name in HIRES_PASSES}
    assert passes == {"both": [True, True], "first": [True, False], "second": [False, True]}


def test_other_errors_get_their_place():
    with pytest.raises(NoFaceError, match="^PuLID unit 2, field images: photo 1: no face$"), at_unit(2, "images"):
        raise NoFaceError("photo 1: no face")


def test_schema():
    described = json.loads(json.dumps(schema()))
    assert list(described["properties"]) == [field.name for field in FIELDS]
    assert described["properties"]["weight"]["maximum"] == 5
    assert described["properties"]["weight"]["type"] == ["number", "null"]
    assert described["properties"]["weight"]["default"] is None
    families = {name: field.get("family") for name, field in described["properties"].items() if "family" in field}
    of_flux = {"start_step": "flux", "cfg_start_step": "flux"}
    of_sdxl = ("projection", "num_zero", "lora_weight", "identity_net")
    assert families == {**dict.fromkeys(of_sdxl, "sdxl"), **of_flux}
    PulidUnit.from_mapping({name: field["default"] for name, field in described["properties"].items()}, 1)
    assert described["properties"]["hires"]["enum"] == [*HIRES_PASSES, None]
    assert described["additionalProperties"] is False
