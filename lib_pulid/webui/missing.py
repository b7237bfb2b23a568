"""Builds the part of the accordion that shows missing files: names, sizes, licenses, and a button to download them."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from lib_pulid import hosts
from lib_pulid.disk import format_size
from lib_pulid.fields import AUTO
from lib_pulid.files import catalog, control_nets
from lib_pulid.files.catalog import FAMILIES, WeightFile
from lib_pulid.methods import Method, usual
from lib_pulid.webui.fetching import State
from lib_pulid.webui.library import Library
from lib_pulid.webui.widgets import AT_ONCE, silent

_CHOSEN = ("identity", "enabled", "model")  # of each unit, what is read


class Missing:
    """The widgets for missing files, hidden while none is missing. The page's script asks for them when it is there.

    Args:
        family: returns the loaded checkpoint's model family, "" if it is not known.
    """

    def __init__(self, tab: str, library: Library, family: Callable[[], str]) -> None:
        self._tab = tab
        self._library, self._downloads, self._family = library, library.downloads, family
        elem_id = f"pulid_{tab}_missing"
        with gr.Column(visible=False, elem_id=elem_id, elem_classes=["pulid-missing-files"]) as self.panel:
            self.note = gr.HTML("", elem_id=f"{elem_id}_note", elem_classes=["pulid-note"])
            self.accept = silent(
                gr.Checkbox(False, label="I accept the license", visible=False, elem_id=f"{elem_id}_accept")
            )
            with gr.Row(elem_classes=["pulid-buttons"]):
                self.start = gr.Button("Download", size="sm", variant="primary", elem_id=f"{elem_id}_start")
                self.stop = gr.Button("Stop", size="sm", visible=False, elem_id=f"{elem_id}_stop")
        self.look = gr.Button("Look for PuLID's files", visible=False, elem_id=f"{elem_id}_look")  # clicked by pulid.js
        self.outputs = [self.panel, self.note, self.accept, self.start, self.stop]

    def wire(self, units: Sequence[Any], refresh: Callable[[str], tuple[Any, Any]]) -> None:
        """Connects the buttons. units: of the accordion; refresh: lists identities and models again."""
        lists = [unit.widgets[name] for unit in units for name in ("identity", "model")]

        def look(accepted: bool, *chosen: Any) -> list[Any]:
            values = [*self.values(accepted, _models(chosen))]
            if self._downloads.state.running:
                return values + [gr.update()] * len(lists)
            return values + [update for identity in chosen[:: len(_CHOSEN)] for update in refresh(identity)]

        def start(accepted: bool, *chosen: Any) -> list[Any]:
            files = self.files(_models(chosen))
            self._downloads.start([file for file in files if accepted or not file.restricted])
            return look(accepted, *chosen)

        chosen = [unit.widgets[name] for unit in units for name in _CHOSEN]
        asks = {"inputs": [self.accept, *chosen], "outputs": [*self.outputs, *lists], **AT_ONCE}
        shows = {"inputs": [self.accept, *chosen], "outputs": self.outputs, **AT_ONCE}
        for unit in units:
            for name in ("model", "enabled"):
                unit.widgets[name].change(lambda accepted, *chosen: self.values(accepted, _models(chosen)), **shows)
        self.look.click(look, **asks, _js=f"(...values) => {{ Pulid.look('{self._tab}'); return values; }}")
        self.start.click(start, **asks)
        for unit in units:
            unit.refresh.click(look, **asks)
            for event in unit.stored:
                event.then(look, **asks)
        self.stop.click(self._downloads.stop, [], [], **AT_ONCE)
        self.accept.change(look, **asks)

    def files(self, models: Sequence[str] = (AUTO,)) -> tuple[WeightFile, ...]:
        """Lists the files missing for the selected models: with "auto", PuLID's; else those of the file's method."""
        found: dict[str, WeightFile] = {}
        for model in dict.fromkeys(models):
            method = None if model == AUTO else self._library.adapters.method_of(model)
            is_other = method is not None and method.name != usual(method.family).name
            lacking = self._of_method(method) if is_other else self._of_pulid()  # type: ignore[arg-type]
            found |= {file.name: file for file in lacking}
        return tuple(found.values())

    def _of_method(self, method: Method) -> tuple[WeightFile, ...]:
        folder, runs = self._library.folder, not hosts.current().why_no_control_nets()
        return control_nets.missing_for(method, folder.path, folder.models_dir, runs)

    def _of_pulid(self) -> tuple[WeightFile, ...]:
        """Lists the files missing for the loaded checkpoint's family; without one, for a family with a PuLID file."""
        folder = self._library.folder.models_dir
        with_file = (family for family in FAMILIES if catalog.find_adapter(family, folder))
        lacking = catalog.missing(self._family() or next(with_file, FAMILIES[0]), folder)
        # Under any name: recognized by content.
        methods = [file.method for file in self._library.adapters.listed() if file.method is not None]
        own = {method.family for method in methods if method.name == usual(method.family).name}
        return tuple(file for file in lacking if file.group not in own)

    def values(self, accepted: bool, models: Sequence[str] = (AUTO,)) -> tuple[Any, ...]:
        """Returns the widgets' current values; the page polls them during a download. models: the selected ones."""
        state, files = self._downloads.state, self.files(models)
        restricted = [file for file in files if file.restricted]
        names, licences = (file.name for file in restricted), dict.fromkeys(file.licence for file in restricted)
        notice = f"I accept the license of {' and '.join(names)}: {'; '.join(licences)}"
        return (
            gr.update(visible=bool(files or state.running or state.problems)),
            gr.update(value=self._text(files, state)),
            gr.update(label=notice, visible=bool(restricted) and not state.running),
            gr.update(value=_label(files, accepted), visible=bool(files) and not state.running),
            gr.update(visible=state.running),
        )

    def _text(self, files: Sequence[WeightFile], state: State) -> str:
        folder = self._library.folder.models_dir
        problems = (html.escape(problem).replace("\n", "<br>") for problem in state.problems)
        lines = [f"<p class='pulid-bad'>{problem}</p>" for problem in problems]
        if state.running:
            return "".join([_progress(state), *lines])
        if not files:
            return "".join(lines)
        rows = "".join(
            f"<li><a href='{html.escape(file.url)}' target='_blank' rel='noopener'>{html.escape(file.name)}</a>, "
            f"{html.escape(file.purpose)}, {file.size_text}, {html.escape(file.licence)}<br>to "
            f"<code>{html.escape(str(folder / file.folder))}</code></li>"
            for file in files
        )
        return "".join([*lines, f"<p class='pulid-warn'>PuLID needs files that are missing:</p><ul>{rows}</ul>"])


