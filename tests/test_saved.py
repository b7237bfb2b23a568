"""Saved identities on a disk that others use, too: names, rights, two programs at once; and `.pulidembd`."""

from __future__ import annotations

import errno
import os
import re
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_pulid import disk
from lib_pulid.errors import (
    IdentityMismatchError,
    MissingWeightsError,
    PulidError,
    SettingError,
    StorageError,
    WrongWeightsError,
)
from lib_pulid.files import catalog, pulidembd
from lib_pulid.identity import Identity, with_uncond
from lib_pulid.injection import compile_injection
from lib_pulid.stores.folder import Settings
from lib_pulid.webui import routes
from lib_pulid.webui.library import Library
from lib_pulid.weights import load_adapter
from tests import small_models
from tests.host.models.gguf import BF16, F16, F32, gguf


def person(value: float = 1.0, **info: str) -> Identity:
    return Identity(torch.full((1, 4, 64), value), info=info)


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(lambda: Settings(tmp_path))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> small_models.SmallFiles:
    return small_models.write_files(tmp_path_factory.mktemp("files"), [8] * 3, 64)


def place(source: Path, *paths: Path, content: bytes | None = None) -> None:
    """Puts a file, or something else in its place, where nothing need be yet."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes() if content is None else content)


# ---------------------------------------------------------------- two programs


def test_a_name_that_another_program_takes_meanwhile(library, tmp_path, monkeypatch):
    """It has looked and found the name free; then the other is quicker."""
    theirs, real = Library(lambda: Settings(tmp_path)), Identity.save

    def save(self: Identity, path: Path) -> Path:
        if self.cond[0, 0, 0] == 1:
            theirs.identities.save("anna", person(2))
        return real(self, path)

    monkeypatch.setattr(Identity, "save", save)
    with pytest.raises(SettingError, match="anna is already saved"):
        library.identities.save("anna", person(1))
    assert library.identities.load("anna").cond[0, 0, 0] == 2
    assert os.listdir(library.identities.folder) == ["anna.safetensors"]


@pytest.mark.parametrize("links", [True, False])
def test_no_way_to_save_overwrites(tmp_path, monkeypatch, links):
    if not links:

        def no_link(*_):
            raise OSError(errno.EPERM, "a file system without links")

        monkeypatch.setattr(os, "link", no_link)
    person(1).save(tmp_path / "x.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("x", "dangling", "folder"):
        with pytest.raises((SettingError, StorageError)):
            person(2).save(tmp_path / f"{name}.safetensors")
    assert Identity.load(tmp_path / "x.safetensors").cond[0, 0, 0] == 1
    assert len(os.listdir(tmp_path)) == 3  # nothing half written


def test_another_spelling_saved_meanwhile_is_seen(library, monkeypatch):
    real = Identity.save

    def save(self: Identity, path: Path) -> Path:
        real(person(2), path.with_name("ANNA.safetensors"))
        return real(self, path)

    monkeypatch.setattr(Identity, "save", save)
    with pytest.raises(SettingError, match="ANNA is already saved"):
        library.identities.save("anna", person(1))
    assert [one.name for one in library.identities.listed()] == ["ANNA"]


# ---------------------------------------------------------------- names

SPELLINGS = ["Zoë", unicodedata.normalize("NFD", "Zoë"), "ZOË", " zoë ", "Zoë\u200b", "\uff3a\uff4fë"]


@pytest.mark.parametrize("asked", SPELLINGS, ids=ascii)
@pytest.mark.parametrize("kept", SPELLINGS[:3], ids=ascii)
def test_one_name_in_all_its_spellings(library, kept, asked):
    person(1).save(library.identities.folder / f"{kept}.safetensors")
    assert library.identities.load(asked).cond[0, 0, 0] == 1
    if asked != "Zoë\u200b":
        with pytest.raises(SettingError, match="is already saved"):
            library.identities.save(asked, person(2))
    assert len(library.identities.listed()) == 1


def test_two_that_differ_in_spelling_only_are_not_mixed_up(library):
    for value, name in enumerate(("anna", "Anna", unicodedata.normalize("NFD", "Zoë"), "Zoë"), 1):
        person(value).save(library.identities.folder / f"{name}.safetensors")
    assert library.identities.load("Anna").cond[0, 0, 0] == 2
    assert library.identities.load("Zoë").cond[0, 0, 0] == 4
    assert library.identities.load(unicodedata.normalize("NFD", "Zoë")).cond[0, 0, 0] == 3
    with pytest.raises(SettingError, match="ANNA could be .* or .*Spell it"):
        library.identities.load("ANNA")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_not_text_is_not_listed(library):
    """Of an archive in another encoding. The page could not be sent with it, and would not be shown at all."""
    library.identities.save("anna", person(1))
    for folder, suffix in ((library.identities.folder, ".safetensors"), (library.presets.folder(), ".json")):
        folder.mkdir(exist_ok=True)
        try:
            Path(os.fsdecode(os.fsencode(folder / "M") + b"\xfcller" + suffix.encode())).write_bytes(b"{}")
        except OSError:
            pytest.skip("this file system has no such names")
    listed = [path.name for path in disk.listed(library.identities.folder, (".safetensors",))]
    assert (listed, library.presets.names()) == (["anna.safetensors"], ["natural"])


def test_a_file_name_is_not_another_persons_name(library):
    """`anna.safetensors` is how many would write the file of anna."""
    library.identities.save("anna", person(1))
    with pytest.raises(SettingError, match="anna is already saved"):
        library.identities.save("anna.safetensors", person(2))
    assert library.identities.save("ben.SafeTensors ", person(3)).name == "ben"
    assert library.identities.load("ben.safetensors").cond[0, 0, 0] == 3


def test_two_files_of_one_name(library):
    for value, suffix in enumerate((".safetensors", ".SAFETENSORS", ".pulidembd"), 1):
        person(value).save(library.identities.folder / f"anna{suffix}")
    for name in ("anna", "Anna"):
        with pytest.raises(SettingError, match=r"could be anna\.SAFETENSORS or anna\.safetensors\. Rename"):
            library.identities.load(name)
    assert [library.identities.load(f"anna{end}").cond[0, 0, 0] for end in (".safetensors", ".SAFETENSORS")] == [1, 2]
    assert library.identities.load("anna.pulidembd").cond[0, 0, 0] == 3


def test_identities_in_folders(library):
    """Those who keep many sort them, as they do with LoRAs."""
    identities = library.identities
    for value, name in enumerate(("anna", "clients/ben", "clients/old/carla.pulidembd", "clients/anna"), 1):
        path = identities.folder / (name if "." in name else f"{name}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        person(value).save(path)
    listed = {saved.name: identities.load(saved.name).cond[0, 0, 0] for saved in identities.listed()}
    assert listed == {"anna": 1, "clients/ben": 2, "clients/old/carla.pulidembd": 3, "clients/anna": 4}
    for name, value in {"ben": 2, "Ben.safetensors": 2, "carla": 3, "Clients/Anna": 4, "anna.safetensors": 1}.items():
        assert identities.load(name).cond[0, 0, 0] == value, name
    with pytest.raises(SettingError, match="clients/ben is already saved"):
        identities.save("Ben", person(5))
    with pytest.raises(IdentityMismatchError, match="Did you mean clients/ben"):
        identities.load("bern")
    assert routes.identity_file("ben", library) == ("ben.safetensors", identities.path("ben").read_bytes())
    assert routes.identity_file("clients/ben.pulidembd", library)[0] == "ben.pulidembd"

    (identities.folder / "anna.safetensors").rename(identities.folder / "clients/old/anna.safetensors")
    with pytest.raises(SettingError, match=r"anna could be clients/anna.safetensors or clients/old/anna.safetensors"):
        identities.load("anna")
    for folder in ("clients", "clients/old"):
        (identities.folder / folder / "anna.json").write_text("{}")
    identities.delete("clients/anna")
    assert not (identities.folder / "clients/anna.json").exists()
    assert (identities.folder / "clients/old/anna.json").exists() and identities.load("anna").cond[0, 0, 0] == 1


WRONG_NAMES = dict.fromkeys([
    "../x", "a/b", "a\\b", "/x", "C:x", "a:b", ".hidden", "..", "nul.txt", "com1", "LPT9.x", "None", "a\nb", "a\0b",
    "a*b", "a?b", 'a"b', "a<b", "a|b", "\ud800", " ", "李" * 80, "\u202ea", "é" * 80 + "é" * 21,
], "") | {
    "my 🙂": r"contains 🙂 \(U\+1F642\)", "a\u202eb": r"contains \(U\+202E\)", "x.": "ends with a dot",
    "con": "con is reserved", "CON": "CON is reserved", "COM¹": "COM¹ is reserved", "aux .x": "aux .x is reserved",
    "0123456789": "looks like an identity's hash", "ABCDEF0123": "looks like an identity's hash",
    "-x": "starts with -", "x" * 81: "too long", "": "empty",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_NAMES, ids=ascii)
def test_names_an_identity_cannot_have(library, name):
    with pytest.raises(SettingError, match=f"{WRONG_NAMES[name]}.*A name may have letters, digits"):
        library.identities.save(name, person())
    assert library.identities.listed() == []


def test_a_hash_in_capitals_and_a_damaged_file_by_name(library):
    saved = library.identities.save("anna", person(1))
    assert library.identities.load(saved.short_hash.upper()).short_hash == saved.short_hash
    (library.identities.folder / "ben.safetensors").write_bytes(b"half")
    with pytest.raises(IdentityMismatchError, match=r"ben\.safetensors is not a saved identity, or is damaged"):
        library.identities.load("ben")


# ---------------------------------------------------------------- rights


@pytest.fixture
def closed(monkeypatch):
    """Folders and files that nobody may look into, also for whoever runs the tests as root."""
    shut: list[str] = []

    def is_shut(path) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(tuple(shut))

    def guard(owner, name):
        real = getattr(owner, name)

        def call(path, *args, **kwargs):
            if is_shut(path):
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in ("stat", "lstat", "listdir", "scandir", "mkdir"):
        guard(os, name)
    guard(Path, "stat")
    monkeypatch.setattr(os, "access", lambda path, mode: not is_shut(path))
    return shut


def test_a_place_that_may_not_be_looked_into_has_nothing(tmp_path, closed, monkeypatch):
    """A container's user with another user's HOME: only looking there ended everything."""
    home = tmp_path / "home"
    for name in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    expected = catalog.missing("sdxl", tmp_path / "models")
    home.mkdir()
    closed.append(str(home))
    assert catalog.missing("sdxl", tmp_path / "models") == expected
    assert {file.name for file in expected} >= {"glintr100.onnx", "pulid_v1.1.safetensors"}


def test_an_identity_is_back_with_its_drive(library, monkeypatch):
    """A network drive that did not answer for a moment: nothing about the file shows that it can be read again."""
    saved = library.identities.save("anna", person(1, note="x"))
    library.identities.save("ben", person(2))
    real = Path.open

    def stale(path, *args, **how):
        if path.name == "anna.safetensors":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", stale)
        assert (library.identities.names(), library.identities.card(saved)) == (["ben"], ({}, None))
    assert library.identities.names() == ["anna", "ben"]
    assert library.identities.card(saved)[0]["note"] == "x"


PLACES = ["", "pulid", "pulid/identities", "pulid/cache", "clip", "clip_vision", "ControlNet", "antelopev2", "facexlib",
          "insightface", "insightface/models/antelopev2", "GFPGAN"]  # fmt: skip


@pytest.mark.parametrize("folder", PLACES)
def test_any_folder_may_be_closed(library, tmp_path, closed, files, folder):
    (tmp_path / "pulid" / "identities").mkdir(parents=True)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    place(files.sdxl, tmp_path / "pulid" / "mine.safetensors")
    closed.append(str(tmp_path / folder))
    open_still = folder not in ("", "pulid")
    assert [file.name for file in library.adapters.listed()] == (["mine.safetensors"] if open_still else [])
    assert library.identities.listed() == []
    assert library.identities.find("0123456789") is None
    assert len(catalog.missing("", tmp_path)) == 5
    if folder in ("", "pulid", "pulid/identities"):
        with pytest.raises(StorageError, match="cannot be written"):
            library.identities.save("anna", person())


def test_a_folder_that_is_a_file_or_cannot_be_written(library, tmp_path, monkeypatch):
    for what in ("pulid", "pulid/identities"):
        path = tmp_path / what
        path.write_text("no folder")
        assert (library.adapters.listed(), library.identities.listed()) == ([], [])
        with pytest.raises(StorageError):
            library.identities.save("anna", person())
        path.unlink()
        path.mkdir()

    def refused(self, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(StorageError, match=rf"{tmp_path}.*anna\.safetensors cannot be written \(Permission denied\)"):
        library.identities.save("anna", person())


def test_a_copy_that_may_be_read_goes_before_one_that_may_not(tmp_path, closed):
    file = catalog.named("pulid_v1.bin")
    for folder in ("pulid", "ControlNet"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file.name).write_bytes(b"x")
    assert catalog.status(file, tmp_path).path == tmp_path / "pulid" / file.name
    closed.append(str(tmp_path / "pulid"))
    assert catalog.status(file, tmp_path).path == tmp_path / "ControlNet" / file.name


def test_nobody_looks_for_files_in_another_way():
    """`Path.is_file` and its like raise where a folder may not be looked into: `disk` has those that do not."""
    asked = re.compile(r"(?<!disk)\.(is_file|is_dir|iterdir|glob|rglob|expanduser)\(|Path\.home\(")
    for path in (Path(__file__).parents[1] / "lib_pulid").rglob("*.py"):
        if path.name not in ("disk.py", "haar.py") and "training" not in path.parts:
            assert asked.findall(path.read_text(encoding="utf-8")) == [], path.name


# ---------------------------------------------------------------- files of others in the folder


def test_auto_passes_over_other_adapters(library, tmp_path, files):
    folder = tmp_path / "pulid"
    place(files.sdxl, folder / "my_pulid.safetensors")
    sites = {"ip_adapter.1.to_k_ip.weight": torch.ones(8, 8), "ip_adapter.1.to_v_ip.weight": torch.ones(8, 8)}
    encoders = ("proj.weight", "latents", "perceiver_resampler.proj_in.weight")
    for name, encoder in zip("abc", (f"image_proj.{one}" for one in encoders)):
        save_file({f"image_proj.{encoder}": torch.ones(8, 8), **sites}, folder / f"{name}_ip-adapter.safetensors")
        torch.save({"image_proj": {encoder: torch.ones(8)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(8)}},
                   folder / f"{name}.bin")  # fmt: skip
    save_file({"double_blocks.0.processor.proj_lora1.down.weight": torch.ones(2, 2)}, folder / "a_lora.safetensors")
    assert library.adapters.load("auto", "sdxl").path.name == "my_pulid.safetensors"
    with pytest.raises(WrongWeightsError, match=r"a_ip-adapter\.safetensors is an IP-Adapter of an unknown kind"):
        library.adapters.load("a_ip-adapter", "sdxl")
    (folder / "my_pulid.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match="no PuLID file for SDXL(.|\n)*Left out: a.bin is an IP-Adapter"):
        library.adapters.load("auto", "sdxl")


def test_adapters_below_the_folder(tmp_path, files):
    """People sort their models in folders, and the WebUIs list those, too. A link that leads in a circle ends there."""
    folder, elsewhere = tmp_path / "models" / "pulid", tmp_path / "drive"
    place(files.flux, folder / "flux/model.safetensors")
    found, left_out = ("sdxl/v1 é/mine", "sdxl/model"), ("identities/no", ".cache/huggingface/no")
    place(files.sdxl, *(folder / f"{name}.safetensors" for name in found + left_out))
    place(files.sdxl, elsewhere / "linked.safetensors", folder.parent / "Stable-diffusion/no.safetensors")
    (folder / "a_link").symlink_to(elsewhere, target_is_directory=True)
    (folder / "sdxl" / "circle").symlink_to(folder, target_is_directory=True)
    (folder / "broken").symlink_to("nowhere")
    adapters = Library(lambda: Settings(folder.parent)).adapters
    assert adapters.names() == ["linked.safetensors", "mine.safetensors", "model.safetensors"]
    assert len(adapters.listed()) == 4  # two are named model
    assert adapters.load("mine", "sdxl").path == folder / "sdxl/v1 é/mine.safetensors"
    for family in ("sdxl", "flux"):
        assert adapters.load("model.safetensors", family).path == folder / family / "model.safetensors"
        assert adapters.load("auto", family).family == family
    place(files.sdxl, folder / "mine.safetensors")
    assert adapters.load("mine", "sdxl").path == folder / "mine.safetensors"
    assert len(adapters.listed()) == 4


def test_a_models_folder_with_pulid_files_in_it(library, tmp_path, files):
    """All other models are below it."""
    place(files.sdxl, tmp_path / "pulid_v1.1.safetensors", tmp_path / "Lora" / "no.safetensors")
    assert library.adapters.names() == ["pulid_v1.1.safetensors"]


def test_one_file_under_two_spellings(library, tmp_path, files):
    """As where the disk does not tell them apart: it is found under the catalog's, too."""
    place(files.sdxl, tmp_path / "pulid" / "PULID_V1.1.safetensors", tmp_path / "clip" / "pulid_v1.1.safetensors")
    assert library.adapters.names() == ["PULID_V1.1.safetensors"]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"version https://git-lfs.github.com/spec/v1\n", "half"])
