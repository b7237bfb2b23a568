"""The command line in process: images of the miniature, identities, errors in words, the weight files."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lib_pulid import bench, cli, cli_checks, demo, disk, doctor, miniature, standalone
from lib_pulid.contact_sheet import MARGIN, Section, Tile, contact_sheet
from lib_pulid.errors import DownloadError, SettingError, StorageError, WrongWeightsError
from lib_pulid.evaluate import command as evaluate
from lib_pulid.files import catalog, download
from lib_pulid.files.catalog import WeightFile
from lib_pulid.hosts import diffusers_base
from lib_pulid.identity import Identity
from lib_pulid.sites import find_sites
from tests.small_models.bases import TEXT_WIDTH, open_small_workshop, small_parts
from tests.small_models.people import GROUP, PORTRAIT

insightface = pytest.importorskip("insightface")


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory) -> Path:
    """One for all that only reads: the identities in its cache save time."""
    return tmp_path_factory.mktemp("models")


# The same few models for all tests; errors are not kept.
LOADED = [
    (owner, name, functools.lru_cache(getattr(owner, name)))
    for owner, name in ((standalone, "load_base"), (standalone, "load_adapter"), (miniature, "encoders"))
]


@pytest.fixture
def run(capsys, models_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    for owner, name, load in LOADED:
        monkeypatch.setattr(owner, name, load)
    monkeypatch.setattr(standalone, "open_workshop", open_small_workshop(standalone.open_workshop))
    real = cli_checks.family_of
    monkeypatch.setattr(cli_checks, "family_of", lambda model: "flux" if model == "tiny-flux" else real(model))

    def _run(command: str, *rest: object, models: Path | None = models_dir) -> Said:
        where = [] if models is None else ["--models-dir", str(models)]
        capsys.readouterr()
        status = cli.main([command, *map(str, rest), *where])
        return Said(status, *capsys.readouterr())

    return _run


@pytest.fixture
def generate(run, tmp_path):
    """Runs `generate`; gives what was said and the image, if there is one."""

    def _generate(*rest: object, name: str = "picture.png", **where: Path) -> tuple[Said, np.ndarray | None]:
        path = tmp_path / "pictures" / name
        path.unlink(missing_ok=True)
        given = ("--prompt", "a sailor", "--steps", 2, "--size", 64, "-o", path)
        said = run("generate", *given, *rest, **where)
        return said, np.asarray(Image.open(path)) if path.is_file() else None

    return _generate


# ---------------------------------------------------------------- help


def leaves(status: int, *arguments: str) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments])
    assert left.value.code == status


@pytest.mark.parametrize("command", ["", "demo", "generate", "embed", "doctor", "models"])
def test_help(capsys, command):
    leaves(0, *([command] if command else []), "--help")
    said = capsys.readouterr().out
    assert f"python -m lib_pulid {command}".rstrip() in said
    if not command:
        assert all(name in said for name in ("demo", "generate", "embed", "doctor", "models"))


def test_version_and_no_command(capsys):
    leaves(0, "--version")
    assert re.fullmatch(r"sd-webui-pulid \d+\.\d+\.\d+\n", capsys.readouterr().out)
    for wrong in ([], ["paint"], ["generate"], ["models", "remove"], ["generate", "--prompt", "x", "--fusion", "mean"]):
        leaves(2, *wrong)
    for option in ("--face", "--mask", "--identity", "--pulid", "-o", "--models-dir"):  # an empty path is none
        leaves(2, "generate", "--prompt", "x", option, "")


# ---------------------------------------------------------------- generate


@pytest.mark.parametrize(("model", "sites", "weight"), [("miniature", 70, 0.8), ("tiny-flux", 20, 1.0)])
def test_generate(generate, model, sites, weight):
    said, picture = generate("--model", model, "--face", GROUP)
    assert (said.status, said.err.count("Error")) == (0, 0)
    assert picture.shape == (64, 64, 3)
    assert re.search(rf"picture\.png: identity [0-9a-f]{{10}}, weight {weight}, injected at {sites} sites", said.out)
    unchanged, plain = generate("--model", model, "--face", GROUP, "--weight", 0)
    assert "weight 0.0, injected at 0 sites" in unchanged.out
    assert not np.array_equal(picture, plain)
    _, other = generate("--model", model, "--face", PORTRAIT)
    assert not np.array_equal(picture, other)
    assert np.array_equal(generate("--model", model, "--face", GROUP)[1], picture)  # and again, bit for bit
    if model == "miniature":
        assert not np.array_equal(generate("--face", GROUP, "--projection", "none")[1], picture)
        assert not np.array_equal(generate("--face", GROUP, "--num-zero", 0)[1], picture)
    else:
        _, second_step = generate("--model", model, "--face", GROUP, "--start", 0.5)
        assert np.array_equal(generate("--model", model, "--face", GROUP, "--start-step", 1)[1], second_step)
        assert not np.array_equal(second_step, picture)


def test_generate_with_a_mask(generate):
    """What masks do: test_diffusers_host.py."""
    half = Image.new("RGB", (40, 40))
    half.paste("white", (0, 0, 20, 40))
    half.save("half.png")
    drawn = [generate("--face", GROUP, *given)[1] for given in ((), ("--weight", 0), ("--mask", "half.png"))]
    assert len({image.tobytes() for image in drawn}) == 3


def test_generate_with_a_control_net(generate, tmp_path):
    """InstantID: its adapter half, without and with its other half, IdentityNet."""
    from lib_pulid.hosts.diffusers import denoiser_of
    from tests.reference import method_cases
    from tests.small_models import methods as small

    unet, models = denoiser_of(small_parts("sdxl")[0].pipeline), tmp_path / "models"
    widths = [site.width for site in find_sites(unet).sites]
    state = small.method_files(widths, token_width=TEXT_WIDTH, only=["instantid"])["instantid"]
    adapter = small.write(tmp_path / "instantid.bin", state)

    def drawn(*rest: object) -> tuple[int, str, np.ndarray | None]:
        said, image = generate("--model", "tiny-sdxl", "--adapter", adapter, "--face", GROUP, *rest, models=models)
        return said.status, said.out + said.err, image

    status, said, alone = drawn()
    assert status == 0 and "note: InstantID's ControlNet (IdentityNet) is missing" in said
    status, said, _ = drawn("--identity-net", "0.8")
    assert status == 1 and "IdentityNet) is missing" in said
    (models / "pulid").mkdir(parents=True, exist_ok=True)
    net = models / "pulid" / "control_instant_id_sdxl.safetensors"
    save_file(method_cases.identity_net(unet).state_dict(), net)
    status, said, both = drawn("--identity-net", "1.5")
    assert status == 0 and "; ControlNet 1.5" in said and "note" not in said
    assert not np.array_equal(both, alone)
    status, said, off = drawn("--identity-net", "0")
    assert status == 0 and np.array_equal(off, alone)
    assert "; ControlNet 0.8" in drawn()[1]
    status, said, _ = drawn("--identity-net", "3")
    assert status == 1 and "--identity-net: 3.0 is out of range; use 0 to 2" in said


def test_a_saved_identity_in_the_place_of_the_photo(run, generate, tmp_path):
    path = tmp_path / "new" / "person.safetensors"
    said = run("embed", "--face", GROUP, "--name", "Ada", "-o", path)
    identity = Identity.load(path)
    assert said.status == 0
    assert f"person.safetensors: identity {identity.short_hash}, 32 tokens, PuLID v1.1 for SDXL" in said.out
    assert identity.info["name"] == "Ada"
    assert identity.info["photos"] == "1"
    of_photo, of_file = generate("--face", GROUP)[1], generate("--identity", path)[1]
    assert np.array_equal(of_photo, of_file)
    again = run("embed", "--face", PORTRAIT, "-o", path)
    assert again.status == 1
    assert "SettingError: person is already saved. Choose another name" in again.err
    assert Identity.load(path).short_hash == identity.short_hash
    path = path.with_name("several.safetensors")
    several = run("embed", "--face", GROUP, "--face", PORTRAIT, "--fusion", "average", "-o", path)
    assert several.status == 0
    assert Identity.load(path).info["photos"] == "2"
    assert Identity.load(path).info["fusion"] == "average"
    assert Identity.load(path).short_hash != identity.short_hash


def test_which_face(run, tmp_path):
    """The group's faces, asked for one by one, are different ones, in the order that was asked for."""
    left = []
    for index in (0, 2):
        given = ("--face", GROUP, "--face-order", "left-to-right", "--face-index", index)
        said = run("embed", *given, "-o", f"{index}.safetensors", models=tmp_path / "m")
        left.append(int(re.search(r"\((-?\d+), -?\d+\), \d+ x \d+ pixels", said.out)[1]))
    assert left[0] + 50 < left[1]


