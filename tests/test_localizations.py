"""The translations in localizations/ are of texts that are in the page.

The hosts look up whole text nodes, titles and placeholders, without the blanks around them.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from lib_pulid import __version__
from lib_pulid.fields import FIELDS, PRESET_TIPS

ROOT = Path(__file__).parents[1]
BUILDERS = ("accordion", "blending", "canvas", "missing", "preset_row", "settings")
SOURCES = [ROOT / "lib_pulid" / "webui" / f"{name}.py" for name in BUILDERS]


def texts_of(path: Path) -> set[str]:
    """The text nodes of all strings in a file."""
    strings = (node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant))
    return {part.strip() for text in strings if isinstance(text, str) for part in re.split(r"<[^>]*>", text)}


@pytest.mark.parametrize("path", sorted((ROOT / "localizations").glob("*.json")), ids=lambda path: path.stem)
def test_keys_are_in_the_page(path):
    shown = {text for field in FIELDS for text in (field.label, field.tip)} | set(PRESET_TIPS.values())
    shown = shown.union(*map(texts_of, SOURCES))
    translated = json.loads(path.read_text("utf-8"))
    plain = {re.sub(r" \(person \d+\)$|(?<=^Person) \d+$", "", key) for key in translated}
    assert plain - shown == set()
    assert {field.label for field in FIELDS if field.kind not in ("images", "image", "text")} <= set(translated)
    assert all(translated.values())


def test_the_version_is_written_once():
    assert f'"{__version__}"' not in (ROOT / "pyproject.toml").read_text("utf-8")
    assert "__version__" in (ROOT / "lib_pulid" / "webui" / "accordion.py").read_text("utf-8")
