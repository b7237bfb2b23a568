"""Implements the accordion's buttons: widget values in, widget values out."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from lib_pulid.blend import read_share
from lib_pulid.errors import MissingWeightsError, PulidError, SettingError
from lib_pulid.faces import FaceChoice
from lib_pulid.fields import (
    AUTO,
    CUSTOM,
    FAMILIES,
    FIELD,
    MOST_PHOTOS,
    NONE,
    NOT_DRAWN,
    PRESET_FAMILY,
    PRESET_TIPS,
    WEIGHTS,
    check,
    preset_name,
    preset_values,
)
from lib_pulid.images import load_image
from lib_pulid.methods import METHODS, Method, has, usual
from lib_pulid.webui import pictures
from lib_pulid.webui.library import Library
from lib_pulid.webui.presets import SAVED

if TYPE_CHECKING:
    from lib_pulid.identity import Identity

THUMBNAIL = 192
PRESET_FIELDS = ("projection", "num_zero", "start_step")  # the fields that presets set
# The first settings of the rows that only some methods have.
ROWS = ("projection", "start_step", "lora_weight", "identity_net")
FOLLOWING = ("weight", "fusion", *PRESET_FIELDS, "model")  # what is read when the checkpoint or the model changes


# The page bypasses gradio's queue, where a click would wait until the current image is done. Also, gradio 3.41 leaves a
# queued request open when its page is closed (`Queue.clean_event`), and Reload UI may wait for it.
AT_ONCE: Mapping[str, Any] = {"queue": False, "show_progress": False}


class Actions:
    """The accordion's buttons.

    Args:
        family: returns the model family of a checkpoint by name, or of the selected one by ""; "" if it is not known.
    """

    def __init__(self, library: Library, family: Callable[[str], str]) -> None:
        self._library, self.family = library, family

    # ------------------------------------------------------------ lists

    def identity_choices(self) -> list[str]:
        return [NONE, *(one.name for one in self._library.identities())]

    def model_choices(self) -> list[str]:
        return [AUTO, *(file.name for file in self._library.adapters())]

    def refresh(self, identity: str = NONE) -> tuple[Any, Any]:
        """Lists the identities and the models again. identity: the selected one; it is deselected if it is gone."""
        chosen = {} if self._is_there(identity) else {"value": NONE}
        return gr.update(choices=self.identity_choices(), **chosen), gr.update(choices=self.model_choices())

    def _is_there(self, identity: str) -> bool:
        try:
            return not _saved(identity) or self._library.find(identity) is not None
        except SettingError:  # several have this name: generating reports it
            return True

    # ------------------------------------------------------------ photos

    def add_photos(self, files: Any, images: str) -> tuple[Any, str, Any, str]:
        """Adds files. Returns an empty drop zone, all photos, the unit's checkbox (checked), and a note."""
        known, problems = list(_images(images)), []
        for file in files if isinstance(files, list) else [files] if files else []:
            path = Path(getattr(file, "name", None) or str(file))
            if len(known) == MOST_PHOTOS:
                problems.append(f"{path.name} and all after it were skipped: {MOST_PHOTOS} photos is the maximum.")
                break
            try:
                known.append(pictures.packed(load_image(path)))
            except PulidError as error:
                problems.append(str(error))
        return None, json.dumps(known) if known else "", gr.update(value=True) if known else gr.update(), _bad(problems)

    def show_photos(self, images: str) -> str:
        """Shows the photos, each with a ✕ that the page's script listens to."""
        photos = [pictures.decode(photo, "photo") for photo in _images(images)]
        return "".join(
            f"<figure><img alt='photo {n}' src='{pictures.small(photo, THUMBNAIL)}'><button type='button' "
            f"data-index='{n - 1}' aria-label='Remove photo {n}' title='Remove photo {n}'>✕</button></figure>"
            for n, photo in enumerate(photos, 1)
        )

    def remove_photo(self, images: str, index: float) -> str:
        """Removes a photo by its number, from 0."""
        rest = [photo for n, photo in enumerate(_images(images)) if n != int(index)]
        return json.dumps(rest) if rest else ""

    # ------------------------------------------------------------ either photos or a saved identity

    def photos_count(self, images: str, identity: str, note: str) -> tuple[Any, Any]:
        """Deselects the identity after photos were added, and says so in the note."""
        if not (images and _saved(identity)):
            return gr.update(), gr.update()
        told = f"The photos are used now; the saved identity {identity} was deselected."
        return gr.update(value=NONE), gr.update(value=(note or "") + _warn(told))

    def identity_counts(self, identity: str, images: str) -> Any:
        """Removes the photos after an identity was selected: unused, they would mix with the next person's."""
        return "" if images and _saved(identity) else gr.update()

    def draw_counts(self, draw: str, images: str, identity: str) -> tuple[Any, Any, Any]:
        """Removes photos and identity after drawing was chosen, and checks the unit's checkbox."""
        if draw in (None, NOT_DRAWN):
            return gr.update(), gr.update(), gr.update()
        gone = gr.update(value=NONE) if _saved(identity) else gr.update()
        return "" if images else gr.update(), gone, gr.update(value=True)

    def draw_counts_no_more(self, images: str, identity: str, draw: str) -> Any:
        """Stops drawing after a photo or an identity was given."""
        given = images or _saved(identity)
        return gr.update(value=NOT_DRAWN) if given and draw not in (None, NOT_DRAWN) else gr.update()

    # ------------------------------------------------------------ faces

    def asked(self, images: str, identity: str, order: str, index: float) -> str:
        """Returns a hash of what a preview shows."""
        return hashlib.sha256(json.dumps([images, identity, order, int(index)]).encode()).hexdigest()

    def still_asked(self, images: str, identity: str, order: str, index: float, asked: str) -> tuple[Any, Any]:
        """Hides a finished preview if something else has been selected meanwhile."""
        same = asked == self.asked(images, identity, order, index)
        return (gr.update(), gr.update()) if same else self.no_preview()

    def no_preview(self) -> tuple[Any, Any]:
        return gr.update(value=[], visible=False), ""

    def preview(self, images: str, identity: str, order: str, index: float) -> tuple[Any, str]:
        """Finds the faces. Returns the gallery, and notes on what was found."""
        shown: list[tuple[np.ndarray, str]] = []
        lines: list[str] = []
        try:
            if _saved(identity):
                shown, lines = self._preview_identity(identity)
            elif not images:
                lines = [_bad(["No photo yet: drop one above."])]
            else:
                self._preview_photos(_images(images), FaceChoice(order, int(index)), shown, lines)
        except PulidError as error:
            lines.append(_bad([str(error)]))
        finally:
            self._library.release()
        return gr.update(value=shown, visible=bool(shown)), "".join(lines)

    def _preview_identity(self, identity: str) -> tuple[list[tuple[np.ndarray, str]], list[str]]:
        found = self._library.saved(identity)
        shown = [] if found.thumbnail is None else [(found.thumbnail, identity)]
        of = found.info.get("blend", "")
        of = f"a blend of {of}" if of else f"{found.info.get('photos', '?')} photo(s)"
        made = f"{identity}: {of}, made for {found.info.get('adapter', '?')}."
        return shown, [_good(made)]

    def _preview_photos(
        self, images: Sequence[str], choice: FaceChoice, shown: list[tuple[np.ndarray, str]], lines: list[str]
    ) -> None:
        for number, text in enumerate(images, 1):
            name = f"photo {number}"
            try:
                photo = pictures.decode(text, name)
                face = self._library.read_face(photo, choice, name, lambda text: lines.append(_warn(text)))
            except MissingWeightsError:
                raise
            except PulidError as error:
                lines.append(_bad([str(error)]))
                continue
            found = "1 face" if len(face.detections) == 1 else f"{len(face.detections)} faces"
            shown += [
                (pictures.marked(photo, face), f"{name}: {found}"),
                (face.aligned, f"{name}: aligned"),
                (pictures.parsed(face), f"{name}: encoder input"),
            ]
            notes = pictures.warnings(face)
            lines.append(_warn(f"{name}: {'; '.join(notes)}.") if notes else _good(f"{name}: the face is good to use."))

    def save(
        self, name: str, images: str, model: str, order: str, index: float, fusion: str, identity: str = NONE
    ) -> tuple[Any, Any, str]:
        """Saves the person. Returns the list with the new identity selected, an empty name field, and a note.

        Without photos, the selected identity is saved under another name, or in another format.
        """
        told: list[str] = []
        try:
            if not name.strip():
                raise SettingError("Enter a name for the identity first.")
            made = self._library.saved(identity) if _saved(identity) and not images else None
            saved = self._library.save(
                name, made or self._encoded(images, model, FaceChoice(order, int(index)), fusion, told)
            )
        except PulidError as error:
            return gr.update(), gr.update(), _bad([str(error)])
        finally:
            self._library.release()
        note = _good(f"Saved {saved.name} ({saved.short_hash}) for {saved.adapter}. It is selected below and used now.")
        listed = gr.update(choices=self.identity_choices(), value=saved.name)
        return listed, gr.update(value=""), "".join([note, *told])

    def list_people(self) -> Any:
        """Lists the saved identities again, for a blend."""
        return gr.update(choices=self.identity_choices()[1:])

    def blend(self, units: int, people: Any, shares: str, name: str) -> tuple[Any, ...]:
        """Saves a blend. people: the names, in the order in which they were chosen. shares: "" for equal ones.

        Returns the people, an empty name field, a note, and the list of saved identities of each unit.
        """
        try:
            given = _shares(shares or "", people or [])
            made = self._library.blend(list(zip(people or [], given)), name or "")
        except PulidError as error:
            return (gr.update(), gr.update(), _bad([str(error)]), *[gr.update()] * units)
        note = _good(f"Saved {made.name} ({made.short_hash}) for {made.adapter}. Select it as a saved identity.")
        return (self.list_people(), gr.update(value=""), note, *[gr.update(choices=self.identity_choices())] * units)

    def delete(self, identity: str, asked: str) -> tuple[Any, str, str]:
        """Deletes the selected identity at the second click. asked: the identity that the first click was for.

        Returns the list, the identity that the next click would delete, and a note.
        """
        name = _saved(identity)
        try:
            if not name:
                raise SettingError("Select a saved identity to delete first.")
            path = self._library.listed(name).path
            if name != asked:
                return gr.update(), name, _warn(f"Click again to delete {path}. It cannot be restored.")
            gone = self._library.delete(name)
        except PulidError as error:
            return gr.update(), "", _bad([str(error)])
        return gr.update(choices=self.identity_choices(), value=NONE), "", _good(f"Deleted {gone.name}.")

    def _encoded(self, images: str, model: str, choice: FaceChoice, fusion: str, told: list[str]) -> Identity:
        photos = [pictures.photo(text, f"photo {i}") for i, text in enumerate(_images(images), 1)]
        if not photos:
            raise SettingError("No photo to save: drop one above.")
        adapter = self._library.adapter(model or AUTO, self._family_for(model))
        told_of, judge = lambda text: told.append(_warn(text)), self._library.judge()  # noqa: E731
        return self._library.encode(photos, adapter, choice, fusion, warn=told_of, judge=judge)

    def _family_for(self, model: str) -> str:
        """Returns the family of a named file; with auto the checkpoint's, or the only one with files."""
        files = self._library.adapters()
        named = [file.family for file in files if model in (file.name, file.path.stem) and file.family]
        family = named[0] if named else self.family("")
        if not family:
            families = {file.family for file in files if file.family} or {"sdxl"}
            if len(families) > 1:
                raise SettingError("Select a PuLID model first: an identity is saved either for SDXL or for FLUX.")
            family = families.pop()
        return family

    # ------------------------------------------------------------ presets and the checkpoint's family

    def apply_preset(self, preset: str) -> list[Any]:
        """Sets the widgets of PRESET_FIELDS."""
        values = preset_values(preset)
        return [gr.update(value=values[name]) if name in values else gr.update() for name in PRESET_FIELDS]

    def name_preset(self, family: str, shown: str, *values: Any) -> Any:
        """Names the preset after a setting of `family` changed. shown: the page's family. values: of PRESET_FIELDS."""
        if shown not in ("", family):
            return gr.update()
        return gr.update(value=_preset_name(family, values))

    def saved_presets(self) -> Any:
        """Lists the user's presets, none of them selected."""
        return gr.update(choices=[NONE, *self._library.presets.names()], value=NONE)

    def load_preset(self, name: str) -> list[Any]:
        """Returns the widgets of a preset's fields, the list with nothing selected, and a note."""
        if name in (None, "", NONE):
            return [gr.update()] * (len(SAVED) + 2)
        try:
            values = self._library.presets.load(name)
        except PulidError as error:
            return [*[gr.update()] * len(SAVED), self.saved_presets(), _bad([str(error)])]
        widgets = [gr.update() if values.get(field) is None else gr.update(value=values[field]) for field in SAVED]
        return [*widgets, self.saved_presets(), _good(f"The settings are those of the preset {name}.")]

    def save_preset(self, name: str, *values: Any) -> tuple[Any, Any, str]:
        """Saves the values of SAVED under a name. Returns the list, an empty name field, and a note."""
        try:
            if not name.strip():
                raise SettingError("Enter a name for the preset first.")
            name = self._library.presets.save(name, dict(zip(SAVED, values)))
        except PulidError as error:
            return gr.update(), gr.update(), _bad([str(error)])
        return (
            self.saved_presets(),
            gr.update(value=""),
            _good(f"Saved the preset {name}: these settings, without the face."),
        )

    def follow_checkpoint(self, shown: str, name: str, *values: Any) -> list[Any]:
        """Shows the settings of the checkpoint's family in every unit.

        shown: the page's family, "" for all. name: of the checkpoint. values: of FOLLOWING, unit by unit.

        Returns the family; then for every unit weight, preset, fusion, and ROWS.
        """
        family, count = self.family(name or ""), len(FOLLOWING)
        units = [values[i : i + count] for i in range(0, len(values), count)]
        if family == shown:
            return [gr.update()] * (1 + (3 + len(ROWS)) * len(units))
        return [family, *(update for unit in units for update in self.follow_model(family, *unit))]

    def follow_model(self, family: str, *values: Any) -> list[Any]:
        """Shows the settings of a family and of the selected model's method in one unit. values: of FOLLOWING.

        Returns weight, preset, fusion, and ROWS.
        """
        *others, model = values
        method = self._library.method_of(model) or (usual(family) if family else None)
        return _for_method(family, method, *others)

    # ------------------------------------------------------------ mask

    def keep_region(self, picture: Any, strokes: Any = None) -> str:
        """Returns the mask as text. gradio 3 passes image and strokes in a dict."""
        if isinstance(picture, dict):
            picture, strokes = picture.get("image"), picture.get("mask")
        return pictures.drawn_region(picture, strokes)

    def empty_picture(self, width: float, height: float) -> np.ndarray:
        """Returns a black image of the size that will be generated."""
        return np.zeros((int(height or 512), int(width or 512), 3), np.uint8)


