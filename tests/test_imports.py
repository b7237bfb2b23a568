"""Imports point downward; what is heavy or belongs to a host is imported only where it may be."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports from layers below its own only. A new module has to be given its place here.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("lib_pulid",),
    ("errors",),
    ("boxes", "contact_sheet", "disk", "names", "camera_files", "wide_gray"),
    ("encoders", "methods", "sites", "gpu_cost"),
    ("images", "files", "projectors", "control", "face_choice", "field_kinds", "token_masks", "lora"),
    ("weights", "faces", "masks", "watch"),
    ("vision", "clip_vision", "face_models", "attention", "likeness"),
    ("readings", "judge"),
    ("identity", "head"),
    ("photos", "injection", "blend"),
    ("fields",),
    ("units", "tags", "bench_cases"),
    ("stores",),
    ("hosts",),  # a package of several files, see test_hosts_do_not_know_each_other
    ("training",),
    ("miniature",),
    ("standalone", "webui"),
    ("demo", "evaluate", "cli_files", "cli_checks"),
    ("bench", "doctor"),
    ("cli_commands",),
    ("cli",),
    ("__main__",),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
HOST_MODULES = {"modules", "modules_forge", "backend", "launch", "ldm", "sgm", "ldm_patched", "k_diffusion"}
GRADIO = {"gradio", "gradio_client", "fastapi"}


def sources(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of the package, of scripts/ and of the files beside them."""
    files = [*(root / "lib_pulid").rglob("*.py"), *(root / "scripts").glob("*.py"), *root.glob("*.py")]
    return {module_name(path): path for path in files}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def statements(text: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imports(name: str, modules: dict[str, Path], added: str = "") -> Iterator[tuple[int, str]]:
    """Line and full name of every import, also of those inside functions and for types only. added: at its end."""
    path = modules[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements((path.read_text(encoding="utf-8") if path.exists() else "") + added):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        else:
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, *([source] if source else [])])
            for alias in node.names:  # `from lib_pulid import catalog` imports a module
                full = f"{source}.{alias.name}"
                yield node.lineno, full if full in modules else source


def part(name: str) -> str:
    """lib_pulid.hosts.forge -> hosts: what has a layer."""
    pieces = name.split(".")
    return pieces[0] if len(pieces) == 1 else pieces[1]


def problems(file: Path | None = None, added: str = "") -> list[str]:
    """added: at the end of the file, which may be a new one."""
    modules = sources(ROOT) | ({module_name(file): file} if file else {})
    imported = {name: list(imports(name, modules, added if path == file else "")) for name, path in modules.items()}
    edges = {name: {target for _, target in found} & set(modules) - {name} for name, found in imported.items()}
    return [*misplaced(modules, imported), *circles(edges)]


def misplaced(modules: dict[str, Path], imported: dict[str, list[tuple[int, str]]]) -> list[str]:
    found = []
    for name, path in sorted(modules.items()):
        for line, target in imported[name]:
            where = f"{path.relative_to(ROOT)}:{line} imports {target}"
            if target.split(".")[0] == "lib_pulid":
                if target not in modules:
                    found.append(f"{where}, which does not exist")
                elif name.startswith("lib_pulid") and part(name) != part(target):
                    mine, theirs = LAYER.get(part(name)), LAYER.get(part(target))
                    if mine is None or theirs is None:
                        found.append(f"{where}: one of them has no place in LAYERS")
                    elif theirs >= mine:
                        found.append(f"{where}, which is not below it")
                continue
            top = target.split(".")[0]
            home = part(name) if name.startswith("lib_pulid") else name.split(".")[0]
            if top in HOST_MODULES and home not in ("hosts", "webui", "scripts", "install", "preload"):
                found.append(f"{where}: only hosts, webui and scripts know a host")
            if top in GRADIO and home not in ("webui", "scripts"):
                found.append(f"{where}: only webui knows gradio")
            if top == "diffusers" and not name.startswith(("lib_pulid.hosts.diffusers", "lib_pulid.training.")):
                found.append(f"{where}: only hosts/diffusers*.py and training/ know diffusers")
    return found


