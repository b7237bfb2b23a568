"""Defines PulidUnit, one person's settings; converts it from a dict, a list or an X/Y/Z cell, and back."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from lib_pulid.errors import IdentityMismatchError, PulidError, SettingError
from lib_pulid.faces import FaceChoice
from lib_pulid.fields import (
    AUTO,
    FIELD,
    FIELDS,
    MOST_UNITS,
    NONE,
    NOT_DRAWN,
    PRESET_FAMILY,
    PRESETS,
    Number,
    check,
    field_named,
    place,
    preset_name,
    preset_values,
    show,
)
from lib_pulid.injection import acts
from lib_pulid.methods import Method, has, usual

SETTINGS = ("projection", "num_zero", "start_step", "lora_weight")  # of `compile_injection`, if the method has them
_SOURCES = ("draw", "identity", "images")  # of a person, the one that takes precedence first
_EMPTY = (None, "", NONE)  # what hosts turn an empty text or list into


@dataclass(frozen=True)
class PulidUnit:
    """One person's settings; the fields are those of FIELDS. images, mask: base64 or data URIs. box: four numbers.

    `on` fills in what depends on family and method (weight and identity_net None, preset "auto").
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
    box: str = ""
    hires: str = "both"
    draw: str = NOT_DRAWN
    keep_best: int = 0
    lora_weight: float = 1.0
    identity_net: float | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)  # fields set by name, not by a widget

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], number: Number) -> PulidUnit:
        """Reads an API dict. A field that is missing or null gets its default, or the named preset's value.

        Raises:
            SettingError: a field is unknown, or its value is wrong; the message names unit and field.
        """
        fields = {name: field_named(name, number) for name in values}
        checked = {name: check(fields[name], value, number) for name, value in values.items() if value is not None}
        if checked.get("images") and checked.get("identity"):
            raise SettingError(place(number, "identity") + "give either images or an identity, not both.")
        if checked.get("draw", NOT_DRAWN) != NOT_DRAWN and (checked.get("images") or checked.get("identity")):
            raise SettingError(place(number, "draw") + "a photo is drawn; give neither images nor an identity, or off.")
        preset = preset_values(checked.get("preset", ""))
        return cls(**{**preset, **checked}, given=frozenset(checked))._checked(number)

    @classmethod
    def from_positions(cls, values: Sequence[Any], number: Number) -> PulidUnit:
        """Reads the widgets' values, in the order of FIELDS; a short list is filled up with defaults.

        The preset there only names what the other widgets say; a saved identity takes precedence over photos, and a
        drawn photo over both.
        """
        named = {field.name: (field, value) for field, value in zip(FIELDS, values) if field.name != "preset"}
        checked = {name: check(field, value, number) for name, (field, value) in named.items()}
        return cls(**_one_source(checked))._checked(number)

    def changed(self, values: Mapping[str, Any], number: Number) -> PulidUnit:
        """Returns a copy with some fields replaced, for X/Y/Z axes. Photo, identity and draw replace one another."""
        checked = {name: check(field_named(name, number), value, number) for name, value in values.items()}
        checked = _one_source(checked)
        preset = preset_values(checked.get("preset", ""))
        return replace(self, **{**preset, **checked}, given=self.given | set(checked))._checked(number)

    def positions(self) -> list[Any]:
        """Returns the inverse of `from_positions`, plain JSON; photos as in the accordion's hidden field."""
        values = {**self.values(), "images": json.dumps(self.images) if self.images else ""}
        for name, one in FIELD.items():
            if one.shown is not None and values[name] == one.default:
                values[name] = one.shown
        return list(values.values())

    def values(self) -> dict[str, Any]:
        """Returns the fields of FIELDS by name."""
        return {name: getattr(self, name) for name in FIELD}

    @property
    def choice(self) -> FaceChoice:
        return FaceChoice(self.face_order, self.face_index)

    @property
    def is_off(self) -> bool:
        """Whether it changes nothing, as its strength is 0."""
        return self.weight == 0 and not self.identity_net

    def in_pass(self, hires: bool) -> bool:
        """Whether it is used in the first or the second (hires) pass."""
        return self.hires in ("both", "second" if hires else "first")

    def in_the_only_pass(self) -> PulidUnit:
        """Resolves it for a generation without hires fix: also a unit for the second pass is used."""
        return replace(self, hires="both") if self.hires == "second" else self

    def on(self, family: str, method: Method | None = None) -> PulidUnit:
        """Resolves it for a checkpoint of this family, and a method (None: PuLID): fills in the weight, the strength of
        its ControlNet (0 without one, and by default with a weight of 0), and the family's name of the preset."""
        method = method or usual(family)
        weight = method.weight if self.weight is None else self.weight
        usual_net = method.control_weight if weight else 0.0
        net = usual_net if self.identity_net is None or not method.control else self.identity_net
        return replace(self, weight=weight, identity_net=net, preset=preset_name(family, self.values()))

    def settings(self, method: Method) -> dict[str, Any]:
        """Returns what `compile_injection` is given of it besides the mask, as far as the method has it."""
        found = {name: getattr(self, name) for name in SETTINGS if has(method, name)}
        return {"weight": self.weight or 0.0, "start": self.start, "end": self.end, **found}

    def check_method(self, method: Method, number: Number) -> None:
        """Raises: SettingError: a setting that the method does not have was given another value than its default."""
        for name in FIELD:
            changed = name in self.given and getattr(self, name) != FIELD[name].default
            named = changed and FIELD[name].family in ("", method.family) and not has(method, name)
            if named and (name != "preset" or self.preset in PRESET_FAMILY):
                raise SettingError(
                    f"{place(number, name)}{method.label} has no such setting. Leave it out, or choose another model."
                )

    def check_family(self, family: str, number: Number) -> None:
        """Raises: SettingError: the preset belongs to the other family."""
        if PRESET_FAMILY.get(self.preset, family) != family:
            own, choices = PRESET_FAMILY[self.preset].upper(), ", ".join(PRESETS[family])
            raise SettingError(
                f"{place(number, 'preset')}{self.preset} is for {own}, but the checkpoint is {family.upper()}. "
                f"Leave the preset out, or use {choices}."
            )

    def check_steps(self, family: str, steps: int, number: Number) -> None:
        """Raises: SettingError: with so many steps, the identity would never be used on a checkpoint of this family."""
        start_step = self.start_step if family == "flux" else 0
        if self.is_off or any(acts(i, steps, self.start, self.end, start_step) for i in range(steps)):
            return
        name, why = "start", f"none of the {steps} steps is between start {self.start:g} and end {self.end:g}"
        if start_step >= steps:
            name = "start_step"
            why = f"it starts at step {start_step}, but there are only {steps} steps (0-{steps - 1})"
        elif start_step:
            why += f", at or after start step {start_step}"
        raise SettingError(
            f"{place(number, name)}PuLID would never be active: {why}. Start earlier, end later, or use more steps."
        )

    def _checked(self, number: Number) -> PulidUnit:
        if self.start >= self.end:
            raise SettingError(place(number, "start") + f"start ({self.start:g}) has to be below end ({self.end:g}).")
        return self


