"""Finds the ControlNets that belong to a method, and tells by its header whether a file can be one.

InstantID's is in diffusers' format, as are most ControlNets for SDXL: nothing in its tensors tells it from those. So a
file counts by its name in the catalog; in the PuLID folder and below it, under any name; and in the WebUIs' ControlNet
folder, if it has the catalog's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lib_pulid import disk
from lib_pulid.errors import MissingWeightsError, WrongWeightsError
from lib_pulid.files import catalog, places
from lib_pulid.files.checkpoint_header import read_header
from lib_pulid.files.state_dict import describe
from lib_pulid.methods import Method

MARK = "controlnet_cond_embedding.conv_in.weight"  # of diffusers' format
_TEXT = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"  # reads the tokens
_POOLED = "add_embedding.linear_1.weight"  # SDXL's pooled text and sizes
_FOLDER = "ControlNet"  # of Forge and its successors, below the models folder


def file_of(role: str) -> catalog.WeightFile:
    """Returns the catalog's file with this role."""
    return next(file for file in catalog.CATALOG if file.role == role)


def missing_for(method: Method, folder: Path, models_dir: Path, runs: bool = True) -> tuple[catalog.WeightFile, ...]:
    """Lists what a method lacks: what reads photos for it, and its ControlNet. runs: whether that could run."""
    files = (file for file in catalog.CATALOG if file.role and file.role in method.reads)
    lacking = [file for file in files if not catalog.status(file, models_dir).usable]
    if runs and method.control and find(method.control, folder, models_dir) is None:
        lacking.append(file_of(method.control))
    return tuple(lacking)


def require(
    role: str, folder: Path, models_dir: Path, token_width: int, fingerprint_of: Callable[[Path], str] | None = None
) -> Path:
    """Finds the ControlNet of a method, and checks it by its header. See `find` and `check`.

    A file of the catalog's size has to have its bytes. Files of other sizes pass, as do adapters: people convert them,
    and the header shows what they are.

    Args:
        fingerprint_of: gives the start of a file's sha256, and remembers it: 2.5 GB take seconds. None: the bytes are
            not compared, as on the command line, where nothing is remembered; `models verify` does it there.

    Raises:
        MissingWeightsError: the message says where to get it. WrongWeightsError.
    """
    path, file = find(role, folder, models_dir), file_of(role)
    if path is None:
        by_hand, how = catalog.by_hand([file], models_dir), catalog.how_to_get([file])
        raise MissingWeightsError(f"{file.purpose} is missing:\n{by_hand}\n{how}.")
    check(path, role, token_width)
    if fingerprint_of is not None and disk.size_of(path) == file.size:
        catalog.check_bytes(file, path, fingerprint_of(path))
    return path


def find(role: str, folder: Path, models_dir: Path) -> Path | None:
    """Finds the ControlNet of a method. role: see `methods.Method.control`. folder: of the PuLID files."""
    return next(_places(file_of(role), folder, models_dir), None)


def _places(file: catalog.WeightFile, folder: Path, models_dir: Path) -> Iterator[Path]:
    if (path := catalog.status(file, models_dir).path) is not None:
        yield path
    own = places.below(folder, models_dir)
    for home in (*own, models_dir / _FOLDER):
        yield from filter(disk.is_file, (home / file.name, home / file.path))
    others = disk.listed(models_dir / _FOLDER, (".safetensors",))
    likely = (path for path in others if file.size and disk.size_of(path) == file.size)
    here = (path for one in own for path in disk.listed(one, (".safetensors",)))
    yield from (path for path in (*here, *likely) if is_one(read_header(path)))


def is_one(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file with these tensors is a ControlNet for SDXL in diffusers' format."""
    return MARK in shapes and _TEXT in shapes and _POOLED in shapes


def check(path: Path, role: str, token_width: int) -> None:
    """Checks a file by its header, before it is loaded. token_width: of the tokens that it will read (2048).

    Raises:
        WrongWeightsError: the message says what the file is.
    """
    shapes = read_header(path)
    needed = f"Needed: {file_of(role).purpose}, {file_of(role).name}, in diffusers' format."
    if not shapes:
        raise WrongWeightsError(f"{path.name} cannot be read: it is damaged, or no safetensors file. {needed}")
    if not is_one(shapes):
        raise WrongWeightsError(f"{path.name} is {describe(shapes)}, or not for SDXL. {needed}")
    if shapes[_TEXT][-1] != token_width:
        raise WrongWeightsError(
            f"{path.name} reads tokens of width {shapes[_TEXT][-1]}, but the face's have {token_width}. {needed}"
        )
