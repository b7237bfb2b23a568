"""Names of saved identities and of files: which ones can be given, and which ones are the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import TypeVar

from lib_pulid.errors import SettingError

HASH = re.compile(r"[0-9a-f]{10}")
LONGEST_NAME = 200  # bytes: file systems take 255, and a file that is being written has a longer name
NOBODY = "None"  # how lists show "no saved identity"
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
Found = TypeVar("Found")


def key(name: str) -> str:
    """What is the same in all spellings of a name: composed or decomposed, wide or narrow, small or capital letters,
    with blanks at its ends or invisible characters."""
    seen = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold()).split())


def find(name: str, known: Mapping[str, Found]) -> Found | None:
    """What is known under a name, or else under one other spelling of it.

    Raises:
        SettingError: several other spellings are known; each may be another person.
    """
    for form in (str, lambda text: unicodedata.normalize("NFC", text), key):
        alike = [other for other in known if form(other) == form(name)]
        if len(alike) > 1:
            raise SettingError(f"{name} could be any of {', '.join(alike)}: spell it as one of them.")
        if alike:
            return known[alike[0]]
    return None


def new(name: str) -> str:
    """The name of a new identity as it is kept, composed. It can be a file's name everywhere.

    Raises:
        SettingError: it cannot be one; the message says why.
    """
    name = unicodedata.normalize("NFC", name.strip())
    if reason := _reason_against(name):
        raise SettingError(
            f"A name has letters, digits, blanks and -_.()' only, and begins with a letter or digit: {reason}."
        )
    return name


def _reason_against(name: str) -> str:
    """Why a file cannot be called so everywhere, or the identity not be told from a hash or from "None"; or ""."""
    for character in name:
        # M: vowel signs
        if not (character.isalnum() or character in "_ .()'-" or unicodedata.category(character)[0] == "M"):
            shown = f"{character} " if character.isprintable() else ""
            return f"{shown}(U+{ord(character):04X}) cannot be in it"
    if not name:
        return "it is empty"
    if not (name[0].isalnum() or name[0] == "_"):
        return f"it begins with {name[0]}"
    if name.endswith("."):
        return "it ends with a dot"
    if len(name) > 80 or len(name.encode()) > LONGEST_NAME:
        return "it is too long (80 characters, of some scripts fewer)"
    if HASH.fullmatch(name):
        return f"{name} looks like an identity's hash"
    return f"{name} is reserved" if name == NOBODY or _RESERVED.fullmatch(name) else ""
