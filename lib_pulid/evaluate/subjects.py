"""Reads the people to evaluate, from a folder of photos or drawn, and their prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib_pulid import disk
from lib_pulid.errors import ImageError, NoFaceError, SettingError
from lib_pulid.images import load_image, readable_suffixes

if TYPE_CHECKING:
    from lib_pulid.training.world import Scene

PROMPTS = Path(__file__).with_name("prompts.txt")
MOST_DRAWINGS = 50  # of one person without a detected face, before giving up


@dataclass(frozen=True)
class Prompt:
    """A prompt. wanted: attribute of the scene -> value, for those that a judge can read."""

    text: str
    wanted: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Subject:
    """One person.

    reference, targets: uint8 RGB [H, W, 3]; the photo for the identity, and others of the same person.
    traits: attribute of the face -> value, if known; otherwise a judge reads them from the reference.
    """

    name: str
    reference: np.ndarray
    targets: tuple[np.ndarray, ...]
    prompts: tuple[Prompt, ...]
    traits: Mapping[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- a folder


def read_folder(folder: Path, prompts: Sequence[Prompt], each: int) -> list[Subject]:
    """Reads a folder with a subfolder of photos, or one photo, per person.

    In a subfolder, the first photo by name is the reference, the others are targets. Each person gets the next `each`
    prompts of the list, which repeats.

    Raises:
        SettingError: the folder does not exist, is empty, or names somebody twice.
        ImageError: names all files that cannot be read.
    """
    found = _photos(folder)
    problems: list[str] = []

    images: dict[str, list[np.ndarray]] = {name: [] for name in found}
    for name, paths in found.items():
        for path in paths:
            try:
                images[name].append(load_image(path, str(path.relative_to(folder))))
            except ImageError as error:
                problems.append(str(error))
    if problems:
        raise ImageError("\n".join(["These photos cannot be read. Repair or remove them:", *problems]))
    turns = _turns(prompts, each)
    return [Subject(name, first, tuple(others), next(turns)) for name, (first, *others) in images.items()]


def _photos(folder: Path) -> dict[str, list[Path]]:
    if not disk.is_folder(folder):
        raise SettingError(f"--faces is {folder}; it has to be a folder with one photo or subfolder per person.")
    found: dict[str, list[Path]] = {}
    seen: dict[str, str] = {}
    suffixes = readable_suffixes()
    folders = [path for path in disk.listed(folder) if disk.is_folder(path) and not path.name.startswith(".")]
    for entry in sorted([*folders, *disk.listed(folder, suffixes)], key=_natural):
        paths = sorted(disk.listed(entry, suffixes), key=_natural) if entry in folders else [entry]
        name = entry.name if entry in folders else entry.stem
        if not paths:
            raise SettingError(f"{entry} has no photos. Add one, or remove the folder.")
        if other := seen.get(name.casefold()):
            raise SettingError(f"{folder} has {other} and {entry.name}, the same name for two people. Rename one.")
        seen[name.casefold()] = entry.name
        found[name] = paths
    if not found:
        raise SettingError(
            f"{folder} has no photos. Put one photo per person there, or a subfolder with several of one person."
        )
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """Returns a sort key with 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name.casefold())]


def _turns(prompts: Sequence[Prompt], each: int) -> Iterator[tuple[Prompt, ...]]:
    each, start = min(each, len(prompts)), 0
    while True:
        yield tuple(prompts[(start + i) % len(prompts)] for i in range(each))
        start += each


def read_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """Reads one prompt per line; skips empty lines and those that start with #."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"--prompts is {path}; it has to be a UTF-8 text file with one prompt per line. ({error})"
        ) from None
    prompts = [Prompt(line) for line in dict.fromkeys(lines) if line and not line.startswith("#")]
    if not prompts:
        raise SettingError(f"{path} has no prompts. Write one per line.")
    return prompts


# ---------------------------------------------------------------- drawn people


def drawn_people(
    count: int, each: int, has_face: Callable[[np.ndarray], bool], prompts: Sequence[Prompt] = (), size: int = 256
) -> list[Subject]:
    """Draws people not seen in training: a reference each, two other drawings, and prompts of new scenes.

    Args:
        has_face: whether the detector finds a face; a drawing without one is replaced by another scene.
        prompts: to use instead of new scenes.
    """
    from lib_pulid.training import world
    from lib_pulid.training.dataset import HELD_OUT, Drawn

    people = Drawn(Path(), count, HELD_OUT)
    turns = _turns(prompts, each) if prompts else None

    def subject(number: int) -> Subject:
        person = people.person(number)
        rng = np.random.default_rng([HELD_OUT, 2, number])
        drawings = (world.draw([person], world.sample_scene(rng), size) for _ in range(MOST_DRAWINGS))
        found = list(islice(filter(has_face, drawings), 3))
        if not found:
            raise NoFaceError(
                f"The detector found no face in {MOST_DRAWINGS} drawings of one person, so it is not the miniature's."
            )
        rng = np.random.default_rng([HELD_OUT, 3, number])
        own = next(turns) if turns else tuple(_scene_prompt(world.sample_scene(rng)) for _ in range(each))
        traits = {name: getattr(person, name) for name in world.ATTRIBUTES}
        return Subject(f"drawn {number}", found[0], tuple(found[1:]), own, traits)

    return [subject(number) for number in range(count)]


def _scene_prompt(scene: Scene) -> Prompt:
    from lib_pulid.training import world

    wanted = {name: world.SCENE_ATTRIBUTES[name][index] for name, index in world.scene_attributes(scene).items()}
    if scene.background == "plain":
        del wanted["second_color"]  # neither named nor visible
    return Prompt(world.describe(scene), wanted)