@pytest.mark.parametrize(("given", "words"), [
    ((), "SettingError: Give either --face (once or more) or --identity."),
    (("--face", GROUP, "--identity", "x.safetensors"), "SettingError: Give either --face"),
    (("--face", "gone.jpg"), "ImageError: gone.jpg: no such file"),
    (("--face", "grey.png"), "NoFaceError: grey.png: no face was found"),
    (("--face", GROUP, "--face-index", -1), "SettingError: --face-index: -1 is out of range; use 0 to 50."),
    (("--identity", "gone.safetensors"), "IdentityMismatchError: The saved identity gone.safetensors was"),
    (("--identity", "x.safetensors"), "IdentityMismatchError: This identity was made with PuLID v7"),
    (("--face", GROUP, "--model", "sdxl.safetensors"), "MissingWeightsError: No model at sdxl.s"),
    (("--face", GROUP, "--model", "grey.png"), "WrongWeightsError: grey.png ("),
    (("--face", GROUP, "--pulid", "gone.bin"), "MissingWeightsError: --pulid: gone.bin was not found"),
    (("--face", GROUP, "--pulid", "grey.png"), "WrongWeightsError: grey.png ("),
    (("--face", GROUP, "--weight", "nan"), "SettingError: --weight: nan is not a number."),
    (("--face", GROUP, "--fusion", "id_mix"), "SettingError: fusion id_mix works with PuLID v1 only"),
    (("--face", GROUP, "--mask", "gone.png"), "ImageError: gone.png: no such file"),
    (("--face", GROUP, "--device", "cuda:77"), "Error: "),
], ids=lambda value: re.sub(r"\W+", " ", str(value))[-30:] if isinstance(value, str) else "")  # fmt: skip
def test_errors_in_words(generate, given, words):
    """One of each option; the core's own tests have all that may be wrong with it."""
    Image.new("RGB", (200, 200), "grey").save("grey.png")
    Identity(torch.ones(1, 32, 64), info={"encoder": "0" * 16, "adapter": "PuLID v7"}).save("x.safetensors")
    said, picture = generate(*given)
    assert (said.status, picture) == (1, None)
    assert words in said.err
    assert "Traceback" not in said.err


