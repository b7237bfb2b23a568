"""Checks the command line's arguments before the work, which can take minutes: the settings, with the WebUI's checks,
and whether the result can be written."""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import Image

from lib_pulid import disk, miniature
from lib_pulid.errors import MissingWeightsError, SettingError, StorageError
from lib_pulid.files.pulidembd import SUFFIX as PULIDEMBD
from lib_pulid.images import load_image
from lib_pulid.units import PulidUnit

MOST_STEPS, MOST_GUIDANCE, LARGEST_SIZE = 1000, 100, 8192
Result = TypeVar("Result")


def checked(arguments: argparse.Namespace) -> PulidUnit:
    """Checks the arguments of `generate`.

    Raises:
        SettingError, ImageError, MissingWeightsError.
    """
    unit = check_faces(arguments)
    check_sampling(arguments)
    if not 0 <= arguments.seed < 2**64:
        raise SettingError(f"--seed is {arguments.seed}; it has to be in 0..{2**64 - 1}.")
    in_words(lambda: unit.check_steps(family_of(arguments.model), steps_of(arguments), 0))
    check_kept(arguments.out, *arguments.face, arguments.mask)
    write_picture(Image.new("RGB", (size_of(arguments),) * 2), arguments.out, really=False)
    return unit


def check_sampling(arguments: argparse.Namespace) -> None:
    """Checks steps, size and guidance. Raises: SettingError."""
    if not 1 <= steps_of(arguments) <= MOST_STEPS:
        raise SettingError(f"--steps is {arguments.steps}; it has to be in 1..{MOST_STEPS}.")
    if arguments.size is not None and (not 64 <= arguments.size <= LARGEST_SIZE or arguments.size % 16):
        raise SettingError(f"--size is {arguments.size}; it has to be a multiple of 16 in 64..{LARGEST_SIZE}.")
    if arguments.guidance is not None and not 0 <= arguments.guidance <= MOST_GUIDANCE:  # NaN is not, either
        raise SettingError(f"--guidance is {arguments.guidance}; it has to be in 0..{MOST_GUIDANCE}.")


def check_faces(arguments: argparse.Namespace) -> PulidUnit:
    """Checks photos, PuLID file and settings."""
    unit = in_words(lambda: PulidUnit.from_mapping({name: getattr(arguments, name) for name in arguments.settings}, 0))
    for path in arguments.face:
        load_image(path)
    if arguments.pulid is not None and not disk.is_file(arguments.pulid):
        raise MissingWeightsError(f"--pulid: {arguments.pulid.name} was not found in {arguments.pulid.parent}.")
    return unit


def in_words(check: Callable[[], Result], option: str = "") -> Result:
    """Runs a check; in its error, the field's name becomes the option's name."""
    try:
        return check()
    except SettingError as error:
        words = re.sub(r"^PuLID, field (\w+)", lambda found: f"--{(option or found[1]).replace('_', '-')}", str(error))
        raise SettingError(words) from error


def check_kept(out: Path, *inputs: Path | None) -> None:
    """Checks that a result does not replace one of the files that it is made of."""
    for path in filter(None, inputs):
        if disk.is_file(out) and disk.is_file(path) and os.path.samefile(out, path):
            raise SettingError(f"--out is {out}, the same file as {path}, which would be lost. Give it another name.")


def check_identity_file(path: Path, family: str) -> None:
    """Checks the file that `embed` will write."""
    if path.suffix.lower() not in (".safetensors", PULIDEMBD):
        raise SettingError(f"--out is {path.name}; its extension has to be .safetensors or {PULIDEMBD}.")
    if path.suffix.lower() == PULIDEMBD and family == "sdxl":
        raise SettingError(f"--out is {path.name}: {PULIDEMBD} is for FLUX, but --model is SDXL.")
    disk.check_writable(path)


def family_of(model: str) -> str:
    """Returns a base model's family by its name or folder: a single file is SDXL."""
    if model in miniature.MODELS:
        return miniature.MODELS[model]
    return "flux" if disk.is_folder(disk.user_path(model) / "transformer") else "sdxl"


def size_of(arguments: argparse.Namespace) -> int:
    return arguments.size or (miniature.SIZE if arguments.model in miniature.MODELS else 1024)


def steps_of(arguments: argparse.Namespace) -> int:
    usual = miniature.STEPS.get(miniature.MODELS.get(arguments.model, ""), 20)
    return usual if arguments.steps is None else arguments.steps


def write_picture(picture: Image.Image, path: Path, really: bool = True) -> None:
    """Writes an image. really: if False, only checks that it could be written. Raises: SettingError, StorageError."""
    buffer = io.BytesIO()
    try:
        picture.save(buffer, Image.registered_extensions()[path.suffix.lower()])
    except Exception as error:  # every format has its own
        kind = path.suffix or "a file without an extension"
        raise SettingError(
            f"--out is {path.name}; an image of this size cannot be written as {kind}. Use .png, .jpg or .webp."
        ) from error
    if not really:
        disk.check_writable(path, replace=True)
        return
    try:
        disk.write(path, buffer.getvalue(), replace=True)
    except StorageError as error:  # it took minutes to make
        kept = disk.write(Path(tempfile.mkdtemp(prefix="pulid-")) / path.name, buffer.getvalue())
        raise StorageError(f"{error} The image was saved as {kept} instead.") from error