@pytest.mark.parametrize("name", ["pulid_v1.1.safetensors", "pulid_v1.bin"])
def test_auto_names_a_damaged_file(library, tmp_path, files, name, content, beside):
    """It is the one that the user means, so no other file takes its place."""
    half = files.sdxl.read_bytes()[:1000]
    place(files.sdxl, tmp_path / "pulid" / name, content=half if content == "half" else content)
    if beside:
        place(files.sdxl, tmp_path / "pulid" / "mine.safetensors")
    with pytest.raises(WrongWeightsError, match=rf"^{re.escape(name)} (is|\()"):
        library.adapters.load("auto", "sdxl")


def test_a_link_to_a_drive_that_is_not_there(library, tmp_path):
    (tmp_path / "pulid").mkdir()
    for name, ask in (
        ("pulid_v1.1.safetensors", lambda: library.adapters.load("auto", "sdxl")),
        ("EVA02_CLIP_L_336_psz14_s6B.pt", lambda: catalog.require_encoders(tmp_path)),
    ):
        (tmp_path / "pulid" / name).symlink_to(f"/gone/{name}")
        with pytest.raises(MissingWeightsError, match=rf"{name} .*there is a link to /gone/{name}, which cannot"):
            ask()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_copy_in_another_precision_counts_as_the_file(tmp_path, files, dtype):
    made_with = load_adapter(files.flux)
    path = tmp_path / "copy.safetensors"
    save_file({key: value.to(getattr(torch, dtype)) for key, value in load_file(files.flux).items()}, path)
    copy = load_adapter(path)
    for ours, theirs in ((made_with, copy), (copy, made_with)):
        compile_injection(theirs, Identity(torch.zeros(1, 32, 64), info={"encoder": ours.fingerprint}))
    other = load_adapter(files.sdxl)
    assert not other.is_encoder(made_with.fingerprint)
    assert made_with.is_encoder(made_with._digest(torch.Tensor.half)[:16])  # as identities had it before