NONSENSE = [
    ("--weight", 50), ("--start", 0.9, "--end", 0.1), ("--start", 0.9), ("--model", "tiny-flux", "--start-step", 4),
    ("--guidance", "nan"), ("--guidance", "inf"), ("--guidance", -1), ("--seed", -1), ("--seed", 2**64),
    ("--steps", 0), ("--steps", 10**6), ("--size", 0), ("--size", 100), ("--size", -64), ("--size", 10**6),
    ("-o", "a.psd"), ("-o", "a.fits"), ("-o", "a.h5"), ("-o", "a.mpg"), ("-o", "a.wmf"), ("-o", "a.xpm"), ("-o", "a"),
    ("-o", "folder.png"), ("-o", "file/a.png"), ("-o", "closed/a.png"), ("-o", "ж" * 130 + ".png"),
    ("-o", "/proc/a.png"), ("--mask", "folder.png"), ("--face", "gone.jpg"),
]  # fmt: skip


NONSENSE_TO_EVALUATE = [
    ("--weights", "0.4,nan"), ("--weights", "0:1:0.1"), ("--weights", 50), ("--guidance", "nan"), ("--guidance", -1),
    ("--steps", 0), ("--steps", 10**6), ("--size", 100), ("--size", 10**6), ("--seeds", 0), ("-o", "file"),
    ("-o", "file/x"), ("-o", "closed"), ("--faces", "file"), ("--prompts", "folder.png"),
]  # fmt: skip
GIVEN = [*(("generate", one) for one in NONSENSE), *(("evaluate", one) for one in NONSENSE_TO_EVALUATE)]


@pytest.mark.parametrize(("command", "given"), GIVEN, ids=lambda it: re.sub(r"\W+", " ", str(it))[:40])
def test_all_is_checked_before_the_work(run, monkeypatch, tmp_path, command, given):
    monkeypatch.setattr(standalone, "load_base", Mock(side_effect=AssertionError("the work has begun")))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    real = Path.mkdir

    def mkdir(path, *args, **kwargs):  # as for whoever is not root
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    usual = ("--prompt", "x", "--steps", 4, "--face", GROUP) if command == "generate" else ()
    said = run(command, *usual, *given)
    assert said.status == 1
    assert re.match(r"(Setting|Storage|Image)Error: (?!PuLID, field)\S", said.err)
    assert "Traceback" not in said.err


@pytest.mark.parametrize("which", ["--face", "--mask"])
def test_no_input_is_overwritten(run, monkeypatch, tmp_path, which):
    monkeypatch.setattr(standalone, "load_base", None)
    content = Path(PORTRAIT).read_bytes()
    (tmp_path / "me.png").write_bytes(content)
    (tmp_path / "link.png").symlink_to("me.png")
    given = (which, "me.png") if which == "--face" else ("--face", GROUP, which, "me.png")
    for out in ("me.png", tmp_path / "me.png", "link.png"):
        said = run("generate", "--prompt", "x", *given, "-o", out)
        assert said.status == 1
        assert re.match(r"SettingError: --out is \S+, the same file as me\.png, which would be lost\.", said.err)
    (tmp_path / "demo_flux.png").write_bytes(content)
    assert "which would be lost" in run("demo", "--face", "demo_flux.png", "-o", ".").err
    assert (tmp_path / "me.png").read_bytes() == (tmp_path / "demo_flux.png").read_bytes() == content


@pytest.mark.parametrize(
    "out", ["a.pt", "a", "folder.safetensors", "there.safetensors", "file/a.safetensors", "a.pulidembd"]
)
def test_where_an_identity_cannot_be_kept(run, monkeypatch, tmp_path, out):
    monkeypatch.setattr(standalone, "load_base", None)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "there.safetensors").symlink_to("nowhere")
    (tmp_path / "file").write_text("x")
    said = run("embed", "--face", GROUP, "-o", out)
    assert said.status == 1
    assert re.match(r"(Setting|Storage)Error: \S", said.err)


