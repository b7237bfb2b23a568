"""Defines a unit's fields in one table, `FIELDS`, and checks their values.

Everything that reads or writes settings uses the table: the API's dicts, the WebUI's positional list, the widgets, the
X/Y/Z axes, the infotext, and `/pulid/schema`. All values are plain JSON. They are checked here, once, by their kind
(field_kinds.py); an error names unit and field.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from lib_pulid.attention import PROJECTIONS
from lib_pulid.errors import SettingError
from lib_pulid.face_choice import FACE_ORDERS
from lib_pulid.field_kinds import Field, checked, show
from lib_pulid.files.catalog import FAMILIES
from lib_pulid.identity import FUSIONS
from lib_pulid.injection import MOST
from lib_pulid.methods import METHODS, usual
from lib_pulid.names import NOBODY

AUTO = "auto"
NONE = NOBODY  # nobody, nothing: in lists
CUSTOM = "custom"
HIRES_PASSES = ("both", "first", "second")
NOT_DRAWN = "off"
DRAWS = (NOT_DRAWN, "random", "in turn")

Number = int | str  # of a unit in the accordion or the API, from 1; or what messages call a unit of the prompt: "tag 1"

# Limits of one request, so that neither a typo nor a stranger can keep a machine busy for hours.
MOST_UNITS = 10
MOST_PHOTOS = 50  # per person; more than a handful add nothing
LONGEST_TEXT = 255  # of a name, as of a file name

# Default weight, as in the official demos.
WEIGHTS: Mapping[str, float] = {family: usual(family).weight for family in FAMILIES}

# The official settings (commit 1aa2fc7) by model family; a name belongs to one family only. SDXL: fidelity and style
# from app.py (PuLID v1), v1.1 from app_v1_1.py; neutral is the plain residual without orthogonal projection.
# FLUX: docs/pulid_for_flux.md, "4" for realistic images and "0-1" for stylized ones.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sdxl": {
        "v1.1": {"projection": "ortho_v2", "num_zero": 20},
        "fidelity": {"projection": "ortho_v2", "num_zero": 8},
        "style": {"projection": "ortho", "num_zero": 16},
        "neutral": {"projection": "none", "num_zero": 0},
    },
    "flux": {"realistic": {"start_step": 4}, "stylized": {"start_step": 0}},
}
PRESET_TIPS: Mapping[str, str] = {
    "sdxl": "v1.1: the default. For PuLID v1: fidelity (closer to the photo), style (closer to the prompt's style). "
    "neutral: no projection.",
    "flux": "realistic: from step 4, closer to the prompt. stylized: from step 0, closer to the photo.",
}
OLD_CHOICES: Mapping[str, str] = {"stylised": "stylized"}  # still accepted: images and scripts have them
PRESET_FAMILY = {name: family for family, presets in PRESETS.items() for name in presets}


def preset_values(name: str) -> Mapping[str, Any]:
    """Returns the fields that a preset sets; none for "auto" and "custom"."""
    return PRESETS[PRESET_FAMILY[name]][name] if name in PRESET_FAMILY else {}


def preset_name(family: str, values: Mapping[str, Any]) -> str:
    """Returns the name of the preset with these settings in a family, or "custom"."""
    fits = (n for n, preset in PRESETS[family].items() if all(values[key] == preset[key] for key in preset))
    return next(fits, CUSTOM)


FIELDS = (
    Field("enabled", "Use this person", "bool", True, "Off: this tab is ignored.", pasted=False),
    Field("images", "Photos", "images", (), "Photos of one person, as base64 or data URIs; the best one first.",
          most=MOST_PHOTOS, pasted=False),
    Field("identity", "Saved identity", "text", "", "Name or short hash of a saved identity, used instead of photos.",
          most=LONGEST_TEXT),
    Field("model", "PuLID model", "text", AUTO, "auto picks the PuLID file that fits the checkpoint.",
          most=LONGEST_TEXT),
    Field("weight", "Weight", "float", None, "Likeness strength; 0 disables it. Default: 0.8 (SDXL), 1.0 (FLUX).",
          0, MOST["weight"], 0.05, shown=WEIGHTS["sdxl"]),
    Field("preset", "Preset", "choice", AUTO, " ".join(f"{f.upper()}: {PRESET_TIPS[f]}" for f in FAMILIES),
          choices=(AUTO, *PRESET_FAMILY, CUSTOM), old_choices=OLD_CHOICES, shown="v1.1"),
    Field("projection", "Projection", "choice", "ortho_v2", "How the prompt is protected. ortho_v2: closest to the "
          "photo. ortho: closest to the prompt's style (SDXL).", choices=PROJECTIONS, advanced=True, family="sdxl"),
    Field("num_zero", "Zero tokens", "int", 20, "More: closer to the prompt. Fewer: closer to the photo (SDXL).",
          0, MOST["num_zero"], 1, advanced=True, family="sdxl"),
    Field("start", "Start", "float", 0.0, "Start after this fraction of the steps.", 0, 1, 0.01, advanced=True),
    Field("end", "End", "float", 1.0, "Stop after this fraction of the steps.", 0, 1, 0.01, advanced=True),
    Field("start_step", "Start step", "int", 0, "First step with the identity (FLUX). Official: 4 for realistic "
          "images, 0 to 1 for stylized ones. Earlier: closer to the photo. Later: closer to the prompt.", 0,
          MOST["start_step"], 1, advanced=True, family="flux"),
    Field("cfg_start_step", "True CFG from step", "int", 0, "With a CFG above 1, the steps before this one ignore the "
          "negative prompt (FLUX). 0: every step uses it. Official: 1.", 0, 20, 1, advanced=True, family="flux"),
    Field("face_order", "Face in the photo", "choice", "largest", "How faces are ordered if a photo has several.",
          choices=FACE_ORDERS, advanced=True),
    Field("face_index", "Face number", "int", 0, "0 is the first in that order, 1 the next.", 0, 50, 1, advanced=True),
    Field("fusion", "Several photos", "choice", "official", "How several photos become one identity. id_mix: blends "
          "people (PuLID v1). average: the mean of each photo's own tokens.", choices=FUSIONS, advanced=True),
    Field("mask", "Mask", "image", "", "Where the face may appear: white yes, black no. Empty: everywhere.",
          advanced=True, pasted=False),
    Field("box", "Box", "box", "", "Region for this face: x, y, width, height, as fractions of the image. Empty: "
          "everywhere.", advanced=True),
    Field("hires", "Hires fix passes", "choice", "both", "Which passes of hires fix use the face.",
          choices=HIRES_PASSES, advanced=True),
    Field("draw", "Draw the photo", "choice", NOT_DRAWN, "From the folder in Settings, PuLID: random, by the image's "
          "seed, or in turn.", choices=DRAWS, advanced=True),
    Field("keep_best", "Keep the best", "int", 0, "Keep so many of the images, those most like the person, the best "
          "first; 0: all.", 0, 100, 1, advanced=True, pasted=False),
    Field("lora_weight", "LoRA strength", "float", 1.0, "Strength of the LoRA in FaceID's file. Official: 1. Lower: "
          "cleaner images, less likeness.", 0, MOST["lora_weight"], 0.05, advanced=True, family="sdxl"),
    Field("identity_net", "IdentityNet strength", "float", None, "InstantID's ControlNet, which keeps the face where "
          "it is in the photo, turned as there. Default and official: 0.8. 0: off.", 0, MOST["identity_net"], 0.05,
          advanced=True, family="sdxl", shown=max(method.control_weight for method in METHODS)),
)  # fmt: skip
FIELD = {field.name: field for field in FIELDS}


BOOLS: Mapping[str, bool] = {"true": True, "false": False, "yes": True, "no": False}
_NUMBERS = {"float": "number", "int": "whole number"}


def schema() -> dict[str, Any]:
    """Returns the JSON schema of a unit's dict."""
    kinds = {"bool": "boolean", "int": "integer", "float": "number", "images": "array", "box": "array"}
    items = {"images": {"type": "string"}, "box": {"type": "number"}}
    properties = {}
    for field in FIELDS:
        entry = {
            "title": field.label,
            "description": field.tip,
            "minimum": field.minimum,
            "maximum": field.maximum,
            "enum": [*field.choices, None] if field.choices else None,
            "items": items.get(field.kind),
            "family": field.family or None,
        }
        properties[field.name] = {
            "type": [kinds.get(field.kind, "string"), "null"],  # null: the default
            **{key: value for key, value in entry.items() if value is not None},
            "default": list(field.default) if isinstance(field.default, tuple) else field.default,
        }
    return {"title": "PuLID unit", "type": "object", "additionalProperties": False, "properties": properties}


