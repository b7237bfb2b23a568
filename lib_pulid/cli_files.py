"""`python -m lib_pulid models`: lists, downloads and verifies the weight files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from lib_pulid import disk
from lib_pulid.disk import ProgressCallback, format_size
from lib_pulid.errors import MissingWeightsError, SettingError
from lib_pulid.files import catalog
from lib_pulid.files.catalog import FAMILIES, Status, WeightFile


def run(action: str, names: Sequence[str], models_dir: Path, accept_license: bool = False) -> int:
    """action: "list", "download" or "verify". names: of files, or families; () for all of them.

    Returns:
        0; 1 if a file could not be downloaded, or (verify) is wrong or, asked for by name, missing.
    """
    if action == "download":
        return download(_chosen(names or FAMILIES, models_dir), models_dir, accept_license, replace=names)
    found = show(_chosen(names, models_dir) or catalog.CATALOG, models_dir, verify=action == "verify")
    wrong = [one for one in found if one.state == "differs" or (names and one.state == "missing")]
    return int(action == "verify" and bool(wrong))


def show(files: Sequence[WeightFile], models_dir: Path, verify: bool = False) -> list[Status]:
    """Prints a line for each file, and what is wrong with it. verify: reads every byte."""
    print(f"Weights in {models_dir}")
    found = []
    for file in files:
        found.append(one := _status(file, models_dir, verify))
        state = one.state
        if verify and state == "there":
            state = "verified" if file.sha256 else "no checksum"
        size = file.size_text if one.path is None else format_size(disk.size_of(one.path))
        place = one.path or f"{models_dir / file.folder}{f'; {file.licence}' * file.restricted}"
        print(f"{state:11} {size:>14}  {file.name:39} {file.purpose:34} {place}")
        if one.problem:
            print(f"{'':11} {one.problem}")
    return found


def download(files: Sequence[WeightFile], models_dir: Path, accept_license: bool, replace: Sequence[str]) -> int:
    """Downloads files one after another; one that fails does not stop the others.

    replace: names of files whose bytes are verified, and that are downloaded again if they are wrong.
    """
    status = 0
    for file in files:
        one = _status(file, models_dir, verify=file.name in replace)
        if one.state == "there":
            print(f"{file.name}: {one.path}")
            continue
        if one.usable and file.name not in replace:
            print(f"{one.problem}. It is left alone; to replace it: python -m lib_pulid models download {file.name}")
            continue
        try:
            if file.restricted and not accept_license:
                _ask_license(file)
            print(f"{file.name} ({file.purpose}), {file.size_text}, license: {file.licence}", flush=True)
            with _bar(file.name) as progress:
                path = catalog.download(file, models_dir, progress, replace=one.path is not None)
            print(f"{file.name}: {path}")
        except MissingWeightsError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            status = 1
    return status


def _status(file: WeightFile, models_dir: Path, verify: bool) -> Status:
    """Looks for a file. verify: reads every byte, with a bar."""
    with _bar(file.name) if verify else nullcontext() as progress:
        return catalog.status(file, models_dir, progress)


def _chosen(names: Sequence[str], models_dir: Path) -> list[WeightFile]:
    """Gives the files of these names; for a family the encoders and a PuLID file, one that is there or the first."""
    chosen: list[WeightFile] = []
    for name in names:
        file, group = catalog.named(name), catalog.in_group(name) if name in FAMILIES else ()
        if file is not None:
            chosen.append(file)
        elif group:
            there = (one for one in group if catalog.status(one, models_dir).path)
            chosen += [*catalog.in_group("encoders"), next(there, group[0])]
        else:
            known = ", ".join([*FAMILIES, *(file.name for file in catalog.CATALOG)])
            raise SettingError(f"Unknown: {name}. Known: {known}.")
    return list(dict.fromkeys(chosen))


def _ask_license(file: WeightFile) -> None:
    question = f"{file.name} ({file.purpose}) may be used under this license: {file.licence}. Accept? [y/N] "
    if sys.stdin is None or not sys.stdin.isatty():
        raise MissingWeightsError(f"{file.name} needs its license accepted ({file.licence}): --accept-license.")
    answer = ""
    with suppress(EOFError):  # Ctrl+D
        answer = input(question)
    if answer.strip().lower() not in ("y", "yes"):
        raise MissingWeightsError(f"{file.name} was not downloaded: its license was not accepted.")


@contextmanager
def _bar(name: str) -> Iterator[ProgressCallback]:
    """Shows a bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, disable=None, leave=False) as shown:

        def progress(done: int, total: int, note: str) -> None:
            shown.total = total or shown.total
            shown.set_postfix_str(note, refresh=bool(note))
            shown.update(done - shown.n)

        yield progress