def test_embed_needs_a_photo(run):
    said = run("embed", "-o", "x.safetensors")
    assert (said.status, said.err) == (1, "SettingError: Give at least one photo with --face.\n")


def test_a_picture_that_cannot_be_written_is_kept(generate, monkeypatch):
    """A disk that is full by then."""
    real = disk.write
    writes = []

    def write(path, content, **how):
        if Path(path).suffix == ".png":  # not the miniature, which is unpacked once
            writes.append(Path(path))
        if writes == [Path(path)]:
            raise StorageError(f"{path} cannot be written (No space left on device).")
        return real(path, content, **how)

    Identity(torch.ones(1, 32, 64)).save("x.safetensors")
    monkeypatch.setattr(disk, "write", write)
    said, picture = generate("--identity", "x.safetensors")
    assert (said.status, picture) == (1, None)
    assert f"No space left on device). The image was saved as {writes[1]} instead." in said.err
    assert Image.open(writes[1]).size == (64, 64)


def test_interrupted(run, monkeypatch):
    monkeypatch.setattr(doctor, "report", Mock(side_effect=KeyboardInterrupt))
    said = run("doctor")
    assert (said.status, said.err) == (130, "interrupted\n")


INSTALL = "Run: pip install -r requirements-standalone.txt\n"
WRAPPED = WrongWeightsError("x.safetensors cannot be opened")
WRAPPED.__cause__ = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(("error", "said"), [
    (ModuleNotFoundError("No module named 'timm'", name="timm"), rf"ModuleNotFoundError: No module .*'\. {INSTALL}"),
    (ImportError("it needs transformers"), rf"ImportError: it needs transformers\. {INSTALL}"),
    (WRAPPED.__cause__, r"OutOfMemoryError: not enough memory \(CUDA out .*\)\. Try a smaller --size, .*--device cpu"),
    (WRAPPED, r"OutOfMemoryError: not enough memory \(x\.safe"), (MemoryError(), r".* memory \(MemoryError\)\. Try"),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "")  # fmt: skip
def test_a_missing_package_and_a_lack_of_memory(run, monkeypatch, error, said):
    monkeypatch.setattr(doctor, "report", Mock(side_effect=error))
    status, _, words = run("doctor")
    assert status == 1 and re.match(said, words)


@pytest.mark.parametrize("bug", [ValueError("out of range"), ImportError("no gone in it", name="lib_pulid.disk")])
def test_a_bug_of_ours_keeps_its_traceback(run, monkeypatch, bug):
    monkeypatch.setattr(doctor, "report", Mock(side_effect=bug))
    with pytest.raises(type(bug)):
        run("doctor")


def test_a_missing_package_is_not_taken_for_a_wrong_model(run, monkeypatch):
    """Whether our import fails, or one of diffusers' own while it reads the model."""
    Image.new("RGB", (8, 8)).save("x.png")
    given = ("generate", "--prompt", "x", "--face", GROUP, "--model", "x.png")
    inner = ModuleNotFoundError("No module named 'transformers'", name="transformers")
    monkeypatch.setattr(diffusers_base, "load_sdxl", Mock(side_effect=inner))
    assert run(*given).err == f"ModuleNotFoundError: No module named 'transformers'. {INSTALL}"
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert re.match(f"ModuleNotFoundError: .*diffusers.*{INSTALL}", run(*given).err)


@pytest.mark.parametrize(("arguments", "status"), [(("models", "list"), 141), (("doctor", "--help"), 0)])
def test_a_pipe_that_is_closed_and_a_terminal_without_the_letters(tmp_path, arguments, status):
    """`| head` reads no more than it shows; a folder's name may have letters that the terminal has not."""
    read, write = os.pipe()
    if status:
        os.close(read)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PULID_MODELS_DIR": str(tmp_path / "é")}
    command = [sys.executable, "-m", "lib_pulid", *arguments]
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment, cwd=Path(cli.__file__).parents[1]
    )
    assert (done.returncode, done.stderr) == (status, b"")


