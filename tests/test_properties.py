"""What holds for every unit, every image's parameters, every request and every region, not for examples only."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lib_pulid.boxes import read_box
from lib_pulid.errors import ImageError, SettingError
from lib_pulid.fields import FAMILIES, FIELD, FIELDS, LONGEST_TEXT, MOST_UNITS, NONE, Field, check
from lib_pulid.injection import DenoiseStep, _Masks, token_grid
from lib_pulid.methods import has, usual
from lib_pulid.stores.folder import Settings
from lib_pulid.units import PulidUnit, default_args, parse_args
from lib_pulid.webui import infotext, pictures
from lib_pulid.webui.library import Library

# Names as people and file systems have them: commas, quotes, line ends of other alphabets, characters of every plane.
NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=LONGEST_TEXT)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
VALID: dict[str, Any] = {
    "bool": lambda field: st.booleans(),
    "int": lambda field: st.integers(int(field.minimum), int(field.maximum)),
    "float": lambda field: st.floats(field.minimum, field.maximum),
    "choice": lambda field: st.sampled_from(field.choices),
    "text": lambda field: NAMES,
    "image": lambda field: st.text(max_size=12),
    "box": lambda field: st.sampled_from(["", "0 0 0.5 1", [0.25, 0.5, 0.5, 0.25]]),
    "images": lambda field: st.lists(st.text(min_size=1, max_size=12).filter(str.strip), max_size=4),
}


@st.composite
def valid_dicts(draw) -> dict[str, Any]:
    """What an API caller may send: any fields, each within its range."""
    names = draw(st.lists(st.sampled_from(list(FIELD)), unique=True))
    values = {name: draw(VALID[FIELD[name].kind](FIELD[name])) for name in names}
    assume(values.get("start", 0.0) < values.get("end", 1.0))
    if values.get("images") and values.get("identity", "").strip() not in ("", NONE):
        del values["identity"]
    if values.get("draw", "off") != "off":
        values = {name: value for name, value in values.items() if name not in ("images", "identity")}
    return values


def expected(field: Field, value: Any) -> Any:
    """What a unit has to hold for a value that was given: the same, but for blanks around it and an empty choice."""
    if field.kind == "box":
        is_empty = not value or (isinstance(value, str) and value.strip() in ("", NONE))
        return "" if is_empty else str(read_box(value))
    if field.kind == "text":
        return field.default if value.strip() in ("", NONE) else value.strip()
    if field.kind == "image":
        return value.strip()
    return tuple(image.strip() for image in value) if field.kind == "images" else value


@given(valid_dicts())
def test_every_valid_dict_is_a_unit_and_keeps_its_values(values):
    unit = PulidUnit.from_mapping(values, 1)
    for name, value in values.items():
        # the preset is named by what projection and zero tokens are
        if name != "preset" or not {"projection", "num_zero"} & set(values):
            assert name == "preset" and value == "custom" or getattr(unit, name) == expected(FIELD[name], value)
    assert PulidUnit.from_mapping(json.loads(json.dumps(unit.values())), 1) == unit
    through_positions = PulidUnit.from_positions(json.loads(json.dumps(unit.positions())), 1)
    # Widgets have no place for "as the family has it": they begin with SDXL's weight, and their preset is only a name.
    for family in FAMILIES if unit.weight is not None else FAMILIES[:1]:
        assert through_positions.on(family) == unit.on(family)
    assert parse_args([True, *unit.positions()]) == ([(1, through_positions)] if unit.enabled else [])


@given(st.lists(valid_dicts(), min_size=1, max_size=3), st.booleans())
def test_several_units_as_lists_and_as_dicts(dicts, switch):
    units = [(number, PulidUnit.from_mapping(values, number)) for number, values in enumerate(dicts, 1)]
    flat = [value for _, unit in units for value in unit.positions()]
    read = [(number, PulidUnit.from_positions(unit.positions(), number)) for number, unit in units]
    assert parse_args([True, *flat]) == [one for one in read if one[1].enabled]
    assert parse_args([False, *flat]) == []
    expected = [one for one in units if one[1].enabled]
    assert parse_args([*([True] if switch else []), *dicts]) == expected
    assert parse_args([*dicts, *default_args(3)[len(dicts) :]]) == expected  # as a host fills it up


@given(st.sampled_from(FIELDS), JSON)
def test_a_value_is_taken_as_it_is_or_refused(field, value):
    """Never cut, rounded, or replaced by something else."""
    try:
        unit = PulidUnit.from_mapping({field.name: value}, 7)
    except SettingError as error:
        assert str(error).startswith(f"PuLID unit 7, field {field.name}: ") or field.name in ("start", "end")
        str(error).encode()
        return
    taken = getattr(unit, field.name)
    if value is None:  # as if it were left out
        assert taken == field.default
    elif field.kind == "images" and isinstance(value, str):
        assert taken == ((value.strip(),) if value.strip() else ()) or value.lstrip().startswith("[")
    elif field.kind != "choice" or value != "custom":
        assert type(value) in (type(taken), int, float, list)
        assert taken == expected(field, value)


@given(st.lists(JSON, max_size=20) | st.lists(st.dictionaries(st.sampled_from(list(FIELD)), JSON), max_size=4))
@example([math.nan])
@example([{}, 10**5000])
def test_any_arguments_are_units_or_a_message(args):
    try:
        units = parse_args(args)
    except SettingError as error:
        assert str(error).startswith("PuLID")
        str(error).encode()
    else:
        assert all(isinstance(unit, PulidUnit) and 1 <= number <= MOST_UNITS for number, unit in units)


@pytest.fixture(scope="module")
def empty_library(tmp_path_factory) -> Library:
    folder = tmp_path_factory.mktemp("models")
    return Library(lambda: Settings(folder))


@given(
    st.text() | st.text(st.sampled_from("abcABC012+/=_- \n,:;data")) | st.binary().map(lambda b: b.decode("latin-1"))
)
def test_any_text_is_an_image_or_a_message(text):
    with pytest.raises(ImageError, match="^photo 1: "):
        pictures.decode(text, "photo 1")


FACTS = st.fixed_dictionaries({"hash": st.just("0123456789"), "file": NAMES, "weights": st.just("abcdef0123")})


@given(valid_dicts(), FACTS, st.sampled_from(FAMILIES))
@example({"model": '100%2C, "x": y\\.bin'}, {"hash": "0123456789", "file": "a", "weights": "b"}, "sdxl")
@example({"start": 0.1234561, "end": 0.1234564}, {"hash": "0123456789", "file": "a", "weights": "b"}, "flux")
def test_every_unit_is_read_back_from_the_parameters_as_it_was(empty_library, values, facts, family):
    unit = PulidUnit.from_mapping(values, 1).on(family)
    text = infotext.write(unit, family, facts)
    assert not set(text) & set('"\\\n\r')  # nothing that the hosts' own quoting has to change
    parameters = {infotext.key(1): text}
    written = [field for field in FIELDS if field.pasted and field.family in ("", family)]
    written = [field for field in written if has(usual(family), field.name)]
    read = {field.name: infotext.PastedField(1, field, empty_library)(parameters) for field in written}
    assert read.pop("identity") == NONE  # it is looked for among those that are saved
    assert read == {name: getattr(unit, name) for name in read}
    assert infotext.read(text).get("identity", "") == unit.identity
    assert infotext.read(text).get("file", "") == facts["file"]
    # and a unit that is made of what was read is the same in all that the parameters hold
    again = PulidUnit.from_mapping({**read, "identity": unit.identity}, 1).on(family)
    assert [getattr(again, field.name) for field in written] == [getattr(unit, field.name) for field in written]


@given(st.text() | st.lists(st.sampled_from([*FIELD, ": ", ", ", "%", "%2", "1e999", "nan", "\n"])).map("".join))
@example("weight: nan, num_zero: 999, projection: x, start: inf")
def test_any_text_in_the_parameters_does_no_harm(empty_library, text):
    for field in FIELDS:
        value = infotext.PastedField(1, field, empty_library)({infotext.key(1): text})
        if value is not None:  # what is put into a widget is a value that it may have
            check(field, value, 1)


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def on_tokens(mask: np.ndarray, latent: tuple[int, int], halvings: int) -> torch.Tensor:
    """The region [H, W] as a layer sees it, [h, w]."""
    height, width = latent
    for _ in range(halvings):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    step = DenoiseStep(0.0, True, latent)
    masks = _Masks([SimpleNamespace(mask=torch.from_numpy(mask).float(), family="sdxl")], step)  # type: ignore[list-item]
    grid = token_grid(height * width, latent, "sdxl")
    assert math.prod(grid) == height * width
    return masks.over(0, height * width).reshape(grid)


@given(SIZES, SIZES, st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_region_stays_within_its_own_bounds(size, latent, halvings, seed):
    mask = np.random.default_rng(seed).random(size, np.float32)
    seen = on_tokens(mask, latent, halvings)
    assert mask.min() - 1e-5 <= seen.min() and seen.max() <= mask.max() + 1e-5
    for value in (0.0, 0.25, 1.0):
        even = on_tokens(np.full(size, value, np.float32), latent, halvings)
        torch.testing.assert_close(even, torch.full_like(even, value))


@given(SIZES, st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_the_mean_is_kept_where_the_sizes_divide(latent, times_high, times_wide, seed):
    mask = np.random.default_rng(seed).random((latent[0] * times_high, latent[1] * times_wide), np.float32)
    assert abs(on_tokens(mask, latent, 0).mean().item() - mask.mean()) < 1e-4


@given(SIZES, SIZES)
def test_a_region_is_not_mirrored_nor_turned(size, latent):
    assume(min(*size, *latent) >= 4)
    mask = np.zeros(size, np.float32)
    mask[: size[0] // 2, : size[1] // 2] = 1
    seen = on_tokens(mask, latent, 0)
    assert seen[0, 0] == 1 and seen[-1, -1] == 0 and seen[0, -1] == 0 and seen[-1, 0] == 0
