"""Defines Scene, everything in a drawn image except the people's looks, and the prompt that describes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib_pulid.training.people import ATTRIBUTES, NUMBERS, Color, Person

BACKGROUND = ("plain", "stripes", "dots", "checks", "waves", "rays", "hills", "clouds")
BACKGROUND_COLOR: dict[str, Color] = {
    "red": (214, 86, 76),
    "orange": (238, 154, 84),
    "yellow": (244, 208, 104),
    "green": (122, 176, 112),
    "teal": (70, 156, 160),
    "blue": (108, 158, 214),
    "purple": (148, 118, 186),
    "pink": (240, 164, 176),
}
SECOND_COLOR: dict[str, Color] = {"white": (252, 244, 230), "navy": (72, 86, 132)}
CLOTHES = ("shirt", "striped shirt", "hoodie", "suit", "turtleneck", "dress", "overalls")
CLOTHES_COLOR: dict[str, Color] = {
    "red": (206, 62, 62),
    "orange": (240, 138, 54),
    "yellow": (246, 206, 74),
    "green": (70, 150, 92),
    "blue": (58, 106, 196),
    "purple": (122, 78, 164),
    "white": (246, 242, 236),
    "black": (52, 50, 62),
}
EXPRESSION = ("neutral", "smiling", "laughing", "sad", "surprised")
LIGHT = ("even", "left", "right", "evening", "dim")
STYLE = ("flat", "outlined", "pencil", "watercolor", "sticker")
POSITION = ("left", "center", "right")
SIZE = ("small", "medium", "close-up")
# Heads of one person, in heights of the image: large, for SDXL's autoencoder keeps four numbers of 8 x 8 pixels.
SCALES = {"small": (0.56, 0.62), "medium": (0.64, 0.70), "close-up": (0.72, 0.78)}

# What a prompt names and a network can be asked to read: the names of each attribute's values.
SCENE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": BACKGROUND,
    "background_color": tuple(BACKGROUND_COLOR),
    "second_color": tuple(SECOND_COLOR),
    "clothes": CLOTHES,
    "clothes_color": tuple(CLOTHES_COLOR),
    "position": POSITION,
    "size": SIZE,
    "expression": EXPRESSION,
    "light": LIGHT,
    "style": STYLE,
}
_OF_PLACEMENT = ("clothes", "clothes_color", "position", "size", "expression")


@dataclass(frozen=True)
class Placement:
    """Where and how one person is in the image; none of it is the person.

    x, y: center of the head; scale: height of the head, crown to chin; fractions of the image.
    tilt: degrees, clockwise; turn: -1 (to the left of the image) to 1.
    """

    x: float = 0.5
    y: float = 0.45
    scale: float = 0.6
    tilt: float = 0.0
    turn: float = 0.0
    expression: str = "neutral"
    clothes: str = "shirt"
    clothes_color: str = "blue"

    @property
    def position(self) -> str:
        """Third of the image, more or less, that the head is in."""
        return POSITION[int(np.digitize(self.x, (0.43, 0.57)))]

    @property
    def size(self) -> str:
        """How large the head is in the image."""
        return SIZE[int(np.digitize(self.scale, (0.63, 0.71)))]


@dataclass(frozen=True)
class Scene:
    """Everything but the people; shift (0..1) moves the background's pattern."""

    placements: tuple[Placement, ...] = (Placement(),)
    background: str = "plain"
    background_color: str = "blue"
    second_color: str = "white"
    light: str = "even"
    style: str = "flat"
    shift: float = 0.0


def scene_attributes(scene: Scene) -> dict[str, int]:
    """Returns the index into SCENE_ATTRIBUTES of each; of the first person if there are several."""
    first = scene.placements[0]
    return {
        name: values.index(getattr(first if name in _OF_PLACEMENT else scene, name))
        for name, values in SCENE_ATTRIBUTES.items()
    }


def sample_scene(rng: np.random.Generator, persons: int = 1) -> Scene:
    """Draws a scene for 1 to 3 people, from left to right; heads do not overlap."""

    def one(name: str) -> str:
        values = SCENE_ATTRIBUTES[name]
        return values[rng.integers(len(values))]

    def placement(number: int) -> Placement:
        if persons == 1:
            scale = rng.uniform(*SCALES[SIZE[rng.integers(3)]])
            side = int(rng.integers(-1, 2))
            x = 0.5 + side * rng.uniform(0.09, 0.15) + (not side) * rng.uniform(-0.05, 0.05)
            y = 0.5 * scale + rng.uniform(0.05, 0.10)
        else:
            scale = rng.uniform(0.35, 0.42) if persons == 2 else rng.uniform(0.24, 0.28)
            x = (number + 0.5) / persons + rng.uniform(-0.005, 0.005)
            y = rng.uniform(0.42, 0.5)
        tilt, turn = (12 if persons == 1 else 8) * rng.uniform(-1, 1), rng.uniform(-1, 1)
        return Placement(x, y, scale, tilt, turn, one("expression"), one("clothes"), one("clothes_color"))

    placements = tuple(placement(number) for number in range(persons))
    names: dict[str, Any] = {name: one(name) for name in SCENE_ATTRIBUTES if name not in _OF_PLACEMENT}
    if names["background"] == "plain":
        names["second_color"] = "white"  # it is not seen
    return Scene(placements, **names, shift=float(rng.uniform()))


