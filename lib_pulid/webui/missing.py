"""The part of the accordion that is there only while files are missing: which, how large, under which licence, and the
button that gets them."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from lib_pulid import catalog
from lib_pulid.catalog import FAMILIES, WeightFile
from lib_pulid.download import in_words
from lib_pulid.webui.fetching import State
from lib_pulid.webui.library import Library

LOOK_EVERY = 0.5  # seconds


class Missing:
    """Widgets and what they do.

    Args:
        family: tells the family of the loaded checkpoint, "" where it cannot be told.
    """

    def __init__(self, tab: str, library: Library, family: Callable[[], str]) -> None:
        self._library, self._downloads, self._family = library, library.downloads, family
        files, elem_id = self.files(), f"pulid_{tab}_missing"
        with gr.Column(visible=bool(files), elem_id=elem_id, elem_classes=["pulid-missing-files"]) as self.panel:
            self.note = gr.HTML(self._text(files, State()), elem_id=f"{elem_id}_note", elem_classes=["pulid-note"])
            self.accept = gr.Checkbox(
                False, label=_notice(files), visible=any(file.restricted for file in files), elem_id=f"{elem_id}_accept"
            )
            self.accept.do_not_save_to_config = True
            with gr.Row(elem_classes=["pulid-buttons"]):
                self.start = gr.Button(_label(files), size="sm", variant="primary", elem_id=f"{elem_id}_start")
                self.stop = gr.Button("Stop", size="sm", visible=False, elem_id=f"{elem_id}_stop")
        self.look = gr.Button("Look for PuLID's files", visible=False, elem_id=f"{elem_id}_look")  # clicked by pulid.js
        self.outputs = [self.panel, self.note, self.accept, self.start, self.stop]

    def wire(self, refreshed: Sequence[tuple[Any, Any]], refresh: Callable[[], tuple[Any, Any]]) -> None:
        """refreshed: each unit's lists of identities and of models, which `refresh` fills when a download has ended."""
        lists = [widget for pair in refreshed for widget in pair]
        for event in (
            self.look.click(self.watch, [], self.outputs, show_progress=False),
            self.start.click(self.download, [self.accept], self.outputs, show_progress=False),
        ):
            event.then(lambda: refresh() * len(refreshed), [], lists, show_progress=False)
        self.stop.click(self._downloads.stop, [], [], show_progress=False)

    def files(self) -> tuple[WeightFile, ...]:
        """What the loaded checkpoint's family lacks; without one, the family of which there is a PuLID file."""
        folder = self._library.models_dir
        with_file = (family for family in FAMILIES if catalog.find_adapter(family, folder))
        lacking = catalog.missing(self._family() or next(with_file, FAMILIES[0]), folder)
        own = {file.family for file in self._library.adapters()}  # of any name: told by what is in them
        return tuple(file for file in lacking if file.group not in own)

    def download(self, accepted: bool) -> Iterator[tuple[Any, ...]]:
        """Starts, and tells until it is done; what needs a licence accepted that is not stays where it is."""
        self._downloads.start([file for file in self.files() if accepted or not file.restricted])
        yield from self.watch()

    def watch(self) -> Iterator[tuple[Any, ...]]:
        """The widgets' values, again and again while something is under way."""
        while True:
            state, files = self._downloads.state, self.files()
            restricted = any(file.restricted for file in files)
            yield (
                gr.update(visible=bool(files or state.running or state.problems)),
                gr.update(value=self._text(files, state)),
                gr.update(label=_notice(files), visible=restricted and not state.running),
                gr.update(value=_label(files), visible=bool(files) and not state.running),
                gr.update(visible=state.running),
            )
            if not state.running:
                return
            time.sleep(LOOK_EVERY)

    def _text(self, files: Sequence[WeightFile], state: State) -> str:
        folder = self._library.models_dir
        lines = [f"<p class='pulid-bad'>{_lines(problem)}</p>" for problem in state.problems]
        if state.running:
            return "".join([_progress(state), *lines])
        if not files:
            return "".join(lines)
        rows = "".join(
            f"<li><a href='{html.escape(file.url)}' target='_blank' rel='noopener'>{html.escape(file.name)}</a>, "
            f"{html.escape(file.purpose)}, {file.told_size}, {html.escape(file.licence)}<br>to "
            f"<code>{html.escape(str(folder / file.folder))}</code></li>"
            for file in files
        )
        return "".join([*lines, f"<p class='pulid-warn'>PuLID needs files that are not there yet:</p><ul>{rows}</ul>"])


def _progress(state: State) -> str:
    share = f"{in_words(state.done)} of {in_words(state.total)}" if state.total else "asking"
    note = f"; {html.escape(state.note)}" if state.note else ""
    rest = f" Then: {html.escape(', '.join(state.waiting))}." if state.waiting else ""
    bar = f"<progress max='{max(1, state.total)}' value='{state.done}'></progress>"
    return f"<p>{html.escape(state.name)}: {share}{note}.{rest}</p>{bar}"


def _notice(files: Sequence[WeightFile]) -> str:
    restricted = [file for file in files if file.restricted]
    licences = "; ".join(dict.fromkeys(file.licence for file in restricted))
    return f"I accept for {' and '.join(file.name for file in restricted)}: {licences}"


def _label(files: Sequence[WeightFile]) -> str:
    known, more = sum(file.size for file in files), any(not file.size for file in files)
    return f"Download {len(files)} file{'s' * (len(files) != 1)} ({in_words(known)}{' or more' * more})"


def _lines(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")
