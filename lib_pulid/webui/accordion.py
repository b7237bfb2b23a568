"""Builds the accordion's widgets. What they do is in actions.py.

Written for gradio 3.41 and 4.40; the hosts add `tooltip=` and `_js=` to both. Photos (their hashes, see dropped.py) and
the mask travel as text in hidden fields, so that a unit's values are plain JSON, from the page as from the API.

The host translates the page by whole texts (`localizations/`), so every label, hint and paragraph is one literal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion

from lib_pulid import __version__
from lib_pulid.fields import AUTO, FIELD, FIELDS, NONE, PRESET_TIPS, Field
from lib_pulid.units import PulidUnit
from lib_pulid.webui import blending, canvas
from lib_pulid.webui.actions import Actions
from lib_pulid.webui.following import FOLLOWING, PRESET_FIELDS, ROWS, Following, is_shown, preset_choices
from lib_pulid.webui.infotext import PastedField
from lib_pulid.webui.library import Library
from lib_pulid.webui.missing import Missing
from lib_pulid.webui.preset_row import PresetRow
from lib_pulid.webui.widgets import AT_ONCE, TOOL, Unspoken, remembered_answers, silent, tool

# The rows below "Advanced".
ADVANCED = (
    ("projection", "num_zero"),
    ("start_step", "cfg_start_step"),
    ("lora_weight",),
    ("identity_net",),
    ("start", "end"),
    ("face_order", "face_index"),
    ("fusion", "hires"),
    ("draw", "keep_best"),
)


@remembered_answers()
def build(
    tab: str, count: int, library: Library, actions: Actions, families: Sequence[str]
) -> tuple[list[Any], list[tuple[Any, PastedField]]]:
    """Builds the accordion of a tab.

    tab: "txt2img" or "img2img". count: number of units. families: of the checkpoints that the host can load.

    Returns the widgets that a script's ui() returns, in the order of the positional list; and how to paste into each.
    """
    on = InputAccordion(False, label="PuLID", elem_id=f"pulid_{tab}")
    with on:
        missing = Missing(tab, library, lambda: actions.family(""))
        following = Following(library, actions.family)
        gr.HTML(
            "<p>One tab is one person. Drop a photo with a large, sharp face, describe the image in the prompt, and "
            "generate.</p><p>Opening this panel enables PuLID and closing it disables it. Once you use the checkbox, "
            f"only the checkbox counts.</p><p class='pulid-version'>PuLID {__version__}</p>",
            elem_classes=["pulid-hint"],
        )
        family = families[0] if len(families) == 1 else ""
        shown = silent(gr.Textbox(value=family, visible=False, label="PuLID family", elem_id=f"pulid_{tab}_family"))
        with gr.Tabs(elem_id=f"pulid_{tab}_units", elem_classes=["pulid-units"]):
            # Read once for all units. The models come with the page, see `Missing.look`.
            lists = {"identities": actions.identity_choices(), "presets": following.saved_presets()["choices"]}
            units = []
            for number in range(1, count + 1):
                with gr.Tab(f"Person {number}", elem_id=f"pulid_{tab}_{number}"):
                    units.append(_Unit(tab, number, actions, following, shown, lists))
        blending.build(tab, [unit.widgets["identity"] for unit in units], library)
        if not family:
            _follow_checkpoint(tab, units, following, shown)
        with gr.Accordion("Regions: where each face may appear", open=False, elem_id=f"pulid_{tab}_regions"):
            gr.HTML(
                "<p>Drag on the frame to draw a box for the person whose tab is open; drag a box to move it, its "
                "corner to resize it. With the keyboard: Enter, arrows, Shift and arrows, Delete. "
                "No box: everywhere.</p><div class='pulid-frame'></div>",
                elem_classes=["pulid-hint"],
            )
    missing.wire(units, actions.refresh)
    for unit in units:
        unit.presets.wire_others(following, [other.presets for other in units])
    controls, fields = [on], [(on, PastedField(1, None, library))]
    for number, widgets in enumerate((unit.widgets for unit in units), 1):
        controls += [widgets[field.name] for field in FIELDS]
        fields += [(widgets[field.name], PastedField(number, field, library)) for field in FIELDS]
    return controls, fields


def _follow_checkpoint(tab: str, units: Sequence[_Unit], following: Following, shown: Any) -> None:
    """Adds a hidden button for the page's script, which knows the selected checkpoint and when it changes."""
    name = silent(gr.Textbox(value="", visible=False, label="PuLID checkpoint"))
    button = gr.Button("PuLID: follow the checkpoint", visible=False, elem_id=f"pulid_{tab}_checkpoint")
    button.click(
        following.follow_checkpoint,
        [shown, name, *(unit.widgets[field] for unit in units for field in FOLLOWING)],
        [shown, *(part for unit in units for part in unit.following)],
        _js=f"(shown, name, ...values) => [shown, Pulid.follow('{tab}'), ...values]",
        **AT_ONCE,
    )