# ---------------------------------------------------------------- models


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Nothing is fetched: files of the right size appear. What was asked for, by name. What a real server can do to a
    download: test_download.py."""
    asked: dict[str, str] = {}

    def fetch(wanted, headers, tell):
        asked[wanted.target.name] = wanted.url
        put(Path(wanted.target).parents[0], wanted.target.name, folder="")
        tell(wanted.size, wanted.size, "")

    monkeypatch.setattr("lib_pulid.files.download.fetch", fetch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # facexlib's own folder may hold weights
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return asked


def test_list(run, hub, tmp_path):
    (tmp_path / "m" / "pulid").mkdir(parents=True)
    (tmp_path / "m" / "pulid" / "pulid_v1.bin").write_bytes(b"x")
    said = run("models", "list", models=tmp_path / "m")
    assert (said.status, hub) == (0, {})
    names = {file.name for file in catalog.CATALOG}
    lines = {name: line for line in said.out.splitlines() for name in names if f" {name} " in line}
    assert set(lines) == names
    there = [name for name, line in lines.items() if line.startswith("there")]
    assert there == ["pulid_v1.bin"]
    assert str(tmp_path / "m" / "pulid" / "pulid_v1.bin") in lines["pulid_v1.bin"]
    assert re.match(r"missing +261 MB +glintr100.onnx", lines["glintr100.onnx"])
    assert "non-commercial research purposes only" in lines["glintr100.onnx"]
    assert "insightface/models/antelopev2" in lines["glintr100.onnx"]


@pytest.mark.parametrize("accept", ["--accept-license", "--accept-licence"])
def test_download_of_everything(run, hub, tmp_path, accept):
    said = run("models", "download", accept, models=tmp_path / "m")
    assert said.status == 0
    at = "https://huggingface.co"
    assert hub["pulid_v1.1.safetensors"] == f"{at}/guozinan/PuLID/resolve/main/pulid_v1.1.safetensors"
    assert hub["EVA02_CLIP_L_336_psz14_s6B.pt"].startswith(f"{at}/QuanSun/EVA-CLIP/resolve/11afd202")
    assert hub["glintr100.onnx"].startswith(f"{at}/DIAMONIK7777/antelopev2/resolve/ba0c3e10")
    assert hub["parsing_bisenet.pth"] == f"{at}/leonelhs/facexlib/resolve/main/parsing_bisenet.pth"
    assert set(hub) == {*ENCODERS, "pulid_v1.1.safetensors", "pulid_flux_v0.9.1.safetensors"}
    written = {str(p.relative_to(tmp_path / "m")) for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert "pulid/pulid_v1.1.safetensors" in written
    assert "insightface/models/antelopev2/scrfd_10g_bnkps.onnx" in written
    assert "facexlib/parsing_bisenet.pth" in written
    assert len(written) == len(hub) == 7
    assert {path.name for path in catalog.require_encoders(tmp_path / "m").values()} == set(ENCODERS)
    assert said.out.count("non-commercial research purposes only") == 2
    hub.clear()  # what is there is left alone, and no license is asked for again
    assert run("models", "download", models=tmp_path / "m").status == 0
    assert hub == {}


def test_download_by_name(run, hub, tmp_path):
    said = run("models", "download", "pulid_v1.bin", models=tmp_path / "m")
    assert said.status == 0
    assert list(hub) == ["pulid_v1.bin"]
    assert f"pulid_v1.bin: {tmp_path / 'm' / 'pulid' / 'pulid_v1.bin'}" in said.out
    said = run("models", "download", "pulid_v2.bin", "pulid_v1.bin", models=tmp_path / "m")
    assert said.status == 1
    assert "SettingError: Unknown: pulid_v2.bin. Known: sdxl, flux, pulid_v1.1.safetensors, " in said.err


@pytest.mark.parametrize("stdin", [io.StringIO("y"), None], ids=["no terminal", "closed"])
@pytest.mark.parametrize("name", ["glintr100.onnx", "scrfd_10g_bnkps.onnx"])
def test_a_licence_that_was_not_accepted(run, hub, tmp_path, monkeypatch, name, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    said = run("models", "download", name, models=tmp_path / "m")
    assert said.status == 1
    assert f"MissingWeightsError: {name} needs its license accepted (InsightFace model license: non-comm" in said.err
    assert "--accept-license" in said.err
    assert hub == {}
    assert not list(tmp_path.rglob(name))


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [("y\n", True), ("Yes\n", True), ("\n", False), ("n\n", False), ("yup\n", False), ("", False)],
)
def test_a_licence_is_asked_for_on_a_terminal(run, hub, tmp_path, monkeypatch, answer, accepted):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    said = run("models", "download", "glintr100.onnx", models=tmp_path / "m")
    assert "non-commercial research purposes only. Accept? [y/N]" in said.out
    assert (said.status, len(hub)) == ((0, 1) if accepted else (1, 0))
    assert accepted or "glintr100.onnx was not downloaded: its license was not accepted." in said.err


def test_download_for_a_family(run, hub, tmp_path):
    put(tmp_path / "m", "pulid_v1.bin")
    said = run("models", "download", "sdxl", "--accept-licence", models=tmp_path / "m")
    assert (said.status, set(hub)) == (0, set(ENCODERS))  # there is a PuLID file for SDXL
    assert run("models", "download", "flux", models=tmp_path / "m").status == 0
    assert set(hub) == {*ENCODERS, "pulid_flux_v0.9.1.safetensors"}


def test_downloads_that_fail_do_not_keep_others_from_coming(run, hub, tmp_path, monkeypatch):
    real = download.fetch

    def fail(wanted, *rest):
        if "pulid_v1.1" in wanted.target.name or "parsing" in wanted.target.name:
            raise DownloadError("no network")
        real(wanted, *rest)

    monkeypatch.setattr("lib_pulid.files.download.fetch", fail)
    said = run("models", "download", "sdxl", "--accept-licence", models=tmp_path / "m")
    assert said.status == 1
    for name in ("pulid_v1.1.safetensors", "parsing_bisenet.pth"):
        file = catalog.named(name)
        assert f"DownloadError: {name} could not be downloaded: no network." in said.err
        assert f"-> {tmp_path / 'm' / file.folder}   from {file.url}" in said.err
    assert set(hub) == {*ENCODERS} - {"parsing_bisenet.pth"}


def test_a_file_of_another_size_is_replaced_when_it_is_named(run, hub, tmp_path):
    path = tmp_path / "insightface/models/antelopev2/scrfd_10g_bnkps.onnx"
    put(tmp_path, *ENCODERS)
    path.write_bytes(b"half")
    said = run("models", "download", "sdxl", "--accept-licence", models=tmp_path)
    assert (said.status, list(hub)) == (0, ["pulid_v1.1.safetensors"])
    assert f"{path} has 4 bytes, not 16,923,827. It is left alone; to replace it: " in said.out
    said = run("models", "download", path.name, "--accept-licence", models=tmp_path)
    assert (said.status, list(hub)) == (0, ["pulid_v1.1.safetensors", path.name])


@pytest.fixture
def empty(monkeypatch) -> WeightFile:
    """A file of ten zeros, as `hub` makes them, in a small catalog."""
    file = replace(catalog.named("pulid_v1.1.safetensors"), size=10, sha256=hashlib.sha256(bytes(10)).hexdigest())
    monkeypatch.setattr(catalog, "CATALOG", (file, catalog.named("pulid_v1.bin"), catalog.named("glintr100.onnx")))
    return file


def test_a_damaged_file_is_replaced_when_it_is_named(run, hub, empty, tmp_path):
    """It has the right size, so that only its bytes tell."""
    put(tmp_path, empty.name)
    path = tmp_path / "pulid" / empty.name
    path.write_bytes(b"123456789?")
    said = run("models", "download", empty.name, models=tmp_path)
    assert (said.status, list(hub), path.read_bytes()) == (0, [empty.name], bytes(10))
    hub.clear()
    assert run("models", "download", empty.name, models=tmp_path).out == f"{empty.name}: {path}\n"
    assert hub == {}


def test_verify(run, hub, empty, tmp_path):
    put(tmp_path, empty.name, "pulid_v1.bin")
    said = run("models", "verify", models=tmp_path)
    assert said.status == 0
    for state, name in (("verified", empty.name), ("no checksum", "pulid_v1.bin"), ("missing", "glintr100.onnx")):
        assert re.search(rf"^{state} .*{re.escape(name)}", said.out, re.MULTILINE)
    assert run("models", "verify", "glintr100.onnx", models=tmp_path).status == 1
    (tmp_path / "pulid" / empty.name).write_bytes(b"123456789?")
    said = run("models", "verify", models=tmp_path)
    assert said.status == 1
    assert re.search(rf"^differs .*{empty.name}.*\n .* is damaged: its checksum is ", said.out, re.MULTILINE)


@pytest.mark.parametrize(("value", "folder"), [
    ("elsewhere", "elsewhere"), ("", "models"), ("  ", "models"), ("~/mine", "home/mine"),
    ("~no-such-user/x", "~no-such-user/x"),
])  # fmt: skip
def test_the_default_folder(run, monkeypatch, tmp_path, value, folder):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(catalog.MODELS_DIR_VARIABLE, value)
    assert f"Weights in {tmp_path / folder}\n" in run("models", "list", models=None).out


def test_a_base_model_below_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "flux-dev" / "transformer").mkdir(parents=True)
    assert cli_checks.family_of("~/flux-dev") == "flux"


@pytest.mark.parametrize(("command", "option"), [
    ("evaluate", "faces"), ("evaluate", "prompts"), ("evaluate", "out"), ("bench", "face"), ("bench", "official"),
])  # fmt: skip
def test_a_path_below_the_home_folder(monkeypatch, tmp_path, command, option):
    """Shells leave --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(bench, "run", lambda arguments: seen.append(arguments) or 0)
    monkeypatch.setattr(evaluate, "run", lambda arguments, device: seen.append(arguments) or 0)
    seen: list = []
    assert cli.main([command, f"--{option}=~/x"]) == 0
    assert getattr(seen[0], option) == tmp_path / "x"
    leaves(2, command, f"--{option}", "")


