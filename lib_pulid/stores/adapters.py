"""Finds PuLID files and those of other methods, loads one of them, and keeps it on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_pulid import disk, names
from lib_pulid.errors import MissingWeightsError, SettingError, UnsupportedModelError, WrongWeightsError
from lib_pulid.fields import AUTO
from lib_pulid.files import catalog
from lib_pulid.files.checkpoint_header import read_tensors, unwrapped
from lib_pulid.files.pickle_header import read_pickle_header
from lib_pulid.methods import Header, Method, maker_of, may_be, method_of, usual
from lib_pulid.stores.folder import ModelsFolder

if TYPE_CHECKING:
    from lib_pulid.weights import Adapter

SUFFIXES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")


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


class Adapters:
    """The adapters in a models folder."""

    def __init__(self, folder: ModelsFolder) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._loaded: tuple[Any, Adapter] | None = None

    def listed(self) -> list[AdapterFile]:
        """Lists the PuLID files, those of the catalog first and in its order, wherever `catalog.status` finds them. Of
        two of one name and method, the one in the upper folder counts."""
        order = {file.name: i for i, file in enumerate(catalog.CATALOG)}
        skip = {file.name for file in catalog.CATALOG if file.role}
        paths = [path for path in self._files() if path.name not in skip]
        here, models_dir = {path.name.casefold() for path in paths}, self._folder.models_dir
        elsewhere = (catalog.status(file, models_dir).path for file in catalog.CATALOG if file.name not in skip)
        paths += [path for path in elsewhere if path is not None and path.name.casefold() not in here]
        found = [file for path in paths if (file := self._folder.remembered(path, _adapter_file)) is not None]
        first = {(file.name, file.method): file for file in found[::-1]}
        return sorted(first.values(), key=lambda file: (order.get(file.name, len(order)), file.name.lower()))

    def names(self) -> list[str]:
        return list(dict.fromkeys(file.name for file in self.listed()))

    def method_of(self, name: str) -> Method | None:
        """Returns the method of a file by name (see `path`), from its header; None with "auto", and where that does not
        tell or the name fits several."""
        try:
            found = self._named(name) if name and name != AUTO else None
        except SettingError:
            return None
        return None if found is None else found.method

    def load(self, name: str, family: str, encoder: str = "", made_for: str = "") -> Adapter:
        """Loads a PuLID file, or one of another method. name: of the file, with or without its suffix, or "auto".

        encoder, made_for: with "auto", the fingerprint of the encoder that a saved identity needs, and the label of its
        adapter; else auto is PuLID.

        Raises:
            MissingWeightsError, WrongWeightsError, UnsupportedModelError. SettingError: the name fits several.
        """
        with self._lock:
            if name == AUTO:
                return self._any(family, encoder, made_for)
            adapter = self._load(self.path(name, family))
        if adapter.family != family:
            raise UnsupportedModelError(
                f"{adapter.path.name} is {adapter.label}, but the checkpoint is {family.upper()}. "
                "Choose auto or another PuLID file."
            )
        return adapter

    def _any(self, family: str, encoder: str, made_for: str) -> Adapter:
        left_out: list[str] = []
        method, folder = maker_of(made_for, family), self._folder.path
        adapters = self._of_method(method, encoder, left_out)
        first = next(adapters, None)
        if first is None and method.name != usual(family).name:
            raise MissingWeightsError(f"the identity was made with {method.label}, which is not in {folder}.")
        if first is None:
            raise catalog.no_adapter(family, folder, self._folder.models_dir, left_out)
        if not encoder or first.is_encoder(encoder):
            return first
        return next((adapter for adapter in adapters if adapter.is_encoder(encoder)), first)

    def _of_method(self, method: Method, encoder: str, left_out: list[str]) -> Iterator[Adapter]:
        """Loads the files of a method, whatever their version."""
        files = [file for file in self.listed() if file.method is None or may_be(file.method, method)]
        if self._loaded is not None and encoder:  # the loaded file is checked at no cost
            loaded = self._loaded[1].path
            files.sort(key=lambda file: file.path != loaded)
        for file in files:
            try:
                adapter = self._load(file.path)
            except (WrongWeightsError, MissingWeightsError) as error:
                if file.method is not None:
                    raise  # its header or its name says that it is a PuLID file: damaged
                left_out.append(str(error))  # some other file in the folder
                continue
            if (adapter.method.name, adapter.family) == (method.name, method.family):
                yield adapter

    def path(self, name: str, family: str = "") -> Path:
        """Returns the path of a file by name, even if it is not a PuLID file: loading it says what it is. family: which
        is meant where folders have files of one name.

        Raises:
            MissingWeightsError. SettingError: the name fits several.
        """
        if (found := self._named(name, family)) is not None:
            return found.path
        known = ", ".join(self.names()) or "none"
        raise MissingWeightsError(f"{name} is not in {self._folder.path}. PuLID files there: {known}.")

    def _named(self, name: str, family: str = "") -> AdapterFile | None:
        """Finds a file by name, in any spelling, with or without its suffix. family, Raises: as `path`."""
        listed = sorted(self.listed(), key=lambda file: file.family != family if family else not file.family)
        files = [*listed, *map(AdapterFile, self._files())]
        for spelled in (lambda file: file.name, lambda file: file.path.stem):
            by_name: dict[str, AdapterFile] = {}
            for file in files:
                by_name.setdefault(spelled(file), file)
            if (found := names.find(name, by_name)) is not None:
                return found
        return None

    def _files(self) -> list[Path]:
        return [path for folder in self._folder.folders for path in disk.listed(folder, SUFFIXES)]

    def _load(self, path: Path) -> Adapter:
        now = disk.stamp(path)
        if self._loaded is None or self._loaded[0] != now:
            from lib_pulid.weights import load_adapter

            self._loaded = None  # first, so that two are never in memory
            self._loaded = now, load_adapter(path)
        return self._loaded[1]


def _adapter_file(path: Path) -> AdapterFile | None:
    """Tells an adapter's method by the names, shapes and dtypes of its tensors; None for another kind of file. Where
    only the checksum would tell, its name does, until it is loaded."""
    file = catalog.named(path.name)
    is_pickle = path.suffix.lower() not in (".safetensors", ".sft")
    header: Header = unwrapped(read_tensors(path) or read_pickle_header(path))
    if not header:  # damaged, or written by an older torch: its name tells, and loading it reports what is wrong
        return AdapterFile(path, usual(file.group) if file is not None and file.group in catalog.FAMILIES else None)
    try:
        method = method_of(header, path.name, lambda: "" if file is None else file.sha256)
    except WrongWeightsError:
        return AdapterFile(path) if is_pickle else None
    return AdapterFile(path, method) if is_pickle or method is not None else None
