"""Builds the row that loads, saves and deletes presets of the user's own, see `presets`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr

from lib_pulid.fields import NONE
from lib_pulid.webui.following import Following
from lib_pulid.webui.presets import SAVED
from lib_pulid.webui.widgets import AT_ONCE, TOOL, silent, tool


class PresetRow:
    """The row of one person.

    elem: returns the id of an element by its name. number: of the person. label: of the list. names: of the presets.
    """

    def __init__(self, elem: Callable[[str], str], number: int, label: str, names: Sequence[str]) -> None:
        with gr.Row(elem_classes=["pulid-line"]):
            listed = gr.Dropdown(
                label=label, choices=list(names), value=NONE, interactive=True, elem_id=elem("presets")
            )
            self.listed = silent(listed)
            name = gr.Textbox(label="Save these settings as", max_lines=1, elem_id=elem("preset_name"))
            self._name = silent(name)
            self._save = gr.Button("Save preset", size="sm", elem_id=elem("save_preset"), **TOOL)
            self._delete = tool("\U0001f5d1", elem("delete_preset"), "Delete the preset of this name")
            self._doomed = silent(gr.Textbox(value="", visible=False, label=f"PuLID {number} preset to delete"))

    def wire(self, follow: Following, widgets: Mapping[str, Any], note: Any, refresh: Any) -> None:
        """widgets: of the person, by field. note: shows what happened. refresh: the button that lists all anew."""
        settings, listed, name, doomed = [widgets[field] for field in SAVED], self.listed, self._name, self._doomed
        listed.change(follow.load_preset, [listed], [*settings, listed, name, note], **AT_ONCE)
        saved = self._save.click(follow.save_preset, [name, *settings], [listed, name, note], **AT_ONCE)
        deleted = self._delete.click(follow.delete_preset, [name, doomed], [listed, doomed, note], **AT_ONCE)
        self._stored = [saved, deleted]
        refresh.click(follow.saved_presets, [], [listed], **AT_ONCE)

    def wire_others(self, follow: Following, rows: Sequence[PresetRow]) -> None:
        """Lists the presets of other people's rows anew after one was saved or deleted in this row."""
        lists = [row.listed for row in rows if row is not self]
        for event in self._stored if lists else ():
            event.then(partial(follow.lists_of_presets, len(lists)), [], lists, **AT_ONCE)
