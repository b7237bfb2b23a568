"""Blended people: the official ID mix at equal shares, everybody's share of the tokens, and what cannot be blended."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lib_pulid.blend import blend, read_share
from lib_pulid.cli import main
from lib_pulid.errors import IdentityMismatchError, PulidError, SettingError
from lib_pulid.identity import Identity, encode_identity
from lib_pulid.likeness import cosine
from lib_pulid.stores.folder import Settings
from lib_pulid.webui import routes
from lib_pulid.webui.library import Library
from lib_pulid.weights import load_adapter
from tests import small_models
from tests.test_identity import PHOTOS

V1, V11, FLUX = "PuLID v1 for SDXL", "PuLID v1.1 for SDXL", "PuLID v0.9 for FLUX"
AXES = {"anna": 0, "ben": 1, "cleo": 2}


def saved(name: str, adapter: str = V1, tokens: int = 10, encoder: str = "0123456789abcdef") -> Identity:
    """Everybody has an axis of the tokens' space, and one of the embeddings'."""
    axis = torch.eye(3)[AXES[name]]
    uncond = torch.full((1, tokens, 3), 0.5)
    info = {"adapter": adapter, "encoder": encoder}
    return Identity(axis.repeat(1, tokens, 1), uncond, info, embeddings={"own": axis.numpy()})


def people(*shares: float, adapter: str = V1) -> list[tuple[str, Identity, float]]:
    return [(name, saved(name, adapter), share) for name, share in zip(AXES, shares)]


def test_equal_shares_are_the_official_mix(tmp_path):
    save_file(small_models.pulid_files((8,) * 3, 64, 20)["v1"], tmp_path / "v1.safetensors")
    adapter = load_adapter(tmp_path / "v1.safetensors")
    photos = PHOTOS[:2]
    official = encode_identity(photos, adapter, fusion="id_mix")
    alone = [encode_identity([photo], adapter) for photo in photos]
    made = blend([("anna", alone[0], 3), ("ben", alone[1], 3)])
    assert torch.equal(made.cond, official.cond)
    assert torch.equal(made.uncond, official.uncond)
    assert made.info["fusion"] == official.info["fusion"] == "id_mix"
    assert adapter.is_encoder(made.info["encoder"])


@pytest.mark.parametrize("shares", [(0.7, 0.3), (0.1, 0.9), (5, 3, 2), (1, 1, 98), (0.5, 0.3, 0.2)])
def test_everybody_has_their_share(shares):
    made = blend(people(*shares))
    assert made.cond.shape == (1, 10 * len(shares), 3)
    wanted = torch.tensor(shares, dtype=torch.float32) / sum(shares)
    assert torch.allclose(made.cond.mean(1)[0, : len(shares)], wanted, atol=1e-6)
    assert torch.allclose(made.cond.sum(-1), torch.ones(1))  # of each block, too
    assert torch.allclose(made.uncond, torch.tensor(0.5))
    assert cosine(made.embeddings["own"][: len(shares)], np.array(shares)) == pytest.approx(1)


def test_a_small_change_of_the_shares_is_a_small_change():
    near, equal = (blend(people(0.5 + more, 0.5 - more)).cond for more in (1e-4, 0.0))
    assert (near - equal).abs().max() < 1e-3


@pytest.mark.parametrize("adapter", [V11, FLUX])
def test_later_versions_have_no_mix(adapter):
    made = blend(people(7, 3, adapter=adapter))
    assert made.cond.shape == (1, 10, 3)
    assert torch.allclose(made.cond[0, 0], torch.tensor([0.7, 0.3, 0]))
    assert (made.info["fusion"], made.info["blend"]) == ("average", "anna 0.7, ben 0.3")


def test_the_face_is_the_mean_of_faces_of_one_size():
    def with_face(one, value, side=4):
        name, identity, share = one
        return name, replace(identity, thumbnail=np.full((side, side, 3), value, np.uint8)), share

    anna, ben = people(3, 1)
    assert np.array_equal(blend([with_face(anna, 200), with_face(ben, 101)]).thumbnail, np.full((4, 4, 3), 175))
    assert blend([with_face(anna, 200), ben]).thumbnail is None
    assert blend([with_face(anna, 200), with_face(ben, 100, 5)]).thumbnail is None


def test_an_embedding_that_one_lacks():
    first, second = people(1, 1)
    assert blend([first, ("ben", replace(second[1], embeddings={"other": np.ones(3)}), 1)]).embeddings == {}


@pytest.mark.parametrize(("change", "words"), [
    ({"adapter": V11}, "anna was made with PuLID v1 for SDXL, but ben with PuLID v1.1 for SDXL"),
    ({"encoder": "f" * 16}, "anna and ben were made with different files of PuLID v1 for SDXL"),
    ({"encoder": ""}, "ben does not say which PuLID file made it"),
])  # fmt: skip
def test_different_versions(change, words):
    with pytest.raises(IdentityMismatchError, match=words):
        blend([("anna", saved("anna"), 1), ("ben", saved("ben", **change), 1)])


@pytest.mark.parametrize("encoder", ["01234567" + "f" * 8, "f" * 8 + "89abcdef"])
def test_the_same_encoder_in_another_precision(encoder):
    assert blend([("anna", saved("anna"), 1), ("ben", saved("ben", encoder=encoder), 1)])


def test_different_numbers_of_photos():
    one, three = ("anna", saved("anna"), 2), ("ben", saved("ben", tokens=20), 1)
    with pytest.raises(IdentityMismatchError, match=r"different numbers of tokens \(anna 10, ben 20\)"):
        blend([one, three])
    assert blend([(*one[:2], 1), three]).cond.shape == (1, 30, 3)  # as the official mix
    with pytest.raises(IdentityMismatchError, match="different numbers of tokens"):
        blend([("anna", saved("anna", FLUX), 1), ("ben", saved("ben", FLUX, 20), 1)])


@pytest.mark.parametrize("share", [0, -1, float("nan"), float("inf"), True, "0.5", None])
def test_shares_are_checked(share):
    with pytest.raises(SettingError, match="The share of ben has to be a number above 0"):
        blend([("anna", saved("anna"), 1), ("ben", saved("ben"), share)])


def test_how_many():
    with pytest.raises(SettingError, match="1 people cannot be blended; name 2 to 10"):
        blend(people(1))
    with pytest.raises(SettingError, match="anna is the same person as another one"):
        blend([*people(1, 1), ("anna", saved("anna"), 1)])


@pytest.mark.parametrize(
    ("text", "wanted"), [("anna:0.7", ("anna", 0.7)), ("ben", ("ben", 1)), (" Zoë : 2", ("Zoë", 2))]
)
def test_a_share_as_text(text, wanted):
    assert read_share(text) == wanted


@pytest.mark.parametrize("text", ["anna:", "anna:x", "anna:0", ":0.5", "anna:nan", "", "anna:-1"])
def test_a_wrong_share_as_text(text):
    with pytest.raises(SettingError, match=r"anna|name"):
        read_share(text)


@pytest.fixture
def library(tmp_path) -> Library:
    made = Library(lambda: Settings(tmp_path))
    for name in AXES:
        made.identities.save(name, saved(name))
    made.identities.save("later", saved("anna", V11))
    return made


def test_the_command(library, tmp_path, capsys):
    arguments = ["blend", "anna:0.7", "Ben:0.3", "--name", "carla", "--models-dir", str(tmp_path)]
    assert main(arguments) == 0
    carla = library.identities.load("carla")
    assert carla.info["name"] == "carla"
    assert carla.short_hash in capsys.readouterr().out
    assert torch.equal(carla.cond, blend(people(0.7, 0.3)).cond)
    assert main(arguments) == 1  # nothing is overwritten
    assert "carla is already saved" in capsys.readouterr().err
    for wrong, words in ({"anna:0": "above 0", "nobody:1": "nobody is not in", "later:1": "different things"}).items():
        assert main(["blend", "ben:1", wrong, "--name", "x", "--models-dir", str(tmp_path)]) == 1
        assert words in capsys.readouterr().err
    assert library.identities.find("x") is None


def test_the_route(library):
    answer = json.loads(json.dumps(routes.blend({"people": {"anna": 0.7, "ben": 0.3}, "name": "carla"}, library)))
    assert answer == {"name": "carla", "hash": library.identities.load("carla").short_hash, "made_for": V1}


@pytest.mark.parametrize(
    "body",
    [
        {}, {"people": [], "name": "x"}, {"people": {"anna": 1, "ben": 1}}, {"people": {"anna": 1}, "name": "x"},
        {"people": {"anna": "1", "ben": 1}, "name": "x"}, {"people": {"anna": 1, "ben": 1}, "name": "../x"},
        {"people": {"anna": 1, "ben": 1}, "name": "x", "more": 1}, {"people": {"anna": 1, "ben": None}, "name": "x"},
        {"people": {"anna": 10**400, "ben": 1}, "name": "x"}, {"people": {"../anna": 1, "ben": 1}, "name": "x"},
    ],
)  # fmt: skip
def test_the_route_says_what_is_wrong(library, body):
    with pytest.raises(PulidError):
        routes.blend(body, library)
    assert library.identities.find("x") is None


def test_the_page(ui, script, tmp_path):
    """The names in the order in which they were chosen; shares as the sliders say, or none."""
    from lib_pulid.webui.actions import Actions
    from lib_pulid.webui.blending import blend as save_blend

    library = Library(lambda: Settings(tmp_path))
    for name in AXES:
        library.identities.save(name, saved(name))
    actions = Actions(library, lambda name: "")
    listed, name, note, *units = save_blend(library, 2, ["ben", "anna"], "70, 30", "carla")
    assert torch.allclose(library.identities.load("carla").cond.mean(1)[0], torch.tensor([0.3, 0.7, 0]))
    assert "Saved carla" in note
    assert name["value"] == ""
    assert listed["choices"] == ["anna", "ben", "carla", "cleo"]
    assert [unit["choices"] for unit in units] == [["None", "anna", "ben", "carla", "cleo"]] * 2
    assert "a blend of ben 0.7, anna 0.3" in actions.preview("", "carla", "largest", 0)[1]
    save_blend(library, 1, ["ben", "anna"], "", "equal")
    assert torch.equal(library.identities.load("equal").cond, blend(people(1, 1)[::-1]).cond)
    for wrong in (
        ([], "", "x"),
        (["anna", "ben"], "70", "x"),
        (["anna", "ben"], "a, b", "x"),
        (["anna", "ben"], "", ""),
    ):
        assert "pulid-bad" in save_blend(library, 1, *wrong)[2]
    assert library.identities.find("x") is None
    assert "Enter a name for the blend first" in save_blend(library, 1, ["anna", "ben"], "", " ")[2]


def test_the_page_has_it(ui, script, monkeypatch):
    from tests.fake_webui import Widget

    built, make = [], Widget.__init__
    monkeypatch.setattr(Widget, "__init__", lambda self, *args, **how: make(self, *args, **how) or built.append(self))
    script.ui(False)
    named = {widget.elem_id: widget for widget in built}
    people, save, refresh = (named[f"pulid_txt2img_blend_{name}"] for name in ("people", "save", "refresh"))
    for button in (save, refresh):  # afterwards the people are chosen anew, by name
        assert button.events["click.then"] == (None, [people], [people])
    fn, inputs, outputs = save.events["click"]
    assert [widget.elem_id for widget in inputs] == [
        f"pulid_txt2img_blend_{name}" for name in ("people", "shares", "name")
    ]
    assert len(fn([], "", "")) == len(outputs) == 3 + 3


def test_a_blend_is_a_person(library):
    """It is saved as one, and can be blended again where it has as many tokens."""
    path = library.identities.blend([("anna", 1.0), ("ben", 1.0)], "carla").path
    assert Identity.load(path).info["blend"] == "anna 0.5, ben 0.5"
    other = library.identities.blend([("anna", 1.0), ("cleo", 1.0)], "other")
    again = library.identities.blend([("carla", 3.0), (other.short_hash, 1.0)], "again")
    assert torch.allclose(library.identities.load("again").cond.mean(1)[0], torch.tensor([0.5, 0.375, 0.125]))
    assert again.adapter == V1
