"""PuLID in miniature: a small SDXL, its PuLID file and the models that read faces, trained on drawn people.

The weights beside this file are in the formats of the real ones and are read by the same code. They know the drawn
world (`training.world`) and nothing else. `lib_pulid/training` made them and can make them again.
"""

from __future__ import annotations

import atexit
import hashlib
import lzma
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lib_pulid import disk
from lib_pulid.errors import MissingWeightsError, StorageError, WrongWeightsError
from lib_pulid.training import world
from lib_pulid.training.dataset import HELD_OUT, Drawn

if TYPE_CHECKING:
    from lib_pulid.faces import FaceModels
    from lib_pulid.judge import Judge
    from lib_pulid.photos import Encoders

FOLDER = Path(__file__).parent
MODELS = {"miniature": "sdxl"}  # name on the command line -> family
SIZE, STEPS, GUIDANCE = 128, 12, 2.0  # what its images come out best with
ENCODERS = ("detector.onnx", "recogniser.onnx", "parser.onnx", "tower.safetensors")
LIMITS = (
    "The miniature knows drawn people only; for photographs get the real weights with "
    "`python -m lib_pulid models download sdxl` and give a checkpoint of yours with --model."
)
AGAIN = "It comes with the program: install that again, or in a git checkout: git checkout -- lib_pulid/miniature"
REFERENCE_SIZE = 256  # pixels of a drawn reference


def checkpoint(family: str) -> Path:
    """The base model."""
    return _path(f"{family}.safetensors")


def adapter(family: str) -> Path:
    """The PuLID file."""
    return _path(f"pulid_{family}.safetensors")


def face_models() -> FaceModels:
    """Detector, recogniser and parser, the last two trained for faces that are drawn."""
    from lib_pulid.face_models import FaceFiles, load_face_models

    detector, recogniser, parser = map(_path, ENCODERS[:3])
    return load_face_models(FaceFiles(detector, recogniser, landmarker=None, parser=parser))


def encoders() -> Encoders:
    """Face models and vision tower: all that turns a drawing into an identity."""
    from lib_pulid.photos import Encoders
    from lib_pulid.vision import load_vision_tower

    return Encoders(face_models(), load_vision_tower(_path(ENCODERS[3])))


def encoder_files() -> list[Path]:
    """What `encoders` reads."""
    return [_path(name) for name in ENCODERS]


def judge() -> Judge:
    """Another reader of faces, which had no part in training the adapter: it says how much two faces are alike."""
    from lib_pulid.judge import Judge

    return Judge(_path("judge.onnx"))


def scene_judge() -> Judge:
    """A reader of whole images: it names what of a prompt they show."""
    from lib_pulid.judge import Judge

    return Judge(_path("scene_judge.onnx"))


def _path(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file() and (packed := FOLDER / f"{name}.xz").is_file():
        return _unpacked(packed)
    if not path.is_file():
        raise MissingWeightsError(f"{name}, a part of the miniature, is not in {FOLDER}. {AGAIN}")
    return path


def _unpacked(packed: Path) -> Path:
    """A file of which NAME.xz is shipped: unpacked beside it once; each time where nobody may write."""
    content = packed.read_bytes()
    path = FOLDER / "unpacked" / hashlib.sha256(content).hexdigest()[:16] / packed.stem
    if path.is_file():
        return path
    try:
        whole = lzma.decompress(content)
    except (lzma.LZMAError, EOFError) as error:
        raise WrongWeightsError(f"{packed.name} in {FOLDER} is damaged ({error}). {AGAIN}") from error
    try:
        return disk.write(path, whole, replace=True)
    except StorageError:  # the program's own folder is often not the user's
        folder = tempfile.mkdtemp(prefix="pulid-miniature-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return disk.write(Path(folder, packed.stem), whole)


# ---------------------------------------------------------------- prompts


@lru_cache(1)
def vocabulary() -> frozenset[str]:
    """The words it was trained on, in lowercase."""
    return world.vocabulary()


def check_prompt(prompt: str) -> list[str]:
    """Says which words of a prompt it does not know; empty if it knows them all."""
    words = re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", prompt.lower())
    unknown = [word for word in dict.fromkeys(words) if word not in vocabulary()]
    if not unknown:
        return []
    example = world.describe(world.Scene((world.Placement(expression="smiling"),), "dots", "green"))
    return [f"the miniature does not know the words {', '.join(unknown)}; a prompt that it knows: {example}"]


# ---------------------------------------------------------------- people to show


def person(number: int) -> world.Person:
    """Somebody whom no training saw; the same for the same number."""
    return Drawn(FOLDER, number + 1, HELD_OUT).person(number)


def portrait(number: int, scene: world.Scene | None = None, size: int = REFERENCE_SIZE) -> np.ndarray:
    """A drawing of `person(number)`, uint8 RGB [size, size, 3]; without a scene plain and seen from the front."""
    return world.draw([person(number)], scene or world.Scene(), size)


def group(numbers: Sequence[int], size: int = 2 * REFERENCE_SIZE) -> np.ndarray:
    """A drawing of up to three people, from left to right, uint8 RGB [size, size, 3]."""
    scene = world.sample_scene(np.random.default_rng(len(numbers)), len(numbers))
    level = tuple(replace(placement, tilt=0.0, turn=0.0) for placement in scene.placements)
    return world.draw([person(n) for n in numbers], replace(scene, placements=level, light="even", style="flat"), size)
