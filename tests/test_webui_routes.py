"""What the HTTP routes answer; and the forms that errors and passwords take, where fastapi is installed."""

from __future__ import annotations

import json

import pytest
import torch

from lib_pulid.errors import MissingWeightsError, NoFaceError, OutOfMemoryError, PulidError, SettingError
from lib_pulid.fields import FIELDS
from lib_pulid.files import pulidembd
from lib_pulid.identity import Identity
from lib_pulid.webui import routes


def test_models_identities_and_schema(library):
    found = json.loads(json.dumps(routes.models(library)))
    assert {file["name"]: file["family"] for file in found["models"]} == {
        "standin_pulid_sdxl.safetensors": "sdxl",
        "standin_pulid_flux.safetensors": "flux",
    }
    assert routes.identities(library)["identities"] == []
    described = json.loads(json.dumps(routes.describe()))
    assert described["order"] == [field.name for field in FIELDS]
    assert described["presets"]["sdxl"]["style"] == {"projection": "ortho", "num_zero": 16}
    assert described["presets"]["flux"]["realistic"] == {"start_step": 4}
    assert described["weights"] == {"sdxl": 0.8, "flux": 1.0}


def test_detect(library, two):
    answer = json.loads(json.dumps(routes.detect({"images": [two], "face_order": "left-to-right"}, library)))
    found = answer["photos"][0]
    assert len(found["faces"]) == 2
    x0, y0, x1, y1 = found["faces"][found["chosen"]]["box"]
    assert x0 < 200 < x1 < 480  # the stand-in detector measures two neighbors less exactly than one
    assert y0 < 240 < y1
    assert found["aligned"].startswith("data:image/png;base64,")
    assert any("2 faces" in warning for warning in found["warnings"])


@pytest.mark.parametrize(("body", "kind", "words"), [
    ({}, SettingError, "field images: no photo"), ({"imgs": []}, SettingError, "field imgs: detect takes images"),
    ({"images": ["%"]}, PulidError, "field images: photo 1: not base64"),
    ({"images": ["TWO"], "face_index": 5}, NoFaceError, "field images: photo 1: face number 6"),
    ({"images": ["TWO"], "face_order": "x"}, SettingError, "field face_order"),
])  # fmt: skip
def test_detect_says_what_is_wrong(library, two, body, kind, words):
    with pytest.raises(kind, match=words):
        routes.detect({**body, **({"images": [two]} if body.get("images") == ["TWO"] else {})}, library)


@pytest.mark.parametrize(
    ("error", "status"),
    [(NoFaceError("who?"), 422), (MissingWeightsError("x.bin"), 500), (OutOfMemoryError("help"), 500)],
)
def test_an_error_that_ends_a_request(client, error, status):
    answer = client(error=error).get("/fails")
    assert answer.status_code == status
    assert answer.json()["detail"] == str(error)
    assert answer.json()["error"] == type(error).__name__


BAD = "\ud800" * 300  # no text, and too long


@pytest.mark.parametrize(("path", "body", "words"), [
    ("download", {"names": [BAD], "accept_license": True}, "is not in the catalog"),
    ("download", {"names": ["x"], "accept_license": None, "accept_licence": None}, "x is not in the catalog"),
    ("download", {"names": ["x"], "accept_license": "false"}, "true or false"),
    ("blend", {"people": {BAD: 1, "b": 1}, "name": "c"}, "too long for a name"),
    ("blend", {"people": {"\ud800": 1, "b": 1}, "name": "c"}, "control characters"),
    ("blend", {"people": {"a": 1, "b": 1}, "name": "\ud800"}, "contains"),
])  # fmt: skip
def test_names_that_are_not_text(client, path, body, words):
    answer = client().post(f"/pulid/{path}", content=json.dumps(body))
    assert answer.status_code == 422 and words in answer.json()["detail"]
    assert len(answer.content) < 1000


def test_a_message_that_is_not_text(client):
    answer = client(error=SettingError("\ud800")).get("/fails")
    assert (answer.status_code, answer.json()["detail"]) == (422, "\\ud800")


def test_a_saved_identity_as_a_file(client, library):
    values = torch.arange(32 * 64, dtype=torch.float32).reshape(1, 32, 64) / 16
    folder = library.identities.folder
    paths = [
        Identity(values, info={"adapter": f"PuLID for {family}"}).save(folder / f"{name}.safetensors")
        for name, family in (("Zoë file", "FLUX"), ("Sdxl file", "SDXL"))
    ]
    own, embedding = (client().get(f"/pulid/identities/{name}") for name in ("zoë file", "Zoë file.pulidembd"))
    assert own.content == paths[0].read_bytes()
    assert "filename*=UTF-8''Zo%C3%AB%20file.safetensors" in own.headers["content-disposition"]
    assert torch.equal(torch.from_numpy(pulidembd.unpack(embedding.content))[None], values)
    read = Identity(values + 1, info={"adapter": "PuLID for FLUX"})
    cached = read.save(library.folder.path / "cache" / "read.safetensors")
    assert library.identities.find(read.short_hash) is not None
    nobodys = [(f"{read.short_hash}{ending}", "is not in") for ending in ("", ".pulidembd")]  # only read, not saved
    for name, words in (*nobodys, ("nobody", "is not in"), ("Sdxl file.pulidembd", "is for FLUX"), ("..%2F..%2Fx", "")):
        answer = client().get(f"/pulid/identities/{name}")
        assert answer.status_code in (404, 422) and words in answer.text
    cached.unlink()
