"""The weight files: what each is for, where it comes from, where it lies, and whether it is the right one.

Folders are those of the WebUIs: `pulid`, `insightface/models/antelopev2`, `facexlib` below the models folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lib_pulid import disk
from lib_pulid.errors import DownloadError, MissingWeightsError, WrongWeightsError
from lib_pulid.files import download as downloads
from lib_pulid.files.download import Download, ProgressCallback, RetryPolicy, format_size, no_progress

MODELS_DIR_VARIABLE = "PULID_MODELS_DIR"
FAMILIES = ("sdxl", "flux")
_NON_COMMERCIAL = "InsightFace model licence: non-commercial research purposes only"
_FACEXLIB = "https://github.com/xinntao/facexlib/releases/download/"


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Args:
        name: file name. folder: below the models folder. purpose: in words.
        source: "owner/repository" on the Hugging Face Hub, or a URL. origin: a URL to try where the source fails.
        group: "sdxl", "flux" (one file of a group is enough) or "encoders" (all are needed).
        licence: in words; `restricted` licences have to be accepted.
        size: bytes, or 0 where it is not known. sha256: or "" where it is not known.
        others: sizes of well-known other files that people put under this name, and what they are.
    """

    name: str
    folder: str
    purpose: str
    source: str
    group: str
    licence: str = "Apache-2.0"
    restricted: bool = False
    size: int = 0
    sha256: str = ""
    revision: str = "main"
    origin: str = ""
    others: tuple[tuple[int, str], ...] = ()

    @property
    def url(self) -> str:
        """For a person; the program asks huggingface_hub, which knows mirrors."""
        hub = f"https://huggingface.co/{self.source}/resolve/{self.revision}/{self.name}"
        return self.source if "://" in self.source else self.origin or hub

    @property
    def told_size(self) -> str:
        return format_size(self.size) if self.size else "size not known"


# Sizes and sums were not measured here. They are what public lists say, each sum found in several with the same size:
# pulid_v1.1, EVA02_CLIP, antelopev2: a script that pins URL, size and sum of each at the revisions named here;
# pulid_flux_v0.9.1: utensils/mold's manifest and experiment notes; its size: download checks of several projects;
# detection_Resnet50_Final, parsing_bisenet: model lists of several projects, those of facexlib's GitHub release and of
# the copies on the hub (leonelhs/facexlib) being the same.
# w600k_r50 and w600k_mbf (buffalo_l, buffalo_s) and AuraFace's file of the very same name: likewise.
CATALOG = (
    WeightFile(
        "pulid_v1.1.safetensors", "pulid", "PuLID v1.1 for SDXL", "guozinan/PuLID", "sdxl", size=984_405_232,
        sha256="4cb8ceec1078e0165399b88332ab3c5971619111b8e1730e6bae64144aabae41",
    ),
    WeightFile("pulid_v1.bin", "pulid", "PuLID v1 for SDXL", "guozinan/PuLID", "sdxl"),
    WeightFile(
        "ip-adapter_pulid_sdxl_fp16.safetensors", "pulid", "PuLID v1 for SDXL, half precision",
        "huchenlei/ipadapter_pulid", "sdxl",
    ),
    WeightFile(
        "pulid_flux_v0.9.1.safetensors", "pulid", "PuLID v0.9.1 for FLUX", "guozinan/PuLID", "flux",
        size=1_142_099_520, sha256="92c41c3af322b02e58e1b32842e4601e08c8f16ec1fe80089dbe957df510f51d",
    ),
    WeightFile("pulid_flux_v0.9.0.safetensors", "pulid", "PuLID v0.9.0 for FLUX", "guozinan/PuLID", "flux"),
    WeightFile(
        "EVA02_CLIP_L_336_psz14_s6B.pt", "pulid", "vision tower", "QuanSun/EVA-CLIP", "encoders", "MIT",
        size=856_461_210, sha256="84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05",
        revision="11afd202f2ae80869d6cef18b1ec775e79bd8d12",
    ),
    WeightFile(
        "scrfd_10g_bnkps.onnx", "insightface/models/antelopev2", "face detector", "DIAMONIK7777/antelopev2",
        "encoders", _NON_COMMERCIAL, restricted=True, size=16_923_827,
        sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
        revision="ba0c3e10f4548361eb9a63265d87ce1140ab5a05",
    ),
    WeightFile(
        "glintr100.onnx", "insightface/models/antelopev2", "face recogniser", "DIAMONIK7777/antelopev2",
        "encoders", _NON_COMMERCIAL, restricted=True, size=260_665_334,
        sha256="4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
        revision="ba0c3e10f4548361eb9a63265d87ce1140ab5a05",
        others=(
            (174_383_860, "w600k_r50.onnx of buffalo_l"),
            (13_616_099, "w600k_mbf.onnx of buffalo_s"),
            (260_694_151, "AuraFace's file of the same name"),
        ),
    ),
    WeightFile(
        "detection_Resnet50_Final.pth", "facexlib", "face landmarks (RetinaFace)", "leonelhs/facexlib", "encoders",
        "MIT", size=109_497_761, sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
        origin=_FACEXLIB + "v0.1.0/detection_Resnet50_Final.pth",
    ),
    WeightFile(
        "parsing_bisenet.pth", "facexlib", "face parser (BiSeNet)", "leonelhs/facexlib", "encoders", "MIT",
        size=53_289_463, sha256="468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
        origin=_FACEXLIB + "v0.2.0/parsing_bisenet.pth",
    ),
)  # fmt: skip


