"""Registers `<pulid:...>` with the host as an extra network, so that it removes the tags from the prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lib_pulid.tags import NAMES


def register(activate: Callable[[Any], None]) -> None:
    """Registers it; to be called from on_before_ui, since the host forgets its networks when the page is reloaded.

    activate: is called with the host's StableDiffusionProcessing, once or more often before each batch and each second
    pass, also without any tags.
    """
    from modules import extra_networks

    class PulidNetwork(extra_networks.ExtraNetwork):
        def activate(self, p: Any, params_list: Any) -> None:
            activate(p)

        def deactivate(self, p: Any) -> None:
            """Nothing is left to undo: hooks live for one sampling."""

    name, *spellings = NAMES
    network = PulidNetwork(name)
    extra_networks.register_extra_network(network)
    for spelling in spellings:
        extra_networks.register_extra_network_alias(network, spelling)
