"""The settings page, the command line flags, and what follows from both."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from lib_pulid.fields import MOST_UNITS
from lib_pulid.hosts.webui import CHROMA

SECTION = ("pulid", "PuLID")
UNITS, FOLDER, DEVICE, KEEP = "pulid_units", "pulid_models_dir", "pulid_device", "pulid_keep_encoders"


def add_settings() -> None:
    """To be called from on_ui_settings."""
    import gradio as gr
    from modules.shared import OptionInfo, opts

    infos = {
        UNITS: OptionInfo(3, "Persons in one picture", gr.Slider, {"minimum": 1, "maximum": MOST_UNITS, "step": 1})
        .info("number of tabs")
        .needs_reload_ui(),
        FOLDER: OptionInfo("", "Models folder").info(
            "empty: the WebUI's own, that is pulid, insightface/models/antelopev2 and facexlib below models"
        ),
        DEVICE: OptionInfo("CPU", "Photos are read on", gr.Radio, {"choices": ["CPU", "GPU"]}).info(
            "CPU takes some seconds per photo and no video memory; each photo is read once"
        ),
        KEEP: OptionInfo(False, "Keep the models that read photos in memory").info(
            "about 2 GB; new photos are read faster"
        ),
        CHROMA: OptionInfo(False, "Try PuLID on Chroma").info(
            "an experiment with the PuLID file for FLUX, which was not trained for Chroma: expect less likeness"
        ),
    }
    for name, info in infos.items():
        info.section = SECTION
        opts.add_option(name, info)


def units() -> int:
    return max(1, min(MOST_UNITS, int(_option(UNITS, 3) or 3)))


def models_dir() -> Path:
    """The flag, else the setting, else the host's models folder."""
    from modules import paths
    from modules.shared import cmd_opts

    chosen = getattr(cmd_opts, "pulid_models_dir", None) or _option(FOLDER, "")
    return Path(chosen or getattr(paths, "models_path", "models")).expanduser().absolute()


def device() -> str:
    from modules import devices

    return str(devices.device) if _option(DEVICE, "CPU") == "GPU" else "cpu"


def keep_encoders() -> bool:
    return bool(_option(KEEP, False))


def make_temp_folder() -> None:
    """Makes the folder of the host's setting temp_dir, where gradio shows images from. In a fresh Forge Neo nobody else
    does, and the first photo that is dropped would fail."""
    from modules.shared import opts

    folder = getattr(opts, "temp_dir", "")
    if folder:
        with suppress(OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)


def _option(name: str, default: Any) -> Any:
    from modules.shared import opts

    return opts.data.get(name, default)