def _for_method(family: str, method: Method | None, weight: float, fusion: str, *values: Any) -> list[Any]:
    """method: None if neither the checkpoint's family nor the model is known."""
    fusions = [one for one in FIELD["fusion"].choices if one != "id_mix" or method is None or _may_mix(method)]
    has_preset = method is None or has(method, "preset")
    preset = {"value": _preset_name(family, values), "info": PRESET_TIPS[family]} if family and has_preset else {}
    is_default = method is not None and weight != method.weight and weight in WEIGHTS.values()
    return [
        gr.update(value=method.weight) if method is not None and is_default else gr.update(),
        gr.update(choices=preset_choices(family), visible=has_preset, **preset),
        gr.update(choices=fusions, value=fusion if fusion in fusions else FIELD["fusion"].default),
        *(gr.update(visible=_is_shown(name, family, method)) for name in ROWS),
    ]


def _may_mix(method: Method) -> bool:
    """Whether id_mix is of use in a version of the method; "auto" may be any of them."""
    return any(one.several == "first" for one in METHODS if (one.name, one.family) == (method.name, method.family))


def _is_shown(name: str, family: str, method: Method | None) -> bool:
    """Whether a setting is of use with a checkpoint's family and a method, as far as they are known."""
    candidates = [usual(one) for one in FAMILIES] if method is None else [method]
    return family in ("", FIELD[name].family) and any(has(one, name) for one in candidates)


