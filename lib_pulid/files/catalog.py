"""The catalog of weight files: what each is for, where it comes from, where it lies, and whether it is the right one.

Folders are those of the WebUIs: `pulid`, `insightface/models/antelopev2`, `facexlib` below the models folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lib_pulid import disk
from lib_pulid.disk import ProgressCallback, format_size, no_progress
from lib_pulid.errors import DownloadError, MissingWeightsError, WrongWeightsError
from lib_pulid.files import download as downloads
from lib_pulid.files.download import Download
from lib_pulid.files.places import ANTELOPE, BUFFALO, JUDGE, places

MODELS_DIR_VARIABLE = "PULID_MODELS_DIR"
FAMILIES = ("sdxl", "flux")
_NON_COMMERCIAL = "InsightFace model license: non-commercial research purposes only"
_ANTELOPE_REVISION = "ba0c3e10f4548361eb9a63265d87ce1140ab5a05"
_INSTANTID = "InstantID checkpoints: non-commercial research purposes only (InsightFace)"
_FACEID = "IP-Adapter-FaceID models: non-commercial research purposes only (InsightFace)"
_FACEXLIB = "https://github.com/xinntao/facexlib/releases/download/"


@dataclass(frozen=True)
class WeightFile:
    """One file.

    Args:
        name: file name. folder: below the models folder. purpose: in words.
        source: "owner/repository" on the Hugging Face Hub, or a URL. origin: a URL to try where the source fails.
        group: "sdxl", "flux" (one PuLID file of a family is enough), "encoders" (PuLID needs all), or "methods" (the
            files of other methods, each by itself).
        licence: in words; `restricted` licenses have to be accepted.
        size: bytes, or 0 where it is not known. sha256: its first digits, or "", where not all are known.
        role: of a model that reads photos, as in `methods.Method.reads`, or of a method's ControlNet.
        remote: its path in the repository, if that is not its name.
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
    role: str = ""
    remote: str = ""
    others: tuple[tuple[int, str], ...] = ()

    @property
    def url(self) -> str:
        """For a person; the program asks huggingface_hub, which knows mirrors."""
        hub = f"https://huggingface.co/{self.source}/resolve/{self.revision}/{self.path}"
        return self.source if "://" in self.source else self.origin or hub

    @property
    def path(self) -> str:
        """Its path in the repository."""
        return self.remote or self.name

    @property
    def size_text(self) -> str:
        return format_size(self.size) if self.size else "size not known"


@dataclass(frozen=True)
class Status:
    """What is there of a file. path: None where it is missing. problem: what is wrong with it, or ""."""

    file: WeightFile
    path: Path | None = None
    problem: str = ""

    @property
    def state(self) -> str:
        """ "there", "missing" or "differs"."""
        return "missing" if self.path is None else "differs" if self.problem else "there"

    @property
    def usable(self) -> bool:
        """Files of other sizes pass, and loading them shows what they are. But another face recognizer loads like the
        right one and gives a stranger's face, so those that are known do not."""
        return self.path is not None and disk.size_of(self.path) not in dict(self.file.others)