def test_without_a_home(monkeypatch):
    """In a container the user may have no home folder, which must not be an error."""
    for name in ("expanduser", "home"):
        monkeypatch.setattr(Path, name, Mock(side_effect=RuntimeError("Could not determine home directory.")))
    for name in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert len(catalog.missing("sdxl", Path("nowhere"))) == 6


# ---------------------------------------------------------------- doctor


def put(models: Path, *names: str, folder: str | None = None) -> None:
    """Files of the right size (sparse) in their places, or in a folder."""
    for file in catalog.CATALOG:
        if file.name in names:
            path = models / (file.folder if folder is None else folder) / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as handle:
                handle.truncate(file.size or 10)


ENCODERS = [file.name for file in catalog.in_group("encoders")]


def test_doctor_where_nothing_is(run, hub, tmp_path):
    said = run("doctor", models=tmp_path / "m")
    assert said.status == 1
    for name in ENCODERS:
        assert re.search(rf"missing .* {re.escape(name)}", said.out)
        assert f"to do: python -m lib_pulid models download {name}   (" in said.out
    assert "models download glintr100.onnx   (InsightFace model license: non-commercial" in said.out
    for family in ("SDXL", "FLUX"):
        assert f"to do: for {family}: python -m lib_pulid models download pulid_" in said.out
    assert re.search(r"there +torch \d", said.out)
    assert re.search(r"Python +3\.\d+", said.out)
    assert "Ready for" not in said.out


