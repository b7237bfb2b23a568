"""The WebUI's entry point: the script, and what is registered with the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib_pulid import hosts
from lib_pulid.errors import PulidError
from lib_pulid.files import checkpoint_header
from lib_pulid.hosts.base import add_callback
from lib_pulid.hosts.families import chosen_checkpoint
from lib_pulid.webui import accordion, generation, grid_numbers, remote, routes, settings, xyz
from lib_pulid.webui.actions import Actions
from lib_pulid.webui.draws import Draws
from lib_pulid.webui.library import Library

from modules import scripts, shared  # isort: skip


class PulidScript(generation.Generation):  # not imported by name: the host would take it for a script of its own
    library = Library(settings.chosen)
    draws = Draws(settings.photo_folder)
    answers = remote.Answers()

    def title(self) -> str:
        return "PuLID"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        tab = "img2img" if is_img2img else "txt2img"
        actions = Actions(self.library, checkpoint_family)
        families = hosts.current().families
        controls, self.infotext_fields = accordion.build(tab, settings.units(), self.library, actions, families)
        self.paste_field_names = [str(name) for _, name in self.infotext_fields]
        return controls


def checkpoint_family(name: str = "") -> str:
    """Returns the family of the checkpoint with this name, or of the selected one; "" if it is not known."""
    from modules import sd_models

    try:
        chosen, loaded = chosen_checkpoint(name), sd_models.model_data.sd_model
        if chosen is None or getattr(getattr(loaded, "sd_checkpoint_info", None), "filename", "") == chosen.filename:
            return hosts.current().loaded_model(SimpleNamespace(sd_model=loaded)).family
        return PulidScript.library.folder.remembered(Path(chosen.filename), checkpoint_header.checkpoint_family)
    except (PulidError, OSError):
        return ""


# ---------------------------------------------------------------- the host's callbacks


def on_before_ui() -> None:
    xyz.add_axes(settings.units(), PulidScript.library, hosts.current().families)
    generation.register(PulidScript())
    from lib_pulid.webui import cards  # not above: it is made of the host's page, which takes a while to import

    cards.register(PulidScript.library)


def on_app_started(demo: Any, app: Any) -> None:
    settings.make_temp_folder()
    routes.add_error_handler(app)
    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        routes.add_routes(app, PulidScript.library, shared.cmd_opts.api_auth)


CALLBACKS: dict[str, Callable[..., Any]] = {
    "app_started": on_app_started,
    "ui_settings": settings.add_settings,
    "before_ui": on_before_ui,
    "image_grid": grid_numbers.write_numbers,
    **hosts.current().callbacks(),
}
for event, callback in CALLBACKS.items():
    add_callback(event, callback, __file__)
