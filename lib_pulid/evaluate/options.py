"""Defines the arguments of the command `evaluate`, and checks them before the work."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib_pulid import disk
from lib_pulid.errors import SettingError

OF_A_METHOD = ("preset", "projection", "num_zero", "start", "end", "start_step")


def add_arguments(parser: argparse.ArgumentParser, path: Callable[[str], Path]) -> None:
    """Adds the command's arguments, besides --models-dir and --device. path: reads a path."""
    add = parser.add_argument
    add("--model", default="miniature", help="SDXL checkpoint, diffusers folder, miniature or miniature-flux")
    files = (
        "PuLID file, or another method's; repeat it to compare. Files of one NAME are trainings of one method, "
        "with error bars"
    )
    add("--pulid", "--adapter", action="append", default=[], metavar="[NAME=]FILE", help=files)
    variants = f"settings to compare ({', '.join(OF_A_METHOD)}); repeat it. Example: loose:projection=ortho,num_zero=16"
    add("--variant", action="append", default=[], metavar="NAME:FIELD=VALUE,...", help=variants)
    faces = (
        "folder with one photo, or a subfolder of photos, per person; in a subfolder, the first photo is the "
        "reference (default with the miniature: drawn people not seen in training)"
    )
    add("--faces", type=path, help=faces)
    add("--people", type=int, default=64, help="number of drawn people, without --faces")
    add("--prompts", type=path, help="text file with one prompt per line (default: a built-in list, or new scenes)")
    add("--each", type=int, help="prompts per person, in turn (default: 4, or 1 for drawn people)")
    add("--weights", default="0.4,0.8,1,1.2", help="weights, separated by commas; images without PuLID are always made")
    add("--seeds", type=int, default=3, help="number of noise seeds: 0, 1, ...")
    add("--steps", type=int, help="denoising steps (default: as generate)")
    add("--size", type=int, help="side in pixels (default: as generate)")
    add("--guidance", type=float, help="CFG on SDXL, distilled guidance on FLUX (default: as generate)")
    judges = "another recognizer as ONNX (buffalo_l's w600k_r50.onnx), facenet, or facenet=FILE; repeat it for several"
    add("--judge", action="append", default=[], metavar="FILE", help=judges)
    add("--clip", help="for CLIP-T and CLIP-I: a transformers folder, or open_clip's ViT-L-14=FILE")
    add("--save-images", action="store_true", help="also write all images to the folder")
    add("--json", action="store_true", help="print the results as JSON instead of tables")
    add("-o", "--out", type=path, default=Path("outputs/evaluate"), help="folder for table.md, results.json, plot.png")


def check(arguments: argparse.Namespace) -> list[float]:
    """Checks the arguments. Returns the weights in order. Raises: SettingError, StorageError."""
    from lib_pulid import fields

    for name in ("people", "each", "seeds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise SettingError(f"--{name} is {value}; it has to be 1 or more.")
    if disk.is_file(arguments.out):
        raise SettingError(f"--out is {arguments.out}, which is a file; give a folder.")
    disk.check_writable(arguments.out / "table.md", replace=True)
    try:
        weights = [float(text) for text in arguments.weights.split(",")]
    except ValueError:
        raise SettingError(
            f"--weights is {arguments.weights}; it has to be numbers separated by commas, like 0.4,0.8,1."
        ) from None
    try:
        return sorted({fields.check(fields.FIELD["weight"], weight, 0) for weight in weights})
    except SettingError as error:
        raise SettingError(str(error).replace("PuLID, field weight", "--weights")) from error


def named_file(text: str) -> tuple[str, Path]:
    """Parses NAME=FILE or FILE. Raises: SettingError: FILE is empty."""
    name, equals, file = text.partition("=")
    if not equals or disk.is_file(disk.user_path(text)):
        name, file = "", text
    if not file.strip():
        raise SettingError(f"--pulid is {text!r}; it has to be FILE or NAME=FILE.")
    path = disk.user_path(file)
    return name or path.stem, path


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """Parses NAME:FIELD=VALUE,..."""
    from lib_pulid import fields

    name, _, pairs = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in pairs.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals):
            raise SettingError(f"--variant is {text}; it has to be like loose:projection=ortho,num_zero=16.")
        field = fields.field_named(key, 0)
        if key not in OF_A_METHOD:
            raise SettingError(f"--variant {name}: {key} cannot be compared; use {', '.join(OF_A_METHOD)}.")
        given: Any = value
        if field.kind in ("int", "float"):
            with contextlib.suppress(ValueError):
                given = int(float(value)) if float(value).is_integer() else float(value)
        found = fields.check(field, given, 0)
        settings |= fields.preset_values(found) if key == "preset" else {key: found}
    return name, settings