V1, FLUX = "pulid_v1.1.safetensors", "pulid_flux_v0.9.1.safetensors"


@pytest.mark.parametrize(
    ("adapters", "able", "other"),
    [(("pulid_v1.bin", FLUX), "SDXL and FLUX", ""), ((V1,), "SDXL", "FLUX"), ((FLUX,), "FLUX", "SDXL")],
)
def test_doctor_is_content_with_one_family(run, hub, tmp_path, adapters, able, other):
    put(tmp_path, *ENCODERS, *adapters)
    said = run("doctor", models=tmp_path)
    assert (said.status, said.out.splitlines()[-1]) == (0, f"Ready for {able}.")
    assert said.out.count("to do") == said.out.count(f"to do: for {other}: ") == bool(other)


def test_doctor_sees_a_truncated_file(run, hub, tmp_path):
    put(tmp_path, *ENCODERS, "pulid_v1.bin", "pulid_flux_v0.9.1.safetensors")
    path = tmp_path / "insightface/models/antelopev2/glintr100.onnx"
    path.write_bytes(b"half")
    said = run("doctor", models=tmp_path)
    assert said.status == 1
    assert re.search(r"differs .* glintr100\.onnx", said.out)
    assert f"to do: {path} has 4 bytes, not 260,665,334: python -m lib_pulid models download glintr100" in said.out
    assert said.out.count("to do") == said.out.count("differs") == 1


def test_doctor_notes_what_is_not_needed(run, hub, tmp_path):
    """Files of other sizes, such as copies in half precision, are allowed; only those that images need count."""
    put(tmp_path, *ENCODERS, V1, "pulid_v1.bin", FLUX, "ip-adapter_instant_id_sdxl.bin")
    pulid = tmp_path / "pulid"
    (pulid / "ip-adapter_instant_id_sdxl.bin").write_bytes(b"half")
    said = run("doctor", models=tmp_path)
    assert (said.status, said.out.splitlines()[-1]) == (0, "Ready for SDXL and FLUX.")
    assert re.search(r"note: .*ip-adapter_instant_id_sdxl\.bin has 4 bytes, not .*; to replace it: python -m", said.out)
    (pulid / V1).write_bytes(b"half")  # goes before pulid_v1.bin
    said = run("doctor", models=tmp_path)
    assert (said.status, said.out.splitlines()[-1]) == (0, "Ready for FLUX.")
    assert f"to do: for SDXL: {pulid / V1} has 4 bytes, not 984,405,232: python -m lib_pulid models d" in said.out
    (pulid / FLUX).write_bytes(b"half")
    assert run("doctor", models=tmp_path).status == 1


def test_doctor_sees_missing_packages(run, monkeypatch):
    bringing, is_there = doctor._bringing, doctor._is_there
    monkeypatch.setattr(doctor, "_bringing", lambda module, *rest: [] if module == "timm" else bringing(module, *rest))
    monkeypatch.setattr(doctor, "_is_there", lambda module: module != "timm" and is_there(module))
    said = run("doctor")
    assert re.search(r"MISSING +timm", said.out)
    assert "to do: pip install timm" in said.out


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        (["onnxruntime-directml 1.20"], ""), (["onnxruntime_openvino 1.20", "onnxruntime-extensions 0.13"], ""),
        (["opencv-contrib-python-headless 4.10"], ""), (["opencv-python 4.9", "opencv-python-headless 4.9"], ""),
        (["onnxruntime 1.20", "onnxruntime-directml 1.21"], "onnxruntime 1.20 and onnxruntime-directml 1.21 hide each"),
    ],
)  # fmt: skip
def test_doctor_knows_who_brings_a_module(run, monkeypatch, tmp_path, packages, words):
    """To install onnxruntime beside onnxruntime-directml would hide that one."""
    for name, version in (package.split() for package in packages):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        module = "cv2" if "cv" in name else name.replace("-", "_") if "ext" in name else "onnxruntime"
        (tmp_path / module).mkdir(exist_ok=True)
        (tmp_path / module / "__init__.py").write_text("")
        (folder / "RECORD").write_text(f"{module}/__init__.py,,\n{folder.name}/RECORD,,\n")
    found = list(metadata.distributions(path=[str(tmp_path)]))
    brought = packages[0].startswith("opencv")
    others = [one for one in metadata.distributions() if one.name.startswith("onnxruntime" if brought else "opencv")]
    monkeypatch.setattr(metadata, "distributions", lambda: [*found, *others])
    said = run("doctor")
    shown = re.search(rf"there +{' '.join(packages[:1])}.* {'images' if brought else 'runs'}", said.out)
    assert shown and "extensions" not in said.out
    assert (words in said.out) if words else "hide each other" not in said.out
    assert not re.search(r"pip install (onnxruntime|opencv)", said.out)


