"""Weight files and saved identities that are damaged, foreign or hostile: named, with what to do, and never run."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from math import inf
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from lib_pulid.disk import fingerprint
from lib_pulid.errors import IdentityMismatchError, MissingWeightsError, SettingError, WrongWeightsError
from lib_pulid.face_models import ArcFaceRecogniser, BiSeNetParser, InsightFaceDetector, RetinaFaceLandmarker
from lib_pulid.files.checkpoint_header import checkpoint_family
from lib_pulid.files.state_dict import HARMLESS, read_state_dict
from lib_pulid.identity import FILE_FORMAT, LARGEST_FILE, FaceFeatures, Identity, encode_identity
from lib_pulid.stores.folder import Settings
from lib_pulid.vision import load_vision_tower
from lib_pulid.webui.library import Library
from lib_pulid.weights import load_adapter
from tests.test_identity import PHOTOS, an_identity
from tests.test_weights import (
    SITES,
    STATES,
    as_safetensors,
    converted_state,
    flux_state,
    pickled,
    tower_state,
    v1_state,
    v11_state,
)

CODE = {"os.system": (os.system, "touch {}"), "eval": (eval, "open({!r}, 'w')"), "exec": (exec, "open({!r}, 'w')")}


class Hostile:
    def __init__(self, call: str, trap: Path) -> None:
        self.call, self.trap = call, trap

    def __reduce__(self):
        function, text = CODE[self.call]
        return function, (text.format(str(self.trap)),)


def hostile(form: str, call: str, trap: Path) -> bytes:
    """A pickle that makes the file `trap` when it is read without care."""
    bad = Hostile(call, trap)
    if form == "bare":
        return pickle.dumps({"a": bad})
    if form == "tar":  # what torch.load read in 2017, and reads to this day
        return tar_file(bad)
    more = {"nested": {"state_dict": {"a": [{"b": bad}]}}, "as a key": {Key(call, trap): torch.zeros(1)}}
    state = {**v1_state(), **more.get(form, {"a": bad})}
    return pickled(state, _use_new_zipfile_serialization=form != "legacy")


class Key(Hostile):
    """A hostile object in a place where a name is expected."""

    def __hash__(self) -> int:
        return 1


def tar_file(bad: object) -> bytes:
    parts = {"storages": (0, []), "tensors": (0,), "pickle": (bad,)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for name, objects in parts.items():
            data = b"".join(pickle.dumps(value, protocol=2) for value in objects)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


LOADERS = {
    "pulid_v1.bin": load_adapter, "pulid.pt": load_adapter, "pulid.pth": load_adapter, "pulid.ckpt": load_adapter,
    "pulid_v1.1.safetensors": load_adapter, "EVA02_CLIP_L_336_psz14_s6B.pt": load_vision_tower,
    "detection_Resnet50_Final.pth": RetinaFaceLandmarker, "parsing_bisenet.pth": BiSeNetParser,
    "scrfd_10g_bnkps.onnx": InsightFaceDetector, "glintr100.onnx": ArcFaceRecogniser, "anna.identity": Identity.load,
}  # fmt: skip
ERRORS = (WrongWeightsError, IdentityMismatchError)


def refused(
    path: Path, content: bytes, words: str, load: Callable = load_adapter, seconds: float = inf, megabytes: float = inf
) -> None:
    path.write_bytes(content)
    began, before = time.process_time(), peak()
    with pytest.raises(ERRORS, match=words):
        load(path)
    assert time.process_time() - began < seconds
    assert peak() - before < megabytes


def peak() -> float:
    """Memory at its peak in MB; 0 where the system counts in other units."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if sys.platform == "linux" else 0


FORMS = ("zip", "legacy", "nested", "as a key", "bare", "tar")
HOSTILE = [(name, form, "os.system") for name in LOADERS for form in FORMS]
HOSTILE += [("pulid_v1.bin", form, call) for form in FORMS for call in ("eval", "exec")]


@pytest.mark.parametrize(("name", "form", "call"), HOSTILE)
def test_no_pickle_is_executed(tmp_path, name, form, call):
    trap, path = tmp_path / "executed", tmp_path / name
    refused(path, hostile(form, call, trap), name, LOADERS[name])
    assert not trap.exists()
    if form == "bare":  # the trap works
        pickle.loads(path.read_bytes())
        assert trap.exists()


