"""The page: what a person does there with mouse and keyboard."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, PngImagePlugin

from lib_pulid import miniature
from tests.host.page import Page, opened
from tests.host.rows_basics import person
from tests.host.table import Rows, differ, equal, expect
from tests.host.webui import Running

rows = Rows()
OOM = "OutOfMemoryError"
SCREENSHOTS: Path | None = None  # set by the command line


PROMPT = "a portrait of a smiling person in a red striped shirt, in front of yellow and white dots, flat illustration"


def ready(page: Page) -> None:
    page.describe(
        PROMPT, width=128, height=128, steps=miniature.STEPS["sdxl"], cfg_scale=miniature.GUIDANCE["sdxl"], seed=1
    )


@contextlib.contextmanager
def at_work(host: Running, photo: str) -> Iterator[Page]:
    """The page with a prompt, and with somebody's photo."""
    with opened(host) as page:
        ready(page)
        page.open()
        page.drop(photo)
        yield page


@rows.row("Page: a closed accordion is off; a click opens it and switches it on; three persons; the badge")
def accordion(host: Running) -> str:
    with opened(host) as page:
        expect(not page.is_on(), "it is on from the start")
        page.keep(SCREENSHOTS, "closed", "#pulid_txt2img")
        page.open()
        names = page.find("#pulid_txt2img_units > .tab-nav button").all_inner_texts()
        expect(len(names) == 3, f"tabs: {names}")
        page.drop("anna")
        page.until("gradioApp().querySelector('#pulid_txt2img .pulid-badge').textContent.includes('1 photo')", "badge")
        page.keep(SCREENSHOTS, "open", "#pulid_txt2img")
        return page.badge()


@rows.row("Page: open is on and closed is off; after a click on the checkbox the title opens and closes only")
def title_and_checkbox(host: Running) -> None:
    with opened(host, on=True) as page:
        expect("closing it disables it" in page.find("#pulid_txt2img .pulid-hint").first.inner_text(), "no hint")
        title = page.part("").locator(".label-wrap").first
        title.click()
        page.until("!(new Pulid('txt2img')).isOn()", "closed, it is off")
        title.click()
        page.until("(new Pulid('txt2img')).isOn()", "open, it is on")
        box = title.locator("input[type=checkbox]")
        box.click()
        page.until("!(new Pulid('txt2img')).isOn()", "the checkbox switches it off")
        expect(page.part("1_drop").is_visible(), "the checkbox has closed it")
        box.click()
        title.click()
        page.part("1_drop").wait_for(state="hidden")
        expect(page.is_on() and page.badge() != "", "the title has switched it off")


@rows.row("Page: preview shows the faces, the chosen one, the crops, and warns")
def preview(host: Running) -> str:
    with opened(host, on=True) as page:
        page.drop("two")
        page.part("1_preview").click()
        page.until("gradioApp().querySelector('#pulid_txt2img_1_seen').innerText.trim() !== ''", "a note")
        page.part("1_shown").locator("img").nth(2).wait_for(state="visible")
        page.keep(SCREENSHOTS, "preview", "#pulid_txt2img")
        captions = page.part("1_shown").inner_text()
        expect("2 faces" in captions, f"the captions: {captions}")
        return page.part("1_seen").inner_text()


@rows.row("Page: generate without, with a dropped photo and its parameters below, off again: the first picture")
def generate(host: Running) -> str:
    with opened(host) as page:
        ready(page)
        plain = page.generate()
        page.open()
        page.drop("ben")
        face = page.generate()
        text = page.parameters()
        page.keep(SCREENSHOTS, "generated")
        differ(plain, face, "with and without")
        expect("PuLID 1:" in text and "weight: 0.8" in text, f"below the picture: {text}")
        page.part("").locator(".label-wrap").first.click()
        page.until("!(new Pulid('txt2img')).isOn()", "it is off")
        equal(plain, page.generate(), "off again")
        expect("PuLID" not in page.parameters(), f"off again: {page.parameters()}")
    return text.partition("PuLID 1:")[2]


@rows.row("Page: a file dragged onto the photos; removing it")
def drag(host: Running) -> None:
    with opened(host, on=True) as page:
        page.drag("ben")
        page.part("1_remove_all").click()
        page.part("1_photos").locator("img").first.wait_for(state="detached")
        page.until("gradioApp().querySelector('#pulid_txt2img .pulid-badge').textContent.includes('no photo')", "badge")


