"""`python -m lib_pulid doctor`: what a machine has and lacks for PuLID."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from lib_pulid import cli_files
from lib_pulid.files import catalog, control_nets
from lib_pulid.methods import METHODS, usual

DOWNLOAD = "python -m lib_pulid models download"
PACKAGES = {
    "torch": "everything",
    "timm": "vision tower",
    "facexlib": "face landmarks and parser",
    "insightface": "face detector and recognizer",
    "onnxruntime": "runs insightface's models (onnxruntime-gpu and the like will do as well)",
    "opencv-python": "images",
    "safetensors": "weight files",
    "diffusers": "demo and generate; the WebUI does not need it",
}
_MODULES = {"opencv-python": "cv2"}  # where a package brings one of another name


def report(models_dir: Path) -> int:
    """Prints the report. Returns 0 if nothing is missing for at least one family, else 1."""
    print(f"Python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    problems = _packages()
    _device()
    print()
    found = cli_files.show(catalog.CATALOG, models_dir)
    encoders = [one for one in found if one.file.group == "encoders"]
    problems += [_again(one) for one in encoders if one.problem]
    problems += [f"{DOWNLOAD} {one.file.name}   ({one.file.licence})" for one in encoders if one.path is None]
    there = [one for one in found if one.path and one.file.group in catalog.FAMILIES]
    used = {one.file.group: one for one in reversed(there)}  # the first of a family, as `auto` takes it
    able = [family for family in catalog.FAMILIES if family in used and not used[family].problem]
    adapters = []
    for family in (one for one in catalog.FAMILIES if one not in able):
        first, *others = (file.name for file in catalog.in_group(family))
        new = f"{DOWNLOAD} {first}   (or {', '.join(others)})"
        adapters.append(f"for {family.upper()}: {_again(used[family]) if family in used else new}")
    print()
    for problem in (*problems, *_of_methods(models_dir), *adapters):
        print(f"to do: {problem}")
    for one in found:
        if one.problem and one not in (*encoders, *used.values()):
            print(f"note: {one.problem}; to replace it: {DOWNLOAD} {one.file.name}")
    if able and not problems:
        print(f"Ready for {' and '.join(map(str.upper, able))}.")
        return 0
    print("Until then there is only the miniature: python -m lib_pulid demo")
    return 1


def _again(one: catalog.Status) -> str:
    return f"{one.problem}: {DOWNLOAD} {one.file.name}"


def _of_methods(models_dir: Path) -> list[str]:
    """Says what the methods lack whose files are there. PuLID is listed by itself."""
    from lib_pulid.stores.adapters import Adapters
    from lib_pulid.stores.folder import ModelsFolder, Settings

    folder = ModelsFolder(lambda: Settings(models_dir))
    there = {file.method for file in Adapters(folder).listed()}
    return [
        f"for {method.label}: {DOWNLOAD} {file.name}   ({file.licence})"
        for method in METHODS
        if method in there and method.name != usual(method.family).name
        for file in control_nets.missing_for(method, folder.path, models_dir)
    ]


def _packages() -> list[str]:
    problems, installed = [], list(metadata.distributions())
    for name, purpose in PACKAGES.items():
        module = _MODULES.get(name, name)
        found = _bringing(module, name.partition("-")[0], installed) or [module] * _is_there(module)
        print(f"{'there' if found else 'MISSING':10} {', '.join(found) or name:40} {purpose}")
        if not found:
            problems.append(f"pip install {name}")
        if name == "onnxruntime" and len(found) > 1:
            problems.append(f"{' and '.join(found)} hide each other: pip uninstall all but the one for your GPU")
    return problems


def _bringing(module: str, prefix: str, installed: Iterable[metadata.Distribution]) -> list[str]:
    """Lists the packages, with versions, that bring a module: onnxruntime-gpu, -directml and others bring onnxruntime,
    but onnxruntime-extensions does not. prefix: of their names."""
    found: dict[str, str] = {}
    for one in installed:
        name = one.metadata["Name"] or ""
        files = one.files if name.lower().startswith(prefix) else []
        if files is None or any(file.parts[0] == module for file in files):
            found.setdefault(name, one.version)
    return [f"{name} {version}" for name, version in sorted(found.items())]


def _is_there(module: str) -> bool:
    """Whether a module can be imported; Debian's cv2 comes without a package that pip knows."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def _device() -> None:
    if not _is_there("torch"):
        return
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        print(f"GPU        {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    else:
        print("GPU        none that torch can use; images are made on the CPU")
    if _is_there("onnxruntime"):
        from lib_pulid.face_models import cuda_problem

        if problem := cuda_problem():
            print(f"note       {problem}")