def default_models_dir() -> Path:
    """$PULID_MODELS_DIR, or `models` below the current folder."""
    return disk.user_path(os.environ.get(MODELS_DIR_VARIABLE, "").strip() or "models").absolute()


def in_group(group: str) -> tuple[WeightFile, ...]:
    return tuple(file for file in CATALOG if file.group == group)


def named(name: str) -> WeightFile | None:
    return next((file for file in CATALOG if file.name == name), None)


# ---------------------------------------------------------------- what is there


def find(file: WeightFile, models_dir: Path) -> Path | None:
    """Where the file lies, or None. Looks into its folder, a folder too deep (a usual slip), where other programs keep
    it, and huggingface_hub's and torch's own folders; a file that is the right one goes before one that is not, and
    one that may be read before one that may not."""
    found = sorted(filter(disk.is_file, _places(file, models_dir)), key=lambda path: not os.access(path, os.R_OK))
    return next((path for path in found if not problem(file, path)), found[0] if found else None)


def find_adapter(family: str, models_dir: Path) -> Path | None:
    """The first PuLID file of a family that is there, in the order of the catalogue."""
    return next((path for file in in_group(family) if (path := find(file, models_dir))), None)


def problem(file: WeightFile, path: Path) -> str:
    """What is wrong with a file, as far as its size tells; "" where nothing is."""
    size = disk.size_of(path)
    if file.size in (0, size):
        return ""
    other = dict(file.others).get(size)
    return f"{path} is {other}, not {file.name}" if other else f"{path} has {size:,} bytes, not {file.size:,}"


def verify(file: WeightFile, path: Path, progress: ProgressCallback = no_progress) -> str:
    """As `problem`, with the sum of all bytes, which takes seconds."""
    if (wrong := problem(file, path)) or not file.sha256:
        return wrong
    return _wrong_sum(file, path, downloads.sha256_of(path, progress))


def fingerprint(files: Mapping[str, Path], fingerprint_of: Callable[[Path], str]) -> str:
    """Names the content of encoder files. fingerprint_of: gives the first hex digits of a file's sha256.

    Raises:
        WrongWeightsError: a file of the right size has other bytes: it is damaged.
    """
    parts = []
    for name, path in files.items():
        file, found = named(name), fingerprint_of(path)
        if file is not None and file.size == disk.size_of(path) and (wrong := _wrong_sum(file, path, found)):
            raise WrongWeightsError(f"{wrong}. Get it again: {how_to_get([file])}")
        parts.append(found)
    return "-".join(parts)


def _wrong_sum(file: WeightFile, path: Path, found: str) -> str:
    if not file.sha256 or file.sha256.startswith(found):
        return ""
    return f"{path} is damaged: its sum is {found[:8]}..., not {file.sha256[:8]}..."


def missing(family: str, models_dir: Path) -> tuple[WeightFile, ...]:
    """What a family ("sdxl", "flux") lacks: encoder files, and where there is no PuLID file at all, the first one."""
    lacking = [file for file in in_group("encoders") if _unusable(file, find(file, models_dir))]
    if family and find_adapter(family, models_dir) is None:
        lacking.insert(0, in_group(family)[0])
    return tuple(lacking)


def require_encoders(models_dir: Path) -> dict[str, Path]:
    """Paths of all encoder files by name.

    Raises:
        MissingWeightsError: names every missing file, its folder and address.
        WrongWeightsError: a file is known to be another one; faces would come out as other people's.
    """
    paths = {file: find(file, models_dir) for file in in_group("encoders")}
    if lacking := [file for file, path in paths.items() if path is None]:
        raise MissingWeightsError(f"These files are needed and not there:\n{by_hand(lacking, models_dir)}\n"
                                  f"{how_to_get(lacking)}")  # fmt: skip
    for file, path in paths.items():
        if wrong := _unusable(file, path):
            raise WrongWeightsError(f"{wrong}; with it, other people's faces come out. {how_to_get([file])}")
    return {file.name: path for file, path in paths.items() if path is not None}


