"""What the accordion's widgets have in common."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gradio as gr
from modules.ui_components import ToolButton

# The page bypasses gradio's queue, where a click would wait until the current image is done. Also, gradio 3.41 leaves a
# queued request open when its page is closed (`Queue.clean_event`), and Reload UI may wait for it.
AT_ONCE: Mapping[str, Any] = {"queue": False, "show_progress": False}
TOOL: Mapping[str, Any] = {"elem_classes": ["pulid-tool"]}  # a small button beside a field


@contextmanager
def remembered_answers() -> Iterator[None]:
    """Remembers what `inspect` and `typing` say of a function, and where uploads go, while the page is built.

    gradio 4 asks again for every widget and every event, always of the same few functions: more than half of the time
    that the accordion takes.
    """
    places: list[tuple[Any, str]] = [(inspect, "signature"), (inspect, "getfullargspec"), (typing, "get_type_hints")]
    if hasattr(blocks := getattr(gr, "blocks", None), "get_upload_folder"):  # not in gradio 3
        places.append((blocks, "get_upload_folder"))
    originals = [getattr(module, name) for module, name in places]
    for (module, name), original in zip(places, originals):
        setattr(module, name, _remembering(original))
    try:
        yield
    finally:
        for (module, name), original in zip(places, originals):
            setattr(module, name, original)


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    remembered = functools.cache(original)

    @functools.wraps(original)
    def ask(*args: Any, **kwargs: Any) -> Any:
        try:
            return remembered(*args, **kwargs)
        except TypeError:  # something that has no hash
            return original(*args, **kwargs)

    return ask


def silent(widget: Any) -> Any:
    """Keeps a widget out of the host's ui-config.json."""
    widget.do_not_save_to_config = True
    return widget


def tool(text: str, elem_id: str, tooltip: str) -> Any:
    """Builds the host's small button."""
    return ToolButton(text, elem_id=elem_id, tooltip=tooltip, **TOOL)


class Unspoken(str):
    """A photo as text whose repr is its length: after an error the hosts print a request's arguments."""

    @classmethod
    def of(cls, text: str | None) -> Unspoken | None:
        return None if text is None else cls(text)

    def __repr__(self) -> str:
        return f"<{len(self)} characters>" if len(self) else "''"