def circles(edges: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return ["a circle: " + " -> ".join(error.args[1])]
    return []


def test_imports_point_downward():
    assert problems() == []


def test_every_module_was_looked_at():
    seen = sources(ROOT)
    assert {"lib_pulid", "lib_pulid.errors", "lib_pulid.hosts.diffusers", "lib_pulid.cli"} <= set(seen)
    assert len(LAYER) == sum(map(len, LAYERS))  # no module has two places


def test_hosts_do_not_know_each_other():
    """Each host is one file over what they share; the package itself knows none of them."""
    modules = sources(ROOT)
    shared = {f"lib_pulid.hosts{name}" for name in ("", ".base", ".families")}
    own = {
        "lib_pulid.hosts.diffusers_base": {"lib_pulid.hosts.diffusers", "lib_pulid.hosts.diffusers_checkpoint"},
        "lib_pulid.hosts.diffusers_control": {"lib_pulid.hosts.diffusers"},
        "lib_pulid.hosts.forge": {"lib_pulid.hosts.forge_control"},
        "lib_pulid.hosts.forge_control": {"lib_pulid.hosts.control_base"},
        "lib_pulid.hosts.a1111": {"lib_pulid.hosts.a1111_control"},
        "lib_pulid.hosts.a1111_control": {"lib_pulid.hosts.control_base"},
        "lib_pulid.hosts.base": {"lib_pulid.hosts.injector", "lib_pulid.hosts.control_base"},
        "lib_pulid.hosts.injector": {"lib_pulid.hosts.families", "lib_pulid.hosts.frame"},
    }
    for name in modules:
        if name.startswith("lib_pulid.hosts"):
            others = {t for _, t in imports(name, modules) if t.startswith("lib_pulid.hosts")} - {name}
            assert others <= (shared if name not in shared else {"lib_pulid.hosts"}) | own.get(name, set()), name


@pytest.mark.parametrize(("file", "line", "words"), [
    ("lib_pulid/errors.py", "from lib_pulid.images import load_image", "not below it"),
    ("lib_pulid/encoders.py", "def f():\n    from lib_pulid import weights", "not below it"),
    ("lib_pulid/faces.py", "from .weights import Adapter", "not below it"),
    ("lib_pulid/injection.py", "import lib_pulid.hosts.diffusers", "not below it"),
    ("lib_pulid/photos.py", "from lib_pulid.hosts import diffusers", "not below it"),
    ("lib_pulid/hosts/diffusers.py", "from ..standalone import Workshop", "not below it"),
    ("lib_pulid/hosts/diffusers.py", "from . import diffusers_base", "a circle: "),
    ("lib_pulid/images.py", "def f():\n    from modules import shared", "know a host"),
    ("lib_pulid/standalone.py", "import backend.memory_management", "know a host"),
    ("lib_pulid/hosts/diffusers.py", "import gradio as gr", "knows gradio"),
    ("lib_pulid/cli.py", "import gradio", "knows gradio"),
    ("lib_pulid/attention.py", "from diffusers.models import attention", "know diffusers"),
    ("lib_pulid/new.py", "from lib_pulid.errors import PulidError", "no place in LAYERS"),
    ("lib_pulid/cli.py", "from lib_pulid.gone import x", "does not exist"),
])  # fmt: skip
def test_a_wrong_import_is_found(file, line, words):
    """The check itself: one wrong line more at the end of a file."""
    new = set(problems(ROOT / file, f"\n{line}\n")) - set(problems())
    assert any(words in problem for problem in new)


def printed(code: str, *args: str) -> list[str]:
    """What a Python of its own prints, in words."""
    result = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


HEAVY = "torch numpy cv2 PIL insightface onnxruntime timm facexlib diffusers transformers torchvision safetensors"
OF_INJECTION = "insightface onnxruntime timm facexlib diffusers cv2 torchvision transformers PIL"


@pytest.mark.parametrize(("module", "forbidden"), [
    ("lib_pulid.errors", HEAVY),
    ("lib_pulid.files.catalog", f"{HEAVY} huggingface_hub requests httpx tqdm filelock"),
    ("lib_pulid.face_models", f"torch {OF_INJECTION}"),
    ("lib_pulid.hosts.diffusers", OF_INJECTION),  # which imports lib_pulid.injection
    ("lib_pulid.photos", "insightface onnxruntime timm facexlib diffusers cv2 torchvision transformers"),
])  # fmt: skip
def test_heavy_libraries_load_when_used(module, forbidden):
    code = (
        f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}} & set({forbidden.split()!r})))"
    )
    assert printed(code) == []


def test_the_rows_for_real_hosts_can_be_imported():
    """They are run by hand, so nothing else would notice a name that is gone."""
    importlib.import_module("tests.host.__main__")
