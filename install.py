"""Installs the packages that are missing, and moves none that is installed.

Bare `pip install insightface` would take numpy and protobuf past what the WebUIs pin, lay opencv-python over
opencv-python-headless, and onnxruntime over onnxruntime-gpu. The WebUI runs this file at each start, and shows what it
prints when it has ended; so it is quick when nothing is missing, and writes to the console when something is.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import invalidate_caches
from importlib.util import find_spec

# Module -> requirement. Missing is what cannot be imported: a module may come from a package of another name
# (onnxruntime-gpu, opencv-contrib-python), and looking for modules is quicker than reading all packages' metadata.
WITH_DEPENDENCIES = {
    "onnx": "onnx>=1.16",
    "onnxruntime": "onnxruntime>=1.17",
    "cv2": "opencv-python-headless>=4.8",
    "skimage": "scikit-image",
    "safetensors": "safetensors",
    "requests": "requests",
}
# What these import, the table above and the hosts bring (torch, torchvision, Pillow, scipy, tqdm, ...). Old
# versions of insightface have no wheel and are built for minutes.
ALONE = {"insightface": "insightface>=1.0,<3", "facexlib": "facexlib==0.3.0", "timm": "timm>=1.0.8,<1.1"}
OLDEST_TIMM = (1, 0, 8)  # the first with all of forward_intermediates

# A1111 and Forge pin protobuf 3.20.0; every onnx wheel that runs with numpy 1.24 and later asks for 3.20.2, but this
# one works with 3.20.0.
OLD_PROTOBUF, ONNX_FOR_IT = (3, 20, 2), "onnx==1.16.2"
# Where pip does not know of these, though they can be imported, it would write over them.
SHARED = {"numpy": "numpy", "google.protobuf": "protobuf"}

NAME = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"  # normalized; PEP 508
# PEP 440, appendix B.
VERSION = (
    r"v?(\d+!)?\d+(\.\d+)*([-_.]?(a|b|c|rc|alpha|beta|pre|preview)[-_.]?\d*)?"
    r"(-\d+|[-_.]?(post|rev|r)[-_.]?\d*)?([-_.]?dev[-_.]?\d*)?(\+[a-z0-9]+([-_.][a-z0-9]+)*)?"
)


def importable(module: str) -> bool:
    """A folder without __init__.py, which an uninstall can leave, is not a package."""
    try:
        spec = find_spec(module)
    except Exception:  # of the package around it; or a .pth file has put the module into sys.modules without a spec
        return module in sys.modules
    return spec is not None and spec.origin is not None


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def timm_version() -> str:
    """Reads timm's version from its own file; "" where there is none."""
    try:
        spec = find_spec("timm")
        with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
            return re.search(r"[\"'](\d[^\"']*)[\"']", file.read())[1]
    except (AttributeError, OSError, TypeError, ValueError):
        return ""


def installed() -> dict[str, list[str]]:
    """Reads name -> version of what is installed as pip sees it: of several versions, the first on sys.path counts.
    `pip list` itself fails, in some of its versions, for one package whose version is missing or not PEP 440's."""
    from importlib import metadata

    found: dict[str, tuple[str, list[str]]] = {}  # name -> folder, versions
    for package in metadata.distributions():
        folder, info = os.path.split(str(getattr(package, "_path", "")))
        try:
            facts = package.metadata or {}
            name, version = facts.get("Name"), facts.get("Version")
        except ValueError:  # not UTF-8
            name, _, version = info.rpartition(".")[0].partition("-")
        if not name or not version or info.startswith("~"):  # ~orch is what an uninstall of torch can leave
            continue
        first, versions = found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), (folder, []))
        # Of two in one folder, pip takes the one listed first; with Python 3.10 that depends on pip's version.
        if not versions or (sys.version_info < (3, 11) and folder == first and version not in versions):
            versions.append(version)
    return {name: versions for name, (_, versions) in found.items()}


def constraints(have: dict[str, list[str]]) -> str:
    """A constraints file that keeps every package where it is: one with two versions cannot be asked for at all. `===`
    takes a version as it is written; with `==`, pip refuses the whole file for one that is not PEP 440's. Left out is
    what pip cannot read in either way, such as "1.0 beta": nothing can require it."""
    pairs = [(name, version) for name, versions in sorted(have.items()) for version in versions]
    pairs = [pair for pair in pairs if re.fullmatch(NAME, pair[0]) and not re.search(r"[\s;,]", pair[1])]
    equal = {version: "==" if re.fullmatch(VERSION, version, re.IGNORECASE) else "===" for _, version in pairs}
    return "".join(f"{name}{equal[version]}{version}\n" for name, version in pairs)


def tell(text: str) -> None:
    """Writes to the console, although the WebUI keeps what this file prints until it has ended."""
    try:
        with open("CONOUT$" if os.name == "nt" else "/dev/tty", "w", encoding="utf-8") as console:
            print(text, file=console)
    except OSError:  # a service has no console
        print(text, flush=True)


def check_timm() -> None:
    version, oldest = timm_version(), ".".join(map(str, OLDEST_TIMM))
    if version and numbers(version) < OLDEST_TIMM:
        print(f"PuLID needs timm {oldest} or later, and {version} is installed, which is left as it is. "
              f"If nothing else needs it: pip install --no-deps timm=={oldest}")  # fmt: skip


def install(missing: list[str]) -> None:
    import tempfile

    import launch

    have = installed()
    for module, name in SHARED.items():
        if importable(module) and name not in have:
            sys.exit(f"PuLID needs {', '.join(missing)}. Nothing was installed, because {name} is there but pip does "
                     f"not know of it (its metadata is missing) and would write over it. Reinstall {name} with pip, "
                     "then restart.")  # fmt: skip
    full = {module: WITH_DEPENDENCIES[module] for module in missing if module in WITH_DEPENDENCIES}
    alone = {module: ALONE[module] for module in missing if module in ALONE}
    if "onnx" in full and numbers(have.get("protobuf", ["999"])[0]) < OLD_PROTOBUF:
        del full["onnx"]
        alone["onnx"] = ONNX_FOR_IT
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "constraints.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(constraints(have))
        for wanted, how in ((full, f'--constraint "{path}"'), (alone, "--no-deps")):
            if wanted:
                call_pip(launch, wanted, how)


def call_pip(launch, wanted: dict[str, str], how: str) -> None:  # noqa: ANN001
    """Installs the requirements of these modules. pip 24.1 and later fail when all is installed, if a package with an
    invalid version lies in the same folder; what can be imported then is installed."""
    names = " ".join(f'"{requirement}"' for requirement in wanted.values())
    try:
        launch.run_pip(f"install {names} --only-binary :all: {how}", f"what PuLID needs ({', '.join(wanted.values())})")
    except RuntimeError as error:
        invalidate_caches()
        if not all(map(importable, wanted)):
            raise
        print(f"PuLID: {', '.join(wanted)} were installed, then pip failed: {str(error).strip().splitlines()[-1]}")


def main() -> None:
    check_timm()
    missing = [module for module in (*WITH_DEPENDENCIES, *ALONE) if not importable(module)]
    if missing:
        tell(f"PuLID: installing {', '.join(missing)} (only at the first start, up to a minute) ...")
        install(missing)


main()
