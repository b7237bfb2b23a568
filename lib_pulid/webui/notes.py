"""Writes a note for the page, as HTML."""

from __future__ import annotations

import html


def good(text: str) -> str:
    return f"<p class='pulid-good'>{html.escape(text)}</p>"


def warn(text: str) -> str:
    return f"<p class='pulid-warn'>{html.escape(text)}</p>"


def bad(text: str) -> str:
    return f"<p class='pulid-bad'>{html.escape(text)}</p>"
