"""Adds axes to the X/Y/Z plot: every setting of the first unit, the main ones of the others, and photos by their file.

The host shows all axes in one list, so the others' advanced settings are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lib_pulid.disk import user_path
from lib_pulid.errors import SettingError
from lib_pulid.fields import AUTO, BOOLS, FIELD, FIELDS, Field, check, place
from lib_pulid.images import load_image
from lib_pulid.units import at_unit
from lib_pulid.webui.dropped import load_photo
from lib_pulid.webui.library import Library
from lib_pulid.webui.pictures import encode

CHANGES = "pulid_changes"  # attribute of a cell's StableDiffusionProcessing
LOADING = 0.5  # "cost" of loading a model or photo: the grid changes costly axes least often


def changes_of(p: Any) -> Mapping[int, Mapping[str, Any]]:
    """Returns what the grid sets in this cell, by unit."""
    return getattr(p, CHANGES, {})


def axes(option: type, count: int, library: Library, families: Collection[str]) -> list[Any]:
    """Makes the axes. option: the host's AxisOption. count: number of units. families: that the host can load."""
    fields = [field for field in FIELDS if not field.family or field.family in families]
    main = [field for field in fields if not field.advanced]
    others = [axis for number in range(2, count + 1) for axis in _unit_axes(option, number, library, main)]
    return [*_unit_axes(option, 1, library, fields), *others]


def add_axes(count: int, library: Library, families: Collection[str]) -> None:
    """Adds the axes to the host's X/Y/Z script, once. families: of the checkpoints that the host can load."""
    from modules import scripts

    for data in scripts.scripts_data:
        if data.script_class.__module__ == "xyz_grid.py" and hasattr(data, "module"):
            known = {axis.label for axis in data.module.axis_options}
            new = axes(data.module.AxisOption, count, library, families)
            data.module.axis_options.extend(axis for axis in new if axis.label not in known)
            return


def _unit_axes(option: type, number: int, library: Library, fields: Sequence[Field]) -> list[Any]:
    set_photo, confirm = partial(_set_photo, number), partial(_confirm_photos, number)
    made = [option(f"[PuLID {number}] Photo file", str, set_photo, confirm=confirm, cost=LOADING)]
    for field in fields:
        if field.kind in ("images", "image"):
            continue
        convert = {"float": float, "int": int}.get(field.kind, str)
        made.append(
            option(
                f"[PuLID {number}] {field.label}",
                convert,
                partial(_set, number, field),
                confirm=partial(_confirm, number, field, library),
                cost=LOADING if field.name in ("model", "identity") else 0.0,
                choices=_choices(field, library),
            )
        )
    return made


def _set_photo(number: int, p: Any, value: str, values: Any) -> None:
    photo = load_photo(_path(p, value, number))
    _change(p, number, "images", (encode(photo, "BMP"),))  # in each cell anew: a PNG would take seconds


def _confirm_photos(number: int, p: Any, values: list[str]) -> None:
    for value in values:
        load_image(_path(p, value, number))


def _path(p: Any, value: str, number: int) -> Path:
    """Reads a path typed in the page. The API can run a grid as well, but its callers must not read files."""
    from modules.shared import cmd_opts

    if getattr(p, "is_api", False) or getattr(cmd_opts, "hide_ui_dir_config", False):
        raise SettingError(
            place(number, "images") + "the axis Photo file reads files of this machine, so it works only in the page "
            "(without --hide-ui-dir-config). Send photos in the unit's field images, one request for each."
        )
    return user_path(value.strip().strip('"'))


def _set(number: int, field: Field, p: Any, value: Any, values: Any) -> None:
    _change(p, number, field.name, _plain(field, value))


def _confirm(number: int, field: Field, library: Library, p: Any, values: list[Any]) -> None:
    """Checks the values before the grid starts, so that a typo does not show up after an hour."""
    finders: dict[str, Callable[[str], Any]] = {"identity": library.identities.path, "model": library.adapters.path}
    for value in values:
        for name, plain in library.presets.expand({field.name: _plain(field, value)}, number).items():
            checked = check(FIELD[name], plain, number)
            if name in finders and checked != FIELD[name].default:
                with at_unit(number, name):
                    finders[name](checked)


def _plain(field: Field, value: Any) -> Any:
    if field.kind == "bool":
        return BOOLS.get(str(value).strip().lower(), value)
    return value


def _choices(field: Field, library: Library) -> Callable[[], list[str]] | None:
    if field.kind == "bool":
        return lambda: ["yes", "no"]
    if field.name == "model":
        return lambda: [AUTO, *library.adapters.names()]
    if field.name == "identity":
        return library.identities.names
    if field.name == "preset":
        return lambda: [*field.choices, *library.presets.names()]
    return (lambda: list(field.choices)) if field.choices else None


def _change(p: Any, number: int, name: str, value: Any) -> None:
    """Sets a value for this cell alone: cells are shallow copies of one another."""
    changes = {unit: dict(values) for unit, values in changes_of(p).items()}
    changes.setdefault(number, {})[name] = value
    setattr(p, CHANGES, changes)
