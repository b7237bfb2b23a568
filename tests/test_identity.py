"""Identities: saved whole or not at all, made of several photos the official way, refused by other adapters."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_pulid.errors import IdentityMismatchError, SettingError
from lib_pulid.identity import FILE_FORMAT, FaceFeatures, Identity, encode_identity
from lib_pulid.injection import compile_injection
from lib_pulid.weights import Adapter, load_adapter
from tests.small_models import ID_COND, TOKEN_WIDTH, TOWER_WIDTH, normal, pulid_files


def an_identity(**changes: object) -> Identity:
    values = {
        "cond": normal(1, 1, 10, 64),
        "uncond": normal(2, 1, 10, 64),
        "info": {"adapter": "PuLID v1 for SDXL", "name": "Zoë 李", "photos": "1"},
        "thumbnail": np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3),
    }
    return Identity(**{**values, **changes})  # type: ignore[arg-type]


def photo(seed: int, patches: int = 3) -> FaceFeatures:
    hidden = tuple(normal(seed + 1 + i, 1, 1 + patches, TOWER_WIDTH) for i in range(5))
    return FaceFeatures(normal(seed, 1, ID_COND), hidden)


PHOTOS = [photo(10), photo(30), photo(50)]


def adapters(folder: Path, seed: int = 1) -> dict[str, Adapter]:
    states = pulid_files((16, 16), 24, 2, seed)
    for name, state in states.items():
        save_file(state, folder / f"{name}_{seed}.safetensors")
    return {name: load_adapter(folder / f"{name}_{seed}.safetensors") for name in states}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return adapters(tmp_path_factory.mktemp("adapters"))


# ---------------------------------------------------------------- the identity itself


def test_tokens_have_to_be_of_one_person():
    for shape in ((10, 64), (2, 10, 64), (1, 1, 10, 64)):
        with pytest.raises(SettingError, match=r"Identity\.cond has shape .*\[1, N, D\]"):
            Identity(torch.zeros(shape))
    with pytest.raises(SettingError, match="have different shapes"):
        Identity(torch.zeros(1, 10, 64), torch.zeros(1, 5, 64))


def test_short_hash():
    identity = an_identity()
    name = identity.short_hash
    assert len(name) == 10
    int(name, 16)
    other_layout = identity.cond.transpose(1, 2).contiguous().transpose(1, 2)
    assert Identity(other_layout).short_hash == Identity(identity.cond.double()).short_hash == name
    changed = identity.cond.clone()
    changed[0, 9, 63] = torch.nextafter(changed[0, 9, 63], torch.tensor(9.0))
    assert Identity(changed).short_hash != name


# ---------------------------------------------------------------- saved and loaded


def test_round_trip(tmp_path):
    identity = an_identity()
    identity.cond[0, 0, 0], identity.cond[0, 0, 1] = 1e-42, -0.0  # bit-identical means these, too
    path = identity.save(tmp_path / "new" / "folder" / "person.safetensors")
    assert path == tmp_path / "new" / "folder" / "person.safetensors"
    loaded = Identity.load(path)
    for ours, theirs in ((loaded.cond, identity.cond), (loaded.uncond, identity.uncond)):
        assert ours.dtype == torch.float32
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()
    assert loaded.info == identity.info
    assert loaded.thumbnail.dtype == np.uint8
    assert np.array_equal(loaded.thumbnail, identity.thumbnail)
    assert loaded.short_hash == identity.short_hash
    assert os.listdir(path.parent) == ["person.safetensors"]


def test_round_trip_of_the_least_of_views_and_of_half_precision(tmp_path):
    least = Identity.load(Identity(normal(1, 1, 3, 4)).save(tmp_path / "least.safetensors"))
    assert (least.uncond, least.thumbnail, dict(least.info)) == (None, None, {})
    turned, mirrored = normal(1, 1, 64, 10).transpose(1, 2), an_identity().thumbnail[:, ::-1, ::-1]
    loaded = Identity.load(an_identity(cond=turned, thumbnail=mirrored).save(tmp_path / "x.safetensors"))
    assert torch.equal(loaded.cond, turned)
    assert np.array_equal(loaded.thumbnail, mirrored)
    half = Identity(normal(1, 1, 3, 4).half())
    assert torch.equal(Identity.load(half.save(tmp_path / "h.safetensors")).cond, half.cond.float())


def test_saving_replaces_where_asked_to_only(tmp_path):
    path = an_identity().save(tmp_path / "x.safetensors")
    loaded = Identity.load(path)
    other = an_identity(cond=normal(7, 1, 10, 64))
    with pytest.raises(SettingError, match="x is already saved"):
        other.save(path)
    assert Identity.load(path).short_hash == loaded.short_hash
    other.save(path, replace=True)
    assert torch.equal(Identity.load(path).cond, other.cond)
    assert torch.equal(loaded.cond, an_identity().cond)  # what was read before is not touched


def test_a_saved_file_can_be_read_by_others(tmp_path):
    """As any file that a program writes: by the umask, not 0600 as tempfile makes them."""
    before = os.umask(0o022)
    try:
        mode = an_identity().save(tmp_path / "x.safetensors").stat().st_mode & 0o777
    finally:
        os.umask(before)
    assert mode == 0o644


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError, Interrupted])
@pytest.mark.parametrize(
    ("owner", "function", "old_file"),
    [(Path, "write_bytes", True), (Path, "write_bytes", False), (os, "replace", True), (os, "link", False)],
)
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, owner, function, old_file, error):
    path = tmp_path / "x.safetensors"
    if old_file:
        an_identity().save(path)

    def fail(temporary, *_):
        with open(temporary, "ab") as file:
            file.write(b"half of a fi")
        raise error("disk full")

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(owner, function, fail)
        an_identity(cond=normal(7, 1, 10, 64)).save(path, replace=old_file)
    assert os.listdir(tmp_path) == (["x.safetensors"] if old_file else [])
    if old_file:
        assert torch.equal(Identity.load(path).cond, an_identity().cond)


# ---------------------------------------------------------------- files that are no identity


def test_foreign_files(tmp_path, made):
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    torch.save({"cond": torch.zeros(1, 2, 3)}, tmp_path / "pickle.bin")
    save_file({"cond": torch.zeros(1, 2, 3)}, tmp_path / "plain.safetensors")
    save_file({"cond": torch.zeros(1, 2, 3)}, tmp_path / "other.safetensors", {"format": "pt", "version": "1"})
    save_file({"uncond": torch.zeros(1, 2, 3)}, tmp_path / "no_cond", {"format": FILE_FORMAT, "version": "1"})
    for path in [*tmp_path.iterdir(), made["v1.1"].path]:
        with pytest.raises(IdentityMismatchError, match=f"{path.name} is not a saved identity"):
            Identity.load(path)


def saved(path: Path, version: str | None = "1", **tensors: Tensor) -> Path:
    metadata = {"format": FILE_FORMAT} if version is None else {"format": FILE_FORMAT, "version": version}
    save_file({"cond": normal(1, 1, 10, 64), **tensors}, path, metadata)
    return path


def test_a_later_version(tmp_path):
    for version in ("2", "1.1"):
        with pytest.raises(IdentityMismatchError, match=r"x\.safetensors was written by a later version"):
            Identity.load(saved(tmp_path / "x.safetensors", version))
    with pytest.raises(IdentityMismatchError):
        Identity.load(saved(tmp_path / "x.safetensors", None))
    assert Identity.load(saved(tmp_path / "x.safetensors")).info == {}


@pytest.mark.parametrize("tensors", [
    {"cond": torch.zeros(10, 64)}, {"cond": torch.zeros(2, 10, 64)}, {"uncond": torch.zeros(1, 9, 64)},
    {"cond": normal(1, 1, 10, 64).index_fill(1, torch.tensor([9]), float("nan"))},
    {"cond": normal(1, 1, 10, 64).index_fill(2, torch.tensor([0]), float("inf"))},
    {"uncond": normal(1, 1, 10, 64).index_fill(1, torch.tensor([3]), float("nan"))},
    {"cond": torch.full((1, 10, 64), float("nan"), dtype=torch.float16)},
    *({"cond": torch.ones(1, 10, 64, dtype=dtype)} for dtype in (torch.int64, torch.bool)),
    {"cond": torch.zeros(1, 10, 64)}, {"cond": torch.zeros(1, 0, 64), "uncond": torch.zeros(1, 0, 64)},
], ids=["cond shape", "two persons", "uncond shape", "cond nan", "cond inf", "uncond nan", "float16 nan", "int64",
        "bool", "zeros", "empty"]
)  # fmt: skip
def test_damaged_tokens(tmp_path, tensors):
    with pytest.raises(IdentityMismatchError, match=r"x\.safetensors is damaged"):
        Identity.load(saved(tmp_path / "x.safetensors", **tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_copy_in_another_precision_is_read(tmp_path, dtype):
    one = normal(1, 1, 10, 64).to(dtype)
    identity = Identity.load(saved(tmp_path / "x.safetensors", cond=one, uncond=2 * one.float()))
    assert identity.cond.dtype == identity.uncond.dtype == torch.float32
    assert torch.equal(identity.cond, one.float())
    assert len(identity.short_hash) == 10


# ---------------------------------------------------------------- several photos of one person


def tokens(adapter: Adapter, features: FaceFeatures) -> Tensor:
    with torch.no_grad():
        return adapter.encoder(features.id_cond, features.vit_hidden)


def nothing(features: FaceFeatures) -> FaceFeatures:
    return FaceFeatures(torch.zeros_like(features.id_cond), tuple(torch.zeros_like(h) for h in features.vit_hidden))


@pytest.mark.parametrize(("fusion", "kept"), [("official", 5), ("id_mix", 10)])
def test_v1_fusion(made, fusion, kept):
    adapter = made["v1"]
    identity = encode_identity(PHOTOS, adapter, fusion=fusion)
    main, *others = [tokens(adapter, p) for p in PHOTOS]
    assert main.shape[1] == 10
    assert torch.equal(identity.cond, torch.cat([main, *(t[:, :kept] for t in others)], dim=1))
    empty = tokens(adapter, nothing(PHOTOS[0]))
    assert torch.equal(identity.uncond, torch.cat([empty, empty[:, :kept], empty[:, :kept]], dim=1))
    assert identity.cond.shape == (1, 10 + 2 * kept, TOKEN_WIDTH)


@pytest.mark.parametrize("name", ["v1", "v1.1", "flux"])
def test_average(made, name):
    adapter = made[name]
    identity = encode_identity(PHOTOS, adapter, fusion="average")
    mean = sum(tokens(adapter, p) for p in PHOTOS) / 3
    assert identity.cond.shape == mean.shape
    assert torch.allclose(identity.cond, mean, atol=1e-5)
    assert torch.allclose(identity.uncond, tokens(adapter, nothing(PHOTOS[0])), atol=1e-5)


@pytest.mark.parametrize("fusion", ["official", "id_mix", "average"])
def test_one_photo_is_the_same_in_every_fusion(made, fusion):
    identity = encode_identity(PHOTOS[:1], made["v1"], fusion=fusion)
    assert torch.equal(identity.cond, tokens(made["v1"], PHOTOS[0]))
    assert identity.info["fusion"] == fusion
    assert identity.cond.dtype == torch.float32 and not (identity.cond.requires_grad or identity.uncond.requires_grad)


@pytest.mark.parametrize("name", ["v1.1", "flux"])
@pytest.mark.parametrize("count", [1, 3])
def test_id_mix_exists_in_v1_only(made, name, count):
    with pytest.raises(
        SettingError, match=f"id_mix works with PuLID v1 only, but the loaded file is {made[name].label}"
    ):
        encode_identity(PHOTOS[:count], made[name], fusion="id_mix")


def test_unknown_fusion_and_no_photo(made):
    with pytest.raises(SettingError, match="official, id_mix, average"):
        encode_identity(PHOTOS, made["v1"], fusion="mean")
    with pytest.raises(SettingError, match="at least one photo"):
        encode_identity([], made["v1"])


def test_info_and_thumbnail(made):
    thumbnail = an_identity().thumbnail
    identity = encode_identity(PHOTOS, made["flux"], thumbnail=thumbnail)
    assert identity.info == {
        "adapter": "PuLID v0.9 for FLUX",
        "encoder": made["flux"].fingerprint,
        "photos": "3",
        "fusion": "official",
        "made_by": identity.info["made_by"],
    }
    assert identity.info["made_by"].startswith("sd-webui-pulid ")
    assert identity.thumbnail is thumbnail


# ---------------------------------------------------------------- the adapter it belongs to


def test_an_identity_of_other_weights_or_another_width_is_refused(made, tmp_path):
    others = adapters(tmp_path, seed=9)
    for name, adapter in made.items():
        identity = Identity.load(encode_identity(PHOTOS[:1], adapter).save(tmp_path / f"saved_{name}.safetensors"))
        compile_injection(adapter, identity)
        words = (
            f"made with {adapter.label} .*{adapter.fingerprint}.*{name}_9.safetensors is .*{others[name].fingerprint}.*"
            "Make it again from the photo"
        )
        with pytest.raises(IdentityMismatchError, match=words):
            compile_injection(others[name], identity)
    with pytest.raises(IdentityMismatchError, match=r"tokens have width 2048, but v1_1\.safetensors needs 64"):
        compile_injection(made["v1"], Identity(torch.zeros(1, 10, 2048)))
