"""install.py: installs what is missing, with the real pip in small environments, and moves nothing that is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pip
import pytest

PATH = Path(__file__).parents[1] / "install.py"
HAVE = {"numpy": "1.26.2", "protobuf": "6.33.0"}
OLD = "3.20.0"  # the protobuf of A1111 and Forge
PIPS = Path(sys.prefix) / "pips"  # `make test` downloads them once


@pytest.fixture
def run(monkeypatch):
    """Runs install.py as the WebUI does, with some modules not found; returns pip's commands and constraints."""

    def _run(*missing: str, have: dict[str, str] = HAVE, folder: str = "") -> list[tuple[str, str]]:
        calls: list[tuple[str, str]] = []

        def run_pip(command: str, what: str) -> None:  # noqa: ARG001
            path = command.partition('--constraint "')[2].rstrip('"')
            calls.append((command, Path(path).read_text() if path else ""))

        launch = ModuleType("launch")
        launch.run_pip = run_pip
        monkeypatch.setitem(sys.modules, "launch", launch)
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
        packages = [SimpleNamespace(metadata={"Name": name, "Version": version}) for name, version in have.items()]
        packages += importlib.metadata.Distribution.discover(path=[folder]) if folder else []
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)
        runpy.run_path(str(PATH))
        return calls

    return _run


def test_nothing_is_done_when_nothing_is_missing(run, capsys):
    assert run() == []
    assert capsys.readouterr().out == ""


def test_two_calls_and_no_more(run):
    first, second = run("insightface", "onnx", "onnxruntime", "timm")
    assert first[0].startswith('install "onnx>=1.16" "onnxruntime>=1.17" --only-binary :all: --constraint ')
    assert first[1] == "numpy==1.26.2\nprotobuf==6.33.0\n"
    assert second[0] == 'install "insightface>=1.0,<3" "timm>=1.0.8,<1.1" --only-binary :all: --no-deps'


@pytest.mark.parametrize("name", ["numpy", "protobuf"])
def test_package_without_metadata_is_not_overwritten(run, name):
    have = {other: version for other, version in HAVE.items() if other != name}
    with pytest.raises(SystemExit, match=f"because {name} is there but pip does not know of it.*Reinstall {name}"):
        run("onnx", have=have)


@pytest.mark.parametrize(("name", "version", "line"), [
    ("Some_Thing", "2.1.2+cu121", "some-thing==2.1.2+cu121\n"), ("x", "1.0.0-rc.1", "x==1.0.0-rc.1\n"),
    ("x", "2.4.0a0+3bcc3cddb5.nv24.7", "x==2.4.0a0+3bcc3cddb5.nv24.7\n"),
    ("x", "1.0.post1.dev2", "x==1.0.post1.dev2\n"), ("x", "1.1build1", "x===1.1build1\n"),
    ("x", "2.7.0-rocm6.3", "x===2.7.0-rocm6.3\n"), ("x", "1.0 beta", ""), ("x", "1.0;x", ""), ("x", "1,0", ""),
    ("föö", "1", ""), ("a b", "1", ""), ("-e", "1", ""),
])  # fmt: skip
def test_constraint_for_any_version(run, name, version, line):
    """None for what pip cannot read: it would refuse the whole file, or take the line for an option."""
    ((_, text),) = run("onnx", have={**HAVE, name: version})
    assert text == f"numpy==1.26.2\nprotobuf==6.33.0\n{line}"


def test_metadata_that_is_not_utf8(run, tmp_path):
    for name, text in (("old_thing-1.5", "Name: old-thing\nVersion: 1.5\nAuthor: Andr\xe9\n"), ("empty-1", "")):
        info = tmp_path / f"{name}.dist-info"
        info.mkdir()
        (info / "METADATA").write_bytes(text.encode("latin-1"))
    ((_, text),) = run("onnx", folder=str(tmp_path))
    assert text == "numpy==1.26.2\nold-thing==1.5\nprotobuf==6.33.0\n"


@pytest.mark.parametrize("init", ["raise RuntimeError", "def", "import nothing_of_this_name"])
def test_a_package_around_one_of_ours_that_is_broken(run, monkeypatch, tmp_path, init):
    """Only pip's own knowledge counts then."""
    (tmp_path / "google").mkdir()
    (tmp_path / "google" / "__init__.py").write_text(init)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "google"]:
        monkeypatch.delitem(sys.modules, name)
    ((_, text),) = run("onnx")
    assert text == "numpy==1.26.2\nprotobuf==6.33.0\n"


