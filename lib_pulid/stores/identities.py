"""Finds, loads, saves and deletes identities: the saved ones, and those in the cache of read photos."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from lib_pulid import disk, names
from lib_pulid.errors import IdentityMismatchError, SettingError
from lib_pulid.files.pulidembd import SUFFIX as PULIDEMBD
from lib_pulid.stores.folder import ModelsFolder

if TYPE_CHECKING:
    import numpy as np

    from lib_pulid.identity import Identity
    from lib_pulid.likeness import Recognizer
    from lib_pulid.photos import IdentityCache

SAFETENSORS = ".safetensors"
SUFFIXES = (SAFETENSORS, PULIDEMBD)
Found = TypeVar("Found")
CARD_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "avif")  # what the hosts save beside a model as its card's image


@dataclass(frozen=True)
class SavedIdentity:
    """A saved identity. adapter: the label of what it was made with, such as "PuLID v1.1 for SDXL"."""

    name: str
    short_hash: str
    adapter: str
    path: Path


class Identities:
    """The identities in a models folder."""

    def __init__(self, models: ModelsFolder) -> None:
        self._models = models
        self._lock = threading.Lock()
        self._cache: tuple[Path, IdentityCache] | None = None

    @property
    def folder(self) -> Path:
        """The folder of the saved ones."""
        return self._models.path / "identities"

    @property
    def cache(self) -> IdentityCache:
        """The identities of all photos that were read."""
        from lib_pulid.photos import IdentityCache

        folder = self._models.path / "cache"
        if self._cache is None or self._cache[0] != folder:
            self._cache = folder, IdentityCache(folder)
        return self._cache[1]

    def listed(self) -> list[SavedIdentity]:
        """Lists the saved identities by name, "clients/anna" in a folder; skips other files."""
        found = [replace(one, name=_shown_name(self._below(one.path))) for one in self._read(self._files())]
        return sorted(found, key=lambda saved: saved.name.lower())

    def names(self) -> list[str]:
        return [one.name for one in self.listed()]

    def find(self, name_or_hash: str) -> Path | None:
        """Returns an identity's path: saved, by name (in any spelling, with or without its folder) or short hash; or
        cached, by hash.

        Raises:
            SettingError: the name fits several.
        """
        paths = {path: self._below(path) for path in self._files()[::-1]}  # of two, the upper one
        for form in _SPELLINGS:
            spelled = {path: form(below) for path, below in paths.items()}
            found = names.find(name_or_hash, {name: path for path, name in spelled.items()})
            if found is not None:
                alike = sorted(str(paths[path]) for path in paths if spelled[path] == spelled[found])
                if len(alike) > 1 and name_or_hash not in alike:  # x.safetensors and x.SAFETENSORS
                    raise SettingError(f"{name_or_hash} could be {' or '.join(alike)}. Rename one of the files.")
                return found
        short_hash = name_or_hash.lower()
        if not names.HASH.fullmatch(short_hash):
            return None
        return next((one.path for one in (*self.listed(), *self._cached()) if one.short_hash == short_hash), None)

    def path(self, name_or_hash: str) -> Path:
        """Returns an identity's path, see `find`.

        Raises:
            IdentityMismatchError: no identity has this name or hash. SettingError: the name fits several.
        """
        path = self.find(name_or_hash)
        if path is None:
            raise self._unknown(name_or_hash)
        return path

    def load(self, name_or_hash: str) -> Identity:
        """Loads an identity. Raises: as `path`, and IdentityMismatchError: its file is damaged."""
        from lib_pulid.identity import Identity

        return Identity.load(self.path(name_or_hash))

    def load_for(self, judge: Recognizer | None, name_or_hash: str) -> Identity:
        """Loads an identity, and adds the embeddings that the cache has of the same one, if the judge's is missing: its
        photo was given again since it was saved. Raises: as `load`."""
        from lib_pulid.identity import Identity

        identity = self.load(name_or_hash)
        if judge is None or judge.key in identity.embeddings:
            return identity
        for found in self._cached():
            if judge.key not in identity.embeddings and found.short_hash == identity.short_hash:
                identity = replace(identity, embeddings={**identity.embeddings, **Identity.load(found.path).embeddings})
        return identity

    def save(self, name: str, identity: Identity) -> SavedIdentity:
        """Saves an identity under a new name; if the name ends in `.pulidembd`, in that format. `.safetensors` at its
        end is not a part of the name: it would be the name of another identity's file.

        Raises:
            SettingError: the name is taken, in any spelling, or is not a valid name. StorageError.
        """
        name = names.new(re.sub(rf"{re.escape(SAFETENSORS)}\s*$", "", name, flags=re.IGNORECASE))
        path = self.folder / (name if name.lower().endswith(PULIDEMBD) else f"{name}{SAFETENSORS}")
        with self._lock:  # of two who save under one name, the second gets an error
            self._check_free(path, [])
            thumbnail = identity.thumbnail if self._models.settings.portraits else None
            replace(identity, info={**identity.info, "name": name}, thumbnail=thumbnail).save(path)
            try:
                self._check_free(path, [path])  # another program may have saved another spelling
            except SettingError:
                path.unlink(missing_ok=True)
                raise
        return _as_saved(path, identity)

    def blend(self, people: Sequence[tuple[str, float]], name: str) -> SavedIdentity:
        """Saves a blend of saved identities, given by name or short hash with their shares, under a new name.

        Raises:
            SettingError, IdentityMismatchError: see `blend.blend`, `load` and `save`.
        """
        from lib_pulid.blend import blend

        names.new(name)  # before the work
        return self.save(name, blend([(one, self.load(one), share) for one, share in people]))

    def card(self, saved: SavedIdentity) -> tuple[Mapping[str, str], np.ndarray | None]:
        """Returns how an identity was made, and its small image of the face, uint8 RGB [h, w, 3]."""
        return self._remembered(saved.path, _card) or ({}, None)

    def delete(self, name: str) -> SavedIdentity:
        """Deletes a saved identity, and its card's image and notes.

        Raises:
            IdentityMismatchError: no saved identity has this name. SettingError: the name fits several. StorageError.
        """
        with self._lock:
            gone = self.named(name)
            stem, same = gone.path.stem, gone.path.with_suffix("")
            beside = [f"{stem}.json", *(f"{stem}{part}.{kind}" for part in ("", ".preview") for kind in CARD_IMAGES)]
            if any(one.path.with_suffix("") == same for one in self.listed() if one != gone):  # x.pulidembd beside x
                beside = []
            for one in (gone.path, *(gone.path.with_name(name) for name in beside)):
                disk.delete(one)
            return gone

    def named(self, name: str) -> SavedIdentity:
        """Returns a saved identity by name or hash, without loading it. Raises: as `delete`."""
        path = self.find(name)
        found = next((one for one in self.listed() if one.path == path), None)
        if found is None:
            raise self._unknown(name)
        return found

    def _cached(self) -> list[SavedIdentity]:
        return self._read(disk.listed(self._models.path / "cache", (SAFETENSORS,)))

    def _files(self) -> list[Path]:
        """Lists the files of saved identities, those of upper folders first."""
        return [path for folder in disk.folders(self.folder) for path in disk.listed(folder, SUFFIXES)]

    def _below(self, path: Path) -> PurePosixPath:
        return PurePosixPath(path.relative_to(self.folder).as_posix())

    def _read(self, paths: Sequence[Path]) -> list[SavedIdentity]:
        found = (self._remembered(path, _saved) for path in paths)
        return [saved for saved in found if saved is not None]

    def _remembered(self, path: Path, read: Callable[[Path], Found | None]) -> Found | None:
        try:
            return self._models.remembered(path, read)
        except OSError:  # not remembered: a network drive may be back the next time
            return None

    def _unknown(self, name: str) -> IdentityMismatchError:
        known = self.names()
        near = names.nearest(name, known)
        hint = f"Did you mean {near}?" if near else f"Saved identities: {', '.join(known) or 'none'}."
        return IdentityMismatchError(f"{name} is not in {self.folder}. {hint}")

    def _check_free(self, path: Path, own: Sequence[Path]) -> None:
        for other in self._files():
            if names.key(other.name) == names.key(path.name) and other not in own:
                shown = _shown_name(self._below(other))
                raise SettingError(f"{shown} is already saved. Choose another name, or delete {other} first.")


def _shown_name(path: PurePath) -> str:
    """Returns the name of a saved identity's file: without its suffix, but with that of another program's format."""
    return str(path if path.suffix.lower() == PULIDEMBD else path.with_suffix(""))


_SPELLINGS: Sequence[Callable[[PurePosixPath], str]] = (
    _shown_name,
    lambda below: str(below.with_suffix("")),
    str,
    lambda below: _shown_name(PurePosixPath(below.name)),
    lambda below: below.stem,
    lambda below: below.name,
)


def _as_saved(path: Path, identity: Identity) -> SavedIdentity:
    return SavedIdentity(_shown_name(PurePath(path.name)), identity.short_hash, identity.info.get("adapter", ""), path)


def _saved(path: Path) -> SavedIdentity | None:
    identity = _loaded(path)
    return None if identity is None else _as_saved(path, identity)


def _card(path: Path) -> tuple[Mapping[str, str], np.ndarray | None] | None:
    identity = _loaded(path)
    return None if identity is None else (identity.info, identity.thumbnail)


def _loaded(path: Path) -> Identity | None:
    """Loads an identity; None for any other file, and a damaged one. Raises: OSError: it cannot be read now."""
    from lib_pulid.identity import Identity

    try:
        return Identity.load(path)
    except IdentityMismatchError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        return None
