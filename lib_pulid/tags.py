"""Reads `<pulid:NAME:WEIGHT:setting=value>` in a prompt: a saved identity, used as one more unit.

The syntax is that of the WebUIs' extra networks, which remove the tags from the text that the model reads. All
settings of the table in `fields.py` but images can be given, by their names. `unit=2` takes all others from the
accordion's unit 2, whether that is enabled or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lib_pulid.errors import SettingError
from lib_pulid.fields import FIELD, MOST_UNITS, NOT_DRAWN, Number, check, field_named, from_text, place, show, spelled

NAMES = ("pulid", "PuLID", "Pulid", "PULID")  # the hosts tell upper from lower case
EXAMPLE = "<pulid:anna:0.8>"
LONGEST_TAG = 2000  # characters
_TAG = re.compile(r"<pulid:([^>]*)>", re.IGNORECASE)
_OPENED = re.compile(r"[<＜〈《‹«]\s*pulid\b", re.IGNORECASE)  # also as keyboards for Chinese and Japanese write it
_REFUSED = {
    "identity": "the name comes first in a tag.",
    "images": "a tag takes a saved identity, not photos.",
    "mask": "a tag takes no image; use box=x,y,w,h, or unit=2 for the mask of unit 2.",
}
_UNIT = "unit"


@dataclass(frozen=True)
class Tag:
    """One tag, checked.

    Args:
        name: of a saved identity, or its hash. values: the settings that are given, in their fields' types.
        preset: a name, which need not be an official one; or "". unit: the accordion's unit to start from; 0: none.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    preset: str = ""
    unit: int = 0


def find_tags(prompt: str) -> tuple[str, ...]:
    """Returns what the prompt's tags have between `<pulid:` and `>`, in their order.

    Raises:
        SettingError: a tag is not closed, so that the model would read it as text.
    """
    found = _TAG.findall(prompt)
    if len(_OPENED.findall(prompt)) > len(found) + sum(len(_OPENED.findall(text)) for text in found):
        raise SettingError(f"PuLID: a <pulid tag in the prompt is not complete. Write it like {EXAMPLE}.")
    return tuple(found)


def parse_tag(text: str, number: Number) -> Tag:
    """Reads one of the texts that `find_tags` returns. number: what messages call it.

    Raises:
        SettingError: the name is missing, or a setting is unknown, wrong, or there twice.
    """
    if len(text) > LONGEST_TAG:
        raise SettingError(place(number, "identity") + f"the tag is too long (more than {LONGEST_TAG} characters).")
    name, *rest = (part.strip() for part in text.split(":"))
    name = check(FIELD["identity"], name, number)
    if not name:
        raise SettingError(place(number, "identity") + f"the tag names no saved identity; write it like {EXAMPLE}.")
    given = _settings(rest, number)
    unit = _unit(given.pop(_UNIT), number) if _UNIT in given else 0
    preset = check(_PRESET, given.pop("preset"), number) if "preset" in given else ""
    values = {key: from_text(field_named(key, number), value, number) for key, value in given.items()}
    if values.get("draw", NOT_DRAWN) != NOT_DRAWN:
        raise SettingError(place(number, "draw") + f"the tag names {name}, so nobody can be drawn. Leave draw out.")
    return Tag(name, values, preset, unit)


_PRESET = replace(FIELD["model"], name="preset")  # any name: it may be a preset of the user's


def _settings(parts: list[str], number: Number) -> dict[str, str]:
    """Splits `setting=value`; a first part without `=` is the weight."""
    given: dict[str, str] = {}
    for i, part in enumerate(parts):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and i:
            raise SettingError(
                f"{place(number, spelled(part))}only the weight may stand without its name; write setting=value, "
                f"as in <pulid:anna:0.8:end=0.5>."
            )
        key, value = (key, value) if equals else ("weight", key)
        if key in _REFUSED:
            raise SettingError(place(number, key) + _REFUSED[key])
        if key != _UNIT:
            field_named(key, number)
        if key in given:
            raise SettingError(place(number, key) + "it is in the tag twice.")
        given[key] = value
    return given


def _unit(text: str, number: Number) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MOST_UNITS):
        raise SettingError(place(number, "unit") + f"{show(text)} is not the number of a unit; use 1 to {MOST_UNITS}.")
    return int(text)
