"""Starts a WebUI on a free port with the extension linked in, and stops it.

The checkout stays as it is: settings, extensions, models and pictures lie in a data folder of the run's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.host.api import Api
from tests.host.models import methods, miniature, pulid

ROOT = Path(__file__).resolve().parents[2]
HELPER = Path(__file__).resolve().parent / "helper"
READY = "Startup time"
SETTINGS = {
    "show_progress_type": "Approx cheap",  # the default preview downloads a model
    "live_previews_enable": False,
    "auto_launch_browser": "Disable",
    "samples_save": False,
    "grid_save": False,
    "skip_early_cond": -1.0,  # at 0, Forge Classic leaves the negative prompt out of the first step
}
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "neo": {
        "show_progress_type": "RGB",  # it has no "Approx cheap"
        "VERSION_UID": "PY313",  # without it, it waits for a key and ends
        "disabled_extensions": ["forge_legacy_preprocessors"],  # at its start it installs from the network
    },
}
FLAGS = {
    "a1111": "--use-cpu all --precision full --no-half --no-download-sd-model --skip-version-check",
    "forge": "--always-cpu", "neo": "--cpu", "ersatz": "--always-cpu", "first-forge": "--always-cpu",
}  # fmt: skip
COMMON = "--api --skip-torch-cuda-test --skip-python-version-check --disable-console-progressbars"
# The first Forge has ldm_patched where the later ones have backend; reForge and Forge Classic went on from it.
NAMES = {"neo": "Forge Neo", "a1111": "A1111", "forge": "Forge", "ersatz": "ersatzForge", "first-forge": "Forge 1"}
FORGES = ("neo", "forge", "ersatz")  # those with FLUX


@dataclass(frozen=True)
class Checkout:
    """A WebUI that runs. Args: folder: its checkout. python: its interpreter."""

    folder: Path
    python: Path

    @property
    def kind(self) -> str:
        """A key of NAMES."""
        if not (self.folder / "modules_forge").is_dir():
            return "a1111"
        flags = self.folder / "backend" / "args.py"
        if not flags.is_file():
            return "first-forge"
        if any((self.folder / "extensions-builtin").glob("ersatz_*")):
            return "ersatz"
        return "forge" if '"--always-cpu"' in flags.read_text(encoding="utf-8") else "neo"

    @property
    def version(self) -> str:
        command = ["git", "-C", str(self.folder), "describe", "--tags", "--always"]
        tag = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        changes = self.folder / "CHANGELOG.md"  # Forge Classic has none
        text = changes.read_text(encoding="utf-8", errors="replace") if changes.is_file() else ""
        first = re.search(r"^## (\S+)", text, re.MULTILINE)
        return f"{NAMES[self.kind]} {first[1] if first else ''} ({tag})"

    def changes(self) -> str:
        """What git says is not as it was checked out."""
        command = ["git", "-C", str(self.folder), "status", "--porcelain", "--untracked-files=all"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def packages(self) -> dict[str, str]:
        command = [str(self.python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {one["name"].lower(): one["version"] for one in json.loads(listed)}

    def merge_table(self) -> Path | None:
        """CLIP's merge table in the open_clip package, which only A1111 has."""
        script = "import importlib.util as u; s = u.find_spec('open_clip'); print(s.submodule_search_locations[0])"
        found = subprocess.run([str(self.python), "-c", script], capture_output=True, text=True, check=False)
        path = Path(found.stdout.strip() or ".", "bpe_simple_vocab_16e6.txt.gz")
        return path if found.returncode == 0 and path.is_file() else None