@pytest.mark.skipif(sys.version_info >= (3, 11), reason="from Python 3.11 on, pip takes the one listed first")
def test_two_versions_in_one_folder(run):
    """Which of them pip takes, its versions see differently; so it can take neither."""
    ((_, text),) = run("onnx", have={**HAVE, "Some-Thing": "1.0", "some_thing": "2.0"})
    assert "some-thing==1.0\nsome-thing==2.0\n" in text


# With the real pip

HOST = {
    "torch": "2.1.2+cu121", "torchvision": "0.16.2", "numpy": "1.26.2", "facexlib": "0.3.0", "safetensors": "0.4.2",
    "requests": "2.32.3", "opencv-python-headless": "4.10.0.84", "onnxruntime-gpu": "1.18.0",
}  # fmt: skip
MODULES = {"opencv-python-headless": "cv2", "opencv-python": "cv2", "onnxruntime-gpu": "onnxruntime"} | {
    "scikit-image": "skimage",
    "protobuf": "google/protobuf",
}
# What an index offers: name, version, what it needs. Whatever of it replaces a package of the host is a fault.
OFFERED = [
    ("insightface", "2.1", "numpy", "onnx>=1.13", "onnxruntime", "opencv-python", "scikit-image"),
    ("onnx", "1.16.2", "numpy", "protobuf>=3.20.2"), ("onnx", "1.18.0", "numpy", "protobuf>=4.25.1"),
    ("onnx", "1.23.2", "numpy>=1.23.2", "protobuf>=6.31.1"), ("timm", "1.0.20", "torch", "torchvision", "safetensors"),
    ("scikit-image", "0.25.2", "numpy"), ("onnxruntime", "1.32.0", "numpy>=1.21.6"),
    ("opencv-python", "5.0.0.93", "numpy>=2"), ("numpy", "1.21.5"), ("numpy", "2.4.6"), ("torch", "2.0.1"),
    ("torch", "2.12.1"), ("torchvision", "0.27.1", "torch==2.12.1"), ("protobuf", "7.36.2"),
]  # fmt: skip


