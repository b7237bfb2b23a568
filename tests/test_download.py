"""Downloads from a server that breaks off, lies, stalls and refuses; and what the catalog knows of files on the disk.

Needs requests, huggingface_hub and pytest only (`--noconftest` where there is no torch), to be run with the versions
that the hosts pin.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import constants

from lib_pulid.disk import ProgressCallback, no_progress
from lib_pulid.errors import DownloadError, MissingWeightsError, WrongWeightsError
from lib_pulid.files import catalog, download, places
from lib_pulid.files.catalog import WeightFile
from lib_pulid.files.download import Download
from tests import file_server
from tests.file_server import FOREVER, chunked, cut, held, length, other_bytes, serving, slowly, status, until

ROOT = Path(__file__).parents[1]
DATA = random.Random(0).randbytes(500_000)
SUM = hashlib.sha256(DATA).hexdigest()
ATTEMPTS = 3


@pytest.fixture(autouse=True)
def _nobody_elses_files(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "TORCH_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(places, "_package", lambda name: [])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name, value in (("ATTEMPTS", ATTEMPTS), ("FIRST_WAIT", 0.02), ("LONGEST_WAIT", 3)):
        monkeypatch.setattr(download, name, value)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)  # so that a busy machine does not count as a stall


@pytest.fixture
def server():
    with serving({"a.bin": DATA}) as made:
        yield made


@pytest.fixture
def wanted(server, tmp_path) -> Download:
    return Download(server.url("a.bin"), tmp_path / "models" / "a.bin", len(DATA), SUM)


def get(wanted: Download, tell=lambda done, total, note: None, **headers: str) -> None:
    download.fetch(wanted, headers, tell)


def files(wanted: Download) -> list[str]:
    return sorted(path.name for path in wanted.target.parent.iterdir())


def fails(wanted: Download, words: str, **how: Any) -> None:
    """With an error, and nothing is kept."""
    with pytest.raises(DownloadError, match=words):
        get(wanted, **how)
    assert files(wanted) == []


def is_whole(wanted: Download) -> bool:
    return wanted.target.read_bytes() == DATA and files(wanted) == ["a.bin"]


# ---------------------------------------------------------------- one file


def test_whole(server, wanted):
    told = []
    get(wanted, lambda done, total, note: told.append((done, total, note)))
    assert is_whole(wanted)
    amounts = [done for done, total, note in told if not note]
    assert amounts == sorted(amounts)
    assert (amounts[0], amounts[-1]) == (0, len(DATA))
    assert {total for _, total, _ in told} == {len(DATA)}
    assert told[-1][2] == "verifying"
    assert len(server.asked) == 1


def test_a_connection_that_breaks_off_goes_on_where_it_ended(server, wanted):
    server.misbehave(cut(200_000), cut(100_000))
    get(wanted)
    assert is_whole(wanted)
    ranges = [asked.range for asked in server.asked]
    starts = [int(text.removeprefix("bytes=").rstrip("-") or 0) for text in ranges]
    assert ranges[0] == ""
    assert 0 < starts[1] < starts[2] < len(DATA)
    assert server.sent < len(DATA) + 3 * 65536  # at most the block under way came twice


def test_one_that_always_breaks_off_is_given_up_and_kept(server, wanted):
    server.misbehave(cut(200_000), *[cut(0)] * 9)
    with pytest.raises(DownloadError, match=r"(of 500,000 bytes|connection failed).*; the 1\d\d kB received are kept"):
        get(wanted)
    assert files(wanted) == ["a.bin.part"]
    assert len(server.asked) == 1 + ATTEMPTS - 1
    server.misbehave()
    get(wanted)
    assert is_whole(wanted)
    assert server.asked[-1].range == server.asked[-2].range != ""


def test_stopped_by_the_caller_and_taken_up_again(server, wanted):
    def tell(done: int, total: int, note: str) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(wanted, tell)
    assert files(wanted) == ["a.bin.part"]
    there = wanted.part.stat().st_size
    get(wanted)
    assert is_whole(wanted)
    assert server.asked[-1].range == f"bytes={there}-"


@pytest.mark.parametrize(
    "how",
    [(cut(200_000), file_server.no_ranges), (cut(200_000), file_server.from_another_byte), (chunked(200_000),)],
    ids=["no ranges", "from another byte", "ends without having said how much it is"],
)
def test_a_server_that_does_not_go_on_where_it_should(server, wanted, how):
    server.misbehave(*how)
    get(wanted)
    assert is_whole(wanted)
    assert server.asked[1].range.startswith("bytes=")


@pytest.mark.parametrize(
    ("rest", "size_known", "ranges"),
    [
        (DATA, True, []), (DATA[:-1] + b"?", True, [""]), (b"x" * 1000, True, ["bytes=1000-", ""]),
        (DATA + b"more", True, [""]), (DATA * 2, True, [""]), (DATA * 2, False, ["bytes=1000000-", ""]),
    ],
    ids=["complete", "complete, damaged", "damaged", "longer", "much longer", "much longer, size not known"],
)  # fmt: skip
def test_the_rest_of_an_earlier_run(server, wanted, rest, size_known, ranges):
    """One that is complete is only checked."""
    wanted.part.parent.mkdir()
    wanted.part.write_bytes(rest)
    get(wanted if size_known else replace(wanted, size=0))
    assert is_whole(wanted)
    assert [asked.range for asked in server.asked] == ranges


def test_what_is_not_the_file_or_cannot_be_checked_is_not_taken(server, wanted):
    server.misbehave(other_bytes, other_bytes)
    fails(wanted, f"what was received is not the file.* instead of {SUM[:8]}")
    server.misbehave(chunked(1000), length(1000, html=True))
    unchecked = replace(wanted, size=0, sha256="")
    fails(unchecked, "does not say how large")
    fails(unchecked, r"the server sends a web page \(a login or an error\?\)")


def test_a_stall_is_noticed_and_overcome(server, wanted, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(download, "ATTEMPTS", 50)
    server.misbehave(cut(200_000, FOREVER))
    notes = set()
    get(wanted, lambda done, total, note: notes.add(note))
    assert is_whole(wanted)
    assert any("connection failed" in note and "next attempt in" in note for note in notes)


def test_a_server_that_never_answers_and_none(wanted, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        wanted = replace(wanted, url=f"http://127.0.0.1:{silent.getsockname()[1]}/a.bin")
        fails(wanted, "connection failed .*time")
    fails(wanted, "connection failed .*(refused|connect)")


@pytest.mark.parametrize(("how", "words"), [
    (length(len(DATA) + 1), "another file there, of 500,001 bytes instead of 500,000"),
    (length(1000), "another file there, of 1,000 bytes instead of 500,000"),
    (length(1000, html=True), "a web page: a login or an error"),
    (chunked(len(DATA) + 1), "sends more than the 500,000 bytes"),
    (chunked(len(DATA) * 2), "sends more than the 500,000 bytes"),
    (status(404), "answers 404 Not Found: it has no such file"), (status(410), "answers 410 Gone: it has no such file"),
    (status(403), "answers 403 Forbidden: the file is gated or private.* HF_TOKEN"),
    (status(401, X_Error_Message="Access to it is restricted"), "answers 401 Access to it is restricted: "),
    (status(451), "answers 451"), (status(429, Retry_After="3600"), "asks to wait 3600 seconds"),
    (status(503, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"), r"asks to wait \d{5,} seconds"),
])  # fmt: skip
def test_a_refusal_or_a_lie_about_the_size_is_final(server, wanted, how, words):
    server.misbehave(*[how] * 9)
    fails(wanted, words)
    assert len(server.asked) == 1


@pytest.mark.parametrize("code", [429, 408, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server, wanted, code):
    server.misbehave(status(code), status(code))
    get(wanted)
    assert is_whole(wanted)
    assert len(server.asked) == 3
    server.misbehave(*[status(code)] * 9)
    wanted.target.unlink()
    with pytest.raises(DownloadError, match=str(code)):
        get(wanted)
    assert len(server.asked) == 3 + ATTEMPTS


def test_it_waits_as_long_as_the_server_asks(server, wanted):
    server.misbehave(status(429, Retry_After="1"))
    began = time.monotonic()
    notes = set()
    get(wanted, lambda done, total, note: notes.add(note))
    assert time.monotonic() - began >= 1.0
    assert "429 Too Many Requests; next attempt in 1 s" in notes
    assert is_whole(wanted)


def test_a_token_that_has_expired_is_left_out(server, wanted):
    server.misbehave(status(401))
    get(wanted, Authorization="Bearer old")
    assert [asked.authorization for asked in server.asked] == ["Bearer old", ""]
    assert is_whole(wanted)


# ---------------------------------------------------------------- the disk


def test_a_disk_that_is_too_small(server, wanted, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 499_999, 499_999))
    fails(wanted, r"not enough disk space: 500 kB free in .*models, 500 kB needed")
    wanted.part.write_bytes(DATA[:200])  # what is there already needs no room
    get(wanted)
    assert is_whole(wanted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_becomes_full(server, wanted):
    wanted.part.parent.mkdir()
    wanted.part.symlink_to("/dev/full")  # really ENOSPC
    fails(wanted, r"the disk is full \(.*models\)")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("checksum", [SUM, ""])
def test_the_last_block_does_not_fit(server, wanted, checksum):
    """The system writes as much of it as it can."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) - 100, before[1]))
    try:
        with pytest.raises(DownloadError, match="cannot be written"):
            get(replace(wanted, sha256=checksum))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(wanted) == ["a.bin.part"]
    get(wanted)
    assert is_whole(wanted)


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_network_drive_that_cannot_do_everything(server, wanted, monkeypatch, reason):
    unsupported = Mock(side_effect=OSError(reason, os.strerror(reason)))
    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    monkeypatch.setattr(os, "fsync", unsupported)
    monkeypatch.setattr(shutil, "disk_usage", unsupported)
    get(wanted)
    assert is_whole(wanted)


