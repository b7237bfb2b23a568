"""Builds the widgets that blend saved people into a new one, and does it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr

from lib_pulid.blend import read_share
from lib_pulid.errors import PulidError, SettingError
from lib_pulid.fields import NONE
from lib_pulid.webui.library import Library
from lib_pulid.webui.notes import bad, good
from lib_pulid.webui.widgets import AT_ONCE, TOOL, silent, tool


def build(tab: str, lists: Sequence[Any], library: Library) -> None:
    """Builds the panel. lists: the widgets of all persons that list the saved identities."""

    def elem(name: str) -> str:
        return f"pulid_{tab}_blend_{name}"

    saved = library.identities.names
    with gr.Accordion("Blend saved people into a new one", open=False, elem_id=elem("panel")):
        with gr.Row(elem_classes=["pulid-line"]):
            label = "People to blend"
            people = gr.Dropdown(choices=saved(), multiselect=True, label=label, elem_id=elem("people"))
            refresh = tool("\U0001f504", elem("refresh"), "Refresh identities and models")
        shares = gr.HTML(
            "<p>Choose two or more saved people; the sliders set how much of each. To save a person, add a photo above "
            "and click Save identity.</p><div class='pulid-shares'></div>",
            elem_id=elem("shares"),
            elem_classes=["pulid-hint"],
        )
        with gr.Row(elem_classes=["pulid-line"]):
            name = gr.Textbox(label="Save the blend as", max_lines=1, elem_id=elem("name"))
            save = gr.Button("Save blend", size="sm", elem_id=elem("save"), **TOOL)
        note = gr.HTML("", elem_id=elem("note"), elem_classes=["pulid-note"])
    for widget in (people, shares, name):
        silent(widget)
    listed = refresh.click(lambda: gr.update(choices=saved()), [], [people], **AT_ONCE)
    people.change(None, [people], [], _js=f"(people) => Blend.choose('{tab}', people)")
    made, shown = partial(blend, library, len(lists)), [people, name, note, *lists]
    given = f"(people, shares, name) => [people, Blend.shares('{tab}'), name]"
    stored = save.click(made, [people, shares, name], shown, _js=given, queue=False)
    for event in (listed, stored):
        # gradio 4 keeps the selected places in the list, where others may be now. The page's own names, since somebody
        # may have been chosen while the server answered.
        event.then(None, [people], [people], _js="(people) => [people]", **AT_ONCE)


def blend(library: Library, units: int, people: Any, shares: str, name: str) -> tuple[Any, ...]:
    """Saves a blend. people: the names, in the order in which they were chosen. shares: see `_shares`.

    Returns the people, an empty name field, a note, and the list of saved identities of each unit.
    """
    try:
        given = _shares(shares or "", people or [])
        if people and not (name or "").strip():
            raise SettingError("Enter a name for the blend first.")
        made = library.identities.blend(list(zip(people or [], given)), name or "")
    except PulidError as error:
        return (gr.update(), gr.update(), bad(str(error)), *[gr.update()] * units)
    note = good(f"Saved {made.name} ({made.short_hash}) for {made.adapter}. Select it as a saved identity.")
    saved = library.identities.names()
    return (gr.update(choices=saved), gr.update(value=""), note, *[gr.update(choices=[NONE, *saved])] * units)


def _shares(text: str, people: Sequence[str]) -> list[float]:
    """Reads the sliders' shares, "70, 30", in the order of the people; "": equal ones. Raises: SettingError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if parts and len(parts) != len(people):
        raise SettingError(f"There are {len(parts)} shares for {len(people)} people. Choose the people again.")
    return [read_share(f"{name}:{part}")[1] for name, part in zip(people, parts)] or [1.0] * len(people)
