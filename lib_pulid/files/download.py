"""One file from a server onto the disk: whole and checked under its final name, or not there at all.

What arrives is written beside the target as `NAME.part` and renamed when size and sum fit, so a break, whatever its
kind, leaves nothing under the final name, and the next attempt goes on where the last one ended.

The addresses, tokens, proxies and the offline switch are huggingface_hub's (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE,
HF_HUB_DOWNLOAD_TIMEOUT, HTTPS_PROXY ...), and so is its HTTP session: requests before version 1.0, httpx after. Its
`hf_hub_download` is not used: it puts a file in place before anyone has compared its sum, and newer versions (2.4.0)
do not go on with what an earlier run has left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lib_pulid.errors import DownloadError
from lib_pulid.files.server import Answer, Broken, get

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
SUM = re.compile(r"[0-9a-f]{64}")

Tell = Callable[[int, int, str], None]  # bytes there, bytes in all (0: not known yet), what is waited for


@dataclass(frozen=True)
class Patience:
    """timeout: seconds without a byte. attempts: in a row that bring nothing. wait: seconds before the second attempt,
    doubled each time. longest: the most that a server may ask to wait."""

    timeout: float = 0.0  # 0: HF_HUB_DOWNLOAD_TIMEOUT, 10 by default
    attempts: int = 4
    wait: float = 1.0
    longest: float = 120.0


@dataclass(frozen=True)
class Wanted:
    """url: where from. target: where to. size: bytes, 0 where not known. sha256: "" where not known."""

    url: str
    target: Path
    size: int = 0
    sha256: str = ""

    @property
    def part(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")


class _Restart(Exception):
    """What had arrived earlier is of no use; it is gone now."""


def address(repository: str, name: str, revision: str = "main") -> tuple[str, dict[str, str]]:
    """URL and headers (with the user's token, if there is one) of a file on the Hugging Face Hub or its mirror."""
    from huggingface_hub import constants, get_token, hf_hub_url

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return hf_hub_url(repository, name, revision=revision), {"Authorization": f"Bearer {token}"} if token else {}


def fetch(
    wanted: Wanted,
    headers: Mapping[str, str] | None = None,
    tell: Tell = lambda done, total, note: None,
    patience: Patience = Patience(),  # noqa: B008
) -> None:
    """Fetches a file, also where another file is: that is kept as `NAME.other`. Where several processes or threads do
    so at once, one fetches and the others wait for it.

    tell: called for each block; what it raises ends the download, and what has arrived is kept.

    Raises:
        DownloadError: in words, without the file's name.
    """
    _refuse_offline()
    before = _stamp(wanted.target)
    try:
        wanted.target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(wanted, tell):
            if _stamp(wanted.target) in (None, before):  # else another process was quicker
                _complete(wanted, dict(headers or {}), tell, patience)
    except OSError as error:
        raise DownloadError(_disk_trouble(error, wanted)) from error


def sha256_of(path: Path, tell: Tell = lambda done, total, note: None) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            done += len(block)
            tell(done, size, "checking")
    return digest.hexdigest()


def in_words(count: int) -> str:
    """1142099520 -> "1.14 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


# ---------------------------------------------------------------- attempts


def _complete(wanted: Wanted, headers: dict[str, str], tell: Tell, patience: Patience) -> None:
    restarted = False
    while True:
        earlier = _length(wanted.part) > 0
        wanted = _receive(wanted, headers, tell, patience)
        try:
            _check(wanted, tell)
            break
        except DownloadError:
            wanted.part.unlink()
            if not earlier or restarted:  # an earlier run's rest can be damaged: once more, from the start
                raise
            restarted = True
    if wanted.target.exists():
        os.replace(wanted.target, wanted.target.with_name(f"{wanted.target.name}.other"))
    os.replace(wanted.part, wanted.target)


def _receive(wanted: Wanted, headers: dict[str, str], tell: Tell, patience: Patience) -> Wanted:
    """Fills the part. Returns what is wanted, with size and sum as the server told them where we knew none."""
    failed, restarts = 0, 0
    while True:
        before = _length(wanted.part)
        try:
            return _attempt(wanted, headers, tell, patience)
        except _Restart as reason:
            restarts += 1
            if restarts > 2:
                raise DownloadError(f"the server does not go on with a download ({reason})") from reason
        except Broken as error:
            failed = failed + 1 if _length(wanted.part) <= before else 1
            if failed >= patience.attempts:
                raise DownloadError(_given_up(error, wanted)) from error
            wait = error.wait or patience.wait * 2 ** (failed - 1)
            if wait > patience.longest:
                raise DownloadError(f"the server asks to wait {wait:.0f} seconds ({error}); try again then") from error
            _pause(wait, tell, wanted, f"{error}; again in {wait:.0f} s")


def _attempt(wanted: Wanted, headers: dict[str, str], tell: Tell, patience: Patience) -> Wanted:
    start = _length(wanted.part)
    if wanted.size and start == wanted.size:
        return wanted
    if wanted.size and start > wanted.size:
        _throw_away(wanted, "there was more than the whole file")
    ask = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    with get(wanted.url, ask, patience.timeout) as answer:
        if answer.status == 401 and headers.pop("Authorization", ""):
            raise _Restart("401")  # a token that has expired closes public files too: without it
        if answer.status == 416:
            _throw_away(wanted, "416")
        answer.refuse()
        if start and answer.status != 206:
            start = 0
        elif start and answer.begins != start:
            _throw_away(wanted, f"asked for byte {start}, got {answer.begins}")
        wanted = _agreed(wanted, answer, start)
        _check_room(wanted, start)
        _write(wanted, answer, start, tell)
    return wanted


def _agreed(wanted: Wanted, answer: Answer, start: int) -> Wanted:
    """Size and sum, where both we and the server know them, have to be the same before a byte is taken."""
    total = answer.total(start)
    if wanted.size and total is not None and total != wanted.size:
        raise DownloadError(
            f"the server has another file there, of {total:,} bytes instead of {wanted.size:,}"
            + (" (a web page: a login or an error?)" if "html" in answer.header("content-type") else "")
        )
    told = answer.header("x-linked-etag").removeprefix("W/").strip('"').lower()
    if wanted.sha256 and SUM.fullmatch(told) and told != wanted.sha256:
        raise DownloadError(
            f"the server has another file there, with the sum {told[:8]}... instead of {wanted.sha256[:8]}..."
        )
    if not (wanted.size or total):
        raise DownloadError("the server does not tell how large the file is, so it cannot be checked")
    return replace(
        wanted, size=wanted.size or total or 0, sha256=wanted.sha256 or (told if SUM.fullmatch(told) else "")
    )


def _write(wanted: Wanted, answer: Answer, start: int, tell: Tell) -> None:
    with wanted.part.open("r+b" if start else "wb", buffering=0) as file:
        done = file.seek(start)
        tell(done, wanted.size, "")
        while block := answer.next_block():
            done += len(block)
            if done > wanted.size:
                file.truncate(0)
                raise DownloadError(f"the server sends more than the {wanted.size:,} bytes of the file")
            file.write(block)
            tell(done, wanted.size, "")
        if done < wanted.size:
            raise Broken(f"the connection ended after {done:,} of {wanted.size:,} bytes")
        os.fsync(file.fileno())


def _check(wanted: Wanted, tell: Tell) -> None:
    if wanted.sha256 and (found := sha256_of(wanted.part, tell)) != wanted.sha256:
        raise DownloadError(
            f"the bytes that came are not the file's: their sum is {found[:8]}... instead of {wanted.sha256[:8]}...; "
            "they are deleted"
        )


def _given_up(error: Broken, wanted: Wanted) -> str:
    there = _length(wanted.part)
    kept = f"; the {in_words(there)} that came are kept, and the next attempt goes on from there" if there else ""
    return f"{error}{kept}"


def _refuse_offline() -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise DownloadError("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is downloaded")


# ---------------------------------------------------------------- the disk


@contextlib.contextmanager
def _alone(wanted: Wanted, tell: Tell) -> Iterator[None]:
    """Holds a lock, which ends with the process at the latest; nothing but a part with something in it stays behind."""
    from filelock import FileLock, Timeout

    path = wanted.target.with_name(f"{wanted.target.name}.lock")
    with contextlib.ExitStack() as stack:
        lock = FileLock(str(path))
        while not lock.is_locked:
            try:
                stack.enter_context(lock.acquire(timeout=0.5, poll_interval=0.05))
            except Timeout:
                tell(0, 0, "waiting: another process is downloading it")
            except NotImplementedError:  # a file system without locks: the sum is checked all the same
                break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if not _length(wanted.part):
                    wanted.part.unlink(missing_ok=True)
                path.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _length(path: Path) -> int:
    stamp = _stamp(path)
    return stamp[1] if stamp else 0


def _throw_away(wanted: Wanted, reason: str) -> None:
    wanted.part.unlink(missing_ok=True)
    raise _Restart(reason)


def _check_room(wanted: Wanted, start: int) -> None:
    free, needed = shutil.disk_usage(wanted.target.parent).free, wanted.size - start
    if free < needed:
        raise DownloadError(
            f"there is not enough room: {in_words(free)} are free in {wanted.target.parent}, {in_words(needed)} needed"
        )


def _disk_trouble(error: OSError, wanted: Wanted) -> str:
    folder = wanted.target.parent
    if error.errno in FULL:
        kept = f"; the {in_words(there)} that came are kept" if (there := _length(wanted.part)) else ""
        return f"the disk is full ({folder}){kept}: make room and go on, or delete {wanted.part.name}"
    return f"{error.filename or folder} cannot be written ({error.strerror or error})"


def _pause(seconds: float, tell: Tell, wanted: Wanted, note: str) -> None:
    """tell is called now and then, so that it can end the pause."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        tell(_length(wanted.part), wanted.size, note)
        time.sleep(min(left, 0.5))
