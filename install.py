"""Installs what is missing, at the versions the host can live with; nothing that is installed is moved.

Bare `pip install insightface` would bring numpy and protobuf past what the WebUIs pin. So every installed package
becomes a constraint. The WebUI runs this file at each start: it has to be quick when nothing is missing.
"""

from __future__ import annotations

import os
import re
import tempfile
from importlib import metadata

# What is wanted, and the names under which it may be there already. onnxruntime and onnxruntime-gpu hide each other.
WANTED = {
    "insightface": ("insightface",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    "facexlib": ("facexlib",),
    "timm": ("timm",),
    "safetensors": ("safetensors",),
}
ONNX = "onnx==1.16.2"
OLDEST_TIMM = (1, 0, 8)  # the first with all of forward_intermediates


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Name -> version of everything that is there."""
    found = ((dist.metadata["Name"], dist.version) for dist in metadata.distributions())
    return {normal(name): version for name, version in found if name and version}


def version(*names: str) -> str:
    """Of the first of these packages that is there; ""."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def missing() -> list[str]:
    return [name for name, aliases in WANTED.items() if not version(*aliases)]


def constraints(have: dict[str, str]) -> str:
    """A pip constraints file that keeps everything where it is; pip takes local versions, 2.1.2+cu121, as they are."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(have.items()) if name != "pip")


def main() -> None:
    wanted, timm = missing(), version("timm")
    if timm and tuple(map(int, re.findall(r"\d+", timm)[:3])) < OLDEST_TIMM:
        wanted_timm = ".".join(map(str, OLDEST_TIMM))
        print(f"PuLID needs timm {wanted_timm} or later, and {timm} is installed, which is left as it is. "
              f"If nothing else needs it: pip install --no-deps timm=={wanted_timm}")  # fmt: skip
    if not wanted:
        return
    import launch

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "constraints.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write(constraints(installed()))
        keep = f'--constraint "{path}" --only-binary onnx'
        names = " ".join(wanted)
        try:
            launch.run_pip(f"install {names} {keep}", f"what PuLID needs ({names})")
        except RuntimeError:
            if "insightface" not in wanted:
                raise
            install_without_dependencies(launch, [name for name in wanted if name != "insightface"], keep)


def install_without_dependencies(launch, others: list[str], keep: str) -> None:  # noqa: ANN001
    """For hosts with an older protobuf than any onnx wheel for their Python asks for, though it works with it: Forge
    pins 3.20.0, onnx 1.13 and later ask for 3.20.2. What else insightface needs, the hosts bring."""
    if others:
        launch.run_pip(f"install {' '.join(others)} {keep}", f"what PuLID needs ({' '.join(others)})")
    names = f"insightface {ONNX}"
    launch.run_pip(f"install --no-deps --only-binary :all: {names}", f"what PuLID needs ({names}, nothing else moved)")


main()