@pytest.mark.parametrize("facts", [{"step": 3}, {"a": {"b": "c"}}, {"x": None, "y": "text"}])
def test_metadata_with_more_than_text_is_no_damage(tmp_path, files, facts):
    import json

    for source in (files.sdxl, person(3, name="anna").save(tmp_path / "anna.safetensors")):
        content = Path(source).read_bytes()
        length = int.from_bytes(content[:8], "little")
        head = json.loads(content[8 : 8 + length])
        head["__metadata__"] = {**head.get("__metadata__", {}), **facts}
        text = json.dumps(head).encode()
        path = tmp_path / f"changed_{Path(source).name}"
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert load_adapter(tmp_path / f"changed_{files.sdxl.name}").family == "sdxl"
    assert Identity.load(tmp_path / "changed_anna.safetensors").cond[0, 0, 0] == 3


# ---------------------------------------------------------------- .pulidembd


def by_hand(values: np.ndarray, kind: int = F16, version: int = 1, architecture: str = "pulid", **more: int) -> bytes:
    """From the format's description: GGUF 3, one tensor `pulid_id`, sizes [D, N], 32 bytes alignment."""
    entries = {"general.architecture": architecture, "pulid.version": version}
    entries |= {name.replace("_", "."): value for name, value in more.items()}
    return gguf({"pulid_id": torch.from_numpy(values)}, kind, entries)


