"""modules.extra_networks, as in all hosts: reads prompts, activates what is registered, and swallows its exceptions.
And of the pages with cards what an extension uses."""

from __future__ import annotations

import json
import os
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


class Page:
    """modules.ui_extra_networks.ExtraNetworksPage."""

    def __init__(self, title: str) -> None:
        self.title, self.name = title, title.lower()
        self.extra_networks_tabname = self.name
        self.items: dict[str, Any] = {}

    def create_html(self, tabname: str = "txt2img") -> dict[str, Any]:
        """The items, as the real one collects them before it writes them."""
        self.items = {item["name"]: item for item in self.list_items()}
        return self.items

    def read_user_metadata(self, item: dict[str, Any], use_cache: bool = True) -> None:
        try:
            with open(os.path.splitext(item["filename"])[0] + ".json", encoding="utf8") as file:
                item["user_metadata"] = json.load(file)
        except (OSError, ValueError):  # the real one prints it
            item["user_metadata"] = {}
        item["description"] = item["user_metadata"].get("description", item["description"])

    def find_preview(self, path: str) -> str | None:
        found = [f"{path}{kind}" for kind in (".png", ".preview.png") if os.path.exists(f"{path}{kind}")]
        return f"./sd_extra_networks/thumb?filename={found[0]}" if found else None

    def find_description(self, path: str) -> str | None:
        return None

    def search_terms_from_path(self, filename: str) -> str:
        return os.path.basename(filename)

    def get_sort_keys(self, path: str) -> dict[str, Any]:
        return {"name": os.path.basename(path).lower(), "date_modified": int(os.stat(path).st_mtime)}


class UserMetadataEditor:
    """modules.ui_extra_networks_user_metadata.UserMetadataEditor, without its widgets."""

    def __init__(self, ui: Any, tabname: str, page: Page) -> None:
        self.ui, self.tabname, self.page = ui, tabname, page

    def get_user_metadata(self, name: str) -> dict[str, Any]:
        item = self.page.items.get(name, {})
        return item.setdefault("user_metadata", {}) or item.update(user_metadata={}) or item["user_metadata"]

    def put_values_into_components(self, name: str) -> tuple[Any, ...]:
        metadata = self.get_user_metadata(name)
        return name, metadata.get("description", ""), "", "", metadata.get("notes", "")

    def save_user_metadata(self, name: str, description: str, notes: str) -> None:
        metadata = self.get_user_metadata(name)
        metadata.update(description=description, notes=notes)
        with open(os.path.splitext(self.page.items[name]["filename"])[0] + ".json", "w", encoding="utf8") as file:
            json.dump(metadata, file)


def fill(module: ModuleType) -> None:
    registry: dict[str, Any] = {}
    swallowed: list[Exception] = []

    def register_extra_network(network: Any) -> None:
        registry[network.name] = network

    def activate(p: Any, data: dict[str, list[ExtraNetworkParams]]) -> None:
        found: dict[Any, list[ExtraNetworkParams]] = {network: [] for network in registry.values()}
        for name, params in data.items():
            if name in registry:
                found[registry[name]].extend(params)
        for network, params in found.items():
            try:
                network.activate(p, params)
            except Exception as error:
                swallowed.append(error)

    public = (ExtraNetwork, ExtraNetworkParams, parse_prompts, activate, register_extra_network)
    vars(module).update({one.__name__: one for one in public}, registry=registry, swallowed=swallowed)