# ---------------------------------------------------------------- demo


@pytest.fixture
def shown(monkeypatch) -> list:
    """The arguments of the contact sheets that are made."""
    made: list = []
    monkeypatch.setattr(demo, "contact_sheet", lambda *given: made.append(given) or contact_sheet(*given))
    return made


def test_demo(run, tmp_path, monkeypatch, shown):
    """Once end to end, with one person's drawing: the sheet is what was said of it."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # conftest.py has set it
    monkeypatch.setattr(miniature, "STEPS", dict.fromkeys(miniature.STEPS, 2))
    said = run("demo", "--face", PORTRAIT, "--out", tmp_path / "sheets", models=tmp_path / "m")
    assert (said.status, said.err.count("Error")) == (0, 0)
    assert re.search(r"face +photo 1: found at \(\d+, \d+\)", said.out)
    path = tmp_path / "sheets" / "demo_sdxl.png"
    assert f"wrote      {path}" in said.out
    people, together = shown[0][2]
    (row,) = people.rows
    assert len(row) == len(people.columns) == 8
    assert np.array_equal(np.asarray(row[0].image), np.asarray(Image.open(PORTRAIT)))
    plain, *weighted = (np.asarray(tile.image).astype(int) for tile in row[1:6])
    changes = [abs(image - plain).mean() for image in weighted]
    assert changes == sorted(changes) and changes[0] > 0
    changed = abs(weighted[2] - plain).max(axis=2)
    assert np.array_equal(np.asarray(row[7].image), 255 - changed)
    assert row[7].caption == f"{(changed > 25).mean():.0%} of the pixels"
    assert all(re.fullmatch(r"likeness -?[01]\.\d\d|no face found", tile.caption) for tile in row[1:7])
    assert re.fullmatch(r"likeness (-?[01]\.\d\d|no face) · (-?[01]\.\d\d|no face)", together.rows[0][2].caption)


def test_demo_of_a_photograph_in_miniature(run, tmp_path):
    """One sentence: what it knows, and how to get the real weights."""
    said = run("demo", "--face", demo.sample_photo(), "--out", tmp_path / "sheets")
    assert said.status == 1
    assert "t1.jpg: no face was found" in said.err
    assert "The miniature knows only drawn people. For photos, get the real weights with" in said.err
    assert "`python -m lib_pulid models download sdxl`" in said.err
    assert not list((tmp_path / "sheets").glob("*.png"))


def test_demo_with_real_weights(run, tmp_path, monkeypatch, shown):
    """They are used where all of them are there; here small ones are in their place."""
    monkeypatch.setattr(demo, "real_model", lambda family, models_dir: "tiny-flux" if family == "flux" else None)
    monkeypatch.setattr(demo, "open_workshop", open_small_workshop(standalone.open_workshop))
    said = run("demo", "--face", GROUP, "--out", tmp_path / "sheets", models=tmp_path / "m")
    assert said.status == 0
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["demo_flux.png"]
    assert len(re.findall(r"weight [\d.]+: injected at 20 of 20 sites, [\d.]+ MB kept", said.out)) == 3
    ((section,),) = (given[2] for given in shown)
    images = [np.asarray(tile.image).astype(int) for tile in section.rows[0]]
    changes = [abs(image - images[2]).mean() for image in images[3:6]]
    assert changes == sorted(changes) and changes[0] > 0


def test_demo_without_insightface(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="Give a photo with --face"):
        demo.sample_photo()


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (40, 30), (30, 40), (200, 600)])
def test_an_image_of_any_shape_stays_in_its_tile(size):
    red, white = (255, 0, 0), Image.new("RGB", (256, 256), "white")
    tiles = [Tile(Image.new("RGB", size, red)), Tile(white, "beside", 0.5)]
    sheet = np.asarray(contact_sheet("title", "text", [Section("heading", ["one", "two"], [tiles])]))
    painted = np.argwhere((sheet == red).all(axis=2))
    (top, left), (bottom, right) = painted.min(0), painted.max(0)
    assert max(bottom - top, right - left) == 255  # fills it
    assert left >= MARGIN and right < MARGIN + 256
    assert abs((right - left + 1) / (bottom - top + 1) - size[0] / size[1]) < 0.02
