"""Downloads one file: under its final name it is complete and verified, or not there at all.

What arrives is written beside the target as `NAME.part` and renamed when size and checksum fit, so an interruption of
any kind leaves nothing under the final name, and the next attempt resumes where the last one ended.

Addresses, tokens and the offline switch are huggingface_hub's (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE,
HF_HUB_DOWNLOAD_TIMEOUT), proxies are requests' (HTTPS_PROXY ...). `hf_hub_download` is not used: it puts a file in
place before its checksum is compared, and newer versions (2.4.0) do not resume what an earlier run has left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lib_pulid.disk import ProgressCallback, format_size, no_progress, sha256_of, size_of
from lib_pulid.errors import DownloadError

if TYPE_CHECKING:
    from requests import Response

BLOCK = 1 << 16
SHA256 = re.compile(r"[0-9a-f]{64}")
ATTEMPTS = 4  # in a row that bring nothing
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled each time
LONGEST_WAIT = 120.0  # seconds; the most that a server may ask for
RETRIED = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
_NO_ACCESS = ": the file is gated or private, or the token is wrong; look at its page, then set HF_TOKEN"
_NO_FILE = ": it has no such file"
REFUSED = {401: _NO_ACCESS, 403: _NO_ACCESS, 404: _NO_FILE, 410: _NO_FILE}


@dataclass(frozen=True)
class Download:
    """url: where from. target: where to. size: bytes, 0 where not known. sha256: its first digits, or ""."""

    url: str
    target: Path
    size: int = 0
    sha256: str = ""

    @property
    def part(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def received(self) -> int:
        return max(0, size_of(self.part))


class TransientError(Exception):
    """Asking again may help. wait: seconds that the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def address(repository: str, name: str, revision: str = "main") -> tuple[str, dict[str, str]]:
    """Gives URL and headers (with the user's token, if there is one) of a file on the Hugging Face Hub or a mirror."""
    from huggingface_hub import constants, get_token, hf_hub_url

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return hf_hub_url(repository, name, revision=revision), {"Authorization": f"Bearer {token}"} if token else {}


