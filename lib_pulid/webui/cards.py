"""The tab "Faces" beside Lora's: a card per saved identity, in the hosts' own page of extra networks.

Imported when the page is built: it needs the host's modules.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
from modules import shared, ui_extra_networks, ui_extra_networks_user_metadata

from lib_pulid.fields import FIELD
from lib_pulid.injection import MOST
from lib_pulid.methods import maker_of
from lib_pulid.stores.identities import SavedIdentity
from lib_pulid.tags import NAMES
from lib_pulid.webui import pictures
from lib_pulid.webui.library import Library
from lib_pulid.webui.widgets import AT_ONCE

TITLE = "Faces"
WEIGHT = "preferred weight"  # in a card's .json, as in Lora's


class FacesPage(ui_extra_networks.ExtraNetworksPage):
    """Lists the saved identities. A click on a card writes `<pulid:anna:0.8>` into the prompt."""

    def __init__(self, library: Library) -> None:
        super().__init__(TITLE)
        self._library = library

    def allowed_directories_for_previews(self) -> list[str]:
        return [os.path.abspath(self._library.identities.folder)]

    def list_items(self) -> Iterator[dict[str, Any]]:
        for index, saved in enumerate(self._library.identities.listed()):
            yield self._item(saved, index)

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        """Makes one card; None if the identity is gone. The host calls it after a card was edited."""
        named = (saved for saved in self._library.identities.listed() if saved.name == name)
        return next((self._item(saved, index) for saved in named), None)

    def _item(self, saved: SavedIdentity, index: int | None) -> dict[str, Any]:
        filename = os.path.abspath(saved.path)
        stem, _ = os.path.splitext(filename)
        info, thumbnail = self._library.identities.card(saved)
        portrait = "" if thumbnail is None else pictures.encode(thumbnail, "JPEG")
        item = {
            "name": saved.name,
            "filename": filename,
            "shorthash": saved.short_hash,
            "preview": self.find_preview(stem) or portrait,
            "description": self.find_description(stem),
            "search_terms": [self.search_terms_from_path(filename), saved.short_hash, saved.adapter],
            "local_preview": f"{stem}.{shared.opts.samples_format}",
            "metadata": info,
            "sort_keys": {"default": index, **self.get_sort_keys(filename)},
        }
        self.read_user_metadata(item)
        weight = preferred_weight(item["user_metadata"]) or default_weight(info)
        name = saved.short_hash if set(saved.name) & set(":>") else saved.name  # these would end it in the tag
        item["prompt"] = ui_extra_networks.quote_js(f"<{NAMES[0]}:{name}:{weight:g}>")
        return item

    def create_user_metadata_editor(self, ui: Any, tabname: str) -> Any:
        self._list_when_opened(ui.pages[-1], tabname)
        return FaceEditor(ui, tabname, self)

    def _list_when_opened(self, cards: Any, tabname: str) -> None:
        """Lists the identities anew whenever the tab is opened: the host lists once, and again with its button only.

        cards: the HTML in the tab, which the host has just made.
        """
        name = f"{tabname}_{self.extra_networks_tabname}"
        # As after that button.
        after = f"() => {{ applyExtraNetworkFilter('{name}'); window.setupAllResizeHandles?.(); }}"
        listed = cards.parent.select(lambda: self.create_html(tabname), [], [cards], **AT_ONCE)
        listed.then(None, [], [], _js=after)


class FaceEditor(ui_extra_networks_user_metadata.UserMetadataEditor):
    """The host's editor of a card, with the weight that a click writes."""

    def create_editor(self) -> None:
        self.create_default_editor_elems()
        weight = FIELD["weight"]
        limits = {"minimum": 0.0, "maximum": weight.maximum, "step": weight.step}
        slider = gr.Slider(label="Preferred weight", info="0: the default", value=0.0, interactive=True, **limits)
        self.edit_notes = gr.TextArea(label="Notes", lines=4)
        self.create_default_buttons()
        viewed = [self.edit_name, self.edit_description, self.html_filedata, self.html_preview, self.edit_notes, slider]
        opened = self.button_edit.click(self.put_values_into_components, [self.edit_name_input], viewed)
        opened.then(fn=lambda: gr.update(visible=True), inputs=[], outputs=[self.box])
        edited = [self.edit_description, self.edit_notes, slider]
        self.setup_save_handler(self.button_save, self.save_with_weight, edited)

    def put_values_into_components(self, name: str) -> list[Any]:
        return [*super().put_values_into_components(name), preferred_weight(self.get_user_metadata(name))]

    def save_with_weight(self, name: str, description: str, notes: str, weight: float) -> None:
        self.get_user_metadata(name)[WEIGHT] = weight
        self.save_user_metadata(name, description, notes)


def preferred_weight(metadata: dict[str, Any]) -> float:
    """Returns the weight in a card's .json; 0 if there is none in range: people edit these files."""
    weight = metadata.get(WEIGHT)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        return 0.0
    return float(weight) if 0 < weight <= MOST["weight"] else 0.0


def default_weight(info: Mapping[str, str]) -> float:
    """Returns the default weight of the method that made an identity."""
    label = info.get("adapter", "")
    return maker_of(label, label.rpartition(" for ")[2].lower()).weight


def register(library: Library) -> None:
    """Adds the tab; to be called from on_before_ui."""
    ui_extra_networks.register_page(FacesPage(library))
