"""modules.extra_networks, as in all hosts: reads prompts, activates what is registered, and swallows its exceptions."""

from __future__ import annotations

import re
from collections import defaultdict
from types import ModuleType
from typing import Any

_TAG = re.compile(r"<(\w+):([^>]+)>")


class ExtraNetworkParams:
    def __init__(self, items: list[str]) -> None:
        self.items = items


class ExtraNetwork:
    def __init__(self, name: str) -> None:
        self.name = name


def parse_prompts(prompts: list[str]) -> tuple[list[str], dict[str, list[ExtraNetworkParams]]]:
    """The prompts without tags, and the tags of the first one."""
    data: dict[str, list[ExtraNetworkParams]] = defaultdict(list)
    for name, text in _TAG.findall(prompts[0] if prompts else ""):
        data[name].append(ExtraNetworkParams(text.split(":")))
    return [_TAG.sub("", prompt) for prompt in prompts], data


def fill(module: ModuleType) -> None:
    registry: dict[str, Any] = {}
    aliases: dict[str, Any] = {}
    swallowed: list[Exception] = []

    def register_extra_network(network: Any) -> None:
        registry[network.name] = network

    def register_extra_network_alias(network: Any, alias: str) -> None:
        aliases[alias] = network

    def activate(p: Any, data: dict[str, list[ExtraNetworkParams]]) -> None:
        found: dict[Any, list[ExtraNetworkParams]] = {network: [] for network in registry.values()}
        for name, params in data.items():
            network = registry.get(name, aliases.get(name))
            if network is not None:
                found[network].extend(params)
        for network, params in found.items():
            try:
                network.activate(p, params)
            except Exception as error:
                swallowed.append(error)

    public = (ExtraNetwork, ExtraNetworkParams, parse_prompts, activate)
    public += (register_extra_network, register_extra_network_alias)
    vars(module).update({one.__name__: one for one in public}, registry=registry, swallowed=swallowed)
