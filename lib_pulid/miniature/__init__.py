"""Loads the miniature: a small SDXL and a small FLUX, their PuLID files and face models, trained on drawn people.

The weights beside this file have the formats of the real ones and are read by the same code. They know the drawn world
(`training.world`) and nothing else. `lib_pulid/training` made them and can make them again.
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
from lib_pulid.disk import fingerprint
from lib_pulid.errors import MissingWeightsError, StorageError, WrongWeightsError
from lib_pulid.training import world
from lib_pulid.training.dataset import HELD_OUT, Drawn

if TYPE_CHECKING:
    from lib_pulid.faces import FaceModels
    from lib_pulid.judge import Judge
    from lib_pulid.likeness import Recognizer
    from lib_pulid.photos import Encoders

FOLDER = Path(__file__).parent
MODELS = {"miniature": "sdxl", "miniature-flux": "flux"}  # name on the command line -> family
SIZE, STEPS, GUIDANCE = 128, {"sdxl": 12, "flux": 4}, {"sdxl": 1.2, "flux": 1.5}  # for its best images
ENCODERS = ("detector.onnx", "recogniser.onnx", "parser.onnx", "tower.safetensors")
LIMITS = (
    "The miniature knows only drawn people. For photos, get the real weights with "
    "`python -m lib_pulid models download sdxl`, and give a checkpoint with --model."
)
AGAIN = "Reinstall sd-webui-pulid; in a git checkout, run: git checkout -- lib_pulid/miniature"
REFERENCE_SIZE = 256  # pixels of a drawn reference


def checkpoint(family: str) -> Path:
    """Returns the path of the base model."""
    return _path(f"{family}.safetensors")


def adapter(family: str) -> Path:
    """Returns the path of the PuLID file."""
    return _path(f"pulid_{family}.safetensors")


def face_models() -> FaceModels:
    """Loads detector, recognizer and parser, the last two trained on drawn faces."""
    from lib_pulid.face_models import load_face_models

    return load_face_models({name.partition(".")[0]: _path(name) for name in ENCODERS[:3]})


def encoders() -> Encoders:
    """Loads the face models and the vision tower."""
    from lib_pulid.photos import load_encoders

    return load_encoders({path.stem: path for path in encoder_files()})


def encoder_files() -> list[Path]:
    """Returns the files that `encoders` loads."""
    return [_path(name) for name in ENCODERS]


def judge() -> Judge:
    """Loads a judge of faces that was not used in training the adapter: it says how alike two faces are."""
    from lib_pulid.judge import Judge

    return Judge(_path("judge.onnx"))


def recognizer() -> Recognizer:
    """Returns the judge of faces, loaded when likeness is measured."""
    from lib_pulid.likeness import Recognizer

    return Recognizer(fingerprint(_path("judge.onnx")), "the miniature's judge", False, judge)


def scene_judge() -> Judge:
    """Loads a judge of whole images: it says which attributes of a prompt they show."""
    from lib_pulid.judge import Judge

    return Judge(_path("scene_judge.onnx"))


def _path(name: str) -> Path:
    path = FOLDER / name
    if not disk.is_file(path) and disk.is_file(packed := FOLDER / f"{name}.xz"):
        return _unpacked(packed)
    if not disk.is_file(path):
        raise MissingWeightsError(f"{name}, a part of the miniature, is missing in {FOLDER}. {AGAIN}")
    return path


def _unpacked(packed: Path) -> Path:
    """Unpacks a file shipped as NAME.xz, once, beside it; to a temporary folder if that is not writable."""
    content = packed.read_bytes()
    path = FOLDER / "unpacked" / hashlib.sha256(content).hexdigest()[:16] / packed.stem
    if disk.is_file(path):
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
    """Returns the words it was trained on, in lowercase."""
    return world.vocabulary()


def check_prompt(prompt: str) -> list[str]:
    """Returns a note on the words of a prompt that it does not know; empty if it knows them all."""
    words = re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", prompt.lower())
    unknown = [word for word in dict.fromkeys(words) if word not in vocabulary()]
    if not unknown:
        return []
    example = world.describe(world.Scene((world.Placement(expression="smiling"),), "dots", "green"))
    return [f"the miniature does not know the words {', '.join(unknown)}. Example of a prompt it knows: {example}"]


# ---------------------------------------------------------------- people to show


def person(number: int) -> world.Person:
    """Returns a person not seen in training, the same for the same number."""
    return Drawn(FOLDER, number + 1, HELD_OUT).person(number)


def portrait(number: int, scene: world.Scene | None = None, size: int = REFERENCE_SIZE) -> np.ndarray:
    """Draws `person(number)`, uint8 RGB [size, size, 3]; without a scene, plain and from the front."""
    return world.draw([person(number)], scene or world.Scene(), size)


def group(numbers: Sequence[int], size: int = 2 * REFERENCE_SIZE) -> np.ndarray:
    """Draws up to three people, from left to right, uint8 RGB [size, size, 3]."""
    scene = world.sample_scene(np.random.default_rng(len(numbers)), len(numbers))
    level = tuple(replace(placement, tilt=0.0, turn=0.0) for placement in scene.placements)
    return world.draw([person(n) for n in numbers], replace(scene, placements=level, light="even", style="flat"), size)