def test_a_torchscript_program_is_no_table(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "pulid_v1.bin")
    with pytest.raises(WrongWeightsError, match=r"pulid_v1\.bin is a TorchScript program"):
        load_adapter(tmp_path / "pulid_v1.bin")


# ---------------------------------------------------------------- bombs


def test_an_archive_that_unpacks_to_much_more(tmp_path, monkeypatch):
    """In small; the limit is half a gigabyte."""
    monkeypatch.setattr(sys.modules[read_state_dict.__module__], "HARMLESS", 1_000_000)
    plain = io.BytesIO(pickled({"a": torch.zeros(500_000)}))
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert (tmp_path / "x.bin").stat().st_size < 20_000
    with pytest.raises(WrongWeightsError, match=r"x\.bin is refused for safety: unpacked"):
        read_state_dict(tmp_path / "x.bin")


ODD = {
    "one number, repeated without end": lambda: torch.zeros(1).expand(HARMLESS // 4, 64),
    "meta": lambda: torch.zeros(2, device="meta"), "sparse": lambda: torch.eye(2).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_plain_numbers(tmp_path, kind):
    content = pickled({**v1_state(), "id_adapter.body.0.bias": ODD[kind]()})
    words = r"x\.bin is refused for safety: its tensors claim more data"
    refused(tmp_path / "x.bin", content, words, megabytes=200)


NUMBERED = {
    "v1 layer": (v1_state, "id_adapter_attn_layers.999999999.id_to_k.weight"),
    "v1 digits": (v1_state, f"id_adapter_attn_layers.{'9' * 5000}.id_to_k.weight"),
    "v1.1 depth": (v11_state, "id_adapter.layers.999999999.0.to_q.weight"),
    "v1.1 depth, digits": (v11_state, f"id_adapter.layers.{'9' * 5000}.0.to_q.weight"),
    "converted layer": (converted_state, "ip_adapter.999999999.to_k_ip.weight"),
    "flux module": (flux_state, "pulid_ca.999999999.to_q.weight"),
    "flux module, no digit": (flux_state, "pulid_ca.².to_q.weight"),
    "flux depth": (flux_state, "pulid_encoder.layers.999999999.0.to_q.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", NUMBERED)
def test_a_number_in_a_name_does_not_decide_how_long_it_takes(tmp_path, what):
    make, key = NUMBERED[what]
    content = as_safetensors({**make(), key: torch.zeros(4, 64)})
    refused(tmp_path / "x.safetensors", content, r"x\.safetensors", seconds=5, megabytes=200)


@pytest.mark.parametrize("change", [
    {"visual.blocks.999999999.attn.q_proj.weight": torch.zeros(4, 4)},
    {"visual.blocks.0.attn.q_proj.weight": torch.zeros(4, 4)},
    {"visual.patch_embed.proj.weight": torch.zeros(20_000, 3, 14, 14)},
], ids=["a block's number", "a block's width", "the width"])  # fmt: skip
def test_a_tower_is_no_larger_than_its_file(tmp_path, change):
    content, words = pickled({**tower_state(), **change}), r"eva\.pt is not the vision tower"
    refused(tmp_path / "eva.pt", content, words, load_vision_tower, megabytes=300)


# ---------------------------------------------------------------- lying heads of safetensors


def with_header(header: object, data: bytes = bytes(64), length: int | None = None) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def entry(start: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


SHAPES = [[2, [1]], [[1], 2], "abc", 5, None, {"a": 1}, [1e400], ["9" * 5000]]
LYING = {
    "overlapping": with_header({"cond": entry(0, 16), "uncond": entry(8, 24)}),
    "negative": with_header({"cond": entry(-16, 0)}),
    "backwards": with_header({"cond": entry(16, 0)}),
    "beyond the end": with_header({"cond": entry(0, 10**12, (25 * 10**10,))}),
    "shape of another size": with_header({"cond": entry(0, 64, (10**9,))}),
    "shape that overflows": with_header({"cond": entry(0, 64, (2**62, 2**62))}),
    "negative shape": with_header({"cond": entry(0, 64, (-16,))}),
    "unknown type": with_header({"cond": entry(0, 64, (16,), "X7")}),
    "header of 2**63 bytes": with_header({}, length=2**63),
    "header of 99 MB": with_header({"cond": entry(0, 64)}, length=99_000_000),
    "header of 200 MB": with_header({"cond": entry(0, 64)}, length=200_000_000),
    "no JSON": with_header(b"{this is no json"), "a list": with_header(b"[1, 2]"), "a number": with_header(b"12345678"),
    "null": with_header(b"null    "), "deep": with_header(b'{"a":' * 100_000), "brackets": with_header(b"[" * 100_000),
    "not UTF-8": with_header(b'{"\xff\xfe": 1}'), "entry of a number": with_header({"cond": 5}),
    "digits": with_header(b'{"cond":' + b"9" * 10_000 + b"}"),
    "metadata of numbers": with_header({"__metadata__": {"format": 1}, "cond": entry(0, 16)}),
    **{f"shape {shape}": with_header({"x.attn2.to_k.weight": {**entry(0, 16), "shape": shape}}) for shape in SHAPES},
}  # fmt: skip


@pytest.mark.parametrize("what", LYING)
def test_a_lying_head_is_refused_by_every_reader(tmp_path, what):
    path = tmp_path / "pulid" / "pulid_v1.1.safetensors"
    (tmp_path / "pulid" / "identities").mkdir(parents=True)
    path.write_bytes(LYING[what])
    before = peak()
    assert checkpoint_family(path) == ""
    for load in (load_adapter, load_vision_tower, RetinaFaceLandmarker, Identity.load):
        with pytest.raises(ERRORS, match=r"pulid_v1\.1\.safetensors"):
            load(path)
    (tmp_path / "pulid" / "identities" / "x.safetensors").write_bytes(LYING[what])
    library = Library(lambda: Settings(tmp_path))
    assert library.identities.listed() == []
    assert [file.name for file in library.adapters.listed()] in ([path.name], [])  # the list is there all the same
    assert peak() - before < 300


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize(
    ("layout", "value"),
    [*((layout, float("nan")) for layout in STATES), ("v1.1", float("inf")), ("flux", -float("inf"))],
)
def test_weights_that_are_no_numbers(tmp_path, layout, value):
    for key in (min(STATES[layout]()), max(STATES[layout]())):  # of the encoder, of a layer
        state = {name: tensor.clone() for name, tensor in STATES[layout]().items()}
        state[key].view(-1)[-1] = value
        words = rf"^x\.safetensors is corrupt: {key} contains NaN"
        refused(tmp_path / "x.safetensors", as_safetensors(state), words)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number(tmp_path, dtype):
    key = "id_adapter_attn_layers.3.id_to_k.weight"
    state = {**v1_state(), key: v1_state()[key].to(dtype)}
    refused(tmp_path / "x.bin", pickled(state), rf"^x\.bin: {key} holds {dtype} values")


def test_large_but_honest_weights_are_taken(tmp_path):
    state = {key: torch.full_like(value, 60_000.0).half() for key, value in v1_state().items()}
    (tmp_path / "x.safetensors").write_bytes(as_safetensors(state))
    assert len(load_adapter(tmp_path / "x.safetensors").sites) == SITES


def test_a_tower_with_weights_that_are_no_numbers(tmp_path):
    broken = tower_state()
    broken["visual.head.weight"].view(-1)[0] = float("nan")
    refused(tmp_path / "eva.pt", pickled(broken), r"eva\.pt (is corrupt|is not the vision tower)", load_vision_tower)


def test_an_embedding_that_is_no_number_makes_no_identity(tmp_path):
    """An ONNX file's weights are not ours to look at; what comes out of it is."""
    (tmp_path / "v1.bin").write_bytes(pickled(v1_state()))
    adapter = load_adapter(tmp_path / "v1.bin")
    photo = PHOTOS[0]
    no_embedding = FaceFeatures(photo.id_cond * float("nan"), photo.vit_hidden)
    no_tower = FaceFeatures(photo.id_cond, (photo.vit_hidden[0] * float("inf"), *photo.vit_hidden[1:]))
    for broken in (no_embedding, no_tower):
        with pytest.raises(WrongWeightsError, match="its file is damaged.* Delete it and download it again"):
            encode_identity([broken], adapter)


# ---------------------------------------------------------------- what lies there


def test_a_folder_under_the_files_name(tmp_path):
    for name, load in LOADERS.items():
        (tmp_path / name).mkdir()
        with pytest.raises((MissingWeightsError, IdentityMismatchError), match=name):
            load(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    for name, load in LOADERS.items():
        (tmp_path / name).write_bytes(b"x" * 100)
        (tmp_path / name).chmod(0)
        with pytest.raises(ERRORS, match=name):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (errno.EACCES, "Permission denied). Change its permissions"),
        (errno.ESTALE, "Check the drive"),
        (errno.EIO, "try"),
    ],
)
def test_a_refusal_to_open_is_told(tmp_path, monkeypatch, reason, words):
    """As above, for whoever runs the tests as root; and that of a network drive, which is not damage."""
    identity = Identity(torch.ones(1, 4, 8)).save(tmp_path / "anna.safetensors")
    (tmp_path / "pulid_v1.bin").write_bytes(pickled(v1_state()))
    (tmp_path / "detector.onnx").write_bytes(b"onnx")
    monkeypatch.setattr(Path, "open", Mock(side_effect=OSError(reason, os.strerror(reason))))
    files = ("pulid_v1.bin", load_adapter), ("pulid_v1.bin", fingerprint), (identity.name, Identity.load)
    for path, read in (*files, ("detector.onnx", InsightFaceDetector)):
        with pytest.raises(
            (WrongWeightsError, IdentityMismatchError), match=rf"^{path} in .* cannot be .*{re.escape(words)}"
        ):
            read(tmp_path / path)


# ---------------------------------------------------------------- names


@pytest.fixture
def library(tmp_path) -> Library:
    folder = tmp_path / "models" / "pulid" / "identities"
    folder.mkdir(parents=True)
    an_identity().save(tmp_path / "secret.safetensors")
    an_identity().save(folder / "anna.safetensors")
    (tmp_path / "secret.bin").write_bytes(pickled(v1_state()))
    return Library(lambda: Settings(tmp_path / "models"))


def outside(tmp_path: Path, name: str) -> list[str]:
    to = [
        "../../../", "..\\..\\..\\", f"{tmp_path}/", "identities/../../../../", "file://" + f"{tmp_path}/", "./../../",
    ]  # fmt: skip
    return [f"{way}{name}{suffix}" for way in to for suffix in ("", ".safetensors", ".bin")]


def test_a_name_never_leads_out_of_the_models_folder(library, tmp_path):
    for name in [*outside(tmp_path, "secret"), "", ".", "..", "/", "~", "http://localhost:1/x", "a" * 255, "anna\0"]:
        assert library.identities.find(name) is None
        with pytest.raises(IdentityMismatchError, match="is not in .*(Saved identities|Did you mean)"):
            library.identities.load(name)
        with pytest.raises(MissingWeightsError, match="is not in .*PuLID files there"):
            library.adapters.load(name, "sdxl")
    assert library.identities.load("anna").short_hash == an_identity().short_hash


@pytest.mark.parametrize(
    "name", ["Berta", "Zoë 李", "हिन्दी", "ภาษาไทย", "O'Neill (2)", "x" * 80, "李" * 66, "console", "e\u0301", "1"]
)
def test_names_of_every_language(library, name):
    saved = library.identities.save(name, an_identity(cond=an_identity().cond + 1))
    assert library.identities.load(saved.name).cond is not None
    assert saved.path.parent == library.identities.folder
    with pytest.raises(SettingError, match="already saved"):
        library.identities.save(name, an_identity())


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("thumbnail", [
    torch.zeros(8, 8, 3), torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(8, 8, 4, dtype=torch.uint8),
    torch.zeros(0, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.int64),
])  # fmt: skip
def test_a_thumbnail_that_is_no_picture_is_left_out(tmp_path, thumbnail):
    tensors = {"cond": an_identity().cond, "thumbnail": thumbnail}
    save_file(tensors, tmp_path / "x.safetensors", {"format": FILE_FORMAT, "version": "1"})
    assert Identity.load(tmp_path / "x.safetensors").thumbnail is None
    assert an_identity().thumbnail is not None


def test_a_file_too_large_for_an_identity_is_not_read(tmp_path):
    """A checkpoint that was put among the identities would be read at every look at the list."""
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(IdentityMismatchError, match=r"x\.safetensors is not a saved identity: it is too large"):
        Identity.load(tmp_path / "x.safetensors")