VALUES = np.random.default_rng(3).integers(-64, 64, (32, 64)).astype(np.float32) / 16  # exact in 16 bits of both kinds


@pytest.mark.parametrize("kind", [F32, F16, BF16])
@pytest.mark.parametrize("more", [{}, {"general_alignment": 64}])
def test_a_pulidembd_made_by_hand_is_read(library, kind, more):
    library.identities.folder.mkdir(parents=True)
    (library.identities.folder / "anna.pulidembd").write_bytes(by_hand(VALUES, kind, **more))
    assert [(one.name, one.adapter) for one in library.identities.listed()] == [("anna.pulidembd", "PuLID for FLUX")]
    for name in ("anna", "anna.pulidembd", library.identities.listed()[0].short_hash):
        identity = library.identities.load(name)
        np.testing.assert_array_equal(identity.cond[0].numpy(), VALUES)
        assert (identity.family, identity.uncond) == ("flux", None)


def test_a_pulidembd_is_written_as_described(tmp_path):
    identity = Identity(torch.from_numpy(VALUES)[None], info={"adapter": "PuLID v0.9 for FLUX"})
    assert identity.save(tmp_path / "x.pulidembd").read_bytes() == by_hand(VALUES)
    real = Identity(torch.zeros(1, 32, 2048)).save(tmp_path / "real.pulidembd")
    assert 131_000 < real.stat().st_size < 131_500
    large = Identity(torch.full((1, 2, 4), 1e6)).save(tmp_path / "large.pulidembd")
    assert Identity.load(large).cond.max() == 1e6
    with pytest.raises(SettingError, match=r"\.pulidembd is for FLUX, .*PuLID v1 for SDXL"):
        person(1, adapter="PuLID v1 for SDXL").save(tmp_path / "sdxl.pulidembd")
    with pytest.raises(SettingError, match="already saved"):
        identity.save(tmp_path / "x.pulidembd")


