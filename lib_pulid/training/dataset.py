"""Keeps drawn images on the disk, with the people and scene of each.

Image `i` shows person `i // SCENES_EACH` of the data set's seed, in a scene of its own; in every sixth image a second
person stands beside. People and scenes are functions of seed and index, so only pixels are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib_pulid.training import world

SIZE = 128
SCENES_EACH = 4
TRAIN, HELD_OUT = 1, 2  # seeds: people of one are never those of the other


@dataclass(frozen=True)
class Drawn:
    """A data set of `people` x SCENES_EACH images, drawn on first use. Args: seed: TRAIN or HELD_OUT."""

    folder: Path
    people: int
    seed: int = TRAIN

    def __len__(self) -> int:
        return self.people * SCENES_EACH

    def person(self, identity: int) -> world.Person:
        """Returns the person with a number: the same for the same seed, whatever the size of the data set."""
        return world.sample_person(np.random.default_rng([self.seed, 0, identity]))

    def numbers(self, index: int) -> tuple[int, ...]:
        """Returns the numbers of the people in image `index`, from left to right."""
        return self._cast(index)[0]

    def example(self, index: int) -> tuple[tuple[world.Person, ...], world.Scene]:
        """Returns the people of image `index`, from left to right, and its scene."""
        numbers, rng = self._cast(index)
        return tuple(map(self.person, numbers)), world.sample_scene(rng, len(numbers))

    def _cast(self, index: int) -> tuple[tuple[int, ...], np.random.Generator]:
        rng = np.random.default_rng([self.seed, 1, index])
        main = index // SCENES_EACH
        if rng.random() >= 1 / 6:
            return (main,), rng
        other = int(rng.integers(self.people))
        return ((main, other) if rng.random() < 0.5 else (other, main)), rng

    def images(self) -> np.ndarray:
        """Maps the images, uint8 RGB [N, SIZE, SIZE, 3], from a file; draws missing ones (7 ms each)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return np.load(made_once(self.folder / f"drawn-{self.seed}-{self.people}.npy", self._draw), mmap_mode="r")

    def _draw(self, path: Path) -> None:
        from tqdm import tqdm

        out = np.lib.format.open_memmap(path, "w+", np.uint8, (len(self), SIZE, SIZE, 3))
        for index in tqdm(range(len(self)), desc="drawing"):
            out[index] = world.draw(*self.example(index))
        out.flush()


def made_once(path: Path, write: Callable[[Path], None]) -> Path:
    """Returns the path of a file, written first if it is not there: under another name, so that it is whole."""
    if not path.is_file():
        part = path.with_name(f"{path.stem}.part{path.suffix}")
        write(part)
        part.replace(path)
    return path


def batches(count: int, batch: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless sorted index arrays [batch] into `count` examples, the same for a seed; `start` steps are skipped."""
    step = start
    while True:
        yield np.sort(np.random.default_rng([seed, step]).choice(count, batch, replace=False))
        step += 1
