"""Compares and validates the names of saved identities and of files."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TypeVar

from lib_pulid.errors import SettingError

HASH = re.compile(r"[0-9a-f]{10}")
LONGEST_NAME = 200  # bytes: file systems allow 255, and the name of a temporary file is longer
NOBODY = "None"  # "no saved identity" in lists
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³]) *(\..*)?", re.IGNORECASE)  # by Windows
Found = TypeVar("Found")


def key(name: str) -> str:
    """Normalizes a name: Unicode composition and width, case, spaces at its ends, invisible characters."""
    seen = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold()).split())


def find(name: str, known: Mapping[str, Found]) -> Found | None:
    """Returns what is known under a name, or else under another spelling of it.

    Raises:
        SettingError: several spellings are known; each may be a different person.
    """
    for form in (str, lambda text: unicodedata.normalize("NFC", text), key):
        alike = [other for other in known if form(other) == form(name)]
        if len(alike) > 1:
            raise SettingError(f"{name} could be {' or '.join(alike)}. Spell it exactly as one of them.")
        if alike:
            return known[alike[0]]
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the known names that are spelled like a name, with or without their folder, at most three: "anna or
    hannah"; "" if none is."""
    keys = {key(spelled): one for one in known for spelled in (one.rpartition("/")[2], one)}
    return " or ".join(keys[near] for near in difflib.get_close_matches(key(name), keys, 3))


def new(name: str) -> str:
    """Validates the name of a new identity, which has to be a valid file name on every system, and composes it.

    Raises:
        SettingError: it is not valid; the message says why.
    """
    name = unicodedata.normalize("NFC", name.strip())
    if reason := _reason_against(name):
        raise SettingError(
            f"{reason}. A name may have letters, digits, spaces and -_.()' and has to start with a letter or digit."
        )
    return name


def _reason_against(name: str) -> str:
    """Says why a name is not a valid file name everywhere, or looks like a hash or "None"; "" if it is valid."""
    for character in name:
        # M: vowel signs
        if not (character.isalnum() or character in "_ .()'-" or unicodedata.category(character)[0] == "M"):
            shown = f"{character} " if character.isprintable() else ""
            return f"The name contains {shown}(U+{ord(character):04X})"
    if not name:
        return "The name is empty"
    if not (name[0].isalnum() or name[0] == "_"):
        return f"The name starts with {name[0]}"
    if name.endswith("."):
        return "The name ends with a dot"
    if len(name) > 80 or len(name.encode()) > LONGEST_NAME:
        return "The name is too long (at most 80 characters, fewer in some scripts)"
    if HASH.fullmatch(name.lower()):  # a hash is found in any case
        return f"The name {name} looks like an identity's hash"
    return f"The name {name} is reserved" if name == NOBODY or _RESERVED.fullmatch(name) else ""