def test_a_drive_that_does_not_know_its_size(server, wanted, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(0, 0, 0))
    get(wanted)
    assert is_whole(wanted)


@pytest.mark.parametrize(("name", "value", "words"), [
    ("REQUESTS_CA_BUNDLE", "/gone/ca.pem", "/gone/ca.pem"), ("https_proxy", "http://a..b:80", "label"),
    ("TOKEN", "ключ", "latin-1"),
])  # fmt: skip
def test_a_wrong_setting_of_the_network_is_named(wanted, monkeypatch, name, value, words):
    for one in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, value)
    url = wanted.url if name == "TOKEN" else "https://127.0.0.1:1/a.bin"
    fails(replace(wanted, url=url), rf"the connection failed \(.*{re.escape(words)}", Authorization=f"Bearer {value}")


def test_a_folder_that_cannot_be_written(server, wanted):
    wanted.target.parent.write_text("not a folder")
    with pytest.raises(DownloadError, match=r"models cannot be written"):
        get(wanted)
    assert server.asked == []


def test_a_wrong_file_is_set_aside_not_lost(server, wanted):
    """Nor is one that was set aside before."""
    wanted.target.parent.mkdir()
    for mine in (b"1", b"22", b"333"):
        wanted.target.write_bytes(mine)
        server.misbehave(other_bytes)
        with pytest.raises(DownloadError):
            get(wanted)
        assert wanted.target.read_bytes() == mine
        get(wanted)
        assert wanted.target.read_bytes() == DATA
    aside = [wanted.target.with_name(f"a.bin.other{number}").read_bytes() for number in ("", 2, 3)]
    assert aside == [b"1", b"22", b"333"]