@dataclass
class Running:
    """A WebUI that is up."""

    kind: str
    api: Api
    data: Path
    generated: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def identities(self) -> Path:
        return self.data / "models" / "pulid" / "identities"

    def photo(self, name: str) -> Path:
        return self.generated / "photos" / f"{name}.png"

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def cpu_seconds(self) -> float:
        """The CPU time that the program has used so far; other programs hardly affect it."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_until_ready(
        self, starts: int = 1, limit: float = 1500, pause: Callable[[float], object] = time.sleep
    ) -> None:
        """pause: what passes a few seconds; a page has to be let live meanwhile."""
        end = time.monotonic() + limit
        while self.log_text().count(READY) < starts:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the WebUI did not start:\n{self.log_text()[-4000:]}")
            pause(0.3)


@contextlib.contextmanager
def running(
    checkout: Checkout,
    generated: Path,
    flags: Sequence[str] = (),
    extensions: Sequence[Path] = (),
    variables: Mapping[str, str] | None = None,
) -> Iterator:
    """A started WebUI. generated: see __main__. flags: more of them. extensions: folders of more extensions. variables:
    of its environment."""
    with tempfile.TemporaryDirectory(prefix="webui-host-") as folder:
        data = Path(folder)
        fill(data, generated, extensions, checkout.kind)
        compile_ours(checkout, data)
        port, log = free_port(), data / "log.txt"
        command = [str(checkout.python), "launch.py", *arguments(checkout, data, generated, port), *flags]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, cwd=checkout.folder, env=environment(checkout) | dict(variables or {}), stdout=sink,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        api = Api(f"http://127.0.0.1:{port}", first_checkpoint(generated))
        host = Running(checkout.kind, api, data, generated, log, process)
        try:
            host.wait_until_ready()
            yield host
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def arguments(checkout: Checkout, data: Path, generated: Path, port: int) -> list[str]:
    folders = ["--data-dir", str(data), "--ckpt-dir", str(generated / "checkpoints")]
    folders += ["--lora-dir", str(generated / "lora")]
    # Forge, with a data folder elsewhere, serves the page its own scripts only if told so.
    folders += ["--gradio-allowed-path", str(checkout.folder)]
    return ["--port", str(port), *folders, *COMMON.split(), *FLAGS[checkout.kind].split()]


def compile_ours(checkout: Checkout, data: Path) -> None:
    """Makes the byte code that every start has but the first after an update."""
    ours = data / "extensions" / "sd-webui-pulid"  # not ROOT: byte code is found by this path
    command = [str(checkout.python), "-m", "compileall", "-q", str(ours / "lib_pulid"), str(ours / "scripts")]
    subprocess.run(command, env=environment(checkout), check=True)


def environment(checkout: Checkout) -> dict[str, str]:
    """Few threads, since many stall for seconds per step on a busy machine; nothing is looked for on the network."""
    ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    ours |= {"PYTHONUNBUFFERED": "1", "PIP_RETRIES": "0", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    # No byte code into the checkout or into our own tree.
    ours["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir(), "webui-host-pycache"))
    ours["PATH"] = f"{checkout.python.parent}{os.pathsep}{os.environ['PATH']}"
    rest = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COMMANDLINE_ARGS")}
    return rest | ours


def fill(data: Path, generated: Path, extensions: Sequence[Path], kind: str) -> None:
    settings = {"sd_model_checkpoint": first_checkpoint(generated)} | SETTINGS | OWN_SETTINGS.get(kind, {})
    (data / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    links = data / "extensions"
    links.mkdir()
    (links / "sd-webui-pulid").symlink_to(ROOT)
    (links / "zz-test-helper").symlink_to(HELPER)  # loaded last
    for extension in extensions:
        (links / extension.name).symlink_to(extension.resolve())
    shutil.copytree(generated / "models", data / "models")
    identities = data / "models" / "pulid" / "identities"
    identities.mkdir()
    pulid.write_marked_identities(identities)
    methods.write_marked_identities(identities)
    for name, folder in (("ControlNet", "controlnet"), ("text_encoder", "modules")):
        links = data / "models" / name
        links.mkdir()
        for path in (generated / folder).iterdir():
            (links / path.name).symlink_to(path)


def first_checkpoint(generated: Path) -> str:
    """The one that is loaded at the start and used where a row names none."""
    names = (miniature.CHECKPOINT, "tiny-sdxl.safetensors")
    return next(name for name in names if (generated / "checkpoints" / name).is_file())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
