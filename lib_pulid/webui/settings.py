"""Adds the settings page, and reads its settings and the command line flags."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from lib_pulid.disk import user_path
from lib_pulid.fields import MOST_UNITS
from lib_pulid.hosts.families import CHROMA
from lib_pulid.stores.folder import Settings

SECTION = ("pulid", "PuLID")
UNITS, FOLDER, DEVICE, KEEP = "pulid_units", "pulid_models_dir", "pulid_device", "pulid_keep_encoders"
LIKENESS, PHOTOS, PORTRAITS = "pulid_likeness", "pulid_photo_folder", "pulid_portraits"
KEPT = [SUFFICES, ALWAYS, NEVER] = ["where memory suffices", "always", "never"]  # saved in users' settings
ROOM = 8e9  # bytes to leave free for a checkpoint, a VAE and the system


def add_settings() -> None:
    """Adds the settings; to be called from on_ui_settings."""
    import gradio as gr
    from modules.shared import OptionInfo, cmd_opts, opts

    # Whoever sends requests must not choose what is read from this machine; nor whoever sees the page, with the flag.
    owner = {
        "component": gr.Textbox,
        "component_args": {"visible": not getattr(cmd_opts, "hide_ui_dir_config", False)},
        "restrict_api": True,
    }
    infos = {
        UNITS: OptionInfo(3, "People in one image", gr.Slider, {"minimum": 1, "maximum": MOST_UNITS, "step": 1})
        .info("the number of tabs")
        .needs_reload_ui(),
        FOLDER: OptionInfo("", "Models folder", **owner).info(
            "empty: the WebUI's own models folder, with pulid, insightface/models/antelopev2 and facexlib in it"
        ),
        DEVICE: OptionInfo("CPU", "Read photos on", gr.Radio, {"choices": ["CPU", "GPU"]}).info(
            "CPU: a few seconds per photo and no video memory; each photo is read only once"
        ),
        KEEP: OptionInfo(SUFFICES, "Keep the encoders of photos in memory", gr.Radio, {"choices": KEPT}).info(
            "about 2 GB; a new photo then takes a fraction of the time. where memory suffices: on the CPU, while "
            f"{ROOM / 1e9:.0f} GB are free"
        ),
        LIKENESS: OptionInfo(False, "Measure the likeness of each image").info(
            "compares the faces in each image with the person's photo; the number is shown below the image and in its "
            "parameters. The time it takes is shown, too"
        ),
        PHOTOS: OptionInfo("", "Folder of photos to draw from", **owner).info(
            "for Draw the photo: one person per photo, which whoever uses this WebUI may draw. empty: none"
        ),
        PORTRAITS: OptionInfo(True, "Keep a small image of the face in saved identities").info(
            "128 pixels, shown on the cards of the tab Faces; off: identities saved from now on hold no image"
        ),
        CHROMA: OptionInfo(False, "Try PuLID on Chroma").info(
            "experimental: uses the PuLID file for FLUX, which was not trained for Chroma; expect less likeness"
        ),
    }
    for name, info in infos.items():
        info.section = SECTION
        opts.add_option(name, info)


def units() -> int:
    wanted = _option(UNITS, 3)  # the API sets any value
    return int(min(MOST_UNITS, wanted)) if isinstance(wanted, (int, float)) and wanted >= 1 else 3


def models_dir() -> Path:
    """Returns the models folder: the flag's, else the setting's, else the host's."""
    from modules import paths
    from modules.shared import cmd_opts

    chosen = str(getattr(cmd_opts, "pulid_models_dir", None) or _option(FOLDER, "") or "").strip()
    return user_path(chosen or getattr(paths, "models_path", "models")).absolute()


def device() -> str:
    from modules import devices

    return str(devices.device) if _option(DEVICE, "CPU") == "GPU" else "cpu"


def keep_encoders() -> bool:
    wanted = _option(KEEP, SUFFICES)
    if wanted in (ALWAYS, NEVER):
        return wanted == ALWAYS
    return device() == "cpu" and _free_memory() >= ROOM


def likeness() -> bool:
    return bool(_option(LIKENESS, False))


def photo_folder() -> Path | None:
    """Returns the folder of photos to draw from; None if there is none."""
    chosen = str(_option(PHOTOS, "") or "").strip()
    return user_path(chosen).absolute() if chosen else None


def chosen() -> Settings:
    """Returns what the stores ask for."""
    return Settings(models_dir(), device(), keep_encoders(), likeness(), bool(_option(PORTRAITS, True)))


def _free_memory() -> int:
    """Returns the computer's free memory in bytes."""
    import psutil  # the WebUIs bring it

    return psutil.virtual_memory().available


def make_temp_folder() -> None:
    """Creates the folder of the host's setting temp_dir, from which gradio serves images.

    A fresh Forge Neo does not create it, and the first dropped photo would fail.
    """
    from modules.shared import opts

    folder = getattr(opts, "temp_dir", "")
    if folder:
        with suppress(OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)


def _option(name: str, default: Any) -> Any:
    from modules.shared import opts

    return opts.data.get(name, default)