# ---------------------------------------------------------------- several at once, and killed


def program(wanted: Download, code: str = "") -> str:
    return textwrap.dedent(f"""
        from pathlib import Path
        from lib_pulid.files.download import *
        {code}
        fetch(Download({wanted.url!r}, Path({str(wanted.target)!r}), {wanted.size}, {wanted.sha256!r}))
        """)


def run(code: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, **variables}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def ends(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=FOREVER)
    return process.returncode, said


def test_two_processes_at_once_download_once(server, wanted):
    server.misbehave(slowly)
    both = [run(program(wanted)) for _ in range(2)]
    assert [ends(process)[0] for process in both] == [0, 0]
    assert is_whole(wanted)
    assert server.sent == len(DATA)


def test_threads_at_once_download_once(server, wanted):
    others_wait = threading.Event()
    server.misbehave(held(others_wait))
    notes: set[str] = set()
    threads = [threading.Thread(target=get, args=(wanted, lambda d, t, note: notes.add(note))) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: "waiting: another process is downloading it" in notes)
    others_wait.set()
    for thread in threads:
        thread.join(FOREVER)
    assert is_whole(wanted)
    assert server.sent == len(DATA)


def test_killed_in_the_middle(server, wanted):
    server.misbehave(cut(300_000, FOREVER))
    process = run(program(wanted))
    until(lambda: wanted.part.is_file() and wanted.part.stat().st_size > 200_000)
    process.send_signal(signal.SIGKILL)
    assert ends(process)[0] == -signal.SIGKILL
    assert not wanted.target.exists()
    there = wanted.part.stat().st_size
    get(wanted)  # the lock ended with the process
    assert is_whole(wanted)
    assert server.asked[-1].range == f"bytes={there}-"


