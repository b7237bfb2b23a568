"""Writes a note for the page, as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence


def good(text: str) -> str:
    return f"<p class='pulid-good'>{html.escape(text)}</p>"


def warn(text: str) -> str:
    return f"<p class='pulid-warn'>{html.escape(text)}</p>"


def bad(problems: Sequence[str]) -> str:
    return "".join(f"<p class='pulid-bad'>{html.escape(problem)}</p>" for problem in problems)
