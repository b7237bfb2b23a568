"""Installs what is missing, at the versions the host can live with; nothing that is installed is moved.

Bare `pip install insightface` would bring numpy and protobuf past what the WebUIs pin. So every installed package
becomes a constraint. The WebUI runs this file at each start: it has to be quick when nothing is missing.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec

# Told by their modules, without reading packages' metadata, which takes longer than all else here. onnxruntime's
# module is there under several package names (onnxruntime-gpu ...), and two of them hide each other.
WANTED = ("insightface", "onnxruntime", "facexlib", "timm", "safetensors")
ONNX = "onnx==1.16.2"
OLDEST_TIMM = (1, 0, 8)  # the first with all of forward_intermediates


def installed() -> dict[str, str]:
    """Name -> version of every package that is there."""
    from importlib import metadata

    found = ((dist.metadata["Name"], dist.version) for dist in metadata.distributions())
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found if name and version}


def missing() -> list[str]:
    return [name for name in WANTED if find_spec(name) is None]


def timm_version() -> str:
    """As timm's own file tells it; "" where there is none."""
    spec = find_spec("timm")
    try:
        with open(os.path.join(os.path.dirname(spec.origin), "version.py"), encoding="utf-8") as file:
            return re.search(r"[\"'](\d[^\"']*)[\"']", file.read())[1]
    except (AttributeError, OSError, TypeError):
        return ""


def constraints(have: dict[str, str]) -> str:
    """A pip constraints file that keeps everything where it is; pip takes local versions, 2.1.2+cu121, as they are."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(have.items()) if name != "pip")


def main() -> None:
    wanted, timm = missing(), timm_version()
    if timm and tuple(map(int, re.findall(r"\d+", timm)[:3])) < OLDEST_TIMM:
        wanted_timm = ".".join(map(str, OLDEST_TIMM))
        print(f"PuLID needs timm {wanted_timm} or later, and {timm} is installed, which is left as it is. "
              f"If nothing else needs it: pip install --no-deps timm=={wanted_timm}")  # fmt: skip
    if not wanted:
        return
    import tempfile

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
