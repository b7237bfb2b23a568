"""Missing files are offered and downloaded, in a start of its own: empty models folder, and a hub on the loopback."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import time
from pathlib import Path

from tests.file_server import Server, held, serving
from tests.host import rows_page
from tests.host.page import Page, opened
from tests.host.table import Result, Row, expect, run
from tests.host.webui import NAMES, Checkout, Running, running

PULID = "pulid_v1.1.safetensors"


def run_all(checkout: Checkout, generated: Path, match: str) -> list[Result]:
    name = (
        "Missing files: named in the accordion, downloaded by its button, usable at once; generation goes on meanwhile"
    )
    if match.lower() not in name.lower():
        return []
    files = {path.name: path.read_bytes() for path in (generated / "models").rglob("*") if path.is_file()}
    facts = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    with serving(files) as server, tempfile.TemporaryDirectory(prefix="webui-models-") as folder:
        variables = {"HF_ENDPOINT": server.hub, "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": ""}
        variables |= {
            "PULID_TEST_CATALOGUE": json.dumps(facts),
            "HF_HUB_CACHE": folder,
            "TORCH_HOME": folder,
            "NO_PROXY": "127.0.0.1,localhost",
        }
        flags = ("--pulid-models-dir", folder)
        try:
            with running(checkout, generated, flags, variables=variables) as host:
                return [run(Row(name, tuple(NAMES), lambda host: check(host, server, Path(folder))), host)]
        except RuntimeError as error:  # it did not start
            return [Result(name, NAMES[checkout.kind], "NO", " ".join(str(error).split())[-300:], 0.0)]


def check(host: Running, server: Server, folder: Path) -> str:
    plain = host.api.txt2img().image
    with opened(host) as page:
        page.open()
        panel = page.part("missing_note")
        panel.wait_for(state="visible")
        said = panel.inner_text()
        for words in (
            PULID, "glintr100.onnx", "parsing_bisenet.pth", "non-commercial research purposes only", str(folder),
        ):  # fmt: skip
            expect(words in said, f"the note does not name {words}: {said[:300]}")
        page.keep(rows_page.SCREENSHOTS, "missing", "#pulid_txt2img")
        release = threading.Event()
        server.misbehave(held(release))
        page.part("missing_start").click()
        until_shown(page, " of ")
        began = time.monotonic()
        expect((host.api.txt2img().image == plain).all(), "the picture meanwhile is another")
        took = time.monotonic() - began
        page.keep(rows_page.SCREENSHOTS, "downloading", "#pulid_txt2img")
        page.load()  # closed and opened again: it goes on, and is shown
        page.open()
        until_shown(page, " of ")
        release.set()
        page.part("missing_start").wait_for(state="visible")  # the two under a licence that was not accepted are left
        expect({path.name for path in folder.rglob("*.onnx")} == set(), "files under a licence came without a word")
        page.part("missing_accept").locator("input").check()
        page.until(
            "gradioApp().querySelector('#pulid_txt2img_missing_start').innerText.startsWith('Download')", "a label"
        )
        page.part("missing_start").click()
        page.part("missing").wait_for(state="hidden")
        models = page.inner.request.get(f"{host.api.url}/pulid/models").json()
        expect([model["name"] for model in models["models"]] == [PULID], f"models: {models['models']}")
        page.drop("anna")
        page.describe("a cat", width=256, height=256, steps=2)
        page.generate()
        expect("PuLID 1" in page.parameters(), f"no picture with the files that came: {page.parameters()}")
    leftovers = [path.name for path in folder.rglob("*") if path.suffix in (".part", ".lock")]
    expect(not leftovers, f"left behind: {leftovers}")
    return f"6 files, {server.sent / 1e6:.0f} MB from a hub on the loopback; a picture meanwhile took {took:.1f} s"


def until_shown(page: Page, words: str) -> None:
    shown = f"gradioApp().querySelector('#pulid_txt2img_missing_note').innerText.includes('{words}')"
    page.until(shown, f"the note says {words}")
