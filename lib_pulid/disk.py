"""Folders and files of the user: looked into and written, whatever their rights are.

A place that may not be looked into has nothing. What is written is there whole or not at all, and takes the place of
another file only where that was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from lib_pulid.errors import SettingError, StorageError

_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL, errno.EACCES)


def is_file(path: str | Path) -> bool:
    """As `Path.is_file`, which raises where a folder above may not be looked into."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """As `Path.is_dir`, likewise."""
    return os.path.isdir(path)


def listed(folder: str | Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """What lies in a folder, sorted; with `suffixes`, the files that end so. Empty where one may not look."""
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError:
        return []
    return [path for path in paths if path.suffix.lower() in suffixes and is_file(path)] if suffixes else paths


def size_of(path: str | Path) -> int:
    """Bytes of a file, -1 where it is gone or may not be looked at."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path that a person typed: `~` is their home, if they have one."""
    path = Path(str(text).strip())
    with contextlib.suppress(RuntimeError):  # no HOME, and no user of this number
        path = path.expanduser()
    return path


# ---------------------------------------------------------------- writing


def write(path: str | Path, content: bytes, *, replace: bool = False) -> Path:
    """Writes a file, whole or not at all. Of two programs that create one file, the second is refused.

    replace: also where a file of this name is.

    Raises:
        SettingError: the name is taken. StorageError: the folder cannot be made or written.
    """
    path = Path(path)
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            temporary.write_bytes(content)
            if replace:
                os.replace(temporary, path)
            else:
                _create(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def check_writable(path: str | Path, *, replace: bool = False) -> None:
    """Makes sure, before the work begins, that `write` will find its place.

    Raises:
        SettingError, StorageError: as `write`; also where `path` is a folder.
    """
    path = Path(path)
    with _storage_errors(path):
        if is_folder(path):
            raise SettingError(f"{path} is a folder; give the name of a file in it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # raises where the name is too long
            if not replace:
                raise _taken(path)
        temporary = _temporary(path)
        temporary.write_bytes(b"")
        temporary.unlink()


def _create(temporary: Path, path: Path) -> None:
    """Gives a written file its name, if nothing has that name: what `rename` alone does not promise."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:  # a file system without links: the name is taken first, and filled then
            path.open("xb").close()
        except FileExistsError:
            raise _taken(path) from error
        os.replace(temporary, path)


def _taken(path: Path) -> SettingError:
    return SettingError(f"{path.stem} is saved already; take another name, or delete {path} first.")


def _temporary(path: Path) -> Path:
    """Hidden, beside the file, and no longer than the longest name where the file's own is not."""
    return path.with_name(f".{path.stem[:40]}{path.suffix}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(
            f"{path} cannot be written ({reason}). Make its folder writable, or choose another place."
        ) from error