def by_hand(files: Iterable[WeightFile], models_dir: Path) -> str:
    """A line per file for someone who has to bring them: name, size, folder, address."""
    return "\n".join(
        f"  {file.name} ({file.purpose}, {file.told_size}) -> {models_dir / file.folder}   from {file.url}"
        for file in files
    )


def how_to_get(files: Iterable[WeightFile]) -> str:
    names = " ".join(file.name for file in files)
    return f"Get them with the button in the PuLID accordion, or with: python -m lib_pulid models download {names}"


def _unusable(file: WeightFile, path: Path | None) -> str:
    """Files of other sizes are let through, and loading them tells what they are; but another face recogniser loads
    like the right one and makes a stranger, so those that are known are refused."""
    if path is None:
        return "missing"
    return problem(file, path) if disk.size_of(path) in dict(file.others) else ""


def _places(file: WeightFile, models_dir: Path) -> Iterator[Path]:
    home = models_dir / file.folder
    folders = [home, home / home.name, models_dir]
    if file.folder == "facexlib":  # A1111 and Forge keep the detector beside GFPGAN's or CodeFormer's models
        folders += [
            home / "weights",
            home / "detection",
            home / "parsing",
            *(models_dir / n for n in ("GFPGAN", "Codeformer")),
        ]
        folders += _package("facexlib")
    elif file.folder == "pulid":  # ComfyUI: clip, clip_vision. sd-webui-controlnet: ControlNet, and its own models
        others = ("clip", "clip_vision") if file.group == "encoders" else ("ControlNet", "ipadapter", "photomaker")
        folders += [models_dir / name for name in others]
        folders.append(models_dir.parent / "extensions" / "sd-webui-controlnet" / "models")
    else:  # insightface's own folders, and the official demo's
        pack = home.name
        folders += [models_dir / "insightface" / pack, models_dir / pack, models_dir / pack / pack]
        folders += [disk.user_path("~/.insightface/models") / pack / deeper for deeper in ("", pack)]
    yield from (folder / file.name for folder in folders)
    yield _torch_cache() / file.name
    if "://" not in file.source:
        snapshots = hub_cache() / f"models--{file.source.replace('/', '--')}" / "snapshots"
        yield from (snapshot / file.name for snapshot in disk.listed(snapshots))


def _package(name: str) -> list[Path]:
    spec = find_spec(name)
    return [Path(spec.origin).parent / "weights"] if spec is not None and spec.origin else []


def _torch_cache() -> Path:
    return _folder_of("TORCH_HOME", default=_folder_of("XDG_CACHE_HOME") / "torch") / "hub" / "checkpoints"


def hub_cache() -> Path:
    """huggingface_hub.constants.HF_HUB_CACHE, without the third of a second that importing it takes."""
    home = _folder_of("HF_HOME", default=_folder_of("XDG_CACHE_HOME") / "huggingface")
    return _folder_of("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", default=home / "hub")


def _folder_of(*variables: str, default: str | Path = "~/.cache") -> Path:
    """The first of these variables that is set and not empty, or the default."""
    return disk.user_path(next(filter(None, map(os.environ.get, variables)), default))


# ---------------------------------------------------------------- getting it


def download(
    file: WeightFile,
    models_dir: Path,
    progress: ProgressCallback = no_progress,
    replace: bool = False,
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008
) -> Path:
    """Fetches a file into its folder, whole or not at all; one that is there is left alone.

    replace: fetch it also where another file has its name and place, which is kept as NAME.other.

    Raises:
        DownloadError: it could not be had; the message says why, and where to put it by hand.
    """
    there, target = find(file, models_dir), models_dir / file.folder / file.name
    if there is not None and not (replace or _unusable(file, there)):
        return there
    first: DownloadError | None = None
    for source in filter(None, (file.source, file.origin)):
        try:
            url, headers = (source, {}) if "://" in source else downloads.address(source, file.name, file.revision)
            downloads.fetch(Download(url, target, file.size, file.sha256), headers, progress, policy)
            return target
        except DownloadError as error:
            first = first or error
    raise DownloadError(
        f"{file.name} could not be downloaded: {first}.\nBy hand:\n{by_hand([file], models_dir)}"
    ) from first