def parse_args(
    args: Sequence[Any], changes: Mapping[int, Mapping[str, Any]] = MappingProxyType({})
) -> list[tuple[int, PulidUnit]]:
    """Reads the enabled units of a script's arguments, with their numbers from 1 on.

    Args:
        args: the positional list [on, *unit 1, *unit 2, ...]; or, from the API, dicts, one per unit, with or without a
            leading boolean; the host fills the remaining positions with the widgets' defaults.
        changes: by unit, what an X/Y/Z grid sets in this cell; that enables the unit.

    Raises:
        SettingError.
    """
    args = list(args)
    if len(args) > 1 + MOST_UNITS * len(FIELDS):
        raise SettingError(f"PuLID: {len(args)} arguments are too many; send {MOST_UNITS} units at most.")
    on, parts = _split(args)
    if parts and isinstance(parts[0], Mapping):
        units = _from_dicts(args, parts)
    else:
        if not isinstance(on, bool):
            raise _not_a_unit(0, on)
        units = _from_lists(parts, on, changes)
    known = {number: unit for number, unit in enumerate(units, 1) if on or number in changes}
    for number, values in changes.items():
        known[number] = known.get(number, PulidUnit()).changed({"enabled": True, **values}, number)
    return [(number, unit) for number, unit in sorted(known.items()) if unit.enabled]


