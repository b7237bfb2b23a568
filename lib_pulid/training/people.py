"""Defines Person, the looks of somebody in the drawn world, in numbers and names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

Color = tuple[int, int, int]

SKIN: dict[str, Color] = {
    "pale": (252, 226, 211),
    "fair": (246, 196, 158),
    "olive": (221, 171, 118),
    "tan": (192, 131, 86),
    "brown": (154, 98, 66),
    "dark": (104, 64, 48),
}
HAIR_COLOR: dict[str, Color] = {
    "black": (36, 32, 44),
    "dark brown": (74, 44, 36),
    "brown": (126, 74, 34),
    "blond": (236, 194, 96),
    "red": (206, 84, 42),
    "gray": (172, 174, 184),
    "blue": (62, 112, 206),
}
EYE_COLOR: dict[str, Color] = {
    "brown": (96, 54, 26),
    "blue": (44, 128, 216),
    "green": (58, 156, 84),
    "amber": (208, 140, 28),
}
HAIR_STYLE = ("balding", "short", "spiky", "curly", "afro", "bob", "long", "bun")
GLASSES = ("none", "round", "square")
BEARD = ("none", "mustache", "goatee", "short beard", "full beard")
FRECKLES = ("none", "freckles")

# What a network can be asked to read from a person's face: the names of each trait's values.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "skin": tuple(SKIN),
    "hair_color": tuple(HAIR_COLOR),
    "hair_style": HAIR_STYLE,
    "eye_color": tuple(EYE_COLOR),
    "glasses": GLASSES,
    "beard": BEARD,
    "freckles": FRECKLES,
}
_ODDS: dict[str, tuple[float, ...]] = {
    "glasses": (0.6, 0.2, 0.2),
    "beard": (0.52, 0.12, 0.12, 0.12, 0.12),
    "freckles": (0.75, 0.25),
}


@dataclass(frozen=True)
class Person:
    """Who it is: names of ATTRIBUTES, and numbers from 0 (little) to 1 (much)."""

    skin: str
    hair_color: str
    hair_style: str
    eye_color: str
    glasses: str
    beard: str
    freckles: str
    skin_shade: float
    hair_shade: float
    face_width: float
    face_length: float
    jaw: float
    chin: float
    ear_size: float
    eye_size: float
    eye_distance: float
    eye_slant: float
    brow_thickness: float
    brow_height: float
    brow_angle: float
    nose_length: float
    nose_width: float
    mouth_width: float
    mouth_height: float
    lip_fullness: float
    lip_tint: float
    hair_volume: float
    hairline: float
    parting: float  # 0: on the left of the image, 1: on the right

    def attributes(self) -> dict[str, int]:
        """Returns the index into ATTRIBUTES of each named trait."""
        return {name: values.index(getattr(self, name)) for name, values in ATTRIBUTES.items()}

    def vector(self) -> np.ndarray:
        """Returns all traits, float32 [K] in 0..1: the numbers, then one-hot names."""
        numbers = [getattr(self, name) for name in NUMBERS]
        for name, index in self.attributes().items():
            numbers += [float(i == index) for i in range(len(ATTRIBUTES[name]))]
        return np.array(numbers, np.float32)


NUMBERS = tuple(field.name for field in fields(Person) if field.name not in ATTRIBUTES)


def sample_person(rng: np.random.Generator) -> Person:
    """Draws somebody new."""
    traits: dict[str, Any] = {
        name: values[rng.choice(len(values), p=_ODDS.get(name))] for name, values in ATTRIBUTES.items()
    }
    numbers = rng.uniform(0, 1, len(NUMBERS))
    return Person(**traits, **dict(zip(NUMBERS, numbers.tolist())))
