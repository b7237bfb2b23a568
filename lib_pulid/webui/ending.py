"""Ends a request that may not go on, and removes what is ours when a generation ends.

The hosts print what a script hook raises and carry on, which would give an image of a stranger. So an error is kept,
and raised where the hosts let it end the request: when they ask the generation for its samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from modules import shared

from lib_pulid import hosts
from lib_pulid.errors import OutOfMemoryError, PulidError, is_out_of_memory
from lib_pulid.fields import FIELD

if TYPE_CHECKING:
    from lib_pulid.webui.plan import UnitPlan


def tell(text: str) -> None:
    """Shows a text in the WebUI's progress line."""
    shared.state.textinfo = text or None


def is_interrupted() -> bool:
    """Whether the host would start no further batch."""
    return shared.state.interrupted or getattr(shared.state, "stopping_generation", False)


class Sampling:
    """Replaces `p.sample` for one call, so that hooks are removed even when sampling raises."""

    def __init__(self, p: Any, plan: UnitPlan) -> None:
        self._p, self._plan = p, plan
        before = vars(p).get("sample")
        self._before: Any = before._before if isinstance(before, Sampling) else before  # another extension's

    def leave(self) -> None:
        if vars(self._p).get("sample") is self:
            del self._p.sample
            if self._before is not None:
                self._p.sample = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.leave()
        sample = self._before or partial(type(self._p).sample, self._p)
        try:
            with hosts.current().sampling(self._p, self._plan):
                return sample(*args, **kwargs)
        except Exception as error:
            self._plan.library.encoders.release()  # what measured the likeness of earlier batches
            raise short_of_memory(error) or error  # noqa: B904  its cause is set


class Refusal:
    """Replaces the `sample` of a generation or of a sampler, and raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error


def restore(p: Any) -> None:
    """Takes our replacement of `p.sample` away."""
    if isinstance(sample := vars(p).get("sample"), Refusal):
        del p.sample
    elif isinstance(sample, Sampling):
        sample.leave()


@contextmanager
def ends_the_request(p: Any) -> Iterator[None]:
    """Keeps any exception raised inside, even a bug of ours, and raises it again when the host asks for samples."""
    try:
        yield
    except Exception as raised:
        tell("")
        error = short_of_memory(raised) or raised
        if not getattr(p, "is_api", False):
            error = in_page_words(error)
        refusal = Refusal(error)
        p.sample = refusal
        sampler = getattr(p, "sampler", None)
        if sampler is not None:  # in the middle of a sampling
            sampler.sample = sampler.sample_img2img = refusal
        p.comment(str(error))  # a grid continues with the next cell, and shows this below the image
        if not hosts.current().tells_errors(p):
            shared.state.interrupted = True  # before the first batch: no image, and the comment below
        hosts.current().stop()
    except BaseException:
        hosts.current().stop()
        raise


def short_of_memory(error: Exception) -> OutOfMemoryError | None:
    """Returns the message to show instead of an out-of-memory error; None for other errors."""
    if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
        return None
    # Forge Neo replaces the message of every exception that contains these three words, so ours must not.
    reason = re.sub("out of memory", "not enough memory", str(error), flags=re.IGNORECASE)[:300]
    short = OutOfMemoryError(
        "PuLID: not enough memory. Try a smaller image or batch, fewer people, "
        f"{hosts.current().less_memory()}, reading photos on the CPU (Settings, PuLID), or closing other programs. "
        f"({type(error).__name__}: {reason})"
    )
    short.__cause__ = error
    return short


def in_page_words(error: Exception) -> Exception:
    """Returns an error in the page's words: "Person 1, Photos: " instead of "PuLID unit 1, field images: "."""

    def words(found: re.Match[str]) -> str:
        field = FIELD.get(found[2])
        return f"Person {found[1]}, {field.label}: " if field else found[0]

    message = re.sub(r"PuLID unit (\d+), field (\w+): ", words, str(error))
    if not isinstance(error, PulidError) or message == str(error):
        return error
    told = type(error)(message)
    told.__cause__ = error
    return told