# ---------------------------------------------------------------- huggingface_hub's variables


def hub_file(**facts: object) -> WeightFile:
    return WeightFile("a.bin", "pulid", "a test", "owner/repo", "sdxl", **facts)  # type: ignore[arg-type]


def from_hub(tmp_path: Path, file: WeightFile, **variables: str) -> tuple[int, str]:
    code = f"""
        from pathlib import Path
        from lib_pulid.files import download
        from lib_pulid.files.catalog import WeightFile, download as get
        download.FIRST_WAIT, download.ATTEMPTS = 0.02, 2
        get({file!r}, Path({str(tmp_path)!r}))
        """
    return ends(run(textwrap.dedent(code), **variables))


@pytest.mark.parametrize("known", [True, False])
def test_a_mirror_of_the_hub_with_a_token(server, tmp_path, known):
    facts = {"size": len(DATA), "sha256": SUM} if known else {}
    server.misbehave(cut(200_000))
    variables = {"HF_ENDPOINT": server.hub, "HF_TOKEN": "hf_secret"}
    assert from_hub(tmp_path, hub_file(**facts, revision="abc"), **variables) == (0, "")
    assert (tmp_path / "pulid" / "a.bin").read_bytes() == DATA
    first, second = (asked for asked in server.asked if "/resolve/" in asked.path)
    assert first.path == "/owner/repo/resolve/abc/a.bin"
    assert first.authorization == "Bearer hf_secret"
    assert second.range.startswith("bytes=")
    assert {asked.authorization for asked in server.of_files} == {""}  # another host


@pytest.mark.parametrize(("facts", "words"), [
    ({}, "what was received is not the file"),
    ({"size": len(DATA), "sha256": "0" * 64},
     f"another file there, with the checksum {SUM[:8]}... instead of 00000000..."),
], ids=["none is known", "another one"])  # fmt: skip
def test_the_sum_that_the_hub_tells_counts(server, tmp_path, facts, words):
    """Another file is not even begun."""
    server.misbehave(other_bytes, other_bytes)
    done, said = from_hub(tmp_path, hub_file(**facts), HF_ENDPOINT=server.hub)
    assert done == 1 and words in said
    assert len(server.of_files) == 1
    assert list((tmp_path / "pulid").iterdir()) == []


def test_offline_nothing_is_asked(server, tmp_path):
    done, said = from_hub(tmp_path, hub_file(), HF_ENDPOINT=server.hub, HF_HUB_OFFLINE="1")
    assert done == 1
    assert "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set" in said
    assert f"a.bin (a test, size not known) -> {tmp_path / 'pulid'}   from https://huggingface.co/owner/repo" in said
    assert server.asked == []


