"""What a server answers to the question for a file, through the session of huggingface_hub: requests before its version
1.0, httpx after."""

from __future__ import annotations

import contextlib
import http
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from lib_pulid.errors import DownloadError

BLOCK = 1 << 16
LATER = (408, 425, 429, 500, 502, 503, 504)  # statuses after which asking again is right


class Broken(Exception):
    """Something after which asking again is right. wait: seconds that the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Answer:
    """Of requests or of httpx. headers: by lower-case name."""

    status: int
    headers: Mapping[str, str]
    blocks: Iterator[bytes]

    def header(self, name: str) -> str:
        return self.headers.get(name, "")

    @property
    def begins(self) -> int:
        found = re.match(r"bytes (\d+)-", self.header("content-range"))
        return int(found[1]) if found else -1

    def total(self, start: int) -> int | None:
        found = re.search(r"/(\d+)\s*$", self.header("content-range"))
        if self.status == 206 and found:
            return int(found[1])
        length = self.header("content-length")
        return start + int(length) if length.isdigit() and not self.header("content-encoding") else None

    def next_block(self) -> bytes:
        try:
            return next(self.blocks, b"")
        except Exception as error:  # requests', urllib3's and httpx's, each with classes of its own
            raise Broken(f"the connection broke off ({_reason(error)})") from error

    def refuse(self) -> None:
        if self.status in (200, 206):
            return
        said = self.header("x-error-message")[:200] or _phrase(self.status)
        if self.status in LATER:
            raise Broken(f"{self.status} {said}", _wait_asked(self.header("retry-after")))
        if self.status in (401, 403):
            way = "the file is gated or private, or the token is wrong: look at its page, then set HF_TOKEN"
            raise DownloadError(f"the server refuses it ({self.status} {said}); {way}")
        if self.status in (404, 410):
            raise DownloadError(f"it is not there ({self.status} {said})")
        raise DownloadError(f"the server answers {self.status} {said}")


@contextlib.contextmanager
def get(url: str, headers: Mapping[str, str], timeout: float = 0.0) -> Iterator[Answer]:
    """Asks for a file. timeout: seconds without a byte; 0 is HF_HUB_DOWNLOAD_TIMEOUT, 10 by default.

    Raises:
        Broken: nobody answers.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    timeout = timeout or float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    with contextlib.ExitStack() as stack:
        try:
            if callable(session.stream):  # httpx; requests has a flag of this name
                context = session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
                found = stack.enter_context(context)
                blocks = found.iter_raw(BLOCK)
            else:  # requests
                found = stack.enter_context(session.get(url, headers=headers, timeout=timeout, stream=True))
                blocks = found.iter_content(BLOCK)
        except Exception as error:  # as in next_block
            raise Broken(f"the server cannot be reached ({_reason(error)})") from error
        told = {key.lower(): value for key, value in found.headers.items()}
        for step in found.history:  # a hub tells the sum, and then redirects to where the bytes are
            told |= {key.lower(): value for key, value in step.headers.items() if key.lower().startswith("x-linked-")}
        yield Answer(found.status_code, told, iter(blocks))


def _wait_asked(text: str) -> float:
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return ""


def _reason(error: BaseException) -> str:
    """The innermost of nested errors says it best: `Connection refused`, not `Max retries exceeded with url ...`."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno and error.errno > 0 else str(error)
    return (text or type(error).__name__).splitlines()[0][:200]
