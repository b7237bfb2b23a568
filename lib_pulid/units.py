"""PulidUnit: what a user asked for one person; from a dict, a list, an X/Y/Z cell, and back."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

from lib_pulid.errors import PulidError, SettingError
from lib_pulid.faces import FaceChoice
from lib_pulid.fields import (
    AUTO,
    FIELD,
    FIELDS,
    MOST_UNITS,
    NONE,
    PRESET_FAMILY,
    PRESETS,
    WEIGHTS,
    Field,
    check,
    field_named,
    place,
    preset_name,
    preset_values,
    show,
)
from lib_pulid.injection import acts

_SWITCH = Field("on", "PuLID", "bool", False, "The accordion's own on/off.")
_EMPTY = (None, "", NONE)  # what hosts make of an empty text or list


@dataclass(frozen=True)
class PulidUnit:
    """What was asked for one person; the fields are those of FIELDS. images, mask: base64 or data URIs.

    What depends on the checkpoint's family (weight None, preset "auto") is settled by `on`.
    """

    enabled: bool = True
    images: tuple[str, ...] = ()
    identity: str = ""
    model: str = AUTO
    weight: float | None = None
    preset: str = AUTO
    projection: str = "ortho_v2"
    num_zero: int = 20
    start: float = 0.0
    end: float = 1.0
    start_step: int = 0
    cfg_start_step: int = 0
    face_order: str = "largest"
    face_index: int = 0
    fusion: str = "official"
    mask: str = ""
    hires: str = "both"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], number: int) -> PulidUnit:
        """From an API dict. What is left out or null takes its default, or the preset's value where a preset is named.

        Raises:
            SettingError: a field is unknown, or its value wrong; the message names unit and field.
        """
        fields = {name: field_named(name, number) for name in values}
        checked = {name: check(fields[name], value, number) for name, value in values.items() if value is not None}
        if checked.get("images") and checked.get("identity"):
            raise SettingError(place(number, "identity") + "give either images or an identity, not both.")
        return cls(**{**preset_values(checked.get("preset", "")), **checked})._checked(number)

    @classmethod
    def from_positions(cls, values: Sequence[Any], number: int) -> PulidUnit:
        """From the widgets' values, in the order of FIELDS; a short list is filled with defaults.

        The preset there is only a name for what the other widgets say; a saved identity goes before photos.
        """
        named = {field.name: (field, value) for field, value in zip(FIELDS, values) if field.name != "preset"}
        checked = {name: check(field, value, number) for name, (field, value) in named.items()}
        if checked.get("identity"):
            checked["images"] = ()
        return cls(**checked)._checked(number)

    def changed(self, values: Mapping[str, Any], number: int) -> PulidUnit:
        """A copy with some fields replaced, as X/Y/Z axes do. A photo takes the identity's place, and vice versa."""
        checked = {name: check(field_named(name, number), value, number) for name, value in values.items()}
        if checked.get("images"):
            checked.setdefault("identity", "")
        if checked.get("identity"):
            checked["images"] = ()
        return replace(self, **{**preset_values(checked.get("preset", "")), **checked})._checked(number)

    def positions(self) -> list[Any]:
        """The inverse of `from_positions`, plain JSON; photos as the accordion's hidden field has them."""
        values = {**asdict(self), "images": json.dumps(self.images) if self.images else ""}
        for name, field in FIELD.items():
            if field.shown is not None and values[name] == field.default:
                values[name] = field.shown
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

    def on(self, family: str) -> PulidUnit:
        """As it acts on a checkpoint of this family: with a weight, and the preset's name in this family."""
        weight = WEIGHTS[family] if self.weight is None else self.weight
        return replace(self, weight=weight, preset=preset_name(family, asdict(self)))

    def check_family(self, family: str, number: int) -> None:
        """Raises: SettingError: a preset was asked for by name that this family does not have."""
        if PRESET_FAMILY.get(self.preset, family) != family:
            raise SettingError(
                place(number, "preset") + f"{self.preset} is for {PRESET_FAMILY[self.preset].upper()}, the checkpoint "
                f"is {family.upper()}: leave it out, or take {', '.join(PRESETS[family])}."
            )

    def check_steps(self, family: str, steps: int, number: int) -> None:
        """Raises: SettingError: in none of so many steps the face acts on a checkpoint of this family."""
        start_step = self.start_step if family == "flux" else 0
        if self.weight == 0 or any(acts(i, steps, self.start, self.end, start_step) for i in range(steps)):
            return
        name = "start_step" if start_step >= steps else "start"
        limits = f"from step {start_step} on and " if start_step else ""
        raise SettingError(
            f"{place(number, name)}the face would never act: of the {steps} steps, which count from 0, none lies "
            f"{limits}between the shares {self.start:g} and {self.end:g}."
        )

    def _checked(self, number: int) -> PulidUnit:
        if self.start >= self.end:
            raise SettingError(place(number, "start") + f"{self.start:g} is not below end, which is {self.end:g}.")
        return self


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
    if len(args) > 1 + MOST_UNITS * len(FIELDS):
        raise SettingError(f"PuLID: {len(args)} arguments are too many; {MOST_UNITS} units at most.")
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
    return type(error)(place(number, field) + str(error))


# ---------------------------------------------------------------- script arguments


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
    if end - first > MOST_UNITS:
        raise SettingError(f"PuLID: {end - first} units are too many; {MOST_UNITS} at most.")
    defaults = default_args(1 + len(args) // len(FIELDS))
    for i in range(end, len(args)):
        if args[i] != defaults[i] and not (args[i] in _EMPTY and defaults[i] in _EMPTY):
            raise SettingError(f"PuLID, args[{i}]: {show(args[i])} is no unit; args is a list of dicts, one per unit.")
    return [PulidUnit.from_mapping(values, number) for number, values in enumerate(args[first:end], 1)]
