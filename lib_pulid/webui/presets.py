"""Saves a unit's settings under a name, one JSON file each, and uses them wherever a preset's name may stand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_pulid import disk, names
from lib_pulid.errors import SettingError
from lib_pulid.fields import AUTO, CUSTOM, FIELD, FIELDS, OLD_CHOICES, PRESET_FAMILY, Number, place, show
from lib_pulid.methods import SPECIAL
from lib_pulid.stores.folder import ModelsFolder
from lib_pulid.units import PulidUnit

SUFFIX = ".json"
LARGEST = 100_000  # bytes
# What a preset has: how a face is used, not whose it is or where.
SAVED = tuple(
    field.name
    for field in FIELDS
    if field.kind not in ("images", "image", "box") and field.name not in ("enabled", "identity", "draw", "preset")
)
# Comes with PuLID; docs/evaluate.md has the measurement.
SHIPPED: Mapping[str, Mapping[str, Any]] = {"natural": {"start": 0.2}}
_OFFICIAL = {names.key(name): name for name in (*PRESET_FAMILY, *OLD_CHOICES, *SHIPPED, AUTO, CUSTOM, names.NOBODY)}


@dataclass(frozen=True)
class Presets:
    """The saved presets, and those that come with PuLID."""

    models: ModelsFolder

    def folder(self) -> Path:
        return self.models.path / "presets"

    def names(self) -> list[str]:
        return sorted({*SHIPPED, *self._files()}, key=str.lower)

    def load(self, name: str, number: Number = 0) -> dict[str, Any]:
        """Returns a preset's settings, in their fields' types. number: of the unit, for messages.

        Raises:
            SettingError: there is no such preset, or its file is damaged, has an unknown or wrong setting, or has an
                official preset's name, which means that one everywhere else.
        """
        if (shipped := names.find(name, SHIPPED)) is not None:
            return dict(shipped)
        path = self.named(name, number)
        try:
            _check_not_official(path.stem)
            return _checked(_read(path))
        except SettingError as error:
            raise SettingError(
                f"{place(number, 'preset')}{path.name} in {path.parent} is not usable. {error}"
            ) from error

    def named(self, name: str, number: Number = 0) -> Path:
        """Returns a preset's file, to load or to delete it.

        Raises:
            SettingError: there is none (the message has the nearest names), or the preset comes with PuLID.
        """
        path = names.find(name, self._files())
        if path is not None:
            return path
        if names.find(name, SHIPPED) is not None:
            raise SettingError(f"The preset {name} comes with PuLID, so it cannot be deleted.")
        known = (*PRESET_FAMILY, CUSTOM, AUTO, *self.names())
        near = names.nearest(name, known)
        hint = f"did you mean {near}?" if near else f"use one of {', '.join(known)}."
        raise SettingError(place(number, "preset") + f"there is no preset {show(name)}; {hint}")

    def save(self, name: str, values: Mapping[str, Any]) -> str:
        """Saves settings under a new name, which it returns. Values of fields that a preset does not have are left out.

        Raises:
            SettingError: the name is taken, in any spelling, or is not a valid name; or a value is wrong. StorageError.
        """
        name = names.new(name)
        _check_not_official(name)
        for other in self.names():
            if names.key(other) == names.key(name):
                raise SettingError(f"The preset {other} is already saved. Choose another name, or delete it first.")
        settings = _checked({key: value for key, value in values.items() if key in SAVED})
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        disk.write(self.folder() / f"{name}{SUFFIX}", text.encode())
        return name

    def expand(self, values: Mapping[str, Any], number: Number) -> dict[str, Any]:
        """Replaces the name of a saved preset in a unit's dict by its settings; what else the dict says counts more.

        Raises:
            SettingError: see `load`.
        """
        name = values.get("preset")
        if not isinstance(name, str) or OLD_CHOICES.get(name, name) in FIELD["preset"].choices:
            return dict(values)
        rest = {key: value for key, value in values.items() if key != "preset" and value is not None}
        return {**asked(self.load(name, number)), **rest}

    def expand_args(self, args: Sequence[Any]) -> list[Any]:
        """Does so in the dicts of a script's arguments."""
        numbers = iter(range(1, len(args) + 1))
        return [self.expand(one, next(numbers)) if isinstance(one, Mapping) else one for one in args]

    def _files(self) -> dict[str, Path]:
        return {path.stem: path for path in disk.listed(self.folder(), (SUFFIX,))}


def _check_not_official(name: str) -> None:
    if official := _OFFICIAL.get(names.key(name)):
        raise SettingError(f"{official} is the name of an official preset. Choose another name.")


def _read(path: Path) -> Mapping[str, Any]:
    if disk.size_of(path) > LARGEST:
        raise SettingError("It is too large for a preset.")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(f"It cannot be read as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise SettingError("It is not a JSON object with settings.")
    return values


def asked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out defaults of settings that only some methods have: the page saves them all, though nobody asked."""
    return {
        name: value
        for name, value in values.items()
        if name not in SPECIAL or value not in (FIELD[name].default, FIELD[name].shown)
    }


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks all settings like a request's. Raises: SettingError."""
    for name in values:
        if name in FIELD and name not in SAVED:
            raise SettingError(place(0, name) + f"a preset has no {name}.")
    unit = PulidUnit.from_mapping(values, 0)
    return {name: getattr(unit, name) for name in values}
