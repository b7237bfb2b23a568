"""Draws the world to train and test a miniature on: people and scenes as images, prompts and labels.

A sheet of it: python -m lib_pulid.training.world --seed 0 -o sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from lib_pulid.training.backdrops import draw_background, finish
from lib_pulid.training.clothes import draw_body, draw_collar
from lib_pulid.training.drawing import BACKGROUND as NOTHING
from lib_pulid.training.drawing import FINE, Face, Pen, Sketch
from lib_pulid.training.heads import draw_head
from lib_pulid.training.people import ATTRIBUTES, Person, sample_person
from lib_pulid.training.scenes import (
    SCENE_ATTRIBUTES,
    Placement,
    Scene,
    describe,
    sample_scene,
    scene_attributes,
    vocabulary,
)

__all__ = [
    "ATTRIBUTES",
    "SCENE_ATTRIBUTES",
    "Person",
    "Placement",
    "Scene",
    "describe",
    "draw",
    "face_box",
    "labels",
    "landmarks",
    "sample_person",
    "sample_scene",
    "scene_attributes",
    "vocabulary",
]
_OUTLINES = {"outlined": 0.012, "pencil": 0.0095}  # fractions of the image


def draw(persons: Sequence[Person], scene: Scene, size: int = 128) -> np.ndarray:
    """Draws the persons at the scene's placements: uint8 RGB [size, size, 3]."""
    pen = Pen(size, outline=_OUTLINES.get(scene.style, 0.0))
    draw_background(pen, scene)
    if scene.style == "sticker":
        pen.image.paste((255, 255, 255), mask=_rim(persons, scene, size))
    _people(pen, persons, scene)
    image = np.asarray(pen.image.reduce(FINE), np.float32)
    return finish(image, scene).round().astype(np.uint8)


def _rim(persons: Sequence[Person], scene: Scene, size: int) -> Image.Image:
    """Draws people with a rim around them, the white of a sticker: an L image of the fine size."""
    seen = Image.fromarray(np.uint8(255) * (labels(persons, scene, size) != NOTHING))
    grown = seen.filter(ImageFilter.GaussianBlur(size / 36)).resize(
        (size * FINE, size * FINE), Image.Resampling.BILINEAR
    )
    return grown.point([min(255, max(0, 16 * value - 400)) for value in range(256)])


def labels(persons: Sequence[Person], scene: Scene, size: int = 128) -> np.ndarray:
    """Labels each pixel with BiSeNet's face parsing classes, uint8 [size, size]."""
    pen = Pen(size, labels=True)
    _people(pen, persons, scene)
    return np.asarray(pen.image)[FINE // 2 :: FINE, FINE // 2 :: FINE].copy()


def _people(pen: Pen, persons: Sequence[Person], scene: Scene) -> None:
    figures = zip(persons, scene.placements, strict=True)
    sketches = [Sketch(pen, Face(person, placement), scene.light) for person, placement in figures]
    for sketch in sketches:
        draw_body(sketch)
    for sketch in sketches:
        draw_head(sketch, draw_collar)


def landmarks(person: Person, placement: Placement, size: int = 128) -> np.ndarray:
    """Returns eyes, nose tip and corners of the mouth in pixels, the left ones first: float32 [5, 2]."""
    return (Face(person, placement).landmarks() * size).astype(np.float32)


def face_box(person: Person, placement: Placement, size: int = 128) -> np.ndarray:
    """Returns x0, y0, x1, y1 of the face in pixels, forehead to chin without ears: float32 [4]."""
    return (Face(person, placement).box() * size).astype(np.float32)


def _sheet() -> None:
    """Runs the command line: draws a sheet with a row per person and a column per scene."""
    parser = argparse.ArgumentParser(description="Draws a contact sheet: a row per person, a column per scene.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("-o", "--output", default="sheet.png")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    people = [sample_person(rng) for _ in range(args.rows)]
    rows = [[draw([person], sample_scene(rng), args.size) for _ in range(args.columns)] for person in people]
    Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows])).save(args.output)


if __name__ == "__main__":
    _sheet()
