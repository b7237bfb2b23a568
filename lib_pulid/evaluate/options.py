"""The arguments of the command `evaluate`, and what can be told of them before the work begins."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from lib_pulid.errors import SettingError

OF_A_METHOD = ("preset", "projection", "num_zero", "start", "end", "start_step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes, beside --models-dir."""
    _add_methods(parser)
    add = parser.add_argument
    add(
        "--faces",
        type=Path,
        help="folder with a photo, or a subfolder of photos, per person; of a subfolder the first photo is the "
        "reference (default with the miniature: drawn people whom no training saw)",
    )
    add("--people", type=int, default=64, help="how many drawn people, without --faces")
    add("--prompts", type=Path, help="text file, a prompt a line (default: our own list; new scenes for drawn people)")
    add("--each", type=int, help="prompts per person, taken in turn (default: 4, drawn people 1)")
    add("--weights", default="0.4,0.8,1,1.2", help="strengths, with commas; without the identity is always there")
    add("--seeds", type=int, default=3, help="how many noise seeds: 0, 1, ...")
    add("--steps", type=int, help="denoising steps (default: as generate)")
    add("--size", type=int, help="side in pixels (default: as generate)")
    add("--guidance", type=float, help="CFG on SDXL, distilled guidance on FLUX (default: as generate)")
    add(
        "--judge",
        action="append",
        default=[],
        metavar="FILE",
        help="another recogniser in ONNX (buffalo_l's w600k_r50.onnx), facenet, or facenet=FILE; repeat it for several",
    )
    add("--clip", help="for CLIP-T and CLIP-I: a folder of transformers, or open_clip's ViT-L-14=FILE")
    add("--device", default="auto", help="auto (the GPU, if torch can use one), cpu, cuda, cuda:1 ...")
    add("--save-images", action="store_true", help="write all images into the folder too")
    add("--json", action="store_true", help="print the results as JSON instead of tables")
    add("-o", "--out", type=Path, default=Path("outputs/evaluate"), help="folder for table.md, results.json, plot.png")


def _add_methods(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="miniature", help="single-file SDXL checkpoint, diffusers folder, or miniature")
    add(
        "--pulid",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="PuLID file; repeat it to compare. Files of one name are trainings of one method, with error bars",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:FIELD=VALUE,...",
        help=f"settings to compare ({', '.join(OF_A_METHOD)}); repeat it. Example: loose:projection=ortho,num_zero=16",
    )


def check(arguments: argparse.Namespace) -> list[float]:
    """What can be told before the work begins; gives the weights in order."""
    from lib_pulid import fields

    for name, least in (("people", 1), ("each", 1), ("seeds", 1), ("steps", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise SettingError(f"--{name} is {value}; it has to be {least} or more.")
    if arguments.size is not None and (arguments.size < 64 or arguments.size % 16):
        raise SettingError(f"--size is {arguments.size}; it has to be a multiple of 16, from 64 on.")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise SettingError(f"--out is {arguments.out}, which is a file; give a folder.")
    try:
        weights = [float(text) for text in arguments.weights.split(",")]
    except ValueError:
        raise SettingError(f"--weights is {arguments.weights}; it has to be numbers with commas: 0.4,0.8,1.") from None
    return sorted({fields.check(fields.FIELD["weight"], weight, 0) for weight in weights})


def named_file(text: str) -> tuple[str, Path]:
    """NAME=FILE or FILE."""
    name, equals, file = text.partition("=")
    return (name, Path(file)) if equals and not Path(text).exists() else (Path(text).stem, Path(text))


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:FIELD=VALUE,..."""
    from lib_pulid import fields

    name, _, pairs = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in pairs.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals):
            raise SettingError(f"--variant is {text}; it has to be like loose:projection=ortho,num_zero=16.")
        field = fields.field_named(key, 0)
        if key not in OF_A_METHOD:
            raise SettingError(f"--variant {name}: {key} is not a setting of a method; {', '.join(OF_A_METHOD)} are.")
        try:
            found = fields.check(field, _number(value) if field.kind in ("int", "float") else value, 0)
        except ValueError as error:
            raise SettingError(f"--variant {name}: {error}") from None
        settings |= fields.preset_values(found) if key == "preset" else {key: found}
    return name, settings


def _number(text: str) -> int | float | str:
    """A number, if it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
