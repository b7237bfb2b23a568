"""PulidUnit: what a user asked for one person, and the one table of its fields.

The table `FIELDS` feeds everything that reads or writes settings: the API's dicts, the positional list of the WebUI,
the widgets, the X/Y/Z axes, the parameters in the picture, and `/pulid/schema`. All values are plain JSON. They are
checked once, here; an error names the unit and the field.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from lib_pulid.attention import PROJECTIONS
from lib_pulid.errors import PulidError, SettingError
from lib_pulid.faces import FACE_ORDERS, FaceChoice
from lib_pulid.identity import FUSIONS

AUTO = "auto"
NONE = "None"  # how lists show "no saved identity"
CUSTOM = "custom"
HIRES_PASSES = ("both", "first", "second")

# The official settings: fidelity and style of app.py (PuLID v1), v1.1 of app_v1_1.py, commit 1aa2fc7. Neutral is the
# plain residual, nothing kept apart.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "v1.1": {"projection": "ortho_v2", "num_zero": 20},
    "fidelity": {"projection": "ortho_v2", "num_zero": 8},
    "style": {"projection": "ortho", "num_zero": 16},
    "neutral": {"projection": "none", "num_zero": 0},
}


@dataclass(frozen=True)
class Field:
    """One setting.

    Args:
        name: as in the API. label, tip: for people.
        kind: "bool", "int", "float", "choice", "text", "images" or "image".
        minimum, maximum, step: of numbers. choices: of kind "choice".
        advanced: whether the accordion keeps it behind "Advanced".
        pasted: whether it stands in the picture's parameters.
    """

    name: str
    label: str
    kind: str
    default: Any
    tip: str
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    advanced: bool = False
    pasted: bool = True


FIELDS = (
    Field("enabled", "Use this person", "bool", True, "Off: this tab is left out.", pasted=False),
    Field("images", "Photos", "images", (), "Photos of one person, as base64 or data URIs; the best one first.",
          pasted=False),
    Field("identity", "Saved identity", "text", "", "Name or short hash of a saved identity, used instead of photos."),
    Field("model", "PuLID model", "text", AUTO, "auto takes the PuLID file that fits the checkpoint."),
    Field("weight", "Weight", "float", 0.8, "How strong the face is. 0 changes nothing; SDXL 0.8, FLUX 1.", 0, 5, 0.05),
    Field("preset", "Preset", "choice", "v1.1", "Official settings: v1.1 for PuLID v1.1; for v1 fidelity (likeness) "
          "or style. Neutral: nothing is kept apart. SDXL only.", choices=(*PRESETS, CUSTOM)),
    Field("projection", "Projection", "choice", "ortho_v2", "How the face is kept apart from the prompt; SDXL.",
          choices=PROJECTIONS, advanced=True),
    Field("num_zero", "Zero tokens", "int", 20, "More leave more to the prompt, fewer give more likeness; SDXL.",
          0, 80, 1, advanced=True),
    Field("start", "Start", "float", 0.0, "Share of the steps before the face begins to act.", 0, 1, 0.01,
          advanced=True),
    Field("end", "End", "float", 1.0, "Share of the steps after which the face no longer acts.", 0, 1, 0.01,
          advanced=True),
    Field("face_order", "Face in the photo", "choice", "largest", "How faces are counted if a photo has several.",
          choices=FACE_ORDERS, advanced=True),
    Field("face_index", "Face number", "int", 0, "0 is the first in that order, 1 the next.", 0, 50, 1, advanced=True),
    Field("fusion", "Several photos", "choice", "official", "How they become one face: official; id_mix mixes persons "
          "(PuLID v1); average is the mean of each photo's own tokens.", choices=FUSIONS, advanced=True),
    Field("mask", "Region", "image", "", "Where the face may act: white yes, black no. Empty: everywhere.",
          advanced=True, pasted=False),
    Field("hires", "Hires fix passes", "choice", "both", "In which passes of hires fix the face acts.",
          choices=HIRES_PASSES, advanced=True),
)  # fmt: skip
FIELD = {field.name: field for field in FIELDS}
_SWITCH = Field("on", "PuLID", "bool", False, "The accordion's own on/off.")


@dataclass(frozen=True)
class PulidUnit:
    """What was asked for one person; the fields are those of FIELDS. images, mask: base64 or data URIs."""

    enabled: bool = True
    images: tuple[str, ...] = ()
    identity: str = ""
    model: str = AUTO
    weight: float = 0.8
    preset: str = "v1.1"
    projection: str = "ortho_v2"
    num_zero: int = 20
    start: float = 0.0
    end: float = 1.0
    face_order: str = "largest"
    face_index: int = 0
    fusion: str = "official"
    mask: str = ""
    hires: str = "both"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], number: int) -> PulidUnit:
        """From an API dict. What is left out takes its default, or the preset's value where a preset is named.

        Raises:
            SettingError: a field is unknown, or its value wrong; the message names unit and field.
        """
        checked = {name: check(_known(name, number), value, number) for name, value in values.items()}
        if checked.get("images") and checked.get("identity"):
            raise SettingError(_at(number, "identity") + "give either images or an identity, not both.")
        return cls(**{**PRESETS.get(checked.get("preset", ""), {}), **checked})._settled(number)

    @classmethod
    def from_positions(cls, values: Sequence[Any], number: int) -> PulidUnit:
        """From the widgets' values, in the order of FIELDS; a short list is filled with defaults.

        Projection and zero tokens are as they stand, whatever preset is named; a saved identity goes before photos.
        """
        checked = {field.name: check(field, value, number) for field, value in zip(FIELDS, values)}
        if checked.get("identity"):
            checked["images"] = ()
        return cls(**checked)._settled(number)

    def changed(self, values: Mapping[str, Any], number: int) -> PulidUnit:
        """A copy with some fields replaced, as X/Y/Z axes do. A photo takes the identity's place, and vice versa."""
        checked = {name: check(_known(name, number), value, number) for name, value in values.items()}
        if checked.get("images"):
            checked.setdefault("identity", "")
        if checked.get("identity"):
            checked["images"] = ()
        return replace(self, **{**PRESETS.get(checked.get("preset", ""), {}), **checked})._settled(number)

    def positions(self) -> list[Any]:
        """The inverse of `from_positions`, plain JSON; photos as the accordion's hidden field has them."""
        values = {**asdict(self), "images": json.dumps(self.images) if self.images else ""}
        return list(values.values())

    def mapping(self) -> dict[str, Any]:
        """The inverse of `from_mapping`, plain JSON."""
        return {**asdict(self), "images": list(self.images)}

    @property
    def choice(self) -> FaceChoice:
        return FaceChoice(self.face_order, self.face_index)

    def in_pass(self, hires: bool) -> bool:
        """Whether it acts in the first or the second (hires) pass."""
        return self.hires in ("both", "second" if hires else "first")

    def _settled(self, number: int) -> PulidUnit:
        if self.start >= self.end:
            raise SettingError(_at(number, "start") + f"{self.start:g} is not below end, which is {self.end:g}.")
        mine = {"projection": self.projection, "num_zero": self.num_zero}
        if PRESETS.get(self.preset) == mine:
            return self
        return replace(self, preset=next((name for name, values in PRESETS.items() if values == mine), CUSTOM))


