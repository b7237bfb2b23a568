"""`<pulid:...>` as text: what is written is what is read, and what is wrong is named."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib_pulid.errors import SettingError
from lib_pulid.fields import FIELD, FIELDS, MOST_UNITS
from lib_pulid.tags import Tag, find_tags, parse_tag
from tests.fake_modules.extra_networks import parse_prompts
from tests.test_properties import VALID

SCALARS = [field for field in FIELDS if field.kind not in ("images", "image") and field.name != "identity"]
NAMED = [field for field in SCALARS if field.name not in ("model", "preset", "box", "draw")]


@pytest.mark.parametrize(("text", "tag"), [
    ("anna", Tag("anna")), ("anna:0.8", Tag("anna", {"weight": 0.8})),
    (" Anna B. : 1 ", Tag("Anna B.", {"weight": 1.0})),
    ("anna:weight=0.5:end=0.6", Tag("anna", {"weight": 0.5, "end": 0.6})),
    ("anna:0:num_zero=8:projection=ortho", Tag("anna", {"weight": 0.0, "num_zero": 8, "projection": "ortho"})),
    ("anna:unit=2", Tag("anna", unit=2)), ("anna:box=0, 0.5, 0.5, .5", Tag("anna", {"box": "0 0.5 0.5 0.5"})),
    ("anna:preset=My preset", Tag("anna", preset="My preset")),
    ("0123456789:enabled=no", Tag("0123456789", {"enabled": False})),
])  # fmt: skip
def test_what_is_read(text, tag):
    assert parse_tag(text, "tag 1") == tag


@pytest.mark.parametrize(("text", "field", "words"), [
    ("", "identity", "names no saved identity"), (":0.8", "identity", "names no saved identity"),
    ("None:0.8", "identity", "names no saved identity"), ("anna:strong", "weight", "'strong' is not a number"),
    ("anna:", "weight", "'' is not a number"), ("anna:9", "weight", "out of range"),
    ("anna:nan", "weight", "not a number"), ("anna:0.8:0.5", "0.5", "only the weight"),
    ("anna:0.8:weight=0.5", "weight", "twice"), ("anna:end=0.5:end=0.6", "end", "twice"),
    ("anna:wieght=0.5", "wieght", "did you mean weight"), ("anna:num_zero=1.5", "num_zero", "not a whole number"),
    ("anna:projection=orto", "projection", "not one of"), ("anna:enabled=maybe", "enabled", "neither true nor false"),
    ("anna:unit=0", "unit", "not the number of a unit"),
    (f"anna:unit={MOST_UNITS + 1}", "unit", "not the number of a unit"),
    ("anna:unit=²", "unit", "not the number of a unit"), ("anna:box=0,0,1", "box", "four numbers"),
    ("anna:box=2,0,0.5,1", "box", "outside the image"), ("anna:box=0,0,nan,1", "box", "four numbers"),
    ("anna:mask=iVBO", "mask", "box=x,y,w,h"), ("anna:images=a.png", "images", "not photos"),
    ("anna:draw=random", "draw", "names anna, so nobody can be drawn"),
    ("anna:identity=ben", "identity", "comes first"), ("anna:" + "x" * 5000, "identity", "too long"),
])  # fmt: skip
def test_what_is_wrong_is_named(text, field, words):
    with pytest.raises(SettingError) as caught:
        parse_tag(text, "tag 2")
    assert str(caught.value).startswith(f"PuLID tag 2, field {field}: ")
    assert words in str(caught.value)


def test_tags_are_found_as_the_host_finds_them():
    prompt = "a photo <pulid:anna:0.8> of <lora:x:1> two <PuLID:ben:end=0.5>"
    assert find_tags(prompt) == ("anna:0.8", "ben:end=0.5")
    assert find_tags("a <lora:pulid:1> cat, 1 < 2, <pulidish:1>") == ()


@pytest.mark.parametrize("prompt", ["<pulid:anna:0.8", "a < pulid:anna>", "<pulid>", "<pulid:anna> and <pulid:ben"])
def test_a_tag_that_the_host_would_leave_in_the_text_is_an_error(prompt):
    with pytest.raises(SettingError, match="not complete"):
        find_tags(prompt)


@st.composite
def tags(draw) -> tuple[str, dict]:
    """The text of a tag, and the settings in it."""
    chosen = draw(st.lists(st.sampled_from(NAMED), unique_by=lambda field: field.name, max_size=6))
    values = {field.name: draw(VALID[field.kind](field)) for field in chosen}
    assume(values.get("start", 0.0) < values.get("end", 1.0))
    blank = draw(st.sampled_from(["", " "]))
    parts = ["anna", *(f"{blank}{name}{blank}={blank}{value!s}" for name, value in values.items())]
    return ":".join(parts), values


@settings(max_examples=50)
@given(tags(), st.text(st.characters(exclude_characters="<>"), max_size=20))
def test_every_setting_of_the_table_can_be_written(tag, around):
    text, values = tag
    assert find_tags(f"{around}<pulid:{text}>{around}") == (text,)
    assert parse_tag(text, 1) == Tag("anna", values)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        tag = parse_tag(text, "tag 1")
    except SettingError:
        return
    assert tag.name and set(tag.values) <= set(FIELD)


@given(st.text(st.sampled_from("<>:pulidPULID ann=0.8"), max_size=60))
def test_no_tag_is_found_that_the_host_does_not_see(prompt):
    try:
        found = find_tags(prompt)
    except SettingError:
        return
    _, seen = parse_prompts([prompt])
    theirs = [":".join(params.items) for name, some in seen.items() if name.lower() == "pulid" for params in some]
    assert sorted(theirs) == sorted(text for text in found if text)
