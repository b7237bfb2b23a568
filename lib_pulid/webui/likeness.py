"""Measures the likeness of a request's images, writes it into their parameters, and keeps the best ones.

The host keeps an image whatever happens here: an error becomes a note on why there is no number.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib_pulid import disk
from lib_pulid.errors import PulidError
from lib_pulid.fields import Number
from lib_pulid.files.places import JUDGE
from lib_pulid.hosts.frame import WHOLE, frame_of, part_of_mask
from lib_pulid.likeness import (
    INSIGHTFACE,
    NO_FACE,
    Person,
    Recognizer,
    best,
    choose_judge,
    format_cosine,
    measure,
    text,
)
from lib_pulid.methods import maker_of
from lib_pulid.webui import grid_numbers

if TYPE_CHECKING:
    from lib_pulid.identity import Identity
    from lib_pulid.webui.library import Library
    from lib_pulid.webui.plan import UnitPlan

ENTRY = "PuLID likeness"  # in the infotext
FOLDER = "not kept"
INNER = "_ad_inner"  # attribute of the generations in which ADetailer repaints parts; the whole image is measured


@dataclass(frozen=True, eq=False)
class Measured:
    """One image.

    Args:
        number: in the request, from 0 on. values: see `likeness.measure`; None: not measured. people: their units.
    """

    image: Any
    number: int
    values: tuple[float | None, ...] | None
    people: tuple[Number, ...]


class PerImage(str):
    """An infotext entry of one image.

    Newer hosts call it for every text they write, and so leave it out of a grid's and of another image's; to older ones
    it is text.
    """

    _place: tuple[int, int]

    def __new__(cls, words: str, p: Any = None) -> PerImage:
        made = super().__new__(cls, words)
        made._place = _place(p)
        return made

    def __call__(self, p: Any = None, use_main_prompt: bool = False, **_: Any) -> str | None:
        return None if use_main_prompt or (p is not None and _place(p) != self._place) else str(self)


def _place(p: Any) -> tuple[int, int]:
    return getattr(p, "iteration", 0), getattr(p, "batch_index", 0)


@dataclass(eq=False)
class Meter:
    """Measures the images of one request.

    Args:
        judges: see `EncoderPool.judges`. plan: of the current batch. keep: how many images to keep; 0: all.
    """

    library: Library
    judges: Sequence[Recognizer]
    plan: UnitPlan | None = None
    keep: int = 0
    images: list[Measured] = field(default_factory=list)
    _people: dict[Number, Identity] = field(default_factory=dict)
    _saved: set[Number] = field(default_factory=set)  # those whose photos were not given
    _reasons: dict[str, None] = field(default_factory=dict)  # ordered, each once
    _seconds: list[float] = field(default_factory=list)

    def follow(self, plan: UnitPlan | None, p: Any) -> None:
        """Measures the images from now on with the plan of a new batch; None: nobody is in it."""
        self.plan = plan
        if plan is None:
            return
        plan.judge = self.judges[0] if self.judges else None
        self.keep = max([self.keep, *(unit.keep_best for _, unit in plan.units)])
        if self.keep:
            p.do_not_save_grid = True  # it would show the others, too

    def add(self, p: Any, image: Any) -> None:
        """Measures an image (Pillow), and writes the numbers into its parameters."""
        values, begin = None, time.perf_counter()
        people = () if self.plan is None else self.plan.of_image(getattr(p, "batch_index", 0))
        try:
            if self.plan is not None and people:
                values = self._measure(self.plan, people, p, image)
        except PulidError as error:
            self._reasons[str(error)] = None
        except Exception as error:  # whatever it is, the image is kept
            logging.getLogger(__name__).exception("PuLID: likeness")
            self._reasons[f"{type(error).__name__}: {error}"[:300]] = None
        self._seconds.append(time.perf_counter() - begin)
        iteration, index = _place(p)
        self.images.append(Measured(image, iteration * getattr(p, "batch_size", 1) + index, values, people))
        p.extra_generation_params.pop(ENTRY, None)
        if values is not None and (words := text(values)):
            p.extra_generation_params[ENTRY] = PerImage(words, p)
            setattr(image, grid_numbers.ATTRIBUTE, words)

    def _measure(self, plan: UnitPlan, people: Sequence[Number], p: Any, image: Any) -> tuple[float | None, ...] | None:
        self._people |= {number: plan.people[number] for number in people}
        self._saved |= {number for number, unit in plan.units if unit.identity}
        judge = self.judge
        if judge is None or (plan.listener.stop and plan.listener.stop()):  # an interrupt is answered at once
            return None
        pixels = np.asarray(image.convert("RGB"))
        wanted = [_person(plan, number, judge, p) for number in people]
        return measure(self.library.encoders.see(pixels, judge, self._warn), wanted, pixels.shape[:2])

    @property
    def judge(self) -> Recognizer | None:
        """The recognizer that measures; None if none knows anybody."""
        return choose_judge(self.judges, [identity.embeddings for identity in self._people.values()])

    def _warn(self, words: str) -> None:
        self._reasons[words.replace("photos", "faces", 1)] = None

    # ------------------------------------------------------------ at the end

    def finish(self, processed: Any) -> None:
        """Keeps the best images, and adds the numbers to the note below the images. processed: the host's result."""
        lines = [self._line(one, len(self.images) > 1) for one in self.images if one.values is not None]
        lines += self._judged() if lines else []
        lines += self._unknown()
        lines += [f"PuLID likeness: not measured. {reason}" for reason in self._reasons]
        if self.keep and len(self.images) > 1:
            lines.append(self._keep(processed))
        processed.comments = "".join([processed.comments or "", *(f"{line}\n" for line in lines)])

    def _line(self, one: Measured, several: bool) -> str:
        found = [
            (f"{_called(number)} " if len(one.people) > 1 else "") + _words(value)
            for number, value in zip(one.people, one.values or ())
        ]
        return f"PuLID likeness{f', image {one.number + 1}' if several else ''}: {', '.join(found)}."

    def _judged(self) -> list[str]:
        judge = self.judge
        assert judge is not None
        name = "the adapter's own recognizer, which overestimates" if judge.is_own else judge.name
        advice = ""
        if judge.is_own and len(self.judges) == 1:
            advice = f" For an independent judge, put buffalo_l's {JUDGE} into the models folder."
        seconds = sorted(self._seconds)[len(self._seconds) // 2]
        return [f"Judged by {name}, in {seconds:.1f} s per image.{advice}"]

    def _unknown(self) -> list[str]:
        """Says whom the judge does not know."""
        if not self.judges:
            return []
        judge, lines = self.judge or self.judges[-1], []
        for number, identity in self._people.items():
            if judge.key not in identity.embeddings:
                why = self._why_unknown(identity, number in self._saved)
                lines.append(f"PuLID likeness: {_called(number)} is unknown, since {why}")
            elif self.judges[0].key not in identity.embeddings and number in self._saved:
                lines.append(
                    f"PuLID likeness: {self.judges[0].name} does not know {_called(number)} yet. Give the photo once."
                )
        return lines

    def _why_unknown(self, identity: Identity, is_saved: bool) -> str:
        method = maker_of(identity.info.get("adapter", ""), identity.family)
        if not method.reads_faces:
            return f"{method.label} reads no face."
        if is_saved:
            return "the saved identity has no face embedding. Give the photo once."
        return f"{self.judges[0].name} failed."  # a warning has said why

    def _keep(self, processed: Any) -> str:
        """Leaves the best images in the host's result, the best first; moves the others' files. Returns a note."""
        order = best([one.values for one in self.images], self.keep)
        out = [one for i, one in enumerate(self.images) if i not in order]
        if not any(one.values for one in self.images):
            return f"PuLID kept all {len(self.images)} images, since there is nothing to compare them by."
        if not _arrange(processed, self.images, order):
            return "PuLID kept all images: another extension replaced or moved them after they were measured."
        if not out:
            return "PuLID sorted the images by likeness, the best first."
        listed = ", ".join(f"image {one.number + 1} ({text(one.values or ())})" for one in out)
        return f"PuLID kept {len(order)} of {len(self.images)} images. Not kept: {listed}. {_move(out)}"


def _person(plan: UnitPlan, number: Number, judge: Recognizer, p: Any) -> Person:
    embedding, mask = plan.people[number].embeddings.get(judge.key), plan.masks.get(number)
    if mask is not None:
        # A part that was inpainted alone is back in its image.
        pasted = getattr(p, "paste_to", None) is not None
        mask = part_of_mask(mask, WHOLE if pasted else frame_of(p, bool(getattr(p, "enable_hr", False))))
    return Person(embedding, None if mask is None else mask.cpu().numpy())


def _called(number: Number) -> str:
    return number if isinstance(number, str) else f"person {number}"


def _words(value: float | None) -> str:
    if value is None:
        return NO_FACE
    verdict = "" if math.isnan(value) else f" ({INSIGHTFACE.verdict(value)})"
    return format_cosine(value) + verdict


def _arrange(processed: Any, images: Sequence[Measured], order: Sequence[int]) -> bool:
    """Leaves some images in the host's result, in this order, each with the masks that follow it.

    Args:
        images: all that were measured. order: indices of those to keep.

    Returns:
        False, and changes nothing, if one of them is not there, or another extension has moved them.
    """
    shown, places = processed.images, {id(image): i for i, image in enumerate(processed.images)}
    found = [places.get(id(one.image), -1) for one in images]
    if found != sorted(found) or found[0] < 0:
        return False
    each = found[1] - found[0]  # an image and its masks; what other extensions add comes after the last one's
    groups = [shown[i : i + each] for i in found]
    processed.images = shown[: found[0]] + sum((groups[i] for i in order), []) + shown[found[-1] + each :]
    first = processed.index_of_first_image
    processed.infotexts = _reordered(processed.infotexts, range(first, first + len(images)), order)
    numbers = [one.number for one in images]
    for name in ("all_prompts", "all_negative_prompts", "all_seeds", "all_subseeds"):
        listed = getattr(processed, name, None)
        if isinstance(listed, list) and len(listed) > max(numbers):
            setattr(processed, name, _reordered(listed, numbers, order))
    if processed.infotexts and processed.all_seeds:  # another script may have emptied them
        processed.info, processed.seed = processed.infotexts[0], processed.all_seeds[0]
    return True


def _reordered(values: list, positions: Sequence[int], order: Sequence[int]) -> list:
    """Leaves the values at some of the positions, in an order; those elsewhere stay before and behind them."""
    if len(values) <= max(positions):
        return values
    return [
        *values[: positions[0]],
        *(values[positions[i]] for i in order),
        *(value for i, value in enumerate(values) if i > positions[0] and i not in positions),
    ]


def _move(out: Sequence[Measured]) -> str:
    """Moves the files of images into a folder beside them. Returns a note on where they are."""
    paths = [Path(saved) for one in out if (saved := getattr(one.image, "already_saved_as", None))]
    if not paths:
        return "They were not saved."
    try:
        folders = list(dict.fromkeys(_moved(path).parent for path in paths))
    except OSError as error:
        return f"Their files could not be moved ({error.strerror or error}), and are where they were saved."
    return f"They are in {', '.join(map(str, folders))}."


def _moved(path: Path) -> Path:
    """Moves an image and the text file beside it. A name that is taken gets a number."""
    folder = path.parent / FOLDER
    folder.mkdir(exist_ok=True)
    target, number = folder / path.name, 1
    while target.exists():
        target, number = folder / f"{path.stem}-{number}{path.suffix}", number + 1
    os.replace(path, target)
    if disk.is_file(beside := path.with_suffix(".txt")):
        os.replace(beside, target.with_suffix(".txt"))
    return target


def judges_of(library: Library, warn: Callable[[str], None]) -> Sequence[Recognizer]:
    """Returns `EncoderPool.judges`; none, and a note, if the files are not all there: it costs only the number."""
    try:
        return library.encoders.judges()
    except PulidError as error:
        warn(f"PuLID likeness: not measured. {error}")
        return ()
