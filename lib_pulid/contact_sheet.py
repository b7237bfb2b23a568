"""Draws contact sheets: images in rows and columns, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE = 256
MARGIN, GAP, LINE = 48, 16, 26
INK, FAINT, BAR = "#1d1d26", "#72727f", "#3f7f63"


@dataclass(frozen=True)
class Tile:
    """One image. caption: below it. level: 0..1, a bar between image and caption; None: no bar."""

    image: Image.Image
    caption: str = ""
    level: float | None = None


@dataclass(frozen=True)
class Section:
    """Rows of tiles under a heading. columns: their headings."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Tile]]
    text: str = ""


def contact_sheet(title: str, text: str, sections: Sequence[Section]) -> Image.Image:
    """Draws the sections one below the other; each tile is TILE pixels wide and high."""
    widest = max(max(len(section.columns), *map(len, section.rows)) for section in sections)
    highest = 500 * sum(1 + len(section.rows) for section in sections)  # cut off below
    sheet = Image.new("RGB", (2 * MARGIN + widest * (TILE + GAP) - GAP, highest), "white")
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, MARGIN), title, 40, INK)
    _write(pen, (MARGIN, MARGIN + 54), text, 20, FAINT)
    top = MARGIN + 84
    for section in sections:
        top = _draw(sheet, pen, section, top + 28)
    return sheet.crop((0, 0, sheet.width, top + MARGIN))


def _draw(sheet: Image.Image, pen: ImageDraw.ImageDraw, section: Section, top: int) -> int:
    """Draws a section. Returns where it ends."""
    _write(pen, (MARGIN, top), section.heading, 26, INK)
    top += 36
    if section.text:
        _write(pen, (MARGIN, top), section.text, 18, FAINT)
        top += 28
    for i, column in enumerate(section.columns):
        _write(pen, (MARGIN + i * (TILE + GAP), top), column, 18, INK)
    top += 30 if any(section.columns) else 0
    captions = any(tile.caption for row in section.rows for tile in row)
    for row in section.rows:
        for i, tile in enumerate(row):
            _tile(sheet, pen, tile, MARGIN + i * (TILE + GAP), top)
        top += TILE + (12 + LINE if captions else 0) + GAP
    return top


def _tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    kind = Image.Resampling.BICUBIC
    fitted = ImageOps.contain(tile.image.convert("RGB"), (TILE, TILE), kind)
    sheet.paste(fitted, (x + (TILE - fitted.width) // 2, y + (TILE - fitted.height) // 2))
    if tile.level is not None:
        pen.rectangle((x, y + TILE + 5, x + TILE - 1, y + TILE + 8), fill="#e4e4e8")
        long = round(TILE * min(max(tile.level, 0.0), 1.0))
        if long:
            pen.rectangle((x, y + TILE + 5, x + long - 1, y + TILE + 8), fill=BAR)
    _write(pen, (x, y + TILE + 14), tile.caption, 17, FAINT)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, color: str) -> None:
    pen.text(place, text, fill=color, font=ImageFont.load_default(size))
