"""Lists, reads and writes the user's folders and files, whatever their permissions.

A folder that cannot be read counts as empty. Writes are atomic, and replace another file only on request.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lib_pulid.errors import SettingError, StorageError, WrongWeightsError

_SURROGATE = re.compile("[\ud800-\udfff]")  # how Python reads bytes of a name that are not UTF-8
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL, errno.EACCES)


# Unlike `Path.is_file` and `Path.is_dir`, False if a parent folder cannot be read.
is_file, is_folder = os.path.isfile, os.path.isdir


def listed(folder: str | Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """Lists a folder, sorted; empty if it cannot be read.

    suffixes: lists only the files with them, and no hidden ones: macOS puts a ._x.jpg, which is not an image, beside an
        x.jpg on other systems' disks. Nor those whose names are not valid text, as of an archive in another encoding:
        the WebUIs cannot send such a name to the page, which then is not shown at all.
    """
    try:
        paths = sorted(Path(folder).iterdir())
    except OSError:
        return []
    if not suffixes:
        return paths
    shown = (path for path in paths if path.suffix.lower() in suffixes and not path.name.startswith("."))
    return [path for path in shown if is_file(path) and not _SURROGATE.search(path.name)]


def folders(top: str | Path, left_out: Sequence[str] = ()) -> list[Path]:
    """Lists a folder and those below it, the upper ones first, each once, wherever links lead.

    left_out: names of folders that are not entered; hidden ones are not, either.
    """
    found: dict[str, Path] = {}
    todo = [Path(top)]
    for folder in todo:  # grows
        if (place := os.path.realpath(folder)) not in found:
            found[place] = folder
            names = (path for path in listed(folder) if not path.name.startswith(".") and path.name not in left_out)
            todo += filter(is_folder, names)
    return list(found.values())


def dead_link(path: Path) -> str:
    """Says where a link leads if nothing is there, such as a drive that is not mounted; else ""."""
    if not os.path.islink(path) or os.path.exists(path):
        return ""
    return f"   (there is a link to {os.readlink(path)}, which cannot be found)"


def size_of(path: str | Path) -> int:
    """Returns a file's size in bytes, or -1 if it is gone or not accessible."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def stamp(path: Path) -> tuple[str, int, int, int, int]:
    """Returns what changes with a file: its path, size, times and number. Copying may preserve the time of writing, and
    all files of a PuLID version are equally large."""
    try:
        stat = path.stat()
    except OSError:  # deleted since it was listed, or not accessible: reading it reports that
        return str(path), 0, 0, 0, 0
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


ProgressCallback = Callable[[int, int, str], None]  # bytes so far, bytes in all (0: not known yet), a note


def no_progress(done: int, total: int, note: str) -> None:
    """Shows nothing."""


def sha256_of(path: Path, progress: ProgressCallback = no_progress) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits. Raises: OSError: it cannot be read."""
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            done += len(block)
            progress(done, size, "verifying")
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """Returns the first sixteen digits of a file's sha256. Raises: WrongWeightsError: it cannot be read."""
    try:
        return sha256_of(path)[:16]
    except OSError as error:
        raise WrongWeightsError(why_unreadable(path, error)) from error


def why_unreadable(path: Path, error: OSError) -> str:
    """Says why the system refuses to read a file, which does not mean that it is damaged."""
    todo = "Change its permissions." if isinstance(error, PermissionError) else "Check the drive, and try again."
    return f"{path.name} in {path.parent} cannot be read ({error.strerror or error}). {todo}"


def format_size(count: int) -> str:
    """Formats a number of bytes: 1142099520 -> "1.14 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def user_path(text: str | os.PathLike[str]) -> Path:
    """Expands `~` in a path that a person typed."""
    path = Path(str(text).strip())
    with contextlib.suppress(RuntimeError):  # no HOME, and no such user id
        path = path.expanduser()
    return path


# ---------------------------------------------------------------- writing


def write(path: str | Path, content: bytes, *, replace: bool = False) -> Path:
    """Writes a file atomically. If two programs create the same file, the second gets an error.

    replace: whether it may replace a file.

    Raises:
        SettingError: the name is taken. StorageError: the folder cannot be created or written.
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


def delete(path: str | Path) -> None:
    """Deletes a file; one that is gone already is no error. Raises: StorageError: it cannot be deleted."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be deleted ({error.strerror or error}). Make its folder writable."
        ) from error


def check_writable(path: str | Path, *, replace: bool = False) -> None:
    """Checks before the work that `write` will succeed.

    Raises:
        SettingError, StorageError: as `write`; also if `path` is a folder.
    """
    path = Path(path)
    with _storage_errors(path):
        if is_folder(path):
            raise SettingError(f"{path} is a folder; give a file name in it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # raises if the name is too long
            if not replace:
                raise _taken(path)
        temporary = _temporary(path)
        temporary.write_bytes(b"")
        temporary.unlink()


def _create(temporary: Path, path: Path) -> None:
    """Renames a written file unless the name is taken, which `rename` alone does not guarantee."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:  # a file system without links: reserve the name first, then fill it
            path.open("xb").close()
        except FileExistsError:
            raise _taken(path) from error
        os.replace(temporary, path)


def _taken(path: Path) -> SettingError:
    return SettingError(f"{path.stem} is already saved. Choose another name, or delete {path} first.")


def _temporary(path: Path) -> Path:
    """Returns a hidden path beside the file, with a name that is not too long."""
    return path.with_name(f".{path.stem[:40]}{path.suffix}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise StorageError(
            f"{path} cannot be written ({reason}). Make its folder writable, or choose another one."
        ) from error