def parse_args(
    args: Sequence[Any], changes: Mapping[int, Mapping[str, Any]] = MappingProxyType({})
) -> list[tuple[int, PulidUnit]]:
    """The enabled units of a script's arguments, with their numbers from 1 on.

    Args:
        args: the positional list [on, *unit 1, *unit 2, ...]; or from the API dicts, one per unit, with or without a
            leading on/off; the host fills the places behind them with the widgets' defaults.
        changes: by unit, what an X/Y/Z grid sets in this cell; that switches the unit on.

    Raises:
        SettingError.
    """
    args = list(args)
    leading = bool(args) and isinstance(args[0], bool)
    if len(args) > leading and isinstance(args[leading], Mapping):
        on = args[0] if leading else True
        units = _from_dicts(args, int(leading))
    else:
        on = check(_SWITCH, args[0], 0) if args else False
        units = _from_list(args, on, changes)
    known = {number: unit for number, unit in enumerate(units, 1) if on or number in changes}
    for number, values in changes.items():
        known[number] = known.get(number, PulidUnit()).changed({"enabled": True, **values}, number)
    return [(number, unit) for number, unit in sorted(known.items()) if unit.enabled]


def default_args(count: int) -> list[Any]:
    """The positional list of an accordion with `count` units as it starts: off, and only the first unit ready."""
    units = [replace(PulidUnit(), enabled=i == 0).positions() for i in range(count)]
    return [False, *(value for unit in units for value in unit)]


def at_unit(number: int, field: str, error: PulidError) -> PulidError:
    """The same error, its message preceded by unit and field."""
    return type(error)(_at(number, field) + str(error))


