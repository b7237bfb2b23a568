"""Right files, damaged at random: the readers return something sound or one of our own errors, soon, and run nothing.

A few seconds in all; PULID_FUZZ=60 makes 60 times as many. The damage is drawn from fixed seeds, so that what was found
is found again; a failure leaves the file that made it in the test's folder.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save

from lib_pulid import images
from lib_pulid.errors import PulidError
from lib_pulid.face_models import ArcFaceRecogniser, InsightFaceDetector
from lib_pulid.files.checkpoint_header import checkpoint_family, read_header
from lib_pulid.identity import Identity
from lib_pulid.images import load_image
from lib_pulid.masks import load_mask
from lib_pulid.stores.folder import Settings
from lib_pulid.vision import load_vision_tower
from lib_pulid.webui.library import Library
from lib_pulid.weights import load_adapter
from tests.face_standins import write_arcface, write_scrfd
from tests.small_models import pulid_files
from tests.small_models.images import encoded
from tests.test_bad_files import hostile, peak
from tests.test_checkpoint_header import gguf
from tests.test_identity import an_identity
from tests.test_weights import pickled, tower_state

pytestmark = pytest.mark.filterwarnings("ignore")
TIMES = int(os.environ.get("PULID_FUZZ", "1"))
SLOWEST = 10.0  # seconds of computing for one file
MOST_MEMORY = 400  # MB more than before, at the peak; Linux
NUMBERS = [struct.pack(f, n) for f in ("<I", ">I", "<Q", ">H") for n in (0, 1, 127, 128, 255, 65535)]
NUMBERS += [b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\xff" * 8, b"\0" * 16, b"{", b"[", b"\x80", b"(", b"R", b"c", b"\n"]


def damaged(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Some of what happens to files: bits flip, parts are lost, doubled, moved, mixed with another file's."""
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        # heads matter more than pixels and weights
        end = chance.choice((len(result), min(len(result), 600), min(len(result), 60))) or 1
        at, length = chance.randrange(end), chance.choice((1, 2, 4, 8, 100))
        kind = chance.randrange(8)
        if kind <= 2 and at < len(result):
            result[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            number = chance.choice(NUMBERS)
            result[at : at + len(number)] = number
        elif kind == 4:
            del result[at : at + length]
        elif kind == 5:
            result[at:at] = result[at : at + length] * chance.choice((1, 2, 50))
        elif kind == 6:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            result[at : at + length] = other[start : start + length]
        else:
            del result[max(at, len(result) - chance.choice((1, 8, 100, len(result)))) :]
    return bytes(result)


def fuzz(corpus: list[tuple[str, bytes]], read: Callable[[Path], None], folder: Path, count: int, seed: int) -> int:
    """Reads a number of damaged files. Returns how many of them were refused."""
    chance, plain = random.Random(seed), [data for _, data in corpus]
    for name, data in corpus:
        (folder / name).write_bytes(data)
        read(folder / name)  # undamaged it is read
    refused, before = 0, peak()
    for _ in range(count * TIMES):
        name, data = chance.choice(corpus)
        path = folder / name
        path.write_bytes(damaged(data, plain, chance))
        began = time.process_time()
        try:
            read(path)
        except PulidError as error:
            refused += 1
            assert str(error) and len(str(error)) < 2000
        assert time.process_time() - began < SLOWEST, name
        assert peak() - before < MOST_MEMORY, name
    return refused


def pictures() -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(3)
    colour = Image.fromarray(rng.integers(0, 256, (24, 31, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("JPEG", colour, {"exif": exif}), ("JPEG", colour, {"progressive": True}), ("JPEG", colour.convert("CMYK"), {}),
        ("PNG", colour, {"exif": exif}), ("PNG", colour.convert("P"), {"transparency": 3}),
        ("PNG", colour.convert("LA"), {}), ("PNG", colour.convert("1"), {}),
        ("PNG", Image.fromarray(rng.integers(0, 65536, (9, 9), dtype=np.uint16)), {}),
        ("PNG", colour, {"save_all": True, "append_images": [colour.rotate(9)]}),
        ("GIF", colour, {"save_all": True, "append_images": [colour.rotate(9)]}),
        ("WEBP", colour, {}), ("WEBP", colour.convert("RGBA"), {"lossless": True}),
        ("WEBP", colour, {"save_all": True, "append_images": [colour.rotate(9)]}),
        ("BMP", colour, {}), ("BMP", colour.convert("P"), {}), ("TIFF", colour, {}),
        ("TIFF", colour, {"compression": "tiff_lzw"}), ("TIFF", colour, {"compression": "jpeg"}),
        ("TIFF", colour.convert("F").point(lambda x: x / 255), {}), ("JPEG2000", colour, {}),
    ]  # fmt: skip
    kinds += [("AVIF", colour, {})] if features.check("avif") else []
    return [(f"{n}.{kind.lower()}", encoded(image, kind, **options)) for n, (kind, image, options) in enumerate(kinds)]


def test_damaged_images(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 2_000_000)  # so that memory and time are those of small images

    def read(path: Path) -> None:
        for image in (load_image(path.read_bytes(), "photo"), load_image(path)):
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            assert 0 < image.shape[0] * image.shape[1] <= images.MAX_PIXELS
        region = load_mask(path)
        assert region.min() >= 0 and region.max() <= 1

    assert fuzz(pictures(), read, tmp_path, 1000, seed=1) > 500


WEIGHTS = pulid_files((8, 8), 24, 2)


def read_adapter(path: Path) -> None:
    adapter = load_adapter(path)
    numbers = [*adapter.encoder.parameters(), *(t for site in adapter.sites for t in vars(site).values())]
    assert all(torch.isfinite(tensor).all() for tensor in numbers)


def test_damaged_safetensors(tmp_path):
    folder = tmp_path / "pulid"
    folder.mkdir()
    library = Library(lambda: Settings(tmp_path))

    def read(path: Path) -> None:
        library.adapters.listed()
        read_adapter(path)

    corpus = [(f"{name}.safetensors", save(state)) for name, state in WEIGHTS.items()]
    assert fuzz(corpus, read, folder, 60, seed=2) > 30


def test_damaged_pickles(tmp_path):
    trap, corpus = tmp_path / "executed", []
    for name, state in {**WEIGHTS, "eva": tower_state()}.items():
        for legacy in (False, True):
            corpus.append((f"{name}{legacy}.bin", pickled(state, _use_new_zipfile_serialization=not legacy)))
    others = [hostile(form, call, trap) for form in ("zip", "legacy", "bare", "tar") for call in ("os.system", "exec")]

    def read(path: Path) -> None:
        load_vision_tower(path) if path.name.startswith("eva") else read_adapter(path)

    def read_hostile(path: Path) -> None:
        if path.read_bytes() in others:
            return
        read_adapter(path)

    assert fuzz(corpus, read, tmp_path, 20, seed=3) > 10
    bad = [(f"bad{number}.bin", data) for number, data in enumerate(others)]
    assert fuzz(bad, read_hostile, tmp_path, 100, seed=4) > 50
    assert not trap.exists()


def test_damaged_identities(tmp_path):
    (tmp_path / "pulid" / "identities").mkdir(parents=True)
    library = Library(lambda: Settings(tmp_path))
    data = an_identity().save(tmp_path / "x").read_bytes()

    def read(path: Path) -> None:
        library.identities.listed()
        identity = Identity.load(path)
        assert identity.cond.shape[0] == 1 and torch.isfinite(identity.cond).all()
        assert identity.thumbnail is None or identity.thumbnail.shape[2] == 3

    assert fuzz([("x.safetensors", data)], read, tmp_path / "pulid" / "identities", 300, seed=5) > 150


def test_damaged_onnx(tmp_path):
    pytest.importorskip("insightface")
    corpus = []
    for name, write in (("scrfd.onnx", write_scrfd), ("arcface.onnx", write_arcface)):
        write(tmp_path / name)
        corpus.append((name, (tmp_path / name).read_bytes()))

    def read(path: Path) -> None:
        (InsightFaceDetector if path.name.startswith("scrfd") else ArcFaceRecogniser)(path)

    assert fuzz(corpus, read, tmp_path, 100, seed=6) > 50


DEEP_LIST = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
DEEP_LIST += struct.pack("<IQ", 9, 1) * 100_000


def test_damaged_heads_of_checkpoints(tmp_path):
    whole = gguf(tmp_path / "x.gguf", {"double_blocks.0.a": (32, 64), "b": (32, 64)})
    assert set(read_header(whole)) == {"double_blocks.0.a", "b"}
    for data in (DEEP_LIST, DEEP_LIST[:-8] + b"\xff" * 8):
        (tmp_path / "deep.gguf").write_bytes(data)
        assert read_header(tmp_path / "deep.gguf") == {}

    def read(path: Path) -> None:
        shapes = read_header(path)
        assert all(isinstance(side, int) for shape in shapes.values() for side in shape)
        assert checkpoint_family(path) in ("", "sdxl", "flux")

    corpus = [("x.gguf", whole.read_bytes()), ("x.safetensors", save({"a.attn2.to_k.weight": torch.zeros(2, 2048)}))]
    fuzz(corpus, read, tmp_path, 300, seed=7)
