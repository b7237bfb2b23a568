"""The weight files: what each is for, where it comes from, where it lies.

Folders are those of the WebUIs: `pulid`, `insightface/models/antelopev2`, `facexlib` below the models folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib_pulid.errors import MissingWeightsError

MODELS_DIR_VARIABLE = "PULID_MODELS_DIR"
_NON_COMMERCIAL = "InsightFace model licence: non-commercial research purposes only"


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Args:
        name: file name. folder: below the models folder. purpose: in words.
        source: "owner/repository" on the Hugging Face Hub, or a URL.
        size: bytes, or 0 where it is not known. licence: in words; `restricted` licences have to be accepted.
        group: "sdxl", "flux" (one file of a group is enough) or "encoders" (all are needed).
    """

    name: str
    folder: str
    purpose: str
    source: str
    group: str
    licence: str = "Apache-2.0"
    restricted: bool = False
    size: int = 0


CATALOG = (
    WeightFile("pulid_v1.1.safetensors", "pulid", "PuLID v1.1 for SDXL", "guozinan/PuLID", "sdxl"),
    WeightFile("pulid_v1.bin", "pulid", "PuLID v1 for SDXL", "guozinan/PuLID", "sdxl"),
    WeightFile(
        "ip-adapter_pulid_sdxl_fp16.safetensors", "pulid", "PuLID v1 for SDXL, half precision",
        "huchenlei/ipadapter_pulid", "sdxl",
    ),
    WeightFile(
        "pulid_flux_v0.9.1.safetensors", "pulid", "PuLID v0.9.1 for FLUX", "guozinan/PuLID", "flux", size=1_142_099_520
    ),
    WeightFile("pulid_flux_v0.9.0.safetensors", "pulid", "PuLID v0.9.0 for FLUX", "guozinan/PuLID", "flux"),
    WeightFile(
        "EVA02_CLIP_L_336_psz14_s6B.pt", "pulid", "vision tower", "QuanSun/EVA-CLIP", "encoders", "MIT",
        size=856_461_210,
    ),
    WeightFile(
        "scrfd_10g_bnkps.onnx", "insightface/models/antelopev2", "face detector", "DIAMONIK7777/antelopev2",
        "encoders", _NON_COMMERCIAL, restricted=True, size=16_923_827,
    ),
    WeightFile(
        "glintr100.onnx", "insightface/models/antelopev2", "face recogniser", "DIAMONIK7777/antelopev2",
        "encoders", _NON_COMMERCIAL, restricted=True, size=260_665_334,
    ),
    WeightFile(
        "detection_Resnet50_Final.pth", "facexlib", "face landmarks (RetinaFace)",
        "https://github.com/xinntao/facexlib/releases/download/v0.1.0/detection_Resnet50_Final.pth", "encoders", "MIT",
    ),
    WeightFile(
        "parsing_bisenet.pth", "facexlib", "face parser (BiSeNet)",
        "https://github.com/xinntao/facexlib/releases/download/v0.2.0/parsing_bisenet.pth", "encoders", "MIT",
    ),
)  # fmt: skip


def default_models_dir() -> Path:
    """$PULID_MODELS_DIR, or `models` below the current folder."""
    return Path(os.environ.get(MODELS_DIR_VARIABLE, "models")).absolute()


def in_group(group: str) -> tuple[WeightFile, ...]:
    return tuple(file for file in CATALOG if file.group == group)


def find(file: WeightFile, models_dir: Path) -> Path | None:
    """Where the file lies, or None: in its folder, a folder too deep (a usual slip), or in facexlib's own."""
    for folder in _folders(file, models_dir):
        if (path := folder / file.name).is_file():
            return path
    return None


def find_adapter(family: str, models_dir: Path) -> Path | None:
    """The first PuLID file of a family that is there, in the order of the catalogue."""
    return next((path for file in in_group(family) if (path := find(file, models_dir))), None)


def require_encoders(models_dir: Path) -> dict[str, Path]:
    """Paths of all encoder files by name.

    Raises:
        MissingWeightsError: names every missing file and its folder.
    """
    paths = {file.name: find(file, models_dir) for file in in_group("encoders")}
    missing = [file for file in in_group("encoders") if paths[file.name] is None]
    if missing:
        lines = "\n".join(f"  {file.name} ({file.purpose}) -> {models_dir / file.folder}" for file in missing)
        raise MissingWeightsError(
            f"These files are needed and not there:\n{lines}\nGet them with: python -m lib_pulid models download"
        )
    return {name: path for name, path in paths.items() if path is not None}


def download(file: WeightFile, models_dir: Path, say: Callable[[str], None] = print) -> Path:
    """Fetches a file into its folder, whole or not at all; one that is there is left alone.

    Raises:
        MissingWeightsError: it could not be had; the message says where to put it by hand.
    """
    if (there := find(file, models_dir)) is not None:
        return there
    folder = models_dir / file.folder
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{file.name}: {file.purpose}, licence: {file.licence}")
    try:
        if file.source.startswith("https://"):
            import torch

            torch.hub.download_url_to_file(file.source, str(folder / file.name), progress=True)
        else:
            from huggingface_hub import hf_hub_download

            hf_hub_download(file.source, file.name, local_dir=folder)
    except Exception as error:  # network, disk, hub: whatever it is, the user's way out is the same
        raise MissingWeightsError(
            f"{file.name} could not be downloaded ({type(error).__name__}). Put it into {folder} by hand; "
            f"it comes from {file.source}."
        ) from error
    return folder / file.name


def _folders(file: WeightFile, models_dir: Path) -> Iterator[Path]:
    folder = models_dir / file.folder
    yield from (folder, folder / folder.name, models_dir)
    if file.folder == "facexlib":
        from importlib.util import find_spec

        spec = find_spec("facexlib")
        if spec is not None and spec.origin:
            yield Path(spec.origin).parent / "weights"
