"""Lists where a weight file may lie: in the models folder, and where other programs keep it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lib_pulid import disk

ANTELOPE, BUFFALO = "insightface/models/antelopev2", "insightface/models/buffalo_l"
# Files of recognizers other than the adapter's own, to judge likeness with: buffalo_l's, and facenet-pytorch's.
JUDGE, FACENET = "w600k_r50.onnx", "20180402-114759-vggface2.pt"

# Folders below the models folder where other programs keep the files of a folder.
_ELSEWHERE = {
    "pulid": ("clip", "clip_vision", "ControlNet", "ipadapter", "photomaker"),  # ComfyUI, sd-webui-controlnet
    "clip_vision": ("ControlNet",),
    ANTELOPE: ("insightface/antelopev2", "antelopev2", "antelopev2/antelopev2"),  # the official demo
    BUFFALO: ("insightface",),
    "facexlib": ("GFPGAN", "Codeformer"),  # the WebUIs
}
SAVED = ("identities", "cache", "presets")  # below the PuLID folder: what users save, and what was read of photos


def find_judge(name: str, models_dir: Path) -> Path | None:
    """Returns the path of JUDGE or FACENET; None if it is nowhere."""
    return next(filter(disk.is_file, places(models_dir, BUFFALO, name)), None)


def below(folder: Path, models_dir: Path) -> list[Path]:
    """Lists a folder of weight files and those below it, upper ones first. Of the models folder itself nothing below
    it: all other models are there."""
    return [folder] if folder == models_dir else disk.folders(folder, SAVED)


def places(models_dir: Path, folder: str, name: str, source: str = "", path: str = "") -> Iterator[Path]:
    """Lists where a file may lie: in its folder or one below it, where other programs keep it, and in the caches of
    torch and huggingface_hub. source, path: the repository on the hub (or a URL, or ""), its path there."""
    home = models_dir / folder
    folders = [*below(home, models_dir), models_dir, *(models_dir / other for other in _ELSEWHERE.get(folder, ()))]
    if folder == "pulid":
        folders.append(models_dir.parent / "extensions" / "sd-webui-controlnet" / "models")
    elif folder == "facexlib":
        folders += _package("facexlib")
    elif folder.startswith("insightface"):
        own = disk.user_path("~/.insightface")
        folders += [own, *(own / "models" / home.name / deeper for deeper in ("", home.name))]
    cache = _folder_of("XDG_CACHE_HOME")
    torch_home = _folder_of("TORCH_HOME", default=cache / "torch")
    folders += [torch_home / "hub" / "checkpoints", torch_home / "checkpoints"]
    yield from (one / name for one in folders)
    if source and "://" not in source:  # as huggingface_hub.constants says, whose import takes a third of a second
        home = _folder_of("HF_HOME", default=cache / "huggingface")
        hub = _folder_of("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", default=home / "hub")
        snapshots = disk.listed(hub / f"models--{source.replace('/', '--')}" / "snapshots")
        yield from (snapshot / path for snapshot in snapshots)


def _package(name: str) -> list[Path]:
    spec = find_spec(name)
    return [Path(spec.origin).parent / "weights"] if spec is not None and spec.origin else []


def _folder_of(*variables: str, default: str | Path = "~/.cache") -> Path:
    """Reads the first of these variables that is set and not empty, or takes the default."""
    return disk.user_path(next(filter(None, map(os.environ.get, variables)), default))
