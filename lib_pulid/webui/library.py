"""Finds and loads what is in the models folder: PuLID files, saved identities, and the encoders of photos.

One adapter stays loaded on the CPU; the encoders are released after use.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib_pulid import disk, names
from lib_pulid.disk import listed as _files
from lib_pulid.errors import (
    IdentityMismatchError,
    Interrupted,
    MissingWeightsError,
    PulidError,
    SettingError,
    UnsupportedModelError,
    WrongWeightsError,
)
from lib_pulid.fields import AUTO, Number
from lib_pulid.files import catalog
from lib_pulid.files.checkpoint_header import checkpoint_family, read_dtypes, read_header
from lib_pulid.files.pickle_header import read_pickle_header
from lib_pulid.files.pulidembd import SUFFIX as PULIDEMBD
from lib_pulid.methods import DTYPES, Header, Method, Tensors, maker_of, method_of, usual
from lib_pulid.units import at_unit
from lib_pulid.webui.fetching import Downloads
from lib_pulid.webui.interruptible import Interruptible
from lib_pulid.webui.presets import Presets
from lib_pulid.webui.readers import Readers

if TYPE_CHECKING:
    from lib_pulid.faces import Face, FaceChoice
    from lib_pulid.identity import Identity
    from lib_pulid.injection import Injection
    from lib_pulid.likeness import Recognizer, SeenFace
    from lib_pulid.photos import IdentityCache
    from lib_pulid.webui.compiled import CompiledInjections
    from lib_pulid.weights import Adapter

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
IDENTITY_SUFFIXES = (".safetensors", PULIDEMBD)
CARD_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "avif")  # what the hosts save beside a model as its card's image


@dataclass(frozen=True)
class AdapterFile:
    """A PuLID file or one of another method. method: None if it has to be loaded to find out."""

    path: Path
    method: Method | None = None

    @property
    def family(self) -> str:
        return "" if self.method is None else self.method.family

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class SavedIdentity:
    name: str
    short_hash: str
    adapter: str
    path: Path


class Library:
    """The models folder, and what of it is loaded.

    Args:
        models_dir: returns the models folder, see `catalog`. device: returns the encoders' device.
        keep: whether encoders stay loaded. likeness: whether the likeness of images is measured.
        portraits: whether saved identities keep a small image of the face.
    """

    def __init__(
        self,
        models_dir: Callable[[], Path],
        device: Callable[[], str] = lambda: "cpu",
        keep: Callable[[], bool] = lambda: False,
        likeness: Callable[[], bool] = lambda: False,
        portraits: Callable[[], bool] = lambda: True,
    ) -> None:
        self._models_dir, self._keep, self._likeness, self._portraits = models_dir, keep, likeness, portraits
        self.downloads = Downloads(models_dir)
        self.presets = Presets(lambda: self.folder / "presets")
        self._readers = Readers(device, lambda path: self._of(path, _fingerprint))
        self._lock = threading.RLock()
        self._work = Interruptible()
        self._adapter: tuple[Any, Adapter] | None = None
        self._compiled: CompiledInjections | None = None
        self._cache: tuple[Path, IdentityCache] | None = None
        self._read: dict[Any, Any] = {}  # results of reading a file, by its path, size and time

    @property
    def models_dir(self) -> Path:
        return self._models_dir()

    @property
    def folder(self) -> Path:
        """The folder of PuLID files: `pulid` in the models folder, or the models folder itself if it has the files."""
        folder = self.models_dir / "pulid"
        here = disk.is_folder(folder) or not disk.is_folder(self.models_dir)
        return folder if here else _flat(self.models_dir) or folder

    @property
    def identities_dir(self) -> Path:
        return self.folder / "identities"

    # ------------------------------------------------------------ PuLID files

    def adapters(self) -> list[AdapterFile]:
        """Lists the PuLID files, those of the catalog first and in its order, wherever `catalog.status` finds them."""
        order = {file.name: i for i, file in enumerate(catalog.CATALOG)}
        skip = {file.name for file in catalog.CATALOG if file.role}
        paths = [path for path in _files(self.folder, WEIGHT_SUFFIXES) if path.name not in skip]
        names = {path.name for path in paths}
        elsewhere = (catalog.status(file, self.models_dir).path for file in catalog.CATALOG if file.name not in skip)
        paths += [path for path in elsewhere if path is not None and path.name not in names]
        found = [file for path in paths if (file := self._of(path, _adapter_file)) is not None]
        return sorted(found, key=lambda file: (order.get(file.name, len(order)), file.name.lower()))

    def method_of(self, name: str) -> Method | None:
        """Returns the method of a file by name, from its header; None with "auto", and where that does not tell."""
        return next((file.method for file in self.adapters() if name in (file.name, file.path.stem)), None)

    def adapter(self, name: str, family: str, encoder: str = "", made_for: str = "") -> Adapter:
        """Loads a PuLID file, or one of another method. name: of the file, with or without its suffix, or "auto".

        encoder, made_for: with "auto", the fingerprint of the encoder that a saved identity needs, and the label of its
        adapter; else auto is PuLID.

        Raises:
            MissingWeightsError, WrongWeightsError, UnsupportedModelError.
        """
        with self._lock:
            if name != AUTO:
                return self._checked(self._load(self._named(name)), family)
            left_out: list[str] = []
            method = maker_of(made_for, family)
            adapters = self._of_method(method, encoder, left_out)
            first = next(adapters, None)
            if first is None and method.name != usual(family).name:
                raise MissingWeightsError(f"the identity was made with {method.label}, which is not in {self.folder}.")
            if first is None:
                raise catalog.no_adapter(family, self.folder, self.models_dir, left_out)
            if not encoder or first.is_encoder(encoder):
                return first
            return next((adapter for adapter in adapters if adapter.is_encoder(encoder)), first)

    def _of_method(self, method: Method, encoder: str, left_out: list[str]) -> Iterator[Adapter]:
        """Loads the files of a method, whatever their version."""
        wanted = (method.name, method.family)
        files = [
            file for file in self.adapters() if file.method is None or (file.method.name, file.method.family) == wanted
        ]
        if self._adapter is not None and encoder:  # the loaded file is checked at no cost
            loaded = self._adapter[1].path
            files.sort(key=lambda file: file.path != loaded)
        for file in files:
            try:
                adapter = self._load(file.path)
            except (WrongWeightsError, MissingWeightsError) as error:
                if file.method is not None:
                    raise  # its header says that it is a PuLID file: damaged
                left_out.append(str(error))  # some other file in the folder
                continue
            if (adapter.method.name, adapter.family) == wanted:
                yield adapter

    def _named(self, name: str) -> Path:
        """Returns the path of a file by name, even if it is not a PuLID file: loading it says what it is."""
        paths = [*(file.path for file in self.adapters()), *_files(self.folder, WEIGHT_SUFFIXES)]
        for spelled in (lambda path: path.name, lambda path: path.stem):
            by_name: dict[str, Path] = {}
            for path in paths:
                by_name.setdefault(spelled(path), path)
            if (found := names.find(name, by_name)) is not None:
                return found
        known = ", ".join(file.name for file in self.adapters()) or "none"
        raise MissingWeightsError(f"{name} is not in {self.folder}. PuLID files there: {known}.")

    def _checked(self, adapter: Adapter, family: str) -> Adapter:
        if adapter.family != family:
            raise UnsupportedModelError(
                f"{adapter.path.name} is {adapter.label}, but the checkpoint is {family.upper()}. "
                "Choose auto or another PuLID file."
            )
        return adapter

    def _load(self, path: Path) -> Adapter:
        stamp = _stamp(path)
        if self._adapter is None or self._adapter[0] != stamp:
            from lib_pulid.weights import load_adapter

            self._adapter = None  # first, so that two are never in memory
            self._adapter = stamp, load_adapter(path)
        return self._adapter[1]

    def injection(self, adapter: Adapter, identity: Identity, **settings: Any) -> Injection:
        """Returns the result of `compile_injection`, recent ones from memory."""
        if self._compiled is None:
            from lib_pulid.webui.compiled import CompiledInjections

            self._compiled = CompiledInjections()
        return self._compiled.get(adapter, _stamp(adapter.path), identity, **settings)

    def checkpoint_family(self, path: Path) -> str:
        """Returns a checkpoint's family by its header: "sdxl", "flux", or "" if that does not tell."""
        try:
            return self._of(path, checkpoint_family)
        except OSError:
            return ""

    # ------------------------------------------------------------ saved identities

    def identities(self) -> list[SavedIdentity]:
        """Lists the saved identities by name; skips other files."""
        found = (self._of(path, _saved) for path in _files(self.identities_dir, IDENTITY_SUFFIXES))
        return sorted((saved for saved in found if saved is not None), key=lambda saved: saved.name.lower())

    def find(self, name_or_hash: str) -> Path | None:
        """Returns an identity's path: saved, by name (in any spelling) or short hash; or cached, by hash.

        Raises:
            SettingError: the name fits several.
        """
        paths = _files(self.identities_dir, IDENTITY_SUFFIXES)
        for spelled in (_shown_name, lambda path: path.stem, lambda path: path.name):
            if (found := names.find(name_or_hash, {spelled(path): path for path in paths[::-1]})) is not None:
                return found
        short_hash = name_or_hash.lower()
        if not names.HASH.fullmatch(short_hash):
            return None
        cached = (self._of(path, _saved) for path in _files(self.folder / "cache", (".safetensors",)))
        hits = (one.path for one in (*self.identities(), *cached) if one is not None and one.short_hash == short_hash)
        return next(hits, None)

    def saved(self, name_or_hash: str) -> Identity:
        """Loads an identity.

        Raises:
            IdentityMismatchError: no identity has this name or hash, or its file is damaged.
            SettingError: the name fits several.
        """
        from lib_pulid.identity import Identity

        path = self.find(name_or_hash)
        if path is None:
            raise self._unknown(name_or_hash)
        return Identity.load(path)

    def with_embedding(self, identity: Identity, judge: Recognizer | None) -> Identity:
        """Adds the embeddings that the cache has of the same identity, if the judge's is missing: its photo was given
        again since it was saved."""
        from dataclasses import replace

        from lib_pulid.identity import Identity

        for path in _files(self.folder / "cache", (".safetensors",)):
            if judge is None or judge.key in identity.embeddings:
                break
            found = self._of(path, _saved)
            if found is not None and found.short_hash == identity.short_hash:
                identity = replace(identity, embeddings={**identity.embeddings, **Identity.load(path).embeddings})
        return identity

    def check_saved(self, name_or_hash: str, number: Number) -> None:
        """Checks that an identity is there, without loading it. number: of the unit, for messages.

        Raises:
            IdentityMismatchError, SettingError: as `saved`.
        """
        try:
            if self.find(name_or_hash) is None:
                raise self._unknown(name_or_hash)
        except PulidError as error:
            raise at_unit(number, "identity", error) from error

    def _unknown(self, name: str) -> IdentityMismatchError:
        known = {names.key(one.name): one.name for one in self.identities()}
        near = [known[key] for key in difflib.get_close_matches(names.key(name), known, 3)]
        hint = (
            f"Did you mean {' or '.join(near)}?"
            if near
            else f"Saved identities: {', '.join(known.values()) or 'none'}."
        )
        return IdentityMismatchError(f"{name} is not in {self.identities_dir}. {hint}")

    def save(self, name: str, identity: Identity) -> SavedIdentity:
        """Saves an identity under a new name; if the name ends in `.pulidembd`, in that format.

        Raises:
            SettingError: the name is taken, in any spelling, or is not a valid name. StorageError.
        """
        from dataclasses import replace

        name = names.new(name)
        path = self.identities_dir / (name if name.lower().endswith(PULIDEMBD) else f"{name}.safetensors")
        with self._lock:  # of two who save under one name, the second gets an error
            self._check_free(path, [])
            thumbnail = identity.thumbnail if self._portraits() else None
            replace(identity, info={**identity.info, "name": name}, thumbnail=thumbnail).save(path)
            try:
                self._check_free(path, [path])  # another program may have saved another spelling
            except SettingError:
                path.unlink(missing_ok=True)
                raise
        return SavedIdentity(_shown_name(path), identity.short_hash, identity.info.get("adapter", ""), path)

    def blend(self, people: Sequence[tuple[str, float]], name: str) -> SavedIdentity:
        """Saves a blend of saved identities, given by name or short hash with their shares, under a new name.

        Raises:
            SettingError, IdentityMismatchError: see `blend.blend`, `saved` and `save`.
        """
        from lib_pulid.blend import blend

        names.new(name)  # before the work
        return self.save(name, blend([(one, self.saved(one), share) for one, share in people]))

    def card(self, saved: SavedIdentity) -> tuple[dict[str, str], str]:
        """Returns how an identity was made, and its small image of the face as a data URI, "" without one."""
        return self._of(saved.path, _card)

    def delete(self, name: str) -> SavedIdentity:
        """Deletes a saved identity, and its card's image and notes.

        Raises:
            IdentityMismatchError: no saved identity has this name. SettingError: the name fits several. StorageError.
        """
        with self._lock:
            gone = self.listed(name)
            stem = gone.path.stem
            beside = [f"{stem}.json", *(f"{stem}{part}.{kind}" for part in ("", ".preview") for kind in CARD_IMAGES)]
            if any(one.path.stem == stem for one in self.identities() if one != gone):  # x.pulidembd beside x
                beside = []
            for one in (gone.path, *(gone.path.with_name(name) for name in beside)):
                disk.delete(one)
            return gone

    def listed(self, name: str) -> SavedIdentity:
        """Returns a saved identity by name or hash, without loading it. Raises: as `delete`."""
        path = self.find(name)
        found = next((one for one in self.identities() if one.path == path), None)
        if found is None:
            raise self._unknown(name)
        return found

    def _check_free(self, path: Path, own: Sequence[Path]) -> None:
        for other in _files(self.identities_dir, IDENTITY_SUFFIXES):
            if names.key(other.name) == names.key(path.name) and other not in own:
                shown = _shown_name(other)
                raise SettingError(f"{shown} is already saved. Choose another name, or delete {other} first.")

    # ------------------------------------------------------------ photos

    def encode(
        self,
        photos: Sequence[np.ndarray],
        adapter: Adapter,
        choice: FaceChoice,
        fusion: str,
        tell: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] | None = None,
        judge: Recognizer | None = None,
    ) -> Identity:
        """Encodes photos of one person, uint8 RGB [H, W, 3], each set of photos once.

        tell: is called with the progress. warn: is called with notes for the user. stop: whether to abandon the work,
        polled several times a second. judge: see `photos.make_identity`.

        Raises:
            ImageError, NoFaceError, MissingWeightsError, WrongWeightsError, SettingError.
            Interrupted: `stop` returned True.
        """

        def work(is_left: Callable[[], bool]) -> Identity:
            def told(text: str) -> None:
                if is_left():
                    raise Interrupted(text)
                tell(text)

            with self._lock:
                try:
                    cache = self._identity_cache()
                    folder = self.models_dir
                    return self._readers.encode(photos, adapter, choice, fusion, folder, cache, told, warn, judge)
                finally:
                    if is_left() and not self._keep():
                        self._readers.release()

        return work(lambda: False) if stop is None else self._work.run(work, stop)

    def settle(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits for photos that are still being read after an interrupt, or until `stop` returns True."""
        self._work.settle(stop)

    def read_face(
        self, photo: np.ndarray, choice: FaceChoice, name: str, warn: Callable[[str], None] = lambda text: None
    ) -> Face:
        """Reads the face of one photo for a preview; needs only the face models.

        Raises:
            NoFaceError, MissingWeightsError, WrongWeightsError.
        """
        with self._lock:
            return self._readers.read_face(photo, choice, name, self.models_dir, warn)

    def judges(self) -> list[Recognizer]:
        """Returns what likeness can be measured with, the best first; see `Readers.judges`."""
        with self._lock:
            return self._readers.judges(self.models_dir)

    def judge(self) -> Recognizer | None:
        """Returns the best judge, whose embedding a new identity gets; None if likeness is not measured."""
        return self.judges()[0] if self._likeness() else None

    def see(
        self, image: np.ndarray, judge: Recognizer, warn: Callable[[str], None] = lambda text: None
    ) -> list[SeenFace]:
        """Finds the faces of an image, uint8 RGB [H, W, 3], and embeds them.

        Raises:
            MissingWeightsError, WrongWeightsError.
        """
        with self._lock:
            return self._readers.see(image, judge, self.models_dir, warn)

    def release(self) -> None:
        """Releases the encoders unless the settings keep them; after an interrupt, once their work is done."""
        if self._work.is_busy:
            return
        with self._lock:
            if not self._keep():
                self._readers.release()

    def _identity_cache(self) -> IdentityCache:
        from lib_pulid.photos import IdentityCache

        folder = self.folder / "cache"
        if self._cache is None or self._cache[0] != folder:
            self._cache = folder, IdentityCache(folder)
        return self._cache[1]

    def _of(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """Returns `read(path)`, remembered until the file changes."""
        key = (read.__qualname__, _stamp(path))
        if key not in self._read:
            self._read[key] = read(path)
        return self._read[key]


def _shown_name(path: Path) -> str:
    """Returns a saved identity's name: its file's stem, or the full file name for another program's format."""
    return path.name if path.suffix.lower() == PULIDEMBD else path.stem


def _flat(models_dir: Path) -> Path | None:
    known = {file.name for file in catalog.CATALOG}
    return models_dir if any(path.name in known for path in disk.listed(models_dir)) else None


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError:  # deleted since it was listed, or not accessible: reading it reports that
        return str(path), 0, 0
    return str(path), stat.st_size, stat.st_mtime_ns


def _adapter_file(path: Path) -> AdapterFile | None:
    """Tells an adapter's method by the names, shapes and dtypes of its tensors; None for another kind of file."""
    is_pickle = path.suffix.lower() != ".safetensors"
    header: Header = read_pickle_header(path) if is_pickle else _safetensors_header(path)
    if not header and is_pickle:
        file = catalog.named(path.name)  # written by an older torch
        return AdapterFile(path, usual(file.group) if file is not None and file.group in catalog.FAMILIES else None)
    if not header:
        return AdapterFile(path)  # damaged: listed, and loading it reports what is wrong
    try:
        method = method_of(header, path.name)
    except WrongWeightsError:
        return AdapterFile(path) if is_pickle else None
    return AdapterFile(path, method) if is_pickle or method is not None else None


def _safetensors_header(path: Path) -> Header:
    shapes, dtypes = read_header(path), read_dtypes(path)
    if shapes.keys() != dtypes.keys():
        return {}  # damaged
    return {key: Tensors(shape, DTYPES.get(dtypes[key], dtypes[key])) for key, shape in shapes.items()}


def _fingerprint(path: Path) -> str:
    from lib_pulid.photos import fingerprint_files

    return fingerprint_files([path])


def _saved(path: Path) -> SavedIdentity | None:
    from lib_pulid.identity import Identity

    try:
        identity = Identity.load(path)
    except IdentityMismatchError:
        return None
    return SavedIdentity(_shown_name(path), identity.short_hash, identity.info.get("adapter", ""), path)


def _card(path: Path) -> tuple[dict[str, str], str]:
    from lib_pulid.identity import Identity
    from lib_pulid.webui.pictures import encode

    try:
        identity = Identity.load(path)
    except IdentityMismatchError:  # damaged since it was listed
        return {}, ""
    return dict(identity.info), "" if identity.thumbnail is None else encode(identity.thumbnail, "JPEG")