_LIGHT_WORDS = dict(zip(LIGHT, ("even light", "light from the left", "light from the right", "warm evening", "dim")))
_LIGHT_WORDS |= {"evening": "warm evening light", "dim": "dim light"}
_STYLE_WORDS = dict(
    zip(STYLE, ("flat illustration", "ink outlines", "pencil drawing", "watercolor painting", "sticker"))
)


def describe(scene: Scene, persons: Sequence[Person] | None = None, keep: Collection[str] | None = None) -> str:
    """Writes the scene's prompt, with the people's looks if given; keep: names of SCENE_ATTRIBUTES, None for all."""
    keep = SCENE_ATTRIBUTES if keep is None else keep
    looks = [_looks(person) for person in persons] if persons else [("person", "")] * len(scene.placements)
    figures = [_figure(placement, look, keep) for placement, look in zip(scene.placements, looks)]
    if len(figures) == 1:
        first = scene.placements[0]
        size = {"small": "a wide shot of ", "medium": "a portrait of ", "close-up": "a close-up of "}[first.size]
        where = {"center": "in the middle"}.get(first.position, f"on the {first.position}")
        parts = [(size if "size" in keep else "") + figures[0], where if "position" in keep else ""]
    else:
        count = {2: "two people", 3: "three people"}[len(figures)]
        places = (
            ("on the left", "on the right") if len(figures) == 2 else ("on the left", "in the middle", "on the right")
        )
        parts = [count, *(f"{place} {figure}" for place, figure in zip(places, figures))]
    parts.append(_backdrop(scene, keep))
    parts.append(_LIGHT_WORDS[scene.light] if "light" in keep else "")
    parts.append(_STYLE_WORDS[scene.style] if "style" in keep else "")
    return ", ".join(part for part in parts if part)


def _looks(person: Person) -> tuple[str, str]:
    """Returns noun and looks: "balding person", "with red hair, round glasses and a full beard"."""
    style = "" if person.hair_style == "balding" else f"{person.hair_style} "
    hair = f"{person.hair_color} hair in a bun" if style == "bun " else f"{style}{person.hair_color} hair"
    hair = f"a {style}of {person.hair_color} hair" if style in ("bob ", "afro ") else hair
    hair = f"an {hair[2:]}" if style == "afro " else hair
    parts = [f"{person.skin} skin", hair, f"{person.eye_color} eyes"]
    parts += [f"{person.glasses} glasses"] * (person.glasses != "none")
    parts += [f"a {person.beard}"] * (person.beard != "none")
    parts += ["freckles"] * (person.freckles != "none")
    return f"{'' if style else 'balding '}person", f" with {', '.join(parts[:-1])} and {parts[-1]}"


def _figure(placement: Placement, looks: tuple[str, str], keep: Collection[str]) -> str:
    noun = looks[0]
    if "expression" in keep:
        noun = f"{'calm' if placement.expression == 'neutral' else placement.expression} {noun}"
    color, kind = placement.clothes_color, placement.clothes
    words = [color] * ("clothes_color" in keep) + [kind if "clothes" in keep else "clothes"]
    worn = " ".join(words)
    if worn == "clothes":
        return f"a {noun}{looks[1]}"
    article = "" if worn.endswith(("clothes", "overalls")) else f"{_article(worn)} "
    return f"a {noun}{looks[1]} in {article}{worn}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeio" else "a"


def _backdrop(scene: Scene, keep: Collection[str]) -> str:
    plain = scene.background == "plain"
    colors = [scene.background_color] * ("background_color" in keep)
    colors += [scene.second_color] * ("second_color" in keep and not plain)
    if "background" not in keep:
        return f"{' and '.join(colors)} background" if colors else ""
    if plain:
        return f"in front of a plain {' '.join([*colors, 'wall'])}"
    return f"in front of {' '.join([' and '.join(colors), scene.background]).strip()}"


def vocabulary() -> frozenset[str]:
    """Returns all words of describe(), in lowercase."""
    prompts = []
    for index in range(max(map(len, [*ATTRIBUTES.values(), *SCENE_ATTRIBUTES.values()]))):
        looks: dict[str, Any] = {name: values[index % len(values)] for name, values in ATTRIBUTES.items()}
        names = {name: values[index % len(values)] for name, values in SCENE_ATTRIBUTES.items()}
        person = Person(**looks | dict.fromkeys(NUMBERS, 0.5))
        worn: dict[str, Any] = {name: names[name] for name in ("expression", "clothes", "clothes_color")}
        rest: dict[str, Any] = {name: names[name] for name in names if name not in _OF_PLACEMENT}
        placement = Placement((0.3, 0.5, 0.7)[index % 3], scale=SCALES[SIZE[index % 3]][0], **worn)
        for count in (1, 2, 3):
            scene = Scene((placement,) * count, **rest)
            prompts += [describe(scene, keep={name}) for name in SCENE_ATTRIBUTES]
            prompts += [describe(scene, [person] * count), describe(scene, keep=())]
    return frozenset(" ".join(prompts).replace(",", "").lower().split())
