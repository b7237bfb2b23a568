"""Likeness per image, the best of several, blended and drawn people; the adapter's own recognizer judges."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from lib_pulid import miniature
from lib_pulid.identity import Identity
from tests.host.api import Pictures, pictures
from tests.host.page import opened
from tests.host.rows_errors import refused
from tests.host.rows_grid import grid
from tests.host.rows_miniature import BODY, unit, workshop
from tests.host.table import Rows, equal, expect
from tests.host.webui import Running

rows = Rows()
PEOPLE, SEEDS = range(3), (1, 2)
ENTRY = re.compile(r'PuLID likeness: "?([^"\n]*?)"?(?:, [A-Z]|$)', re.MULTILINE)


@contextlib.contextmanager
def measured(host: Running) -> Iterator[None]:
    host.api.options(pulid_likeness=True)
    try:
        yield
    finally:
        host.api.options(pulid_likeness=False)


def told(parameters: str) -> str:
    """What an image's parameters say."""
    found = ENTRY.search(parameters)
    expect(found is not None, f"no likeness in: {parameters}")
    return found[1]  # type: ignore[index]


def value(words: str) -> float:
    return 0.0 if words == "no face" else float(words)


@rows.row("Likeness: off, there is no entry, and the image is the same to the bit")
def off(host: Running) -> str:
    before = host.api.txt2img(unit(0), **BODY, seed=3)
    expect("likeness" not in before.parameters[0], before.parameters[0])
    with measured(host):
        with_number = host.api.txt2img(unit(0), **BODY, seed=3)
    after = host.api.txt2img(unit(0), **BODY, seed=3)
    expect("likeness" not in after.parameters[0], after.parameters[0])
    equal(before.image, after.image, "off again")
    equal(before.image, with_number.image, "measuring")
    return told(with_number.parameters[0])


@rows.row("Likeness: in each image's parameters over the API; higher with the face than at weight 0")
def each(host: Running) -> str:
    means = []
    with measured(host):
        for weight in (0.0, 1.0):
            asked = [host.api.txt2img({**unit(n), "weight": weight}, **BODY, seed=s) for n in PEOPLE for s in SEEDS]
            means.append(float(np.mean([value(told(made.parameters[0])) for made in asked])))
    expect(means[1] > means[0], f"{means[0]:.2f} at weight 0, {means[1]:.2f} at weight 1")
    return f"{means[0]:.2f} at weight 0, {means[1]:.2f} at weight 1"


@rows.row("Likeness: every image of a batch has its own")
def batch(host: Running) -> str:
    with measured(host):
        made = host.api.txt2img(unit(0), **BODY, seed=1, batch_size=2, n_iter=2)
    words = [told(text) for text in made.parameters[-4:]]
    expect(len(set(words)) > 1, f"all the same: {words}")
    return "; ".join(words)


def requested(host: Running, **changes: Any) -> tuple[Pictures, dict[str, Any]]:
    """Best 2 of 4. Returns the images, and the answer's info."""
    asked = BODY | {"seed": 11, "batch_size": 2, "n_iter": 2} | changes
    answer = host.api.try_txt2img({**unit(0), "keep_best": 2}, **asked)
    expect(answer.status == 200, f"{answer.status} {answer.text[:300]}")
    return pictures(answer), json.loads(answer.body["info"])


@rows.row("Likeness: the best 2 of 4 images are kept")
def best(host: Running) -> str:
    with measured(host):
        every = host.api.txt2img(unit(0), **BODY, seed=11, batch_size=2, n_iter=2)
    numbers = [value(told(text)) for text in every.parameters[-4:]]
    made, info = requested(host)
    expect(len(made.images) == len(made.parameters) == 2, f"{len(made.images)} images, {len(made.parameters)} texts")
    kept = [value(told(text)) for text in made.parameters]
    expect(sorted(kept) == sorted(numbers)[-2:], f"kept {kept} of {numbers}")
    seeds = [int(re.search(r"Seed: (\d+)", text)[1]) for text in made.parameters]  # type: ignore[index]
    expect(info["all_seeds"] == seeds, f"seeds {info['all_seeds']}, in the parameters {seeds}")
    for image, seed in zip(made.images, seeds):
        equal(image, every.images[-4:][seed - 11], f"the image of seed {seed}")
    return f"kept {kept} of {numbers}"


