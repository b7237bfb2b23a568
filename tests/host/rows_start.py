"""What the extension costs the program's start, and what it leaves alone."""

from __future__ import annotations

import resource
import subprocess

from tests.host.rows_basics import person
from tests.host.table import Result, Rows, differ, expect
from tests.host.webui import NAMES, ROOT, Checkout, Running

rows = Rows()
LIMIT = 0.3
HEAVY = ("insightface", "onnxruntime", "timm", "facexlib")


@rows.row("The program's start: nothing in its log says that PuLID's scripts failed")
def log(host: Running) -> None:
    lines = host.log_text().splitlines()
    bad = [line for line in lines if "sd-webui-pulid" in line and ("rror" in line or "scripts/pulid.py" in line)]
    expect(not bad, f"{bad[:3]}")


@rows.row("The program's start: under 0.3 s of CPU time for the extension")
def seconds(host: Running) -> str:
    """Script, widgets and callbacks; and, in a program of its own before that, install.py."""
    took = dict(host.api.get("/host-test/start")["seconds"])
    script, widgets, install = took.pop("script"), sum(took.values()), install_seconds(host)
    seen = f"script {script:.3f}, widgets and callbacks {widgets:.3f}, install.py {install:.3f} s"
    expect(min(script, widgets, install) > 0, seen)
    expect(script + widgets + install < LIMIT, seen)
    return seen


def install_seconds(host: Running) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([host.process.args[0], ROOT / "install.py"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@rows.row("The program's start: no import of insightface, onnxruntime, timm, facexlib by the extension")
def imports(host: Running) -> str:
    """The helper notes the first import of each after the command line is read; before that we are not there."""
    start = host.api.get("/host-test/start")
    guilty = [name for name, files in start["first_imports"].items() if name in HEAVY and by_us(files)]
    expect(not guilty, f"imported by the extension: {guilty}")
    expect(not start["loaded"]["insightface"] or "insightface" in start["first_imports"], "insightface is loaded")
    loaded = [name for name, is_loaded in start["loaded"].items() if is_loaded]
    return f"loaded by the WebUI itself: {', '.join(loaded) or 'none'}"


def by_us(files: list[str]) -> bool:
    return any("sd-webui-pulid" in name or "lib_pulid" in name for name in files)


@rows.row("The first picture with a photo loads them")
def first_photo(host: Running) -> None:
    differ(host.api.txt2img().image, host.api.txt2img(person(host)).image, "with and without")
    expect(host.api.get("/host-test/start")["loaded"]["insightface"], "insightface is not loaded")


def after_all(checkout: Checkout, changes: str, packages: dict[str, str]) -> list[Result]:
    """changes, packages: as they were before the first start."""
    now = checkout.packages()
    moved = [f"{name} {old} -> {now.get(name)}" for name, old in packages.items() if now.get(name) != old]
    added = [f"{name} {version}" for name, version in now.items() if name not in packages]
    git = checkout.changes()
    return [
        Result("install.py moves no package of the host", NAMES[checkout.kind], "NO" if moved else "yes",
               "; ".join(moved) or f"added: {', '.join(added) or 'nothing, all was there'}", 0.0),
        Result("The WebUI's checkout is as it was", NAMES[checkout.kind], "yes" if git == changes else "NO",
               "" if git == changes else git, 0.0),
    ]  # fmt: skip
