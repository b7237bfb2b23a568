"""Registers `<pulid:...>` with the host as an extra network, so that it removes the tags from the prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lib_pulid.tags import NAMES
from lib_pulid.webui.prompt import texts_of


def register(activate: Callable[[Any, list[str]], None]) -> None:
    """Registers it; to be called from on_before_ui, since the host forgets its networks when the page is reloaded.

    activate: is called before each batch and each second pass, also without any tags; gets the host's
    StableDiffusionProcessing, and the tags of the first prompt as `tags.find_tags` returns them.
    """
    from modules import extra_networks

    class PulidNetwork(extra_networks.ExtraNetwork):
        def activate(self, p: Any, params_list: Sequence[Any]) -> None:
            activate(p, texts_of({self.name: params_list}))

        def deactivate(self, p: Any) -> None:
            """Nothing is left to undo: hooks live for one sampling."""

    name, *spellings = NAMES
    network = PulidNetwork(name)
    extra_networks.register_extra_network(network)
    for spelling in spellings:
        extra_networks.register_extra_network_alias(network, spelling)