def test_its_uncond_is_what_the_encoder_makes_of_zeros(tmp_path, files):
    (tmp_path / "x.pulidembd").write_bytes(by_hand(VALUES))
    adapter, identity = load_adapter(files.flux), Identity.load(tmp_path / "x.pulidembd")
    completed = with_uncond(identity, adapter)
    zeros = [torch.zeros(1, 577, small_models.TOWER_WIDTH)] * 5
    expected = adapter.encoder(torch.zeros(1, small_models.ID_COND), zeros).detach()
    torch.testing.assert_close(completed.uncond, expected)
    assert compile_injection(adapter, completed).has_uncond
    assert with_uncond(person(), adapter).uncond is None  # none was wanted there
    with pytest.raises(IdentityMismatchError, match="made with PuLID for FLUX .*not known.* is PuLID v1.1 for SDXL"):
        compile_injection(load_adapter(files.sdxl), identity)


def test_a_copy_of_it_as_an_identity_of_ours_keeps_what_is_known(library):
    library.identities.folder.mkdir(parents=True)
    (library.identities.folder / "anna.pulidembd").write_bytes(by_hand(VALUES))
    library.identities.save("ben", library.identities.load("anna"))
    library.identities.save("carl.pulidembd", library.identities.load("ben"))
    assert library.identities.load("ben").family == "flux"
    assert (library.identities.folder / "carl.pulidembd").read_bytes() == by_hand(VALUES)
    assert [one.name for one in library.identities.listed()] == ["anna.pulidembd", "ben", "carl.pulidembd"]