def test_a_proxy(server, tmp_path):
    variables = {"HF_ENDPOINT": "http://hub.invalid", "NO_PROXY": "", "no_proxy": "", "http_proxy": server.hub}
    done, said = from_hub(tmp_path, hub_file(), **variables)
    assert "http://hub.invalid/owner/repo/resolve/main/a.bin" in [asked.path for asked in server.asked]
    assert (done, said) == (0, "")


# ---------------------------------------------------------------- the catalog


def test_every_entry_is_complete():
    for file in catalog.CATALOG:
        assert file.purpose
        assert file.licence
        assert file.restricted == ("non-commercial" in file.licence)
        assert file.url.startswith("https://")
        assert file.url.endswith(f"/{file.remote or file.name}")
        assert re.fullmatch("([0-9a-f]{8,64})?", file.sha256)
        assert file.group in (*catalog.FAMILIES, "encoders", "methods")
    encoders = catalog.in_group("encoders")
    assert all(download.SHA256.fullmatch(file.sha256) for file in encoders)
    assert {file.role for file in encoders} == {"tower", "detector", "recogniser", "landmarker", "parser"}
    assert len({file.role for file in encoders}) == len(encoders)
    assert len({file.name for file in catalog.CATALOG}) == len(catalog.CATALOG)


def put(path: Path, data: bytes = b"1234") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("name", "place"), [
    ("EVA02_CLIP_L_336_psz14_s6B.pt", "models/pulid"), ("EVA02_CLIP_L_336_psz14_s6B.pt", "models/pulid/pulid"),
    ("EVA02_CLIP_L_336_psz14_s6B.pt", "models/pulid/models--QuanSun--EVA-CLIP/snapshots/11afd202"),
    ("pulid_v1.1.safetensors", "models/pulid/für SDXL/🙂"), ("EVA02_CLIP_L_336_psz14_s6B.pt", "models/clip"),
    ("EVA02_CLIP_L_336_psz14_s6B.pt", "models"),
    ("EVA02_CLIP_L_336_psz14_s6B.pt", "home/models--QuanSun--EVA-CLIP/snapshots/11afd202"),
    ("EVA02_CLIP_L_336_psz14_s6B.pt", "home/hub/checkpoints"),
    ("glintr100.onnx", "models/insightface/models/antelopev2"),
    ("glintr100.onnx", "models/insightface/models/antelopev2/antelopev2"), ("glintr100.onnx", "models/antelopev2"),
    ("glintr100.onnx", "models/antelopev2/antelopev2"), ("scrfd_10g_bnkps.onnx", "home/.insightface/models/antelopev2"),
    ("detection_Resnet50_Final.pth", "models/GFPGAN"), ("detection_Resnet50_Final.pth", "models/facexlib/facexlib"),
    ("parsing_bisenet.pth", "home/hub/checkpoints"), ("ip-adapter_pulid_sdxl_fp16.safetensors", "models/ControlNet"),
    ("ip-adapter_pulid_sdxl_fp16.safetensors", "extensions/sd-webui-controlnet/models"),
])  # fmt: skip
def test_files_are_found_where_others_keep_them(tmp_path, name, place):
    file = catalog.named(name)
    assert catalog.status(file, tmp_path / "models").path is None
    path = put(tmp_path / place / name)
    assert catalog.status(file, tmp_path / "models").path == path


@pytest.fixture
def one(monkeypatch, server) -> WeightFile:
    """An encoder file, the only one of its catalog."""
    file = WeightFile(
        "a.bin", "insightface/models/antelopev2", "face recognizer", server.url("a.bin"), "encoders", "research only",
        restricted=True, size=len(DATA), sha256=SUM, role="recogniser", others=((7, "somebody else's"),),
    )  # fmt: skip
    monkeypatch.setattr(catalog, "CATALOG", (file,))
    return file


def test_the_right_file_goes_before_a_wrong_one(one, tmp_path):
    wrong = put(tmp_path / one.folder / "a.bin")
    assert catalog.status(one, tmp_path).path == wrong
    right = put(tmp_path / "antelopev2" / "a.bin", DATA)
    assert catalog.status(one, tmp_path).path == right