def _models(chosen: Sequence[Any]) -> tuple[str, ...]:
    """Returns the models of the enabled units; of the first, if none is. chosen: the values of _CHOSEN, by unit."""
    enabled, models = chosen[1 :: len(_CHOSEN)], chosen[2 :: len(_CHOSEN)]
    return tuple(model or AUTO for on, model in zip(enabled, models) if on) or (*models[:1],) or (AUTO,)


def _progress(state: State) -> str:
    amount = f"{format_size(state.done)} of {format_size(state.total)}" if state.total else "connecting"
    note = f"; {html.escape(state.note)}" if state.note else ""
    rest = f" Next: {html.escape(', '.join(state.waiting))}." if state.waiting else ""
    bar = f"<progress max='{max(1, state.total)}' value='{state.done}'></progress>"
    return f"<p>{html.escape(state.name)}: {amount}{note}.{rest}</p>{bar}"


def _label(files: Sequence[WeightFile], accepted: bool) -> str:
    ready = [file for file in files if accepted or not file.restricted]
    chosen = ready or files
    known, more = sum(file.size for file in chosen), " or more" * any(not file.size for file in chosen)
    what = f"{len(chosen)} file{'s' * (len(chosen) != 1)} ({format_size(known)}{more})"
    return f"Download {what}" if ready else f"To download {what}, accept the license above"
