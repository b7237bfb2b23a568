"""Implements the accordion's buttons: widget values in, widget values out. Settings are in following.py."""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from lib_pulid.errors import MissingWeightsError, PulidError, SettingError
from lib_pulid.faces import FaceChoice
from lib_pulid.fields import AUTO, FIELD, MOST_PHOTOS, NONE, NOT_DRAWN, check
from lib_pulid.images import load_image
from lib_pulid.stores.encoders import Listener
from lib_pulid.webui import pictures
from lib_pulid.webui.library import Library
from lib_pulid.webui.likeness import judges_of
from lib_pulid.webui.notes import bad, good, warn

if TYPE_CHECKING:
    from lib_pulid.identity import Identity


class Actions:
    """The accordion's buttons.

    Args:
        family: returns the model family of a checkpoint by name, or of the selected one by ""; "" if it is not known.
    """

    def __init__(self, library: Library, family: Callable[[str], str]) -> None:
        self._library, self.family = library, family

    # ------------------------------------------------------------ lists

    def identity_choices(self) -> list[str]:
        return [NONE, *self._library.identities.names()]

    def refresh(self, identity: str = NONE) -> tuple[Any, Any]:
        """Lists the identities and the models again. identity: the selected one; it is deselected if it is gone."""
        chosen = {} if self._is_there(identity) else {"value": NONE}
        models = [AUTO, *self._library.adapters.names()]
        return gr.update(choices=self.identity_choices(), **chosen), gr.update(choices=models)

    def _is_there(self, identity: str) -> bool:
        try:
            return not _saved(identity) or self._library.identities.find(identity) is not None
        except SettingError:  # several have this name: generating reports it
            return True

    # ------------------------------------------------------------ photos

    def add_photos(self, files: Any, images: str) -> tuple[Any, str, Any, str]:
        """Adds files. Returns an empty drop zone, all photos, the unit's checkbox (checked), and a note."""
        known, problems = list(_images(images)), []
        for file in files if isinstance(files, list) else [files] if files else []:
            path = Path(getattr(file, "name", None) or str(file))
            if len(known) == MOST_PHOTOS:
                problems.append(bad(f"{path.name} and all after it were skipped: {MOST_PHOTOS} photos is the maximum."))
                break
            try:
                known.append(self._library.photos.add(load_image(path)))
            except PulidError as error:
                problems.append(bad(str(error)))
        enabled = gr.update(value=True) if known else gr.update()
        return None, json.dumps(known) if known else "", enabled, "".join(problems)

    def show_photos(self, images: str) -> str:
        """Shows the photos, each with a ✕ that the page's script listens to."""
        return "".join(
            f"<figure>{self._thumbnail(text, n)}<button type='button' data-index='{n - 1}' "
            f"aria-label='Remove photo {n}' title='Remove photo {n}'>✕</button></figure>"
            for n, text in enumerate(_images(images), 1)
        )

    def _thumbnail(self, text: str, number: int) -> str:
        try:
            return f"<img alt='photo {number}' src='{self._library.photos.thumbnail(text, 'photo')}'>"
        except PulidError as error:
            return f"<img alt='photo {number}: add it again' title='{html.escape(str(error))}'>"

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
        return gr.update(value=NONE), gr.update(value=(note or "") + warn(told))

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
        return hashlib.sha256(json.dumps([images, identity, order, int(index or 0)]).encode()).hexdigest()

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
                lines = [bad("No photo yet: drop one above.")]
            else:
                self._preview_photos(_images(images), _choice(order, index), shown, lines)
        except PulidError as error:
            lines.append(bad(str(error)))
        finally:
            self._library.encoders.release()
        return gr.update(value=shown, visible=bool(shown)), "".join(lines)

    def _preview_identity(self, identity: str) -> tuple[list[tuple[np.ndarray, str]], list[str]]:
        found = self._library.identities.load(identity)
        shown = [] if found.thumbnail is None else [(found.thumbnail, identity)]
        of = found.info.get("blend", "")
        of = f"a blend of {of}" if of else f"{found.info.get('photos', '?')} photo(s)"
        made = f"{identity}: {of}, made for {found.info.get('adapter', '?')}."
        return shown, [good(made)]

    def _preview_photos(
        self, images: Sequence[str], choice: FaceChoice, shown: list[tuple[np.ndarray, str]], lines: list[str]
    ) -> None:
        for number, text in enumerate(images, 1):
            name = f"photo {number}"
            try:
                photo = self._library.photos.read(text, name)
                face = self._library.encoders.read_face(photo, choice, name, lambda text: lines.append(warn(text)))
            except MissingWeightsError:
                raise
            except PulidError as error:
                lines.append(bad(str(error)))
                continue
            found = "1 face" if len(face.detections) == 1 else f"{len(face.detections)} faces"
            shown += [
                (pictures.marked(face), f"{name}: {found}"),
                (face.aligned, f"{name}: aligned"),
                (pictures.parsed(face), f"{name}: encoder input"),
            ]
            doubts = pictures.warnings(face)
            lines.append(warn(f"{name}: {'; '.join(doubts)}.") if doubts else good(f"{name}: the face is good to use."))

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
            made = self._library.identities.load(identity) if _saved(identity) and not images else None
            saved = self._library.identities.save(
                name, made or self._encoded(images, model, _choice(order, index), fusion, told)
            )
        except PulidError as error:
            return gr.update(), gr.update(), bad(str(error))
        finally:
            self._library.encoders.release()
        note = good(f"Saved {saved.name} ({saved.short_hash}) for {saved.adapter}. It is selected below and used now.")
        listed = gr.update(choices=self.identity_choices(), value=saved.name)
        return listed, gr.update(value=""), "".join([note, *told])

    def delete(self, identity: str, asked: str) -> tuple[Any, str, str]:
        """Deletes the selected identity at the second click. asked: the identity that the first click was for.

        Returns the list, the identity that the next click would delete, and a note.
        """
        name = _saved(identity)
        try:
            if not name:
                raise SettingError("Select a saved identity to delete first.")
            path = self._library.identities.named(name).path
            if name != asked:
                return gr.update(), name, warn(f"Click again to delete {path}. It cannot be restored.")
            gone = self._library.identities.delete(name)
        except PulidError as error:
            return gr.update(), "", bad(str(error))
        return gr.update(choices=self.identity_choices(), value=NONE), "", good(f"Deleted {gone.name}.")

    def _encoded(self, images: str, model: str, choice: FaceChoice, fusion: str, told: list[str]) -> Identity:
        photos = [self._library.photos.read(text, f"photo {i}") for i, text in enumerate(_images(images), 1)]
        if not photos:
            raise SettingError("No photo to save: drop one above.")
        adapter = self._library.adapters.load(model or AUTO, self._family_for(model))
        listener = Listener(warn=lambda text: told.append(warn(text)))
        judges = judges_of(self._library, listener.warn) if self._library.folder.settings.likeness else ()
        return self._library.encoders.encode(photos, adapter, choice, fusion, next(iter(judges), None), listener)

    def _family_for(self, model: str) -> str:
        """Returns the family of a named file; with auto the checkpoint's, or the only one with files."""
        method = self._library.adapters.method_of(model)
        family = self.family("") if method is None else method.family
        if not family:
            families = {file.family for file in self._library.adapters.listed() if file.family} or {"sdxl"}
            if len(families) > 1:
                raise SettingError("Select a PuLID model first: an identity is saved either for SDXL or for FLUX.")
            family = families.pop()
        return family


def _choice(order: str, index: float | None) -> FaceChoice:
    """index: None where the slider's number was deleted."""
    return FaceChoice(order, int(index or 0))


def _saved(identity: str) -> str:
    """Returns the selected identity, or ""."""
    return "" if identity in (None, "", NONE) else identity


def _images(text: str) -> tuple[str, ...]:
    return check(FIELD["images"], text or "", 0)
