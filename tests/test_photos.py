"""Photos -> Identity with the real insightface and facexlib on small files; what is remembered runs no encoder."""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lib_pulid import readings
from lib_pulid.disk import fingerprint
from lib_pulid.errors import ImageError, NoFaceError, SettingError
from lib_pulid.faces import Face, FaceChoice, read_face
from lib_pulid.identity import Identity, encode_identity
from lib_pulid.images import thumbnail
from lib_pulid.photos import Encoders, IdentityCache, identity_key, make_identity
from lib_pulid.readings import face_features
from lib_pulid.stores.folder import ModelsFolder, Settings
from lib_pulid.vision import load_vision_tower
from lib_pulid.weights import load_adapter
from tests.face_standins import blank, draw_face, remembering_models, write_face_files
from tests.small_models import TOKEN_WIDTH, pulid_files, write_tower
from tests.test_imports import printed

pytest.importorskip("insightface")
pytest.importorskip("facexlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("photos")


@pytest.fixture(scope="module")
def models(folder) -> Encoders:
    """They answer at once when they are asked the same again."""
    write_tower(folder / "eva.pt")
    tower, seen = load_vision_tower(folder / "eva.pt"), {}
    forward = tower.forward

    def remembered(images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        key = images.numpy().tobytes()
        if key not in seen:
            seen[key] = forward(images)
        return seen[key]

    tower.forward = remembered
    return Encoders(remembering_models(write_face_files(folder)), tower)


def write_adapter(path: Path, seed: int) -> Path:
    save_file(pulid_files((8,), 24, 1, seed)["v1"], path)
    return path


@pytest.fixture(scope="module")
def adapter(folder):
    return load_adapter(write_adapter(folder / "v1.safetensors", seed=1))


def two_faces(shade: int = 0) -> np.ndarray:
    """A large face on the left, a smaller one on the right."""
    image = blank(300, 220)
    draw_face(image, (100, 120), 90, shade=shade)
    draw_face(image, (235, 100), 60, shade=6)
    return image


def png(path: Path, image: np.ndarray) -> Path:
    Image.fromarray(image).save(path)
    return path


@pytest.fixture
def encoders(models) -> Mock:
    """Gives the models and counts how often it was asked."""
    return Mock(return_value=models)


@pytest.fixture
def make(adapter, encoders) -> Callable[..., Identity]:
    def _make(photos, cache, **changes):
        settings = {"adapter": adapter, "encoders": encoders, "encoders_id": "e", "cache": cache, **changes}
        return make_identity(photos, settings.pop("adapter"), **settings)

    return _make


# ---------------------------------------------------------------- the chain


def test_the_chain(make, models, adapter, tmp_path):
    """As the parts do it one by one, and it says what it read."""
    told: list[tuple[str, Face]] = []
    photos = [png(tmp_path / "main.png", two_faces()), two_faces(shade=3)]
    identity = make(photos, IdentityCache(), on_face=lambda name, face: told.append((name, face)))
    faces = [read_face(two_faces(shade), models.faces) for shade in (0, 3)]
    expected = encode_identity(face_features(faces, models.tower), adapter)
    assert torch.equal(identity.cond, expected.cond)
    assert torch.equal(identity.uncond, expected.uncond)
    assert identity.cond.shape == (1, 15, TOKEN_WIDTH)
    assert identity.info == expected.info
    assert np.array_equal(identity.thumbnail, thumbnail(faces[0].aligned, 128))
    assert [name for name, _ in told] == ["main.png", "photo 2"]
    for (_, face), own in zip(told, faces):
        assert np.array_equal(face.embedding, own.embedding)
        assert len(face.detections) == 2
        assert abs(face.detection.box - [55, 75, 145, 165]).max() < 6


def test_several_photos_are_one_call_of_the_tower(models, monkeypatch):
    """As many as its memory is reckoned for; and each gets what it would get alone."""
    faces = [read_face(two_faces(shade), models.faces) for shade in (0, 3)]
    alone = [face_features([face], models.tower)[0] for face in faces]
    sizes = []
    handle = models.tower.register_forward_pre_hook(lambda tower, args: sizes.append(len(args[0])))
    together = face_features(faces, models.tower)
    monkeypatch.setattr(readings, "VISION_BATCH", 1)
    face_features(faces, models.tower)
    handle.remove()
    assert sizes == [2, 1, 1]
    for one, other in zip(together, alone):
        for a, b in zip((one.id_cond, *one.vit_hidden), (other.id_cond, *other.vit_hidden), strict=True):
            assert ((a - b).norm() / b.norm()).item() < 1e-5


# ---------------------------------------------------------------- the cache


def fail() -> Encoders:
    raise AssertionError("an encoder was loaded")


def test_the_cache_holds_the_last_ones_in_memory_and_all_on_disk(make, tmp_path, monkeypatch):
    monkeypatch.setattr(IdentityCache, "MOST_IN_MEMORY", 2)
    identity, cache, alone = make([two_faces()], IdentityCache()), IdentityCache(tmp_path), IdentityCache()
    for key in ("a", "b", "c"):
        cache.put(key, identity)
        alone.put(key, identity)
    assert all(torch.equal(cache.get(key).cond, identity.cond) for key in ("a", "b", "c"))
    assert [alone.get(key) is not None for key in ("a", "b", "c")] == [False, True, True]


def test_what_a_killed_process_has_left_goes_with_a_later_write(make, tmp_path):
    identity = make([two_faces()], IdentityCache())
    old, new = (tmp_path / f".key.safetensors.{name}.tmp" for name in ("0a", "0b"))
    for path in (old, new):
        path.write_bytes(b"begun")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    identity.save(tmp_path / "other.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "other.safetensors"]


IN_A_NEW_PROCESS = """
import sys
import time
from lib_pulid.photos import IdentityCache, make_identity
from lib_pulid.weights import load_adapter
photo, adapter, cache = sys.argv[1:]
def fail():
    raise AssertionError("an encoder was loaded")
adapter, cache = load_adapter(adapter), IdentityCache(cache)
print(make_identity([photo], adapter, encoders=fail, encoders_id="e", cache=cache).short_hash)
heavy = {"insightface", "facexlib", "onnxruntime", "timm"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_new_process(make, adapter, tmp_path):
    photo = png(tmp_path / "a.png", two_faces())
    first = make([photo], IdentityCache(tmp_path / "cache"))
    arguments = (str(photo), str(adapter.path), str(tmp_path / "cache"))
    assert printed(IN_A_NEW_PROCESS, *arguments) == [first.short_hash]


def test_the_same_pixels_are_the_same_photo(make, tmp_path):
    """Whatever the file is called and however it is given."""
    cache, image = IdentityCache(), two_faces()
    make([image], cache)
    path = png(tmp_path / "a.png", image)
    for source in (path, str(path), path.read_bytes(), Image.fromarray(image), png(tmp_path / "b.bmp", image)):
        make([source], cache, encoders=fail)


def test_whatever_it_depends_on_makes_a_new_one(make, encoders, folder, tmp_path):
    cache = IdentityCache(tmp_path)
    other = load_adapter(write_adapter(folder / "other.safetensors", seed=2))
    pixel = two_faces()
    pixel[0, 0, 0] ^= 1
    variants = [
        ([two_faces()], {}),
        ([pixel], {}),
        ([two_faces(), two_faces(shade=3)], {}),
        ([two_faces(shade=3), two_faces()], {}),
        ([two_faces()], {"choice": FaceChoice("smallest")}),
        ([two_faces()], {"choice": FaceChoice("largest", 1)}),
        ([two_faces()], {"fusion": "average"}),
        ([two_faces()], {"fusion": "id_mix"}),
        ([two_faces()], {"adapter": other}),
        ([two_faces()], {"encoders_id": "f"}),
    ]
    made = [make(photos, cache, **changes) for photos, changes in variants]
    assert encoders.call_count == len(variants) == len(list(tmp_path.iterdir()))
    for memory in (cache, IdentityCache(tmp_path)):  # and each is found again as itself
        for (photos, changes), identity in zip(variants, made):
            again = make(photos, memory, **{**changes, "encoders": fail})
            assert again.info == identity.info
            assert torch.equal(again.cond, identity.cond)


def test_the_key_tells_shapes_and_photos_apart(adapter):
    def key(*images: np.ndarray) -> str:
        return identity_key(images, adapter, encoders_id="e", choice=FaceChoice(), fusion="official")

    flat = np.arange(6 * 4 * 3, dtype=np.uint8)
    images = [
        (flat.reshape(6, 4, 3),),
        (flat.reshape(4, 6, 3),),
        (flat[:36].reshape(3, 4, 3), flat[36:].reshape(3, 4, 3)),
        (flat.reshape(6, 4, 3), flat.reshape(6, 4, 3)),
        (),
    ]
    assert len({key(*several) for several in images}) == len(images)
    assert key(*images[0]) == key(images[0][0].copy())


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "nan"])
def test_a_damaged_cache_file_is_made_again(make, encoders, tmp_path, damage):
    first = make([two_faces()], IdentityCache(tmp_path))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "nan":
        Identity(first.cond * float("nan")).save(path, replace=True)
    elif damage == "foreign":
        save_file({"cond": torch.zeros(1, 10, 64)}, path)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    again = make([two_faces()], IdentityCache(tmp_path))
    assert encoders.call_count == 2
    assert torch.equal(again.cond, first.cond)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(make([two_faces()], IdentityCache(tmp_path), encoders=fail).cond, first.cond)


@pytest.mark.parametrize("folder_is", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_loses_nothing(make, tmp_path, folder_is):
    """The identity is made all the same, and remembered in memory."""
    (tmp_path / "file").write_bytes(b"a file where the folder should be")
    folder = tmp_path / "file" if folder_is == "a file" else Path("/proc")
    if folder_is == "read-only" and not (folder / "self").exists():
        pytest.skip("no folder here that root cannot write to")
    cache = IdentityCache(folder)
    made = make([two_faces()], cache)
    assert torch.equal(make([two_faces()], cache, encoders=fail).cond, made.cond)


# ---------------------------------------------------------------- errors


def test_no_face_names_the_photo(make, tmp_path):
    """Also if only one of several has none; nor is there an identity of no photo, or in an unknown fusion. Nothing is
    remembered then."""
    cache = IdentityCache(tmp_path / "cache")
    nobody = png(tmp_path / "nobody.png", blank(200, 200))
    with pytest.raises(NoFaceError, match=r"^nobody\.png: no face was found"):
        make([two_faces(), nobody], cache)
    with pytest.raises(NoFaceError, match=r"^photo 2: no face was found"):
        make([two_faces(), blank(200, 200)], cache)
    for photos, changes in (([], {}), ([two_faces()], {"fusion": "mean"})):
        with pytest.raises(SettingError):
            make(photos, cache, **changes)
    assert not (tmp_path / "cache").exists()


def test_an_unreadable_photo_is_named_before_anything_is_loaded(make, tmp_path):
    (tmp_path / "letter.png").write_text("no image")
    for source, name in ((tmp_path / "letter.png", "letter.png"), (b"abc", "photo 2")):
        with pytest.raises(ImageError, match=f"^{name}: "):
            make([two_faces(), source], IdentityCache(), encoders=fail)


# ---------------------------------------------------------------- naming files


def test_fingerprint(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one" * 3_000_000)  # more than one block
    name = fingerprint(path)
    assert name == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert fingerprint(path.rename(tmp_path / "b")) == name
    (tmp_path / "b").write_bytes(b"onE" * 3_000_000)
    assert fingerprint(tmp_path / "b") != name


def test_what_was_read_of_a_file_is_remembered_until_it_changes(tmp_path):
    """And then forgotten; what others read of it is not mixed up with it."""

    class Content:
        def __init__(self, path: Path) -> None:
            self.text = path.read_text()

    folder, path = ModelsFolder(lambda: Settings(tmp_path)), tmp_path / "a"
    path.write_text("one")
    first = folder.remembered(path, Content)
    assert folder.remembered(path, Content) is first
    assert folder.remembered(path, Path.read_text) == first.text == "one"
    gone = weakref.ref(first)
    path.write_text("another")
    del first
    assert folder.remembered(path, Content).text == "another"
    assert gone() is None
