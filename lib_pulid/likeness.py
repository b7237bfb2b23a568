"""Measures how like a person the faces in an image are: the cosine of face embeddings, and which face is whose.

Pure arithmetic on what a detector and a recognizer have found; it loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lib_pulid.face_choice import box_areas
from lib_pulid.faces import Recogniser

UNKNOWN = math.nan  # the value of a person without an embedding
NO_FACE = "no face"
_MOST_FACES = 32  # of a crowd, the largest


@dataclass(frozen=True)
class Scale:
    """Cosines from which on a recognizer's author speaks of the same person, and of a likely one."""

    same: float
    close: float

    def verdict(self, value: float) -> str:
        """Names a cosine, rounded as it is shown: "same person", "close" or "another person"."""
        value = round(value, 2)
        return "same person" if value >= self.same else "close" if value >= self.close else "another person"


# insightface's own demo of buffalo_l's w600k_r50: web-demos/src_recognition/main.py, f8aa2c1.
INSIGHTFACE = Scale(same=0.28, close=0.20)
# Measured with the miniature's judge on 200 drawn people not seen in training, three scenes each: 99 % of the pairs of
# one person are above 0.74, and 99 % of the pairs of two people are below 0.54.
MINIATURE = Scale(same=0.74, close=0.54)


@dataclass(frozen=True)
class Recognizer:
    """A face recognizer that is loaded when it is needed.

    Args:
        key: identifies its file, as in `Identity.embeddings`. name: for users.
        is_own: whether the adapter was trained with it, so that it overestimates.
    """

    key: str
    name: str
    is_own: bool
    load: Callable[[], Recogniser]


@dataclass(frozen=True, eq=False)
class SeenFace:
    """A face in an image. box: [4] x0 y0 x1 y1 in pixels. embedding: [512]."""

    box: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True, eq=False)
class Person:
    """Whom to look for.

    Args:
        embedding: [512], of the same recognizer as the faces'; None if there is none.
        region: [H, W], 0..1, of the whole image in any resolution: where the face has to be; None: anywhere.
    """

    embedding: np.ndarray | None
    region: np.ndarray | None = None


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the cosine of two embeddings [D], -1..1; 0 if one is all zeros."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / lengths, -1, 1)) if lengths else 0.0


def mean_embedding(embeddings: Sequence[np.ndarray], weights: Sequence[float] = ()) -> np.ndarray:
    """Averages the directions of embeddings [512], of one person's photos or of several people: [512] float32."""
    weights = weights or [1.0] * len(embeddings)
    directions = [weight * one / max(float(np.linalg.norm(one)), 1e-12) for one, weight in zip(embeddings, weights)]
    return np.sum(directions, axis=0, dtype=np.float64).astype(np.float32) / np.float32(sum(weights))


def choose_judge(judges: Sequence[Recognizer], people: Sequence[Mapping[str, np.ndarray]]) -> Recognizer | None:
    """Returns the first judge that knows all people, or else most of them; None if none knows anyone.

    people: the embeddings of each, by recognizer, see `Identity.embeddings`.
    """

    def known(judge: Recognizer) -> int:
        return sum(judge.key in embeddings for embeddings in people)

    found = max(judges, key=known, default=None)  # the first of equal ones
    return found if found is not None and known(found) else None


# ---------------------------------------------------------------- whose face is whose


def measure(faces: Sequence[SeenFace], people: Sequence[Person], size: tuple[int, int]) -> tuple[float | None, ...]:
    """Measures each person's likeness in an image of this size (height, width).

    A person with a region is compared with the face that is most inside it; the others are assigned the remaining
    faces so that the sum of all cosines is the largest.

    Returns:
        By person: a cosine; None without a face; UNKNOWN for a person without an embedding.
    """
    from scipy.optimize import linear_sum_assignment

    faces = sorted(faces, key=lambda face: -float(box_areas(face.box[None])[0]))[:_MOST_FACES]
    assigned = _by_region(faces, people, size)
    free = [i for i in range(len(faces)) if i not in assigned.values()]
    others = [n for n, person in enumerate(people) if person.region is None]
    cosines = np.zeros((len(others), len(free)))
    for row, n in enumerate(others):
        if (own := people[n].embedding) is not None:
            cosines[row] = [cosine(own, faces[i].embedding) for i in free]
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    assigned |= {others[row]: free[column] for row, column in zip(rows, columns)}
    return tuple(
        UNKNOWN if person.embedding is None
        else None if n not in assigned
        else cosine(person.embedding, faces[assigned[n]].embedding)
        for n, person in enumerate(people)
    )  # fmt: skip


def _by_region(faces: Sequence[SeenFace], people: Sequence[Person], size: tuple[int, int]) -> dict[int, int]:
    """Assigns to people with a region the face most inside it, each face once: person -> face."""
    shares = [
        (_inside(face.box, person.region, size), n, i)
        for n, person in enumerate(people)
        if person.region is not None
        for i, face in enumerate(faces)
    ]
    assigned: dict[int, int] = {}
    for share, n, i in sorted(shares, key=lambda one: (-one[0], one[2])):  # of equal ones, the largest face
        if share >= 0.5 and n not in assigned and i not in assigned.values():
            assigned[n] = i
    return assigned


def _inside(box: np.ndarray, region: np.ndarray, size: tuple[int, int]) -> float:
    """Computes which part of a box [4] lies in a region [H, W] of an image of this size (height, width): 0..1."""
    scale = np.array(region.shape[::-1] * 2) / np.array(size[::-1] * 2)
    x0, y0, x1, y1 = box * scale
    columns, rows = (slice(max(0, math.floor(a)), max(1, math.ceil(b))) for a, b in ((x0, x1), (y0, y1)))
    part = region[rows, columns]
    return float(part.mean()) if part.size else 0.0


# ---------------------------------------------------------------- numbers as text, and the best images


def text(values: Sequence[float | None]) -> str:
    """Formats the values of an image in order of the people: "0.71, no face"; "" if nobody is known."""
    if all(value is not None and math.isnan(value) for value in values):
        return ""
    return ", ".join(NO_FACE if value is None else format_cosine(value) for value in values)


def format_cosine(value: float) -> str:
    """Formats a cosine, or says that the person is unknown."""
    return "unknown" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # never "-0.00"


def best(images: Sequence[Sequence[float | None] | None], count: int) -> list[int]:
    """Returns the indices of the `count` best images, the best first; an image that was not measured is kept, as last.

    An image is as good as its least alike person; a person without a face is the worst.
    """
    ranks: dict[int, float] = {}
    for i, values in enumerate(images):
        known = [-2.0 if value is None else value for value in values or () if value is None or not math.isnan(value)]
        if known:
            ranks[i] = min(known)
    kept = sorted(ranks, key=lambda i: (-ranks[i], i))[:count]
    return kept + [i for i in range(len(images)) if i not in ranks]
