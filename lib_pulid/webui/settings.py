"""The settings page, the command line flags, and what follows from both."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from lib_pulid.disk import user_path
from lib_pulid.fields import MOST_UNITS
from lib_pulid.hosts.webui import CHROMA

SECTION = ("pulid", "PuLID")
UNITS, FOLDER, DEVICE, KEEP = "pulid_units", "pulid_models_dir", "pulid_device", "pulid_keep_encoders"
KEPT = [SUFFICES, ALWAYS, NEVER] = ["where memory suffices", "always", "never"]
ROOM = 8e9  # bytes that have to be left for others: a checkpoint, a VAE, the system


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
        KEEP: OptionInfo(SUFFICES, "Keep the models that read photos in memory", gr.Radio, {"choices": KEPT}).info(
            "about 2 GB, and a new photo is read in a fraction of the time; where memory suffices: on the CPU, while "
            f"{ROOM / 1e9:.0f} GB of it are free"
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

    chosen = (getattr(cmd_opts, "pulid_models_dir", None) or _option(FOLDER, "") or "").strip()
    return user_path(chosen or getattr(paths, "models_path", "models")).absolute()


def device() -> str:
    from modules import devices

    return str(devices.device) if _option(DEVICE, "CPU") == "GPU" else "cpu"


def keep_encoders() -> bool:
    wanted = _option(KEEP, SUFFICES)
    if wanted in (ALWAYS, NEVER):
        return wanted == ALWAYS
    return device() == "cpu" and _free_memory() >= ROOM


def _free_memory() -> int:
    """Bytes of the computer's memory that are free; 0 where that cannot be told."""
    try:
        import psutil  # the WebUIs bring it
    except ImportError:
        return 0
    return psutil.virtual_memory().available


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