# Sizes and checksums were not measured here. They are what public lists say, each checksum found in several with the
# same size: pulid_v1.1, EVA02_CLIP, antelopev2: a script that pins them at the revisions named here;
# pulid_flux_v0.9.1: utensils/mold's manifest and experiment notes; the others, and those that are mistaken for
# glintr100: model lists of several projects, facexlib's GitHub release and leonelhs/facexlib on the hub being the same.
CATALOG = (
    WeightFile("pulid_v1.1.safetensors", "pulid", "PuLID v1.1 for SDXL", "guozinan/PuLID", "sdxl",
               size=984_405_232, sha256="4cb8ceec1078e0165399b88332ab3c5971619111b8e1730e6bae64144aabae41"),
    WeightFile("pulid_v1.bin", "pulid", "PuLID v1 for SDXL", "guozinan/PuLID", "sdxl"),
    WeightFile("ip-adapter_pulid_sdxl_fp16.safetensors", "pulid", "PuLID v1 for SDXL, half precision",
               "huchenlei/ipadapter_pulid", "sdxl"),
    WeightFile("pulid_flux_v0.9.1.safetensors", "pulid", "PuLID v0.9.1 for FLUX", "guozinan/PuLID", "flux",
               size=1_142_099_520, sha256="92c41c3af322b02e58e1b32842e4601e08c8f16ec1fe80089dbe957df510f51d"),
    WeightFile("pulid_flux_v0.9.0.safetensors", "pulid", "PuLID v0.9.0 for FLUX", "guozinan/PuLID", "flux"),
    WeightFile("EVA02_CLIP_L_336_psz14_s6B.pt", "pulid", "vision tower", "QuanSun/EVA-CLIP", "encoders", "MIT",
               role="tower", revision="11afd202f2ae80869d6cef18b1ec775e79bd8d12",
               size=856_461_210, sha256="84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05"),
    WeightFile("scrfd_10g_bnkps.onnx", ANTELOPE, "face detector", "DIAMONIK7777/antelopev2", "encoders",
               _NON_COMMERCIAL, restricted=True, role="detector", revision=_ANTELOPE_REVISION,
               size=16_923_827, sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"),
    WeightFile("glintr100.onnx", ANTELOPE, "face recognizer", "DIAMONIK7777/antelopev2", "encoders",
               _NON_COMMERCIAL, restricted=True, role="recogniser", revision=_ANTELOPE_REVISION,
               size=260_665_334, sha256="4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
               others=((174_383_860, "w600k_r50.onnx of buffalo_l"), (13_616_099, "w600k_mbf.onnx of buffalo_s"),
                       (260_694_151, "AuraFace's file of the same name"))),
    WeightFile("detection_Resnet50_Final.pth", "facexlib", "face landmarks (RetinaFace)", "leonelhs/facexlib",
               "encoders", "MIT", role="landmarker", origin=_FACEXLIB + "v0.1.0/detection_Resnet50_Final.pth",
               size=109_497_761, sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d"),
    WeightFile("parsing_bisenet.pth", "facexlib", "face parser (BiSeNet)", "leonelhs/facexlib",
               "encoders", "MIT", role="parser", origin=_FACEXLIB + "v0.2.0/parsing_bisenet.pth",
               size=53_289_463, sha256="468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567"),
    WeightFile("ip-adapter_instant_id_sdxl.bin", "pulid", "InstantID for SDXL", "InstantX/InstantID", "methods",
               _INSTANTID, restricted=True, remote="ip-adapter.bin", size=1_691_134_141, sha256="02b3618e"),
    WeightFile("control_instant_id_sdxl.safetensors", "pulid", "InstantID's ControlNet (IdentityNet)",
               "InstantX/InstantID", "methods", _INSTANTID, restricted=True, role="identity_net",
               remote="ControlNetModel/diffusion_pytorch_model.safetensors", size=2_502_139_136, sha256="c8127be9"),
    WeightFile("ip-adapter-faceid-portrait_sdxl_unnorm.bin", "pulid", "FaceID Portrait (unnorm) for SDXL",
               "h94/IP-Adapter-FaceID", "methods", _FACEID, restricted=True, sha256="220bb86e"),
    WeightFile("ip-adapter-faceid-portrait_sdxl.bin", "pulid", "FaceID Portrait for SDXL",
               "h94/IP-Adapter-FaceID", "methods", _FACEID, restricted=True, sha256="5631ce78"),
    WeightFile("ip-adapter-faceid_sdxl.bin", "pulid", "FaceID for SDXL", "h94/IP-Adapter-FaceID", "methods", _FACEID,
               restricted=True, size=1_071_149_741, sha256="f455fed2"),
    WeightFile("ip-adapter-faceid-plusv2_sdxl.bin", "pulid", "FaceID PlusV2 for SDXL", "h94/IP-Adapter-FaceID",
               "methods", _FACEID, restricted=True, size=1_487_555_181, sha256="c6945d82"),
    WeightFile("ip-adapter-plus-face_sdxl_vit-h.safetensors", "pulid", "IP-Adapter Plus Face for SDXL",
               "h94/IP-Adapter", "methods", remote="sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
               size=847_517_512, sha256="677ad886"),
    WeightFile("ip-adapter-plus_sdxl_vit-h.safetensors", "pulid", "IP-Adapter Plus for SDXL",
               "h94/IP-Adapter", "methods", remote="sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
               size=847_517_512, sha256="3f5062b8"),
    WeightFile("ip-adapter_sdxl_vit-h.safetensors", "pulid", "IP-Adapter for SDXL (ViT-H)",
               "h94/IP-Adapter", "methods", remote="sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
               size=698_391_064, sha256="ebf05d91"),
    WeightFile("ip-adapter_sdxl.safetensors", "pulid", "IP-Adapter for SDXL (ViT-bigG)",
               "h94/IP-Adapter", "methods", remote="sdxl_models/ip-adapter_sdxl.safetensors", size=702_585_376),
    WeightFile("CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "clip_vision", "image encoder of IP-Adapter (ViT-H)",
               "h94/IP-Adapter", "methods", remote="models/image_encoder/model.safetensors", role="clip_h"),
    WeightFile("CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors", "clip_vision",
               "image encoder of IP-Adapter (ViT-bigG)", "h94/IP-Adapter", "methods",
               remote="sdxl_models/image_encoder/model.safetensors", role="clip_bigg"),
    WeightFile(JUDGE, BUFFALO, "face recognizer of FaceID", "public-data/insightface", "methods",
               _NON_COMMERCIAL, restricted=True, remote="models/buffalo_l/w600k_r50.onnx",
               role="recogniser_buffalo", size=174_383_860,
               others=((260_665_334, "antelopev2's glintr100.onnx"), (13_616_099, "w600k_mbf.onnx of buffalo_s"))),
)  # fmt: skip


def in_group(group: str) -> tuple[WeightFile, ...]:
    return tuple(file for file in CATALOG if file.group == group)


def named(name: str) -> WeightFile | None:
    return next((file for file in CATALOG if file.name == name), None)


def status(file: WeightFile, models_dir: Path, verify: ProgressCallback | None = None) -> Status:
    """Looks for a file in its folder and wherever else it may lie. A right one goes before one of another size, and
    one that may be read before one that may not.

    verify: compares the checksum of all bytes, too, which takes seconds; called for each block.
    """
    paths = places(models_dir, file.folder, file.name, file.source, file.path)
    found = (Status(file, path, _problem(file, path)) for path in paths if disk.is_file(path))
    best = min(found, key=lambda one: (one.problem != "", not os.access(str(one.path), os.R_OK)), default=Status(file))
    if best.path and not best.problem and verify:
        return Status(file, best.path, _damage(file, best.path, disk.sha256_of(best.path, verify)))
    return best


def find_adapter(family: str, models_dir: Path) -> Path | None:
    """Finds the first PuLID file of a family that is there, in the order of the catalog."""
    return next((path for file in in_group(family) if (path := status(file, models_dir).path)), None)


def missing(family: str, models_dir: Path) -> tuple[WeightFile, ...]:
    """Lists what a family ("sdxl", "flux") lacks: encoder files, and if there is no PuLID file at all, the first."""
    lacking = [file for file in in_group("encoders") if not status(file, models_dir).usable]
    if family and find_adapter(family, models_dir) is None:
        lacking.insert(0, in_group(family)[0])
    return tuple(lacking)


def require_encoders(models_dir: Path, roles: Iterable[str] = ()) -> dict[str, Path]:
    """Finds the models that read photos, by role: those of these roles, or all that PuLID needs.

    Raises:
        MissingWeightsError: names every missing file, its folder and address.
        WrongWeightsError: a file is known to be another one, which would give a stranger's face.
    """
    files = [file for file in CATALOG if file.role and file.role in roles] if roles else in_group("encoders")
    found = [status(file, models_dir) for file in files]
    if lacking := [one.file for one in found if one.path is None]:
        raise MissingWeightsError(f"PuLID needs files that are missing:\n{by_hand(lacking, models_dir)}\n"
                                  f"{how_to_get(lacking)}")  # fmt: skip
    for one in found:
        if not one.usable:
            raise WrongWeightsError(f"{one.problem}; with this file you would get the wrong person's face. "
                                    f"{how_to_get([one.file])}")  # fmt: skip
    return {one.file.role: one.path for one in found if one.path is not None}


def no_adapter(family: str, folder: Path, models_dir: Path, left_out: Iterable[str] = ()) -> MissingWeightsError:
    """Makes the error for a family without a PuLID file. left_out: what is wrong with the files in the folder."""
    files = in_group(family)
    return MissingWeightsError("\n".join([
        f"no PuLID file for {family.upper()} in {folder}. One of these is needed:",
        by_hand(files, models_dir), how_to_get(files[:1]),
        *(f"Left out: {problem}" for problem in left_out),
    ]))  # fmt: skip


def fingerprint(encoders: Mapping[str, Path], fingerprint_of: Callable[[Path], str]) -> str:
    """Names the content of encoder files, given by role. fingerprint_of: gives the start of a file's sha256.

    Raises: as `check_bytes`.
    """
    found = {role: fingerprint_of(path) for role, path in encoders.items()}
    for file in CATALOG:
        if file.role in found:
            check_bytes(file, encoders[file.role], found[file.role])
    return "-".join(found.values())


def check_bytes(file: WeightFile, path: Path, found: str) -> None:
    """Checks a file of the catalog's size. found: the start of its sha256.

    Raises:
        WrongWeightsError: it has other bytes: it is damaged.
    """
    if file.size == disk.size_of(path) and (wrong := _damage(file, path, found)):
        raise WrongWeightsError(f"{wrong}. Delete it and download it again. {how_to_get([file])}")


def by_hand(files: Iterable[WeightFile], models_dir: Path) -> str:
    """Writes a line per file for someone who has to bring it: name, size, folder, address, and a dead link."""
    line = "  {0.name} ({0.purpose}, {0.size_text}) -> {1}   from {0.url}{2}"
    return "\n".join(line.format(one, at := models_dir / one.folder, disk.dead_link(at / one.name)) for one in files)


def how_to_get(files: Iterable[WeightFile]) -> str:
    names = " ".join(file.name for file in files)
    return f"Use the download button in the PuLID accordion, or run: python -m lib_pulid models download {names}"


def _problem(file: WeightFile, path: Path) -> str:
    """Says what is wrong with a file, as far as its size shows."""
    size = disk.size_of(path)
    if file.size in (0, size):
        return ""
    other = dict(file.others).get(size)
    return f"{path} is {other}, not {file.name}" if other else f"{path} has {size:,} bytes, not {file.size:,}"


def _damage(file: WeightFile, path: Path, found: str) -> str:
    if not file.sha256 or file.sha256.startswith(found) or found.startswith(file.sha256):
        return ""
    return f"{path} is damaged: its checksum is {found[:8]}..., not {file.sha256[:8]}..."


def download(
    file: WeightFile, models_dir: Path, progress: ProgressCallback = no_progress, replace: bool = False
) -> Path:
    """Downloads a file into its folder, completely or not at all; one that is there and usable is left alone.

    replace: download it also where another file has its name and place, which is kept as NAME.other.

    Raises:
        DownloadError: why it failed, and where to put the file by hand.
    """
    there, target = status(file, models_dir), models_dir / file.folder / file.name
    if there.path is not None and there.usable and not replace:
        return there.path
    errors = []
    for source in filter(None, (file.source, file.origin)):
        try:
            url, headers = (source, {}) if "://" in source else downloads.address(source, file.path, file.revision)
            downloads.fetch(Download(url, target, file.size, file.sha256), headers, progress)
            return target
        except DownloadError as error:
            errors.append(error)
    reasons = "; from its origin: ".join(dict.fromkeys(map(str, errors)))
    raise DownloadError(f"{file.name} could not be downloaded: {reasons}.\n"
                        f"By hand:\n{by_hand([file], models_dir)}") from errors[0]  # fmt: skip
