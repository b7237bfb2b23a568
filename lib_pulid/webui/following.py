"""Shows the settings that go together: those of a preset, of a checkpoint's family, of a model's method.

Widget values in, widget values out, like `actions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from lib_pulid import disk
from lib_pulid.errors import PulidError, SettingError
from lib_pulid.fields import (
    CUSTOM,
    FAMILIES,
    FIELD,
    NONE,
    PRESET_FAMILY,
    PRESET_TIPS,
    WEIGHTS,
    preset_name,
    preset_values,
)
from lib_pulid.methods import METHODS, Method, has, usual
from lib_pulid.webui.library import Library
from lib_pulid.webui.notes import bad, good, warn
from lib_pulid.webui.presets import SAVED

PRESET_FIELDS = ("projection", "num_zero", "start_step")  # the fields that presets set
# The first settings of the rows that only some methods have.
ROWS = ("projection", "start_step", "lora_weight", "identity_net")
# What is read when the checkpoint or the model changes.
FOLLOWING = ("weight", "preset", "fusion", *PRESET_FIELDS, "model")


class Following:
    """Args: family: see `Actions`."""

    def __init__(self, library: Library, family: Callable[[str], str]) -> None:
        self._library, self.family = library, family

    def apply_preset(self, preset: str) -> list[Any]:
        """Sets the widgets of PRESET_FIELDS."""
        values = preset_values(preset)
        return [gr.update(value=values[name]) if name in values else gr.update() for name in PRESET_FIELDS]

    def name_preset(self, family: str, shown: str, *values: Any) -> Any:
        """Names the preset after a setting of `family` changed. shown: the page's family. values: of PRESET_FIELDS."""
        if shown not in ("", family):
            return gr.update()
        return gr.update(value=_preset_name(family, values))

    def saved_presets(self) -> Any:
        """Lists the user's presets, none of them selected."""
        return gr.update(choices=[NONE, *self._library.presets.names()], value=NONE)

    def lists_of_presets(self, count: int) -> Any:
        """Returns so many lists; gradio wants a single one without a list around it."""
        listed = self.saved_presets()
        return listed if count == 1 else [listed] * count

    def load_preset(self, name: str) -> list[Any]:
        """Returns the widgets of a preset's fields, the list with nothing selected, its name in the name field, and a
        note."""
        if name in (None, "", NONE):
            return [gr.update()] * (len(SAVED) + 3)
        try:
            values = self._library.presets.load(name)
        except PulidError as error:
            return [*[gr.update()] * len(SAVED), self.saved_presets(), gr.update(), bad(str(error))]
        widgets = [gr.update() if values.get(field) is None else gr.update(value=values[field]) for field in SAVED]
        told = good(f"The settings are those of the preset {name}.")
        return [*widgets, self.saved_presets(), gr.update(value=name), told]

    def save_preset(self, name: str, *values: Any) -> tuple[Any, Any, str]:
        """Saves the values of SAVED under a name. Returns the list, an empty name field, and a note."""
        try:
            if not name.strip():
                raise SettingError("Enter a name for the preset first.")
            name = self._library.presets.save(name, dict(zip(SAVED, values)))
        except PulidError as error:
            return gr.update(), gr.update(), bad(str(error))
        return (
            self.saved_presets(),
            gr.update(value=""),
            good(f"Saved the preset {name}: these settings, without the face."),
        )

    def delete_preset(self, name: str, asked: str) -> tuple[Any, str, str]:
        """Deletes the preset in the name field at the second click. asked: the preset that the first click was for.

        Returns the list, the preset that the next click would delete, and a note.
        """
        try:
            if not name.strip():
                raise SettingError("Load the preset to delete first, or enter its name.")
            path = self._library.presets.named(name.strip())
            if path.stem != asked:
                return gr.update(), path.stem, warn(f"Click again to delete {path}. It cannot be restored.")
            disk.delete(path)
        except PulidError as error:
            return gr.update(), "", bad(str(error))
        return self.saved_presets(), "", good(f"Deleted the preset {path.stem}.")

    def follow_checkpoint(self, shown: str, name: str, *values: Any) -> list[Any]:
        """Shows the settings of the checkpoint's family in every unit.

        shown: the page's family, "" for all. name: of the checkpoint. values: of FOLLOWING, unit by unit.

        Returns the family; then for every unit weight, preset, fusion, and ROWS.
        """
        family, count = self.family(name or ""), len(FOLLOWING)
        units = [values[i : i + count] for i in range(0, len(values), count)]
        if family == shown:
            return [gr.update()] * (1 + (3 + len(ROWS)) * len(units))
        shown_anew = [family]
        for weight, *others, model in units:
            shown_anew += [self.usual_weight(family, weight, model), *self.follow_model(family, *others, model)]
        return shown_anew

    def usual_weight(self, family: str, weight: float, model: str) -> Any:
        """Replaces a weight that is a default by that of the selected model's method; any other was set by hand."""
        method = self._method(family, model)
        is_default = method is not None and weight != method.weight and weight in WEIGHTS.values()
        return gr.update(value=method.weight) if method is not None and is_default else gr.update()

    def follow_model(self, family: str, *values: Any) -> list[Any]:
        """Shows the settings of a family and of the selected model's method in one unit. values: of FOLLOWING but the
        weight.

        Returns preset, fusion, and ROWS.
        """
        *others, model = values
        return _for_method(family, self._method(family, model), *others)

    def _method(self, family: str, model: str) -> Method | None:
        """Returns the method of a model; None if neither the checkpoint's family nor the model is known."""
        return self._library.adapters.method_of(model) or (usual(family) if family else None)


def _for_method(family: str, method: Method | None, preset: str, fusion: str, *values: Any) -> list[Any]:
    """method: see `Following._method`. A value that stays is not sent: it may have changed on the page meanwhile."""
    fusions = [one for one in FIELD["fusion"].choices if one != "id_mix" or method is None or _may_mix(method)]
    has_preset = method is None or has(method, "preset")
    shown: dict[str, Any] = {"info": PRESET_TIPS[family]} if family and has_preset else {}
    if shown and (name := _preset_name(family, values)) != preset:
        shown["value"] = name
    return [
        gr.update(choices=preset_choices(family), visible=has_preset, **shown),
        gr.update(choices=fusions, **({} if fusion in fusions else {"value": FIELD["fusion"].default})),
        *(gr.update(visible=is_shown(name, family, method)) for name in ROWS),
    ]


def _may_mix(method: Method) -> bool:
    """Whether id_mix is of use in a version of the method; "auto" may be any of them."""
    return any(one.several == "first" for one in METHODS if (one.name, one.family) == (method.name, method.family))


def is_shown(name: str, family: str, method: Method | None) -> bool:
    """Whether a setting is of use with a checkpoint's family and a method, as far as they are known."""
    candidates = [usual(one) for one in FAMILIES] if method is None else [method]
    return family in ("", FIELD[name].family) and any(has(one, name) for one in candidates)


def preset_choices(family: str) -> list[str]:
    """Lists a family's presets; "": all."""
    return [*(name for name, own in PRESET_FAMILY.items() if family in ("", own)), CUSTOM]


def _preset_name(family: str, values: Sequence[Any]) -> str:
    return preset_name(family, dict(zip(PRESET_FIELDS, values)))
