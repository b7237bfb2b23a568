"""`python -m lib_pulid models`: the weight files listed, downloaded, checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lib_pulid import disk
from lib_pulid.errors import MissingWeightsError, SettingError
from lib_pulid.files import catalog
from lib_pulid.files.catalog import FAMILIES, WeightFile
from lib_pulid.files.download import ProgressCallback, format_size


def run(action: str, names: Sequence[str], models_dir: Path, accept_licence: bool = False) -> int:
    """action: "list", "download" or "verify". names: of files, or families; () for all of them.

    Returns:
        0; 1 if a file could not be had (download), or is wrong or, asked for by name, not there (verify).
    """
    if action == "download":
        return download(_chosen(names or FAMILIES, models_dir), models_dir, accept_licence, replace=names)
    files = _chosen(names, models_dir) if names else list(catalog.CATALOG)
    wrong, lacking = report(files, models_dir, deep=action == "verify")
    return int(action == "verify" and bool(wrong or (names and lacking)))


def report(files: Sequence[WeightFile], models_dir: Path, deep: bool) -> tuple[int, int]:
    """One line per file, and what is wrong with it. deep: reads every byte of it.

    Returns:
        How many are wrong, and how many are not there.
    """
    print(f"In {models_dir}")
    states = []
    for file in files:
        path = catalog.find(file, models_dir)
        wrong = ""
        if path is not None:
            with _bar(file.name) as tell:
                wrong = catalog.verify(file, path, tell) if deep else catalog.problem(file, path)
        states.append(state := _state(file, path, wrong, deep))
        notice = "" if path or not file.restricted else f"; {file.licence}"
        print(f"{state:15} {file.told_size if path is None else format_size(max(0, disk.size_of(path))):>15}  "
              f"{file.name:42} {file.purpose:34} {path or models_dir / file.folder}{notice}")  # fmt: skip
        if wrong:
            print(f"{'':15} {wrong}")
    return states.count("DIFFERS"), states.count("missing")


def download(
    files: Sequence[WeightFile], models_dir: Path, accept_licence: bool = False, replace: Sequence[str] = ()
) -> int:
    """One after another; one that fails does not keep the others from coming. replace: names of files that are fetched
    again where what is there is wrong."""
    failed = 0
    for file in files:
        there = catalog.find(file, models_dir)
        wrong = catalog.problem(file, there) if there else ""
        if there is not None and not wrong:
            print(f"{file.name}: {there}")
            continue
        if wrong and not (file.name in replace or file in catalog.missing("", models_dir)):
            print(f"{wrong}. It is left alone; to get it again: python -m lib_pulid models download {file.name}")
            continue
        try:
            if file.restricted and not accept_licence:
                _ask_licence(file)
            print(f"{file.name} ({file.purpose}), {file.told_size}, licence: {file.licence}", flush=True)
            with _bar(file.name) as tell:
                path = catalog.download(file, models_dir, tell, replace=bool(wrong))
            print(f"{file.name}: {path}")
        except MissingWeightsError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def _chosen(names: Sequence[str], models_dir: Path) -> list[WeightFile]:
    """The files of that name, and for a family its encoders and its PuLID file: the one that is there, or the first."""
    chosen: list[WeightFile] = []
    for name in names:
        file = catalog.named(name)
        if file is not None:
            chosen.append(file)
        elif name in FAMILIES:
            group = catalog.in_group(name)
            chosen += catalog.in_group("encoders")
            chosen.append(next((one for one in group if catalog.find(one, models_dir)), group[0]))
        else:
            known = ", ".join([*FAMILIES, *(file.name for file in catalog.CATALOG)])
            raise SettingError(f"Unknown: {name}. Known: {known}.")
    return list(dict.fromkeys(chosen))


def _state(file: WeightFile, path: Path | None, wrong: str, deep: bool) -> str:
    if path is None:
        return "missing"
    if wrong:
        return "DIFFERS"
    return "there" if not deep else "right" if file.sha256 else "sum not known"


def _ask_licence(file: WeightFile) -> None:
    question = f"{file.name} ({file.purpose}) may be used under this licence: {file.licence}. Accept? [y/N] "
    if not sys.stdin.isatty():
        raise MissingWeightsError(f"{file.name} needs its licence accepted ({file.licence}): --accept-licence.")
    if input(question).strip().lower() not in ("y", "yes"):
        raise MissingWeightsError(f"{file.name} was not downloaded: its licence was not accepted.")


@contextmanager
def _bar(name: str) -> Iterator[ProgressCallback]:
    """A bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, disable=None, leave=False) as shown:

        def tell(done: int, total: int, note: str) -> None:
            shown.total = total or shown.total
            shown.set_postfix_str(note, refresh=bool(note))
            shown.update(done - shown.n)

        yield tell
