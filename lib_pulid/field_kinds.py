"""Defines Field, one setting, and checks a value by the field's kind."""

from __future__ import annotations

import json
import math
import reprlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib_pulid.boxes import read_box
from lib_pulid.names import NOBODY as NONE


@dataclass(frozen=True)
class Field:
    """One setting.

    Args:
        name: as in the API. label, tip: as in the page.
        kind: "bool", "int", "float", "choice", "text", "images", "image" or "box".
        minimum, maximum, step: for numbers. most: images, or characters of a text.
        choices: for kind "choice". old_choices: other spellings that are still accepted.
        advanced: whether it is under "Advanced" in the accordion.
        pasted: whether it is in the infotext.
        family: the only model family that it applies to, or "".
        shown: the widget's initial value if the default depends on the family.
    """

    name: str
    label: str
    kind: str
    default: Any
    tip: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    most: int = 0
    choices: tuple[str, ...] = ()
    old_choices: Mapping[str, str] = field(default_factory=dict, hash=False)
    advanced: bool = False
    pasted: bool = True
    family: str = ""
    shown: Any = None


def checked(field: Field, value: Any) -> Any:
    """Returns a value in the field's own type; for None the default, if the field may be empty.

    Raises:
        ValueError: the value is wrong; the message does not name the field.
    """
    if value is None and (field.default is None or field.kind in ("text", "image", "images", "box")):
        return field.default
    return _CHECKS[field.kind](field, value)


def _bool(field: Field, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{show(value)} is neither true nor false; send one of them.")
    return value


def _float(field: Field, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{show(value)} is not a number.")
    if not field.minimum <= value <= field.maximum:  # before float(), which fails on a whole number of 400 digits
        raise ValueError(f"{show(value)} is out of range; use {field.minimum:g} to {field.maximum:g}.")
    return float(value)


def _int(field: Field, value: Any) -> int:
    number = _float(field, value)
    if number != int(number):
        raise ValueError(f"{value:g} is not a whole number.")
    return int(number)


def _choice(field: Field, value: Any) -> str:
    value = field.old_choices.get(value, value) if isinstance(value, str) else value
    if value not in field.choices:
        raise ValueError(f"{show(value)} is not one of {', '.join(field.choices)}.")
    return value


def _text(field: Field, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{show(value)} is not text; send a string.")
    value = value.strip()
    # Cc, Cs: control characters, and lone surrogates, which no response could be encoded with.
    if len(value) > field.most or any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError(f"{show(value)} is too long for a name, or contains control characters.")
    return field.default if value in ("", NONE) else value


def _image(field: Field, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{show(value)} is not an image; send base64 text.")
    return value.strip()


def _box(field: Field, value: Any) -> str:
    """Returns the box as text, the same for a list as for text."""
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"{show(value)} is not a box; send [x, y, width, height], as fractions of the image.")
    is_empty = value.strip() in ("", NONE) if isinstance(value, str) else value == []
    return "" if is_empty else str(read_box(value))


def _images(field: Field, value: Any) -> tuple[str, ...]:
    """Reads a list; or text: one image, or a JSON list, as in the accordion's hidden field."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise ValueError("the list of images is not valid JSON.") from None
        else:
            value = [value] if value.strip() else []
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{show(value)} is not a list of images; send a list of base64 strings.")
    if len(value) > field.most:
        raise ValueError(f"{len(value)} photos are too many; send the best ones, {field.most} at most.")
    for image in value:
        if not isinstance(image, str) or not image.strip():
            raise ValueError(f"{show(image)} in the list is not an image; send base64 text.")
    return tuple(image.strip() for image in value)


_CHECKS = {
    "bool": _bool, "int": _int, "float": _float, "choice": _choice, "text": _text, "image": _image, "images": _images,
    "box": _box,
}  # fmt: skip


def show(value: Any) -> str:
    """Formats any value in at most 40 characters: it comes from a stranger, and may be deep or long."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 40, 40
    try:
        text = short.repr(value)
    except ValueError:  # an integer with more digits than Python formats
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