def test_what_is_wrong_with_a_file(one, tmp_path):
    path = tmp_path / "a.bin"

    def problem(content: bytes, file: WeightFile = one, verify: ProgressCallback | None = None) -> str:
        put(path, content)
        return catalog.status(file, tmp_path, verify).problem

    assert problem(DATA) == problem(DATA, verify=no_progress) == ""
    assert problem(DATA[:-1]) == f"{path} has 499,999 bytes, not 500,000"
    assert problem(b"1234567") == f"{path} is somebody else's, not a.bin"
    damaged = DATA[:-1] + b"?"  # as large as it should be
    assert problem(damaged) == ""
    assert problem(damaged, verify=no_progress).startswith(f"{path} is damaged: its checksum is ")
    assert problem(damaged, replace(one, sha256="", size=0), no_progress) == ""


def test_another_recogniser_under_the_name_is_refused(one, tmp_path):
    with pytest.raises(MissingWeightsError, match=r"a\.bin \(face recognizer, 500 kB\) -> .*antelopev2   from http"):
        catalog.require_encoders(tmp_path)
    path = put(tmp_path / one.folder / "a.bin", b"1234567")
    with pytest.raises(WrongWeightsError, match="is somebody else's, not a.bin; .* the wrong person's face"):
        catalog.require_encoders(tmp_path)
    assert catalog.missing("", tmp_path) == (one,)
    assert catalog.download(one, tmp_path) == path
    assert catalog.require_encoders(tmp_path) == {"recogniser": path}
    assert path.with_name("a.bin.other").read_bytes() == b"1234567"


def test_buffalo_s_and_auraface_are_among_those_that_are_refused():
    sizes = {174_383_860: "buffalo_l", 13_616_099: "buffalo_s", 260_694_151: "AuraFace"}
    others = dict(catalog.named("glintr100.onnx").others)
    assert all(word in others[size] for size, word in sizes.items())
    assert "antelopev2's glintr100.onnx" in dict(catalog.named("w600k_r50.onnx").others)[260_665_334]


def test_damage_shows_when_a_file_is_read(one, tmp_path):
    def start_of_sum(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    path = put(tmp_path / "a.bin", DATA)
    assert catalog.fingerprint({"recogniser": path}, start_of_sum) == SUM[:16]
    put(path, DATA[:-1] + b"?")
    with pytest.raises(WrongWeightsError, match=r"is damaged.*Delete it and.*models download a\.bin"):
        catalog.fingerprint({"recogniser": path}, start_of_sum)
    assert catalog.missing("", tmp_path) == ()  # so the page offers no download, unless it is deleted
    path.unlink()
    assert catalog.missing("", tmp_path) == (one,)
    put(path, b"a stand-in")  # another size: what it is shows when it is loaded
    assert catalog.fingerprint({"recogniser": path}, start_of_sum) == start_of_sum(path)


def test_what_is_there_is_left_alone(one, server, tmp_path):
    path = put(tmp_path / one.folder / one.folder.rpartition("/")[2] / "a.bin", b"a file of mine")
    assert catalog.download(one, tmp_path) == path
    assert server.asked == []
    assert catalog.download(one, tmp_path, replace=True).read_bytes() == DATA
    assert path.read_bytes() == b"a file of mine"


def test_where_the_source_fails_the_origin_is_asked(one, server, tmp_path):
    file = replace(one, source=server.url("gone.bin"), origin=server.url("a.bin"))
    assert catalog.download(file, tmp_path).read_bytes() == DATA
    (tmp_path / one.folder / "a.bin").unlink()
    server.misbehave(other_bytes)
    with pytest.raises(DownloadError) as failed:
        catalog.download(file, tmp_path)
    for words in ("a.bin could not be downloaded", "404", str(tmp_path / one.folder), server.url("gone.bin")):
        assert words in str(failed.value)
    assert "; from its origin: what was received is not the file" in str(failed.value)
