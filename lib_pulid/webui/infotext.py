"""Writes a unit's settings into the image's parameters (infotext), and reads them back.

One entry per unit, `PuLID 1: "hash: 0123456789, identity: Anna, model: auto, weight: 0.8, ..."`. The face itself is
there only as a hash; it is found again if the identity is saved, or still in the cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote

from lib_pulid import names
from lib_pulid.errors import SettingError
from lib_pulid.fields import AUTO, FIELDS, NONE, NOT_DRAWN, Field, Number, from_text
from lib_pulid.methods import has, maker_of
from lib_pulid.units import PulidUnit
from lib_pulid.webui.library import Library

PREFIX = "PuLID "
# Names of our entries; another program's may begin with "PuLID ", too.
_OURS = re.compile(r"PuLID (?:(?P<unit>[0-9]+)|(?:hires )?tag [0-9]+|likeness|errors elsewhere)")
_ESCAPES = str.maketrans({character: f"%{ord(character):02X}" for character in '%,:"\n\\'})


def key(number: Number) -> str:
    return f"{PREFIX}{number}"


def clear(parameters: MutableMapping[str, Any]) -> None:
    """Removes our entries: the cells of a grid share one dict."""
    for name in [name for name in parameters if _OURS.fullmatch(name)]:
        del parameters[name]


def write(unit: PulidUnit, family: str, facts: Mapping[str, str]) -> str:
    """Formats all settings of a unit that apply to the model family.

    facts: "hash" of the identity, "file" and "weights" of the model; "method" if it is not PuLID; "net", the file of
        its ControlNet; "identity_net", its strength where it is another than the unit's, and "left out", why;
        "experiment" if it is one; "photo" that was drawn.
    """
    method = maker_of(facts.get("method", ""), family)
    unit = unit.on(family, method)
    entries = {"hash": facts["hash"], "weights": facts["weights"]}
    for field in FIELDS:
        if field.pasted and field.family in ("", family) and has(method, field.name):
            entries[field.name] = _text(getattr(unit, field.name))
    if unit.draw == NOT_DRAWN:
        del entries["draw"]
    others = ("file", "method", "identity_net", "net", "left out", "experiment", "photo")
    entries |= {name: facts[name] for name in others if name in facts}
    if photos := len(unit.images) + ("photo" in facts):
        entries["photos"] = str(photos)
    if unit.mask:
        entries["region"] = hashlib.sha256(unit.mask.encode()).hexdigest()[:10]
    return ", ".join(f"{name}: {value.translate(_ESCAPES)}" for name, value in entries.items() if value != "")


def read(text: str) -> dict[str, str]:
    """Parses the text that `write` formats; skips anything else."""
    pairs = (entry.partition(": ") for entry in text.split(", "))
    return {name.strip(): unquote(value) for name, colon, value in pairs if colon}


class PastedField(str):
    """Tells the hosts how to paste into a widget: a name, and a function from parameters to a value, in one object.

    They accept either; the name lets "Send to img2img" copy the widget's value, the function reads our entries.
    """

    _place: tuple[int, Field | None, Library]

    def __new__(cls, number: int, field: Field | None, library: Library) -> PastedField:
        made = super().__new__(cls, f"{PREFIX}{number} {field.name}" if field else f"{PREFIX}on")
        made._place = number, field, library
        return made

    def __call__(self, parameters: Mapping[str, Any]) -> Any:
        number, field, library = self._place
        if field is None:
            return any(found["unit"] for found in map(_OURS.fullmatch, parameters) if found)
        if not any(map(_OURS.fullmatch, parameters)):
            return None  # an image without PuLID disables it and leaves the rest as it is
        text = parameters.get(key(number))
        if field.name == "enabled":
            return text is not None
        return None if text is None else _value(field, read(str(text)), library)


def _value(field: Field, entries: Mapping[str, str], library: Library) -> Any:
    """Returns the widget's new value, or None to leave it."""
    if field.name in ("identity", "images"):
        found = _find(entries, library)
        return {"identity": found or NONE, "images": "" if found else None}[field.name]
    if field.name == "draw" and _find(entries, library):
        return NOT_DRAWN  # the same person, whatever is in the folder now
    if field.name not in entries:
        return {"model": AUTO, "box": "", "draw": NOT_DRAWN}.get(field.name)
    text = entries[field.name]
    try:
        return from_text(field, text, 0)
    except SettingError:  # someone edited the parameters
        return None


def _find(entries: Mapping[str, str], library: Library) -> str:
    """Returns the name of the saved identity with this hash, or the hash if only the cache has it, or ""."""
    short_hash = entries.get("hash", "")
    saved = [one.name for one in library.identities.listed() if one.short_hash == short_hash]
    if saved:
        written = names.key(entries.get("identity", ""))
        return next((name for name in saved if names.key(name) == written), saved[0])
    return short_hash if short_hash and library.identities.find(short_hash) else ""


def _text(value: Any) -> str:
    """Formats with all digits, so that the value read back is the same to the bit."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