@rows.row("Likeness: images that are not kept lie in a folder beside the others")
def folder(host: Running) -> str:
    def saved(name: str) -> int:
        return sum(path.parent.name == name for path in host.data.rglob("*.png"))

    before = saved("not kept")
    requested(host, save_images=True, override_settings={"samples_save": True})
    found = saved("not kept") - before
    expect(found == 2, f"{found} images in the folder “not kept”")
    return f"{found} images"


def save_two(host: Running) -> None:
    """Saves blend-anna and blend-ben."""
    for number, name in enumerate(("blend-anna", "blend-ben")):
        path = host.identities / f"{name}.safetensors"
        if not path.is_file():
            workshop().identity([miniature.portrait(number)]).save(path)


@rows.row("Blend: on the page; a slider moved by keys sets both shares, and a wrong name loses nothing")
def blend_on_the_page(host: Running) -> str:
    save_two(host)
    with opened(host, on=True) as page:
        page.part("blend_panel").locator(".label-wrap").first.click()  # the list is read anew
        for name in ("blend-anna", "blend-ben"):
            page.choose(page.part("blend_people").locator("input").first, name)
            page.inner.wait_for_timeout(500)
        page.inner.keyboard.press("Escape")
        before = host.identities / "a person before them.safetensors"
        shutil.copy(host.identities / "blend-anna.safetensors", before)
        page.part("blend_refresh").click()
        page.inner.wait_for_timeout(2500)
        before.unlink()
        shown = page.part("blend_people").locator(".token").all_inner_texts()
        expect([text.strip() for text in shown] == ["blend-anna", "blend-ben"], f"chosen: {shown}")
        sliders = page.part("blend_shares").locator("input[type=range]")
        sliders.nth(1).wait_for(state="visible")
        sliders.first.focus()
        for _ in range(20):
            page.inner.keyboard.press("ArrowRight")
        shares = [text.strip() for text in page.part("blend_shares").locator("output").all_inner_texts()]
        expect(shares == ["70 %", "30 %"], f"the shares: {shares}")
        field, note = page.part("blend_name").locator("input, textarea").first, page.part("blend_note")
        for name, words in (("a/b", "contains /"), ("blend-anna", "already saved"), ("page blend", "Saved page blend")):
            field.fill(name)
            page.part("blend_save").click()
            page.until(f"gradioApp().querySelector('#pulid_txt2img_blend_note').innerText.includes('{words}')", words)
        expect(field.input_value() == "", f"the name: {field.input_value()}")
        path = host.identities / "page blend.safetensors"
        told = Identity.load(path).info["blend"]
        path.unlink()
        expect(told == "blend-anna 0.7, blend-ben 0.3", f"saved: {told}")
        return f"{told}; {note.inner_text()}"


@rows.row("Draw: without a folder in the settings a message, and no image; the API cannot name one")
def draw(host: Running) -> str:
    settings = {"pulid_photo_folder": str(host.photo("anna").parent)}
    for changes in ({}, {"override_settings": settings}):
        words = ["422", "no folder of photos to draw from is allowed"]
        seen = refused(host, words, {"draw": "random"}, **BODY, seed=1, **changes)
    return seen


@rows.row("Likeness: in the parameters of each cell of an X/Y/Z plot, and in the grid's cells")
def cells(host: Running) -> str:
    asked = grid(host, [("[PuLID 1] Weight", "0, 1")]) | BODY
    plain = host.api.txt2img(unit(0), **asked, seed=1)
    with measured(host):
        made = host.api.txt2img(unit(0), **asked, seed=1)
    equal(plain.images[-1], made.images[-1], "a cell's own image")
    changed = np.argwhere((plain.image != made.image).any(axis=-1))
    side = plain.images[-1].shape[1]
    columns = {int(x) // side for x in changed[:, 1]}
    expect(len(columns) >= 2, f"the grid is changed in columns {columns} of width {side}")
    words = [told(text) for text in made.parameters[-2:]]
    expect("likeness" not in made.parameters[0], f"the grid's own text: {made.parameters[0]}")
    return "; ".join(words)
