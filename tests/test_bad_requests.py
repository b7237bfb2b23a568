"""What an API caller may send: each field of each wrong type, far too much of it, and nested without end."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from lib_pulid import identity, images, masks, names
from lib_pulid.errors import SettingError
from lib_pulid.fields import FIELDS, LONGEST_TEXT, MOST_PHOTOS, MOST_UNITS, schema, show
from lib_pulid.units import PulidUnit, default_args, parse_args
from lib_pulid.webui import routes


def nested(depth: int, key: str = "") -> Any:
    """Lists in lists; dicts in dicts where there is a key."""
    value: Any = {} if key else []
    for _ in range(depth):
        value = {key: value} if key else [value]
    return value


DEEP = nested(10_000)
HUGE = 10**5000  # more digits than Python writes out
WRONG_TYPES: dict[str, list[Any]] = {
    "bool": [None, 0, 1, 0.0, "true", "false", "", [], {}, [True], math.nan, HUGE, DEEP],
    "int": [None, True, False, "1", "", [], [1], {}, 1.5, math.nan, math.inf, -math.inf, HUGE, -HUGE, -1, 1e300, DEEP],
    "float": [None, True, "1", "0.5", "", [], [0.5], {}, math.nan, math.inf, -math.inf, HUGE, -0.001, 1e300, DEEP],
    "choice": [None, True, 1, 0.5, "", "no such choice", [], ["official"], {}, HUGE, DEEP, "x" * 10**6],
    "text": [True, 1, 0.5, [], ["a"], {}, HUGE, DEEP, "x" * 10**6, "a\nb", "\0", "\ud800"],
    "image": [True, 1, 0.5, [], ["a"], {}, HUGE, DEEP],
    "box": [True, 1, 0.5, {}, [1], [[]], ["a"] * 4, [0, 0, 1, HUGE], [0, 0, 1, math.nan], HUGE, DEEP, "x" * 10**6,
            "0 0 1", [0, 0, 0, 1], "2 2 1 1", "\ud800", "left half", [0, 0, 1, 1, 1], [0, 0, 0.001, 1], [1.5, 0, 1, 1],
            {"x": 0}, [None] * 4, "1e9 0 1 1", ["0", 0, True, 1]],
    "images": [True, 1, 0.5, {}, {"a": 1}, [None], [1], [[]], [""], [" "], ["a", None], HUGE, DEEP, ["a"] * 1000, "[",
               "[1]", '["a", {}]', "[" * 100_000, "[" * 100_000 + "]" * 100_000, json.dumps(["a"] * 1000)],
}  # fmt: skip
CASES = [(field, value) for field in FIELDS for value in WRONG_TYPES[field.kind] if value is not None]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{f.name}-{show(v)}" for f, v in CASES])
def test_each_field_of_each_wrong_type(field, value):
    with pytest.raises(SettingError) as caught:
        parse_args([{"images": ["a"]}, {field.name: value}])
    message = str(caught.value)
    assert message.startswith(f"PuLID unit 2, field {field.name}: ")
    assert len(message) < 400
    message.encode()  # an answer can be written with it


def test_null_is_as_left_out():
    """Typed clients send null for all that is not set."""
    assert parse_args([dict.fromkeys((field.name for field in FIELDS), None)]) == parse_args([{}])
    assert parse_args([{"preset": "style", "projection": None}]) == parse_args([{"preset": "style"}])
    assert all("null" in entry["type"] for entry in schema()["properties"].values())


@pytest.mark.parametrize("field", [field for field in FIELDS if field.minimum is not None], ids=lambda f: f.name)
def test_each_number_just_inside_and_just_outside(field):
    step = 1 if field.kind == "int" else 1e-9
    other = {"start": {"end": 1}, "end": {"start": 0}}.get(field.name, {})
    for value in (field.minimum, field.maximum):
        if (field.name, value) not in (("start", 1), ("end", 0)):  # nothing lies between them then
            assert getattr(PulidUnit.from_mapping({field.name: value, **other}, 1), field.name) == value
    for value in (field.minimum - step, field.maximum + step):
        with pytest.raises(SettingError, match=f"unit 1, field {field.name}: .* is out of range"):
            PulidUnit.from_mapping({field.name: value}, 1)


@pytest.mark.parametrize("name", ["", "x", "Weight", "weight ", "x" * 10**6, "\ud800", "a\nb", 5, None, 1.5, (1, 2)])
def test_unknown_fields_of_any_name(name):
    with pytest.raises(SettingError, match="^PuLID unit 1, field .*: there is no such field; ") as caught:
        parse_args([{name: 1}])
    assert len(str(caught.value)) < 400
    str(caught.value).encode()


TOO_MUCH = {
    "10,000 units": [{"images": ["a"]}] * 10_000, "one unit too many": [{"images": ["a"]}] * (MOST_UNITS + 1),
    "10,000 units behind a switch": [True, *[{}] * 10_000], "10,000 tabs": [True, *default_args(1)[1:] * 10_000],
    "a million values": [True] * 10**6, "a unit and a million values": [{}, *[None] * 10**6],
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_MUCH)
def test_too_many_units_take_no_time(what):
    began = time.process_time()
    with pytest.raises(SettingError, match=r"^PuLID: \d+ (units|arguments) are too many; send \d+ (units )?at most"):
        parse_args(TOO_MUCH[what])
    assert time.process_time() - began < 1


def test_as_many_units_as_there_may_be():
    assert len(parse_args([{"images": ["a"]}] * MOST_UNITS)) == MOST_UNITS
    on = [True, *default_args(MOST_UNITS)[1:]]
    assert len(on) == 1 + MOST_UNITS * len(FIELDS)
    assert [number for number, _ in parse_args(on)] == [1]
    assert len(parse_args([{"images": ["a"] * MOST_PHOTOS}])[0][1].images) == MOST_PHOTOS


@pytest.mark.parametrize("args", [
    "text", {"images": ["a"]}, ["images"], [None], [1], ["true"], [True, "x"], [True, 1], [[{"images": ["a"]}]],
    [{"images": ["a"]}, {"images": ["a"]}, "x"], [{"images": ["a"]}, False], [{}, {}, [], {}],
    [DEEP], [{}, DEEP], [True, DEEP], [True, True, DEEP], [{}, nested(10_000, "a")], [nested(10_000, "a")],
    [{"images": ["a"]}, *default_args(2)[2:5], DEEP], [{"weight": nested(10_000, "a")}], [{}, HUGE], [HUGE],
])  # fmt: skip
def test_arguments_that_are_no_list_of_units(args):
    with pytest.raises(SettingError, match="^PuLID"):
        parse_args(args)


@pytest.mark.parametrize("first", [[{"images": ["a"]}], '{"images": ["a"]}', 1, None])
def test_a_first_argument_that_is_no_unit_is_called_so(first):
    """A list in the list, JSON as text: how a unit is sent by mistake."""
    with pytest.raises(SettingError, match=r"^PuLID, args\[0\]: .* is not a unit; args must be a list of dicts"):
        parse_args([first, {"images": ["a"]}])


def test_what_a_requests_infotext_leaves_beside_the_units_is_explained():
    """The hosts write its values into the positions; the dicts cover only the first of them."""
    left = default_args(1)
    left[1 + [field.name for field in FIELDS].index("weight")] = 0.6
    with pytest.raises(SettingError, match=r"args\[5\]: 0.6 is not a unit.*request's infotext"):
        parse_args([{"images": ["a"]}, *left[1:]])


def test_positional_lists_that_are_too_short_or_too_long():
    full = PulidUnit(images=("a",), weight=0.5).positions()
    for length in range(2, len(full) + 1):
        assert parse_args([True, *full[:length]])[0][1].images == ("a",)
    assert parse_args([True]) == []
    with pytest.raises(SettingError, match="unit 2, field enabled"):
        parse_args([True, *full, "a value too much"])
    with pytest.raises(SettingError, match="unit 2, field images"):
        parse_args([True, *full, True, 7])


def test_the_limits_in_the_docs_are_those_of_the_code():
    text = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    limits = {
        f"{images.MAX_PIXELS // 10**6} million pixels", f"{images.MAX_BYTES // 10**6} MB", f"| {MOST_PHOTOS} |",
        f"| {MOST_UNITS} |", f"{LONGEST_TEXT} characters", f"{names.LONGEST_NAME} bytes",
        f"{routes.LARGEST_BODY >> 20} MB, counted", f"| {identity.LARGEST_FILE // 10**6} MB |",
        f"reduced to {masks.LONGEST_SIDE} pixels",
    }  # fmt: skip
    assert [limit for limit in limits if limit not in text] == []
