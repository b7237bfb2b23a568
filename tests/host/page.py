"""The WebUI's page in headless Chromium: what a hand does there, and what an eye sees."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.host.table import Failed, Skipped, expect
from tests.host.webui import Running

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
PATIENCE = 600_000  # ms; a page of a WebUI is slow to come on a busy machine


class Page:
    """One open page. Names of elements are those of the accordion: "1_weight" is the first person's weight."""

    def __init__(self, host: Running, browser_page: Any) -> None:
        self.host, self.inner, self.tab = host, browser_page, "txt2img"
        self.problems: list[str] = []
        browser_page.on("pageerror", self._note_problem)

    def _note_problem(self, error: Any) -> None:
        """Ours only: A1111's own page raises some, of width and height, without any extension."""
        if "pulid" in f"{error} {error.stack}".lower():
            self.problems.append(str(error))

    def find(self, selector: str) -> Any:
        return self.inner.locator(selector)

    def part(self, name: str) -> Any:
        """The outermost element of that name: gradio gives an HTML block's to the block and to what is in it."""
        return self.find(f"#pulid_{self.tab}_{name}" if name else f"#pulid_{self.tab}").first

    def until(self, condition: str, what: str) -> None:
        """condition: JavaScript that comes to be true, also if it cannot be computed yet."""
        attempt = f"() => {{ try {{ return Boolean({condition}); }} catch {{ return false; }} }}"
        try:
            self.inner.wait_for_function(attempt, timeout=PATIENCE)
        except Exception as error:
            raise Failed(f"waited in vain: {what} ({str(error).splitlines()[0]})") from error

    def number(self, name: str) -> float:
        return float(self.part(name).locator("input[type=number]").first.input_value())

    def chosen(self, name: str) -> str:
        return self.part(name).locator("input").first.input_value()

    def box(self, number: int) -> str:
        """The text of a person's box."""
        return self.part(f"{number}_box").locator("input, textarea").first.input_value()

    def badge(self) -> str:
        return self.part("").locator(".pulid-badge").inner_text()

    def note(self) -> str:
        return self.part("1_note").inner_text()

    def load(self, address: str = "") -> None:
        """Opens an address, or the same again, and waits until our script has found the accordion."""
        self.inner.goto(address or self.inner.url, wait_until="domcontentloaded")
        self.find("#pulid_txt2img .label-wrap").first.wait_for(state="visible", timeout=PATIENCE)
        self.until("gradioApp().querySelector('#pulid_txt2img').dataset.pulid === 'connected'", "our script runs")

    def choose_tab(self, tab: str) -> None:
        self.find("#tabs > .tab-nav button").filter(has_text=tab).first.click()
        self.tab = tab if tab in ("txt2img", "img2img") else self.tab

    def is_on(self) -> bool:
        return self.inner.evaluate(f"() => (new Pulid('{self.tab}')).isOn()")

    def open(self, advanced: bool = False) -> None:
        """Opens the accordion, by its label. advanced: and the first person's further settings."""
        if not self.is_on():
            self.part("").locator(".label-wrap").first.click()
            self.until(f"(new Pulid('{self.tab}')).isOn()", "the accordion is on")
        self.part("1_drop").wait_for(state="visible", timeout=PATIENCE)
        if advanced:
            self.part("1_advanced").locator(".label-wrap").first.click()

    def drop(self, *names: str) -> None:
        """Gives photos to the drop zone, and waits until they are shown."""
        self.part("1_drop").locator("input[type=file]").set_input_files([self.host.photo(name) for name in names])
        self.part("1_photos").locator("img").nth(len(names) - 1).wait_for(state="visible", timeout=PATIENCE)

    def drag(self, name: str) -> None:
        """Drags a file, of a type that the browser does not know, over the gallery beside the drop zone."""
        data = list(self.host.photo(name).read_bytes())
        transfer = self.inner.evaluate_handle(
            "(data) => { const t = new DataTransfer();"
            " t.items.add(new File([new Uint8Array(data)], 'photo.png')); return t; }",
            data,
        )
        for event in ("dragenter", "dragover", "drop"):
            self.part("1_photos").dispatch_event(event, {"dataTransfer": transfer})
        self.part("1_photos").locator("img").first.wait_for(state="visible", timeout=PATIENCE)

    def choose(self, field: Any, text: str) -> None:
        """Selects an option of a dropdown. field: its input. An update from the server may close the dropdown; then it
        is opened again."""
        option = self.find(".options li, ul[role=listbox] li").filter(has_text=text).first
        for _ in range(20):
            field.evaluate("(input) => input.blur()")
            field.click()
            with contextlib.suppress(Exception):  # playwright's, after the five seconds
                return option.click(timeout=5000)
        raise Failed(f"the dropdown has no option {text}")

    def set_number(self, name: str, value: float) -> None:
        field = self.part(name).locator("input[type=number]").first
        field.fill(str(value))
        field.press("Tab")

    def generate(self) -> np.ndarray:
        """Presses Generate and waits for the picture; uint8 RGB [H, W, 3]."""
        before = self.shown_picture()
        self.find(f"#{self.tab}_generate").click()
        return self.generated(before)

    def generated(self, before: str = "") -> np.ndarray:
        """Waits for the picture of a run that has just been started. before: the source of the last one's picture."""
        self.until(f"![{json.dumps(before)}, ''].includes({self._source()})", "another picture")
        self.until("!gradioApp().querySelector('.progressDiv')", "the end of the progress bar")
        self.inner.wait_for_timeout(1500)  # gradio puts the new picture in the place of the live preview
        return self.picture()

    def shown_picture(self) -> str:
        return self.inner.evaluate(f"() => {self._source()}") or ""

    def _source(self) -> str:
        images = f"[...gradioApp().querySelectorAll('#{self.tab}_gallery img')]"
        return f"({images}.map((i) => i.src).filter((s) => s.includes('file=') || s.startsWith('data:'))[0] || '')"

    def picture(self) -> np.ndarray:
        answer = self.inner.request.get(self.shown_picture())
        return np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB"))

    def parameters(self) -> str:
        """The text below the picture."""
        return self.find(f"#html_info_{self.tab}").first.inner_text()

    def describe(self, prompt: str, **numbers: float) -> None:
        """Prompt, width, height, steps."""
        self.find(f"#{self.tab}_prompt textarea").fill(prompt)
        for name, value in numbers.items():
            field = self.find(f"#{self.tab}_{name} input[type=number]").first
            field.fill(str(value))
            field.press("Tab")

    def keep(self, folder: Path | None, name: str, selector: str = "") -> None:
        """A picture of the page, or of an element, as HOST-name.png."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            target = self.find(selector) if selector else self.inner
            shot = Image.open(io.BytesIO(target.screenshot())).convert("RGB")
            shot.quantize(128).save(folder / f"{self.host.kind}-{name}.png", optimize=True)


@contextlib.contextmanager
def opened(host: Running, dark: bool = False, on: bool = False) -> Iterator[Page]:
    """The WebUI's page in a browser of its own. on: with the accordion open."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise Skipped("playwright is not installed") from None
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        raise Skipped("there is no chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS.split())
        try:
            inner = browser.new_page(viewport={"width": 1400, "height": 1300})
            inner.set_default_timeout(PATIENCE)
            page = Page(host, inner)
            page.load(f"{host.api.url}/?__theme={'dark' if dark else 'light'}")
            if on:
                page.open()
            yield page
            expect(not page.problems, f"errors in the page: {page.problems[:3]}")
        finally:
            browser.close()
