"""The page's and the API's way to files that are missing, with a catalog of small files on a real server."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from lib_pulid.errors import SettingError
from lib_pulid.files import catalog
from lib_pulid.files.catalog import WeightFile
from lib_pulid.webui import routes
from tests import small_models
from tests.fake_modules.models import SMALL_SITES, WIDTH
from tests.fake_webui import Widget, webui
from tests.file_server import FOREVER, cut, held, serving, slowly, status, until

DATA = bytes(range(256)) * 2000
LICENCE = "research <only>"


@pytest.fixture
def server(monkeypatch):
    names = ("pulid.safetensors", "flux.safetensors", "tower.pt", "faces.onnx")
    with serving(dict.fromkeys(names, DATA)) as made:
        known = {"size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}
        files = [
            WeightFile(name, "pulid", f"the {name[:-3]}", made.url(name), group, **known)
            for name, group in zip(names, ("sdxl", "flux", "encoders"))
        ]
        restricted = WeightFile(
            names[3], "insightface/models/antelopev2", "faces", made.url(names[3]), "encoders", LICENCE, True, **known
        )
        monkeypatch.setattr(catalog, "CATALOG", (*files, restricted))
        yield made


@pytest.fixture
def library(tmp_path, server):
    with webui("a1111", tmp_path) as ui:
        made = ui.script().library
        yield made
        made.downloads.stop()
        finished(made.downloads)


def finished(downloads):
    until(lambda: not downloads.state.running)
    return downloads.state


class Panel:
    """What the page does with the widgets, without the page."""

    def __init__(self, library, family: str = "sdxl") -> None:
        from lib_pulid.webui import missing

        self.library = library
        self.made = missing.Missing("txt2img", library, lambda: family)
        self.made.wire([], lambda identity: ())

    def call(self, widget, accepted: bool) -> dict:
        fn, _, outputs = next(iter(widget.events.values()))
        assert outputs == self.made.outputs
        return dict(zip(("panel", "note", "accept", "start", "stop"), fn(accepted)))

    def look(self, accepted: bool = False) -> dict:
        return self.call(self.made.look, accepted)

    def press(self, accepted: bool) -> dict:
        return self.call(self.made.start, accepted)

    def download(self, accepted: bool) -> dict:
        """Presses the button, and looks when it is done."""
        assert "<progress" in self.press(accepted)["note"]["value"]
        finished(self.library.downloads)
        return self.look(accepted)


def there(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_missing_is_told(library, tmp_path):
    page = Panel(library)
    assert page.made.panel.kwargs["visible"] is False and page.made.note.value == ""  # asked for by the page, later
    seen = page.look()
    note = seen["note"]["value"]
    for words in ("pulid.safetensors", "512 kB", str(tmp_path / "insightface/models/antelopev2"), "tower.pt"):
        assert words in note
    assert "research &lt;only&gt;" in note
    assert "flux.safetensors" not in note
    assert seen["panel"]["visible"] is True
    assert seen["accept"]["label"] == f"I accept the license of faces.onnx: {LICENCE}"
    assert seen["start"]["value"] == "Download 2 files (1.02 MB)"
    for accepted, label in ((True, "Download 3 files (1.54 MB)"), (False, "Download 2 files (1.02 MB)")):
        assert page.made.accept.events["change"][0](accepted)[3]["value"] == label
    assert "flux.safetensors" in Panel(library, "flux").look()["note"]["value"]


def test_one_button_gets_everything_and_then_nothing_is_shown(library, server, tmp_path):
    go_on = threading.Event()
    server.misbehave(held(go_on))
    page = Panel(library)
    first = page.press(True)
    assert first["stop"]["visible"] and not first["start"]["visible"]
    until(lambda: library.downloads.state.done)
    while_busy = Panel(library).look(True)  # another page sees it, too
    go_on.set()
    finished(library.downloads)
    last = page.look(True)
    assert there(tmp_path) == {"pulid/pulid.safetensors", "pulid/tower.pt", "insightface/models/antelopev2/faces.onnx"}
    assert [one["panel"]["visible"] for one in (first, while_busy, last)] == [True, True, False]
    assert while_busy["stop"]["visible"] and not while_busy["start"]["visible"]
    assert "pulid.safetensors: " in while_busy["note"]["value"] and "<progress" in while_busy["note"]["value"]
    assert last["note"]["value"] == ""
    assert Panel(library).look()["panel"]["visible"] is False
    assert Panel(library, "flux").look()["start"]["value"] == "Download 1 file (512 kB)"


def test_a_person_saved_in_one_tab_is_in_the_lists_of_all(library):
    from lib_pulid.webui import missing

    wired: list[Any] = []
    stored = [SimpleNamespace(then=lambda fn, inputs, outputs, **_: wired.append((fn, outputs)))]

    def unit() -> Any:
        widgets = {name: Widget() for name in ("identity", "enabled", "model")}
        return SimpleNamespace(widgets=widgets, refresh=Widget(), stored=stored)

    units = [unit(), unit()]
    missing.Missing("txt2img", library, lambda: "sdxl").wire(
        units, lambda identity: (f"list with {identity}", "models")
    )
    fn, outputs = wired[0]
    values = fn(False, "anna", True, "auto", "None", False, "auto")
    assert outputs[-4:] == [unit.widgets[name] for unit in units for name in ("identity", "model")]
    assert values[-4:] == ["list with anna", "models", "list with None", "models"]
    assert len(outputs) == len(values)


def test_without_the_licence_accepted_the_others_come(library, tmp_path):
    last = Panel(library).download(False)
    assert there(tmp_path) == {"pulid/pulid.safetensors", "pulid/tower.pt"}
    assert last["panel"]["visible"] and last["accept"]["visible"] and last["start"]["visible"]
    assert last["start"]["value"] == "To download 1 file (512 kB), accept the license above"


def test_a_failure_is_told_and_the_rest_comes(library, server, tmp_path):
    server.misbehave(status(404))
    last = Panel(library).download(True)
    assert "pulid.safetensors could not be downloaded: the server answers 404 Not Found" in last["note"]["value"]
    assert last["start"]["value"] == "Download 1 file (512 kB)"
    assert len(there(tmp_path)) == 2
    last = Panel(library).download(True)
    assert last["panel"]["visible"] is False


def test_stopped_and_taken_up_again(library, server, tmp_path):
    server.misbehave(held(threading.Event()))
    page = Panel(library)
    assert page.press(True)["stop"]["visible"]
    until(lambda: library.downloads.state.done > 0)
    page.made.stop.events["click"][0]()
    finished(library.downloads)
    assert page.look()["start"]["visible"]
    assert there(tmp_path) == {"pulid/pulid.safetensors.part"}
    page.download(True)
    assert len(there(tmp_path)) == 3
    assert server.asked[1].range.startswith("bytes=")


def test_pressed_twice_it_downloads_once(library, server, tmp_path):
    server.misbehave(slowly)
    files = catalog.missing("sdxl", tmp_path)
    library.downloads.start(files)
    library.downloads.start(files)
    assert finished(library.downloads).problems == ()
    assert server.sent == 3 * len(DATA)


def test_a_fault_of_ours_is_told_too(library, monkeypatch):
    monkeypatch.setattr(catalog, "download", Mock(side_effect=ZeroDivisionError("oh")))
    library.downloads.start(catalog.CATALOG[:2])
    problems = finished(library.downloads).problems
    assert problems == tuple(f"{file.name}: ZeroDivisionError: oh" for file in catalog.CATALOG[:2])


def test_a_pulid_file_of_any_name_or_elsewhere_will_do(library, tmp_path):
    files = small_models.write_files(tmp_path / "pulid", [WIDTH] * SMALL_SITES, 64)
    for family in ("sdxl", ""):
        assert [file.name for file in Panel(library, family).made.files()] == ["tower.pt", "faces.onnx"]
    files.flux.unlink()
    files.tower.unlink()
    (tmp_path / "ControlNet").mkdir()
    files.sdxl.rename(tmp_path / "ControlNet" / "pulid.safetensors")
    assert [(file.name, file.family) for file in library.adapters.listed()] == [("pulid.safetensors", "sdxl")]


# ---------------------------------------------------------------- HTTP


def test_models_tells_every_file(library, tmp_path):
    (tmp_path / "pulid").mkdir()
    (tmp_path / "pulid" / "tower.pt").write_bytes(DATA)
    (tmp_path / "pulid" / "flux.safetensors").write_bytes(b"1234")
    answer = json.loads(json.dumps(routes.models(library)))
    states = {file["name"]: file["state"] for file in answer["files"]}
    assert states == {
        "pulid.safetensors": "missing",
        "flux.safetensors": "differs",
        "tower.pt": "there",
        "faces.onnx": "missing",
    }
    faces = answer["files"][-1]
    assert (faces["size"], faces["license"], faces["licence"]) == (len(DATA), LICENCE, LICENCE)
    assert faces["restricted"] is True
    assert faces["folder"] == str(tmp_path / "insightface/models/antelopev2")


@pytest.mark.parametrize("spelling", ["accept_license", "accept_licence"])
def test_download_by_name(library, tmp_path, spelling):
    begun = json.loads(json.dumps(routes.download({"names": ["tower.pt"]}, library.downloads)))
    assert begun["running"] is True
    finished(library.downloads)
    assert there(tmp_path) == {"pulid/tower.pt"}
    routes.download({"names": ["faces.onnx"], spelling: True}, library.downloads)
    finished(library.downloads)
    assert len(there(tmp_path)) == 2
    assert routes.progress(library.downloads)["running"] is False


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "download takes names"),
        ({"names": "tower.pt"}, "download takes names"),
        ({"names": ["tower.pt"], "url": "http://elsewhere/x"}, "download takes names"),
        ({"names": ["tower.pt"], "accept_license": "yes"}, "download takes names"),
        ({"names": ["../tower.pt"]}, "field names: ../tower.pt is not in the catalog"),
        ({"names": ["http://elsewhere/tower.pt"]}, "is not in the catalog"),
        ({"names": [{"name": "tower.pt"}]}, "is not in the catalog"),
        ({"names": ["tower.pt", "faces.onnx"]}, r"field accept_license: faces\.onnx .* license \(research <only>\)"),
    ],
)
def test_download_takes_names_of_the_catalogue_only(library, server, tmp_path, body, words):
    with pytest.raises(SettingError, match=words):
        routes.download(body, library.downloads)
    assert not library.downloads.state.running
    assert server.asked == []
    assert there(tmp_path) == set()


def test_a_stalled_server_does_not_keep_stop_from_working(library, server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    server.misbehave(*[cut(100_000, FOREVER)] * 9)
    library.downloads.start(catalog.CATALOG[:1])
    until(lambda: library.downloads.state.done > 0)
    library.downloads.stop()
    assert finished(library.downloads).problems == ()
    assert there(tmp_path) == {"pulid/pulid.safetensors.part"}
