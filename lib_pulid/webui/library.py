"""Holds the stores of one WebUI."""

from __future__ import annotations

from collections.abc import Callable

from lib_pulid.stores.adapters import Adapters
from lib_pulid.stores.encoders import EncoderPool
from lib_pulid.stores.folder import ModelsFolder, Settings
from lib_pulid.stores.identities import Identities
from lib_pulid.webui.compiled import CompiledInjections
from lib_pulid.webui.dropped import DroppedPhotos
from lib_pulid.webui.fetching import Downloads
from lib_pulid.webui.presets import Presets


class Library:
    """What lies in the models folder, what of it is loaded, and the photos that were dropped on the page."""

    def __init__(self, ask: Callable[[], Settings]) -> None:
        self.folder = ModelsFolder(ask)
        self.adapters = Adapters(self.folder)
        self.identities = Identities(self.folder)
        self.encoders = EncoderPool(self.folder, self.identities)
        self.photos = DroppedPhotos()
        self.compiled = CompiledInjections()
        self.presets = Presets(self.folder)
        self.downloads = Downloads(self.folder)