@rows.row("Page: the ✕ on a photo removes that one")
def cross(host: Running) -> str:
    with opened(host, on=True) as page:
        page.drop("anna", "ben", "two", "anna-2")
        page.keep(SCREENSHOTS, "photos", "#pulid_txt2img")
        kept = [one.get_attribute("src") for one in page.part("1_photos").locator("img").all()]
        page.part("1_photos").locator("button").nth(1).click()
        page.until("gradioApp().querySelectorAll('#pulid_txt2img_1_photos img').length === 3", "three are left")
        left = [one.get_attribute("src") for one in page.part("1_photos").locator("img").all()]
        expect(left == [kept[0], *kept[2:]], "another photo is gone")
        return page.badge()


@rows.row("Page: a box is drawn, moved, resized by keys, and written into the parameters")
def region(host: Running) -> str:
    with at_work(host, "anna") as page:
        page.part("regions").locator(".label-wrap").first.click()
        frame = page.part("regions").locator(".pulid-frame[data-pulid]")
        frame.wait_for(state="visible")
        frame.scroll_into_view_if_needed()
        place = frame.bounding_box()

        def drag(start: tuple[float, float], end: tuple[float, float]) -> list[float]:
            for act, (x, y) in (("move", start), ("down", start), ("move", end), ("up", end)):
                at = (place["x"] + x * place["width"], place["y"] + y * place["height"]) if act == "move" else ()
                getattr(page.inner.mouse, act)(*at)
            return [float(number) for number in page.box(1).split()]

        drawn = drag((0.1, 0.1), (0.5, 0.9))
        expect(all(abs(a - b) < 0.02 for a, b in zip(drawn, (0.1, 0.1, 0.4, 0.8))), f"drawn: {drawn}")
        moved = drag((0.3, 0.5), (0.5, 0.5))
        expect(abs(moved[0] - 0.3) < 0.02 and moved[2:] == drawn[2:], f"moved: {moved}")
        page.keep(SCREENSHOTS, "regions", "#pulid_txt2img")
        frame.locator(".pulid-box").focus()
        page.inner.keyboard.press("Shift+ArrowRight")
        expect(float(page.box(1).split()[2]) > moved[2], f"resized: {page.box(1)}")
        page.generate()
        text, box = page.parameters(), page.box(1)
        expect(f"box: {box}" in text, f"below the image: {text}")
        frame.locator(".pulid-box").focus()
        page.inner.keyboard.press("Delete")
        expect(page.box(1) == "", f"removed: {page.box(1)}")
        return box


@rows.row("Page: a box by keys alone; one of a person without a photo is shown as having no effect")
def region_by_keys(host: Running) -> str:
    with at_work(host, "anna") as page:
        page.part("regions").locator(".label-wrap").first.click()
        frame = page.part("regions").locator(".pulid-frame[data-pulid]")
        frame.wait_for(state="visible")
        frame.focus()
        page.inner.keyboard.press("Enter")
        page.inner.keyboard.press("ArrowLeft")
        drawn = page.box(1)
        expect(drawn == "0.23 0.25 0.5 0.5", f"the box: {drawn}")
        page.find("#pulid_txt2img_units > .tab-nav button").nth(1).click()
        page.part("2_drop").wait_for(state="visible")
        frame.focus()
        page.inner.keyboard.press("Enter")
        unused = "[...document.querySelectorAll('.pulid-unused')].map((box) => box.dataset.person).join()"
        page.until(f"{unused} === '2'", "the second person's box is faded")
        page.inner.keyboard.press("Delete")
        expect(page.box(2) == "", f"removed: {page.box(2)}")
        expect(page.inner.evaluate("document.activeElement.className") == "pulid-frame", "the keyboard is elsewhere")
        return drawn


@rows.row("Page: send to img2img takes settings and person along")
def send(host: Running) -> str:
    with at_work(host, "anna") as page:
        page.set_number("1_weight", 0.65)
        page.generate()
        page.find("#txt2img_send_to_img2img, #image_buttons_txt2img #img2img_tab").first.click()
        page.tab = "img2img"
        page.until("(new Pulid('img2img')).isOn()", "PuLID is on in img2img")
        page.until("(new Pulid('img2img')).units()[0]?.text.includes('0.65')", "the weight in img2img")
        page.until("(new Pulid('img2img')).units()[0]?.ready", "the person in img2img")
        page.keep(SCREENSHOTS, "img2img", "#pulid_img2img")
        before = page.badge()
        ready(page)
        page.generate()
        expect("PuLID 1:" in page.parameters(), f"below the picture: {page.parameters()}")
        return before