def fetch(
    download: Download, headers: Mapping[str, str] | None = None, progress: ProgressCallback = no_progress
) -> None:
    """Downloads a file. One that has its name and place is kept as `NAME.other`, or `NAME.other2`. Of several processes
    or threads that want the same file, one downloads it and the others wait.

    progress: called for each block; what it raises ends the download, and what has arrived is kept.

    Raises:
        DownloadError: why it failed, without the file's name.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise DownloadError("HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is downloaded")
    before = size_of(download.target)  # -1 where there is none
    try:
        download.target.parent.mkdir(parents=True, exist_ok=True)
        with _file_lock(download, progress):
            if size_of(download.target) in (-1, before):  # else another process was quicker
                _complete(download, dict(headers or {}), progress)
    except OSError as error:
        folder, reason = download.target.parent, error.strerror or error
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            todo = f"free some space, or delete {download.part.name}"
            raise DownloadError(f"the disk is full ({folder}){_kept(download)}: {todo}") from error
        raise DownloadError(f"{error.filename or folder} cannot be written ({reason})") from error


def _complete(download: Download, headers: dict[str, str], progress: ProgressCallback) -> None:
    resumed = download.received > 0
    download = _receive(download, headers, progress)
    found = sha256_of(download.part, progress=progress) if download.sha256 else ""
    if not found.startswith(download.sha256):
        download.part.unlink()
        if resumed:  # the part of an earlier run can be damaged: once more, from the start
            return _complete(download, headers, progress)
        raise DownloadError(f"what was received is not the file: its checksum is {found[:8]}... instead of "
                            f"{download.sha256[:8]}...; it was deleted")  # fmt: skip
    if download.target.exists():
        os.replace(download.target, _free_name(download.target))
    return os.replace(download.part, download.target)


def _free_name(path: Path) -> Path:
    """Returns a new name beside a file that another one replaces."""
    number = 1
    while os.path.lexists(other := path.with_name(f"{path.name}.other{number if number > 1 else ''}")):
        number += 1
    return other


def _receive(download: Download, headers: dict[str, str], progress: ProgressCallback) -> Download:
    """Fills the part. Returns the download, with size and checksum from the server where we knew none."""
    failed = 0
    while True:
        before = download.received
        try:
            return _attempt(download, headers, progress)
        except TransientError as error:
            failed = failed + 1 if download.received <= before else 1
            if failed >= ATTEMPTS:
                raise DownloadError(f"{error}{_kept(download, ', and the next attempt resumes there')}") from error
            wait = error.wait or FIRST_WAIT * 2 ** (failed - 1)
            if wait > LONGEST_WAIT:
                raise DownloadError(f"the server asks to wait {wait:.0f} seconds ({error}); try again then") from error
            end = time.monotonic() + wait
            while (left := end - time.monotonic()) > 0:
                progress(download.received, download.size, f"{error}; next attempt in {wait:.0f} s")
                time.sleep(min(left, 0.5))


def _attempt(download: Download, headers: dict[str, str], progress: ProgressCallback) -> Download:
    import requests
    from huggingface_hub import constants

    start = download.received if download.received <= (download.size or download.received) else 0
    if start and start == download.size:
        return download
    ask = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        response = requests.get(
            download.url, headers=ask, stream=True, timeout=float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        )
    except (OSError, ValueError) as error:  # wider than requests' own: a bundle of certificates may be missing
        raise TransientError(f"the connection failed ({_reason(error)})") from error
    try:
        with response:
            status, begins = response.status_code, response.headers.get("Content-Range", "")
            if status == 401 and headers.pop("Authorization", ""):  # an expired token closes public files too
                return _attempt(download, headers, progress)
            if status == 416 or (status == 206 and not begins.startswith(f"bytes {start}-")):
                download.part.unlink(missing_ok=True)
                raise TransientError("the server cannot resume the download")
            _check_status(response)
            start = start if status == 206 else 0
            download = _agreed(download, response, start)
            _write(download, response, start, progress)
    except requests.RequestException as error:
        raise TransientError(f"the connection failed ({_reason(error)})") from error
    return download


def _check_status(response: Response) -> None:
    status, headers = response.status_code, response.headers
    said = f"{status} {headers.get('X-Error-Message', '')[:200] or response.reason or ''}"
    if status in RETRIED:
        raise TransientError(said, _seconds(headers.get("Retry-After", "")))
    if status not in (200, 206):
        raise DownloadError(f"the server answers {said}{REFUSED.get(status, '')}")


def _agreed(download: Download, response: Response, start: int) -> Download:
    """Compares size and checksum, where both we and the server know them, before a byte is taken."""
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else None
    if download.size and total is not None and total != download.size:
        page = " (a web page: a login or an error?)" * ("html" in response.headers.get("Content-Type", ""))
        raise DownloadError(f"the server has another file there, of {total:,} bytes instead of {download.size:,}{page}")
    # The hub states the sha256 before it redirects to where the bytes are.
    etags = (step.headers.get("X-Linked-Etag", "") for step in (response, *response.history))
    stated = "".join(SHA256.findall(" ".join(etags).lower())[:1])
    if stated and not stated.startswith(download.sha256):
        raise DownloadError(f"the server has another file there, with the checksum {stated[:8]}... instead of "
                            f"{download.sha256[:8]}...")  # fmt: skip
    if "html" in response.headers.get("Content-Type", "") and not (stated or download.sha256):
        raise DownloadError("the server sends a web page (a login or an error?) instead of the file")
    if not (download.size or total):
        raise DownloadError("the server does not say how large the file is, so it cannot be verified")
    return replace(download, size=download.size or total or 0, sha256=stated or download.sha256)


def _write(download: Download, response: Response, start: int, progress: ProgressCallback) -> None:
    needed = download.size - start
    with _where_supported():
        space = shutil.disk_usage(download.target.parent)
        if space.free < needed and space.total:  # some network drives say 0
            raise DownloadError(f"not enough disk space: {format_size(space.free)} free in {download.target.parent}, "
                                f"{format_size(needed)} needed")  # fmt: skip
    with download.part.open("r+b" if start else "wb") as file:  # buffered: a raw file may write less than it is given
        done = file.seek(start)
        progress(done, download.size, "")
        for block in response.iter_content(BLOCK):
            done += len(block)
            if done > download.size:
                file.truncate(0)
                raise DownloadError(f"the server sends more than the {download.size:,} bytes of the file")
            file.write(block)
            progress(done, download.size, "")
        if done < download.size:
            raise TransientError(f"the connection ended after {done:,} of {download.size:,} bytes")
        file.flush()
        with _where_supported():
            os.fsync(file.fileno())


@contextlib.contextmanager
def _where_supported() -> Iterator[None]:
    """Passes over what the file system, such as a network drive's, does not support."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _seconds(text: str) -> float:
    """Reads Retry-After: seconds, or a date."""
    with contextlib.suppress(TypeError, ValueError):
        return float(text) if text.isdigit() else max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def _reason(error: BaseException) -> str:
    """Gives the innermost of nested errors: `Connection refused`, not `Max retries exceeded with url ...`."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error) or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _file_lock(download: Download, progress: ProgressCallback) -> Iterator[None]:
    """Holds a lock, which ends with the process at the latest. An empty part is removed."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{download.target}.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0.5, poll_interval=0.05)
        except Timeout:
            progress(0, 0, "waiting: another process is downloading it")
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
                raise
            break  # a file system without locks: the checksum is compared all the same
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if not download.received:
                download.part.unlink(missing_ok=True)
            os.unlink(lock.lock_file)
        lock.release()


def _kept(download: Download, then: str = "") -> str:
    return f"; the {format_size(download.received)} received are kept{then}" if download.received else ""
