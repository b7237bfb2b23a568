"""docs/reliability.md names tests that are there, and all of its rows name one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from lib_pulid import fields, identity, images, names
from lib_pulid.webui import routes

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"(test_\w+\.py)::([\w:]+)", TEXT)))


@cache
def defined_in(file: str) -> set[str]:
    """ "test_x" and "TestClass::test_x" of a file below tests/."""
    found = set()
    for node in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test") else []
        found |= {f"{node.name}::{one.name}" for one in inside if isinstance(one, ast.FunctionDef)}  # type: ignore[union-attr]
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found.add(node.name)
    return found


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}::{name}" for file, name in NAMED])
def test_the_test_is_there(file, name):
    assert name in defined_in(file)


def test_every_row_names_a_test():
    rows, in_cases = [], False
    for line in TEXT.splitlines():
        if line.startswith("| "):
            in_cases = in_cases or line.rstrip(" |").endswith("| test")
            rows += [line] if in_cases and not line.rstrip(" |").endswith("| test") else []
        else:
            in_cases = in_cases and line.startswith("|")
    assert len(rows) > 90
    assert [row for row in rows if not re.search(r"\| test_\w+\.py::[\w:]+(, test_\w+\.py::[\w:]+)* \|$", row)] == []


def test_the_limits_are_those_of_the_code():
    limits = {
        f"{images.MAX_PIXELS // 10**6} million pixels", f"{images.MAX_BYTES // 10**6} MB", f"| {fields.MOST_PHOTOS} |",
        f"| {fields.MOST_UNITS} |", f"{fields.LONGEST_TEXT} characters", f"{names.LONGEST_NAME} bytes",
        f"{routes.LARGEST_BODY >> 20} MB, counted", f"| {identity.LARGEST_FILE // 10**6} MB |",
        f"reduced to {images.LONGEST_REGION} pixels",
    }  # fmt: skip
    assert [limit for limit in limits if limit not in TEXT] == []