@pytest.mark.parametrize("wrong", ["version", "architecture", "cut", "head", "name", "kind", "size"])
def test_a_pulidembd_that_is_none(tmp_path, wrong):
    data = by_hand(VALUES)
    content = {
        "version": by_hand(VALUES, version=2), "architecture": by_hand(VALUES, architecture="llama"),
        "cut": data[:-1], "head": data[:60], "name": data.replace(b"pulid_id", b"pulid_xx"),
        "kind": data.replace(struct.pack("<QQIQ", 64, 32, 1, 0), struct.pack("<QQIQ", 64, 32, 12, 0)),
        "size": data.replace(struct.pack("<QQ", 64, 32), struct.pack("<QQ", 1 << 60, 32)),
    }[wrong]  # fmt: skip
    (tmp_path / "x.pulidembd").write_bytes(content)
    said = {"name": "it has no tensor pulid_id", "kind": "ggml's type 12; only F16, F32 and BF16"}.get(wrong, "")
    with pytest.raises(IdentityMismatchError, match=rf"x\.pulidembd is not a saved identity, or is damaged \({said}"):
        Identity.load(tmp_path / "x.pulidembd")
    with pytest.raises((ValueError, LookupError, struct.error)):
        pulidembd.unpack(content)


def test_storage_errors_are_messages():
    assert issubclass(StorageError, PulidError)
    with pytest.raises(StorageError):
        disk.check_writable("/proc/no/such/place")