def preset_choices(family: str) -> list[str]:
    """Lists a family's presets; "": all."""
    return [*(name for name, own in PRESET_FAMILY.items() if family in ("", own)), CUSTOM]


def _preset_name(family: str, values: Sequence[Any]) -> str:
    return preset_name(family, dict(zip(PRESET_FIELDS, values)))


def _shares(text: str, people: Sequence[str]) -> list[float]:
    """Reads shares as typed, "0.7, 0.3". Raises: SettingError."""
    parts = [part for part in text.replace(";", ",").replace(" ", ",").split(",") if part]
    if parts and len(parts) != len(people):
        raise SettingError(
            f"{len(parts)} shares for {len(people)} people: write one for each, in their order, or none."
        )
    return [read_share(f"{name}:{part}")[1] for name, part in zip(people, parts)] or [1.0] * len(people)


def _saved(identity: str) -> str:
    """Returns the selected identity, or ""."""
    return "" if identity in (None, "", NONE) else identity


def _images(text: str) -> tuple[str, ...]:
    return check(FIELD["images"], text or "", 0)


def _good(text: str) -> str:
    return f"<p class='pulid-good'>{html.escape(text)}</p>"


def _warn(text: str) -> str:
    return f"<p class='pulid-warn'>{html.escape(text)}</p>"


def _bad(problems: Sequence[str]) -> str:
    return "".join(f"<p class='pulid-bad'>{html.escape(problem)}</p>" for problem in problems)