class _Unit:
    """The widgets of one person, by field name.

    shown: the hidden field with the model family that the page shows. following: the widgets that change with it.
    stored: the events after which other people's lists are out of date. lists: what they offer.
    """

    def __init__(
        self, tab: str, number: int, actions: Actions, following: Following, shown: Any, lists: dict[str, list[str]]
    ) -> None:
        self._shown, self._lists = shown, lists
        self._tab, self._number, self._actions, self._following = tab, number, actions, following
        self._defaults = replace(PulidUnit(), enabled=number == 1).positions()
        self.widgets: dict[str, Any] = {}
        self._rows: dict[str, Any] = {}  # by their first settings
        self._photos()
        self._faces()
        self._strength()
        with gr.Accordion("Advanced", open=False, elem_id=self._id("advanced")):
            self._advanced()
        w = self.widgets
        self.following = [w["weight"], w["preset"], w["fusion"], *(self._rows[name] for name in ROWS)]
        self._wire()

    def _id(self, name: str) -> str:
        return f"pulid_{self._tab}_{self._number}_{name}"

    def _common(self, field: Field, tip: bool = True) -> dict[str, Any]:
        value = self._defaults[FIELDS.index(field)]
        # The hosts save the page's settings by label: equal labels would be one setting for all people.
        common = {"label": self._label(field.label), "value": value, "elem_id": self._id(field.name)}
        return common | {"interactive": True} | ({"info": field.tip} if tip else {})

    def _label(self, text: str) -> str:
        return text if self._number == 1 else f"{text} (person {self._number})"

    def _hidden(self, name: str) -> None:
        label = f"PuLID {self._number} {name}"
        widget = silent(gr.Textbox(value="", visible=False, elem_id=self._id(name), label=label))
        widget.preprocess = Unspoken.of  # gradio calls it with the page's value
        self.widgets[name] = widget

    # ------------------------------------------------------------ rows

    def _photos(self) -> None:
        self._hidden("images")
        enabled = self.widgets["enabled"] = gr.Checkbox(**self._common(FIELD["enabled"], tip=False))
        enabled.do_not_save_to_config = True  # saved by label, it would be one setting for all units
        with gr.Row(elem_classes=["pulid-photos"]):
            self.drop = gr.File(
                label="Photos: drop, paste, or click",
                file_count="multiple",
                file_types=["image"],
                height=150,
                elem_id=self._id("drop"),
                elem_classes=["pulid-drop"],
            )
            self.strip = gr.HTML("", elem_id=self._id("photos"), elem_classes=["pulid-strip"])
        # The page's script clicks it for the ✕ of a photo, and says which one.
        self.remove = gr.Button("PuLID: remove a photo", visible=False, elem_id=self._id("remove"))
        removed = f"PuLID {self._number} removed photo"
        self.removed = silent(gr.Number(value=-1, visible=False, label=removed))
        with gr.Row(elem_classes=["pulid-buttons"]):
            self.preview = gr.Button("Preview face", size="sm", elem_id=self._id("preview"))
            self.remove_all = gr.Button("Remove all photos", size="sm", elem_id=self._id("remove_all"))

    def _faces(self) -> None:
        self.note = gr.HTML("", elem_id=self._id("note"), elem_classes=["pulid-note"])
        self.shown = gr.Gallery(
            label="Preview",
            columns=3,
            object_fit="contain",
            visible=False,
            interactive=False,
            elem_id=self._id("shown"),
            elem_classes=["pulid-shown"],
        )
        self.seen = gr.HTML("", elem_id=self._id("seen"), elem_classes=["pulid-note"])
        self.asked = silent(gr.Textbox(value="", visible=False, label=f"PuLID {self._number} preview of"))
        with gr.Row(elem_classes=["pulid-line"]):
            self.widgets["identity"] = gr.Dropdown(
                choices=self._lists["identities"],
                allow_custom_value=True,
                **self._common(FIELD["identity"], tip=False)
                | {"value": NONE, "label": self._label("Or a saved identity")},
            )
            self.refresh = tool("\U0001f504", self._id("refresh"), "Refresh identities and models")
            label, hint = "Save this person as", "name, or name.pulidembd"
            name = gr.Textbox(label=label, placeholder=hint, max_lines=1, elem_id=self._id("save_name"))
            self.name = silent(name)
            self.save = gr.Button("Save identity", size="sm", elem_id=self._id("save"), **TOOL)
            self.delete = tool("\U0001f5d1", self._id("delete"), "Delete the selected identity")
            self.doomed = silent(gr.Textbox(value="", visible=False, label=f"PuLID {self._number} to delete"))

    def _strength(self) -> None:
        with gr.Row():
            self._setting("weight")
            family = self._shown.value
            preset = self._common(FIELD["preset"]) | ({"info": PRESET_TIPS[family]} if family else {})
            self.widgets["preset"] = gr.Radio(choices=preset_choices(family), **preset)
        label = self._label("Load a saved preset")
        self.presets = PresetRow(self._id, self._number, label, self._lists["presets"])
        self.widgets["model"] = gr.Dropdown(choices=[AUTO], allow_custom_value=True, **self._common(FIELD["model"]))

    def _advanced(self) -> None:
        for first, *others in ADVANCED:
            with gr.Row(visible=first not in ROWS or is_shown(first, self._shown.value, None)) as self._rows[first]:
                for name in (first, *others):
                    self._setting(name)
        self._hidden("mask")
        self.widgets["box"] = gr.Textbox(max_lines=1, placeholder="0 0 0.5 1", **self._common(FIELD["box"]))
        canvas.build(self._tab, self._number, self.widgets["mask"])

    def _setting(self, name: str) -> None:
        field = FIELD[name]
        if field.choices:
            self.widgets[name] = gr.Dropdown(choices=list(field.choices), **self._common(field))
        else:
            limits = {"minimum": field.minimum, "maximum": field.maximum, "step": field.step}
            self.widgets[name] = gr.Slider(**limits, **self._common(field))

    # ------------------------------------------------------------ events

    def _wire(self) -> None:
        act, follow, w = self._actions, self._following, self.widgets
        images, identity, face = w["images"], w["identity"], [w["face_order"], w["face_index"]]
        self.drop.upload(act.add_photos, [self.drop, images], [self.drop, images, w["enabled"], self.note], **AT_ONCE)
        images.change(act.show_photos, [images], [self.strip], **AT_ONCE)
        images.change(act.photos_count, [images, identity, self.note], [identity, self.note], **AT_ONCE)
        identity.change(act.identity_counts, [identity, images], [images], **AT_ONCE)
        draw, enabled = w["draw"], w["enabled"]
        draw.change(act.draw_counts, [draw, images, identity], [images, identity, enabled], **AT_ONCE)
        for other in (images, identity):
            other.change(act.draw_counts_no_more, [images, identity, draw], [draw], **AT_ONCE)
        which = "(images) => [images, Pulid.removed]"
        self.remove.click(act.remove_photo, [images, self.removed], [images], _js=which, **AT_ONCE)
        self.remove_all.click(lambda: "", [], [images], **AT_ONCE)
        self.refresh.click(act.refresh, [identity], [identity, w["model"]], **AT_ONCE)
        self._wire_preview([images, identity, *face])
        of = [self.name, images, w["model"], *face, w["fusion"], identity]
        saved = self.save.click(act.save, of, [identity, self.name, self.note], queue=False)
        shown = [identity, self.doomed, self.note]
        self.stored = [saved, self.delete.click(act.delete, [identity, self.doomed], shown, **AT_ONCE)]
        identity.change(lambda: "", [], [self.doomed], **AT_ONCE)
        self.presets.wire(follow, w, self.note, self.refresh)
        moved = [w[name] for name in PRESET_FIELDS]
        weight, *values = (w[name] for name in FOLLOWING)
        w["model"].change(follow.follow_model, [self._shown, *values], self.following[1:], **AT_ONCE)
        # Only when a person selects the model: a preset or pasted parameters bring their own weight.
        w["model"].input(follow.usual_weight, [self._shown, weight, w["model"]], [weight], **AT_ONCE)
        w["preset"].change(follow.apply_preset, [w["preset"]], moved, **AT_ONCE)
        for name in PRESET_FIELDS:
            name_preset = partial(follow.name_preset, FIELD[name].family)
            w[name].change(name_preset, [self._shown, *moved], [w["preset"]], **AT_ONCE)

    def _wire_preview(self, of: list[Any]) -> None:
        """Shows a preview. of: the widgets that determine it; it disappears when one of them changes."""
        act, shown = self._actions, [self.shown, self.seen]
        self.preview.click(act.asked, of, [self.asked], **AT_ONCE)
        made = self.preview.click(act.preview, of, shown, queue=False)
        made.then(act.still_asked, [*of, self.asked], shown, **AT_ONCE)
        for widget in of:
            widget.change(act.no_preview, [], shown, **AT_ONCE)