def files_of(name: str, version: str, *needs: str) -> dict[str, str]:
    """The files of a package of one module: path below site-packages -> text."""
    module, info = MODULES.get(name, name), f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{module}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    return {**files, f"{info}/RECORD": "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))}


def lay(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """A folder with wheels, and an old insightface that has to be built."""
    folder = tmp_path_factory.mktemp("index")
    for name, version, *needs in OFFERED:
        with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
            for path, text in files_of(name, version, *needs).items():
                wheel.writestr(path, text)
    (folder / "setup.py").write_text("raise SystemExit('built for minutes')\n")
    with tarfile.open(folder / "insightface-0.7.3.tar.gz", "w:gz") as source:
        source.add(folder / "setup.py", "insightface-0.7.3/setup.py")
    return folder


def environment(folder: Path, pip_wheel: Path | None) -> tuple[Path, Path]:
    """Makes an environment with that pip, or with the one of this Python; returns its Python and site-packages."""
    venv.create(folder, symlinks=os.name != "nt", with_pip=False)
    (site,) = folder.glob("[Ll]ib/**/site-packages")
    if pip_wheel:
        zipfile.ZipFile(pip_wheel).extractall(site)
    else:
        shutil.copytree(Path(pip.__file__).parent, site / "pip")
        lay(site, {f"pip-{pip.__version__}.dist-info/METADATA": f"Name: pip\nVersion: {pip.__version__}\n"})
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"), site


def litter(site: Path, second: Path) -> None:
    """What lies around in environments that have been used for years."""
    lay(site, {"~orch-2.0.1.dist-info/METADATA": "Name: torch\nVersion: 2.0.1\n"})  # an uninstall that broke
    if sys.version_info >= (3, 11):  # an upgrade that broke; see test_two_versions_in_one_folder
        lay(site, {"torch-2.0.1.dist-info/METADATA": "Name: torch\nVersion: 2.0.1\n"})
    lay(site, {"insightface/models/readme.txt": ""})  # a folder that outlived its package
    lay(site, {"distro_info-1.1build1.dist-info/METADATA": "Name: distro-info\nVersion: 1.1build1\n"})
    lay(site, {"nothing-1.0.dist-info/INSTALLER": "", "bare.egg-info/PKG-INFO": "", "alone.py": ""})  # no metadata
    lay(site, {"space-nspkg.pth": "import sys, types; sys.modules.setdefault('space', types.ModuleType('space'))\n"})
    lay(site, {"cv2-stub.pth": "import sys, types; sys.modules['cv2'] = types.ModuleType('cv2')\n"})
    editable = f'{{"dir_info": {{"editable": true}}, "url": "{second.as_uri()}"}}'
    lay(site / "mine-1.0.dist-info", {"METADATA": "Name: mine\nVersion: 1.0\n", "direct_url.json": editable})
    lay(site, {"mine.pth": f"{second / 'mine'}\n"})
    lay(second, files_of("torch", "2.0.1") | files_of("numpy", "1.21.5"))  # older copies, further down sys.path
    lay(site, {"zz.pth": f"{second}\n"})


def texts(*folders: Path) -> dict[Path, str]:
    found = (path for folder in folders for path in folder.rglob("*") if path.suffix in ("", ".py", ".txt", ".json"))
    return {path: path.read_text(errors="replace") for path in found if path.is_file() and "pip" not in path.parts}


LAUNCH = """
import subprocess, sys

def run_pip(command, desc=None):
    print("Installing", desc)
    command = f'"{sys.executable}" -m pip {command} --prefer-binary --no-index --find-links "INDEX"'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
"""


def first_start(folder: Path, index: Path, pip_wheel: Path | None, protobuf: str) -> tuple[str, list[str]]:
    """Runs install.py in a host that lacks our packages; returns what it printed and the names of what is new."""
    python, site = environment(folder / "venv", pip_wheel)
    second = folder / "second"
    for name, version in {**HOST, "protobuf": protobuf}.items():
        lay(site, files_of(name, version, *(["opencv-python"] if name == "facexlib" else [])))
    litter(site, second)
    lay(folder / "webui", {"launch.py": LAUNCH.replace("INDEX", str(index))})
    before = texts(site, second)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    clean |= {"PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(folder / "webui")}
    done = subprocess.run([python, PATH], env=clean, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 0, done.stderr
    after = texts(site, second)
    assert {path: after.get(path) for path in before} == before
    return done.stdout, sorted(path.parent.name.partition(".dist")[0] for path in after.keys() - before.keys()
                               if path.name == "METADATA")  # fmt: skip


@pytest.mark.parametrize(
    ("version", "protobuf", "onnx"),
    [("own", OLD, "1.16.2"), ("24.", "4.25.9", "1.18.0"), ("25.", OLD, "1.16.2"), ("26.", "4.25.9", "1.18.0")],
)
def test_first_start_moves_nothing(tmp_path, index, version, protobuf, onnx):
    """numpy, torch, the leftovers and the second copies stay, file by file, whichever pip it is."""
    wheel = None if version == "own" else next(iter(PIPS.glob(f"pip-{version}*.whl")), None)
    if version != "own" and wheel is None:
        pytest.skip(f"no pip {version}x in {PIPS}: make test downloads it")
    said, new = first_start(tmp_path, index, wheel, protobuf)
    assert new == ["insightface-2.1", f"onnx-{onnx}", "scikit_image-0.25.2", "timm-1.0.20"]
    assert "PuLID: installing onnx, skimage, insightface, timm" in said
    assert said.count("Installing what PuLID needs") == 2


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_takes_the_newest_python(tmp_path):
    """One that cannot make environments, as a shim of a version that is not there, is passed over."""
    for minor, status in ((13, 127), (12, 0), (11, 0), (10, 0)):
        lay(tmp_path, {f"bin/python3.{minor}": f"#!/bin/sh\nexit {status}\n"})
    lay(tmp_path / "pyenv/versions", {f"3.{minor}.0/bin/python": "#!/bin/sh\n" for minor in (13, 14)})
    for script in tmp_path.glob("**/bin/*"):
        script.chmod(0o755)

    def chosen(pyenv: Path) -> str:
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYENV_ROOT": str(pyenv)}
        for told in ("PYTHON", "MAKEFLAGS", "MFLAGS"):  # what the make that runs these tests was told
            environment.pop(told, None)
        command = ["make", "-s", "--eval", "show: ; @echo $(PYTHON)", "show"]
        return subprocess.run(command, cwd=PATH.parent, env=environment, capture_output=True, text=True).stdout.strip()

    assert chosen(tmp_path / "pyenv") == str(tmp_path / "pyenv/versions/3.13.0/bin/python")
    assert chosen(tmp_path / "none") == "python3.12"