def unit_of(args: Sequence[Any], wanted: int, changes: Mapping[str, Any], number: Number) -> PulidUnit:
    """Returns one unit of a script's arguments, whether it is enabled or not.

    Args:
        args: see `parse_args`. wanted: the unit's number, from 1. changes: what an X/Y/Z grid sets in it.
        number: what messages call the unit that is made of it.

    Raises:
        SettingError: there is no such unit, or one of its values is wrong.
    """
    _, parts = _split(list(args))
    if wanted > len(parts):
        raise SettingError(place(number, "unit") + f"there is no unit {wanted} in this request.")
    found = parts[wanted - 1]
    read = PulidUnit.from_mapping if isinstance(found, Mapping) else PulidUnit.from_positions
    return read(found, wanted).changed(changes, wanted)


def default_args(count: int) -> list[Any]:
    """Returns the positional list of a fresh accordion with `count` units: off, and only the first unit enabled."""
    units = [replace(PulidUnit(), enabled=i == 0).positions() for i in range(count)]
    return [False, *(value for unit in units for value in unit)]


@contextmanager
def at_unit(number: Number, field: str, file: str = "") -> Iterator[None]:
    """Puts unit and field, and the name of a file, before the messages of errors raised inside."""
    try:
        yield
    except PulidError as error:
        name = "identity" if isinstance(error, IdentityMismatchError) else field
        raise type(error)(place(number, name) + (f"{file}: " if file else "") + str(error)) from error


def _one_source(checked: dict[str, Any]) -> dict[str, Any]:
    """Lets the first of _SOURCES that is given replace the others."""
    given = next((name for name in _SOURCES if checked.get(name, FIELD[name].default) != FIELD[name].default), None)
    return checked | {name: FIELD[name].default for name in _SOURCES if given and name != given}


def _split(args: list[Any]) -> tuple[Any, list[Any]]:
    """Returns whether units are used at all, and each unit's values: dicts, or lists in the order of FIELDS."""
    leading = bool(args) and isinstance(args[0], bool)
    dicts = list(takewhile(lambda value: isinstance(value, Mapping), args[leading:]))
    if dicts:
        return args[0] if leading else True, dicts
    lists = [args[first : first + len(FIELDS)] for first in range(1, len(args), len(FIELDS))]
    return args[0] if args else False, lists


def _from_lists(lists: Sequence[Any], on: bool, changed: Container[int]) -> list[PulidUnit]:
    """Skips a disabled tab unchecked: it may be half filled in."""
    units = []
    for number, part in enumerate(lists, 1):
        used = number in changed or (on and check(FIELDS[0], part[0], number))
        units.append(PulidUnit.from_positions(part, number) if used else PulidUnit(enabled=False))
    return units


def _from_dicts(args: Sequence[Any], dicts: Sequence[Mapping[str, Any]]) -> list[PulidUnit]:
    """Accepts nothing after the dicts but the widgets' defaults, which the host puts there."""
    if len(dicts) > MOST_UNITS:
        raise SettingError(f"PuLID: {len(dicts)} units are too many; send {MOST_UNITS} at most.")
    defaults = default_args(1 + len(args) // len(FIELDS))
    for i in range(isinstance(args[0], bool) + len(dicts), len(args)):
        if args[i] != defaults[i] and not (args[i] in _EMPTY and defaults[i] in _EMPTY):
            raise _not_a_unit(i, args[i], " Remove PuLID's entries from the request's infotext, if it has one.")
    return [PulidUnit.from_mapping(values, number) for number, values in enumerate(dicts, 1)]


def _not_a_unit(index: int, value: Any, more: str = "") -> SettingError:
    return SettingError(
        f"PuLID, args[{index}]: {show(value)} is not a unit; args must be a list of dicts, one per person.{more}"
    )