def schema() -> dict[str, Any]:
    """JSON schema of a unit's dict."""
    kinds = {"bool": "boolean", "int": "integer", "float": "number", "images": "array"}
    properties = {}
    for field in FIELDS:
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        entry: dict[str, Any] = {
            "type": kinds.get(field.kind, "string"),
            "title": field.label,
            "description": field.tip,
        }
        entry |= {"default": default, "minimum": field.minimum, "maximum": field.maximum}
        entry["enum"] = list(field.choices) or None
        entry["items"] = {"type": "string"} if field.kind == "images" else None
        properties[field.name] = {key: value for key, value in entry.items() if value is not None}
    return {"title": "PuLID unit", "type": "object", "additionalProperties": False, "properties": properties}


# ---------------------------------------------------------------- checks


def check(field: Field, value: Any, number: int) -> Any:
    """The value in its own type, or SettingError."""
    try:
        return _CHECKS[field.kind](field, value)
    except ValueError as error:
        raise SettingError(_at(number, field.name) + str(error)) from None


def _bool(field: Field, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{_show(value)} is neither true nor false.")
    return value


def _float(field: Field, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{_show(value)} is not a number.")
    if not field.minimum <= value <= field.maximum:  # type: ignore[operator]
        raise ValueError(f"{value:g} is not in {field.minimum:g}..{field.maximum:g}.")
    return float(value)


def _int(field: Field, value: Any) -> int:
    number = _float(field, value)
    if number != int(number):
        raise ValueError(f"{value:g} is not a whole number.")
    return int(number)


def _choice(field: Field, value: Any) -> str:
    if not isinstance(value, str) or value not in field.choices:
        raise ValueError(f"{_show(value)} is not one of {', '.join(field.choices)}.")
    return value


def _text(field: Field, value: Any) -> str:
    if value is None:
        return field.default
    if not isinstance(value, str):
        raise ValueError(f"{_show(value)} is not a text.")
    value = value.strip()
    return field.default if value in ("", NONE) else value


def _image(field: Field, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{_show(value)} is not an image; base64 text is.")
    return value.strip()


def _images(field: Field, value: Any) -> tuple[str, ...]:
    """A list; or text: one image, or a list in JSON, as the accordion's hidden field has it."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                raise ValueError("the list of images is not JSON.") from None
        else:
            value = [value] if value.strip() else []
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{_show(value)} is not a list of images (base64 texts).")
    for image in value:
        if not isinstance(image, str) or not image.strip():
            raise ValueError(f"{_show(image)} in the list is not an image; base64 text is.")
    return tuple(image.strip() for image in value)


_CHECKS = {
    "bool": _bool, "int": _int, "float": _float, "choice": _choice, "text": _text, "image": _image, "images": _images,
}  # fmt: skip


def _known(name: Any, number: int) -> Field:
    if name in FIELD:
        return FIELD[name]
    near = difflib.get_close_matches(str(name), FIELD, 1)
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(FIELD)}."
    raise SettingError(_at(number, str(name)[:40]) + f"there is no such field; {hint}")


def _from_list(args: Sequence[Any], on: bool, changed: Container[int]) -> list[PulidUnit]:
    """A tab that is left out may be half filled in, so it is not checked."""
    units = []
    for number, first in enumerate(range(1, len(args), len(FIELDS)), 1):
        part = args[first : first + len(FIELDS)]
        used = number in changed or (on and check(FIELDS[0], part[0], number))
        units.append(PulidUnit.from_positions(part, number) if used else PulidUnit(enabled=False))
    return units


def _from_dicts(args: Sequence[Any], first: int) -> list[PulidUnit]:
    """Behind the dicts only the widgets' own defaults may stand, which the host puts there."""
    end = next((i for i in range(first, len(args)) if not isinstance(args[i], Mapping)), len(args))
    defaults = default_args(1 + len(args) // len(FIELDS))
    for i in range(end, len(args)):
        if isinstance(args[i], Mapping) or _text(_SWITCH, str(args[i])) != _text(_SWITCH, str(defaults[i])):
            raise SettingError(f"PuLID, args[{i}]: {_show(args[i])} is no unit; args is a list of dicts, one per unit.")
    return [PulidUnit.from_mapping(values, number) for number, values in enumerate(args[first:end], 1)]


def _at(number: int, field: str) -> str:
    return f"PuLID unit {number}, field {field}: " if number else f"PuLID, field {field}: "


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