@rows.row("Page: parameters pasted back give the same picture; the person is found again by the hash")
def paste(host: Running) -> str:
    made = host.api.txt2img(person(host, weight=0.65, start=0.25, preset="style"))
    with opened(host) as page:
        page.find("#txt2img_prompt textarea").fill(made.parameters[0])
        page.find("#txt2img_tools #paste, #paste").first.click()
        page.until("(new Pulid('txt2img')).isOn()", "it is on")
        page.until("(new Pulid('txt2img')).units()[0]?.text.includes('0.65')", "the weight")
        page.inner.wait_for_timeout(1500)  # the preset's own change of two sliders
        expect(page.number("1_start") == 0.25, f"start: {page.number('1_start')}")
        expect(page.number("1_num_zero") == 16, f"zero tokens: {page.number('1_num_zero')}")
        expect(page.chosen("1_projection") == "ortho", f"projection: {page.chosen('1_projection')}")
        image = page.generate()
        if host.kind == "neo":  # its page and its API differ without any extension, too
            page.drop("anna")
            equal(page.generate(), image, "the person found by the hash, and the photo")
            return page.badge()
        asked, used = (set(re.split(r"[,\n]\s*", text)) for text in (made.parameters[0], page.parameters()))
        equal(made.image, image, f"the pasted settings, which differ in {sorted(asked ^ used)}")
        return page.badge()


@rows.row("Page: PNG info of a picture, sent to txt2img")
def png_info(host: Running) -> None:
    made = host.api.txt2img(person(host, weight=0.55))
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", made.parameters[0])
    path = host.data / "kept.png"
    Image.fromarray(made.image).save(path, pnginfo=notes)
    with opened(host) as page:
        page.choose_tab("PNG Info")
        page.find("#pnginfo_image input[type=file]").set_input_files(path)
        page.until("gradioApp().querySelector('#tab_pnginfo').innerText.includes('PuLID 1')", "its parameters")
        page.find("#tab_pnginfo button").filter(has_text="txt2img").first.click()
        page.until("(new Pulid('txt2img')).isOn()", "it is on")
        page.until("(new Pulid('txt2img')).units()[0]?.text.includes('0.55')", "the weight")


@rows.row("Page: an identity is saved and chosen; in a page opened anew it is in the list after a refresh")
def identity(host: Running) -> str:
    with opened(host, on=True) as page:
        page.drop("ben")
        page.part("1_save_name").locator("input, textarea").first.fill("Ben from the page")
        page.part("1_save").click()
        page.until("gradioApp().querySelector('#pulid_txt2img_1_note').innerText.includes('Saved Ben')", "a note")
        expect(page.chosen("1_identity") == "Ben from the page", f"chosen: {page.chosen('1_identity')}")
        note = page.note()
        page.load()
        page.open()
        page.part("1_refresh").click()
        page.inner.wait_for_timeout(1000)
        page.choose(page.part("1_identity").locator("input").first, "Ben from the page")
        page.until("(new Pulid('txt2img')).units()[0]?.text.includes('Ben from the page')", "the badge")
        return note


@rows.row("Page: photos or a saved identity, whichever came last; a preview of what is gone goes, too")
def one_of_them(host: Running) -> str:
    shown = "gradioApp().querySelectorAll('#pulid_txt2img_1_{} img').length"
    chosen = "gradioApp().querySelector('#pulid_txt2img_1_identity input').value"
    with opened(host, on=True) as page:
        page.drop("anna")
        page.part("1_save_name").locator("input, textarea").first.fill("Anna then the next")
        page.part("1_save").click()
        page.until(f"{chosen} === 'Anna then the next' && !{shown.format('photos')}", "the identity counts")
        page.drop("ben")
        page.until(f"{chosen} === 'None' && {shown.format('photos')} === 1", "the next person's photo counts, alone")
        page.until("gradioApp().querySelector('#pulid_txt2img_1_note').innerText.includes('was deselected')", "a note")
        page.until("(new Pulid('txt2img')).units()[0].text.includes('1 photo')", "the badge")
        page.part("1_preview").click()
        page.until(f"{shown.format('shown')} === 3", "the preview")
        page.part("1_preview").click()
        page.part("1_remove_all").click()
        page.until(f"!{shown.format('photos')}", "no photo")
        page.inner.wait_for_timeout(15_000)  # the second preview comes late
        page.until(f"!{shown.format('shown')}", "no preview")
        return page.badge()