# ---------------------------------------------------------------- checks


def check(field: Field, value: Any, number: Number) -> Any:
    """Returns a field's value in its own type; for None the default, if the field may be empty.

    Raises:
        SettingError: the value is wrong; the message names unit and field.
    """
    try:
        return checked(field, value)
    except ValueError as error:
        raise SettingError(place(number, field.name) + str(error)) from None


def from_text(field: Field, text: str, number: Number) -> Any:
    """Reads a field's value that is written as text: in a prompt, in an image's parameters.

    Raises:
        SettingError: the value is wrong; the message names unit and field.
    """
    value: Any = text.strip()
    if field.kind == "bool":
        value = BOOLS.get(value.lower(), value)
    elif field.kind in ("float", "int"):
        try:
            value = int(value) if field.kind == "int" else float(value)
        except ValueError:
            raise SettingError(place(number, field.name) + f"{show(value)} is not a {_NUMBERS[field.kind]}.") from None
    return check(field, value, number)


def field_named(name: Any, number: Number) -> Field:
    """Returns the field of this name, or raises SettingError with the nearest one."""
    if isinstance(name, str) and name in FIELD:
        return FIELD[name]
    text = spelled(name)
    near = difflib.get_close_matches(text, FIELD, 1)
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(FIELD)}."
    raise SettingError(place(number, text) + f"there is no such field; {hint}")


def spelled(name: Any) -> str:
    """Returns a field's name as it was given, whatever it is."""
    return name[:40] if isinstance(name, str) and name[:40].isprintable() else show(name)


def place(number: Number, field: str) -> str:
    """Returns the beginning of a message. number: of the unit, 0 if there is none."""
    return f"PuLID {spoken(number)}, field {field}: " if number else f"PuLID, field {field}: "


def spoken(number: Number) -> str:
    """Names a unit in a message."""
    return number if isinstance(number, str) else f"unit {number}"