@rows.row("Page: an error is shown where one looks: no face in the photo")
def error(host: Running) -> str:
    with at_work(host, "nobody") as page:
        page.find("#txt2img_generate").click()
        page.until("document.body.innerText.includes('no face was found')", "the message")
        page.keep(SCREENSHOTS, "error")
        expect(not page.shown_picture(), "there is a picture")
        expect("base64," not in host.log_text(), "the photo is in the log")
        return page.parameters()[:200]


@rows.row("Page: out of memory in the middle of a picture: what helps is shown, and the next one comes")
def out_of_memory(host: Running) -> str:
    host.api.txt2img()  # the rows before may have ended with another denoiser
    with at_work(host, "anna") as page:
        host.api.post("/host-test/fail", {"place": "denoiser.forward", "call": 2, "after": False, "error": OOM})
        page.find("#txt2img_generate").click()
        page.until("document.body.innerText.includes('not enough memory')", "the message")
        expect(host.api.post("/host-test/fail", {})["came"], "nothing has failed")
        page.keep(SCREENSHOTS, "memory")
        said = page.parameters()[:200]
        page.generate()
        expect("PuLID 1:" in page.parameters(), f"below the next picture: {page.parameters()}")
    return said


@rows.row("Page: a preset moves the two settings behind it, a moved setting is called custom or by its name")
def presets(host: Running) -> None:
    with opened(host, on=True) as page:
        page.part("1_preset").locator("label").filter(has_text="fidelity").first.click()
        page.part("1_advanced").locator(".label-wrap").first.click()
        page.until(value("1_num_zero", "8"), "8 zero tokens")
        page.keep(SCREENSHOTS, "advanced", "#pulid_txt2img")
        page.set_number("1_num_zero", 33)
        page.until(f"{checked('1_preset')}?.value === 'custom'", "custom")
        page.set_number("1_num_zero", 20)
        page.until(f"{checked('1_preset')}?.value === 'v1.1'", "v1.1")


def value(name: str, text: str) -> str:
    return f"gradioApp().querySelector('#pulid_txt2img_{name} input[type=number]').value === '{text}'"


def checked(name: str) -> str:
    return f"gradioApp().querySelector('#pulid_txt2img_{name} input:checked')"


@rows.row("Page: with the keyboard: off and on, weight, generate")
def keyboard(host: Running) -> str:
    """The accordion itself is opened by a click: the hosts give its label no place among the keys."""
    with at_work(host, "anna") as page:
        page.part("").locator(".label-wrap input[type=checkbox]").first.focus()
        for state in ("!", ""):
            page.inner.keyboard.press("Space")
            page.until(f"{state}(new Pulid('txt2img')).isOn()", f"the space bar switches it {'off' if state else 'on'}")
        page.part("1_weight").locator("input[type=number]").first.focus()
        page.inner.keyboard.press("ArrowDown")
        page.inner.keyboard.press("Tab")
        page.until("(new Pulid('txt2img')).units()[0]?.text.includes('0.75')", "the weight goes down one step")
        page.find("#txt2img_prompt textarea").focus()
        page.inner.keyboard.press("Control+Enter")
        page.generated()
        expect("weight: 0.75" in page.parameters(), f"below the picture: {page.parameters()}")
        return page.badge()


@rows.row("Page: the button Reload UI: the page comes again, the same picture")
def reload(host: Running) -> None:
    with at_work(host, "anna") as page:
        before = page.generate()
        starts = host.log_text().count("Startup time")
        # What the link at the page's foot does.
        page.inner.evaluate("() => gradioApp().getElementById('settings_restart_gradio').click()")
        host.wait_until_ready(starts + 1, pause=lambda seconds: page.inner.wait_for_timeout(1000 * seconds))
        page.problems.clear()  # the old page has lost its server
    with at_work(host, "anna") as page:
        equal(before, page.generate(), "before and after")
