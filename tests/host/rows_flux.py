"""FLUX in Forge: what the SDXL rows ask, of a transformer."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from tests.host import rows_img2img
from tests.host.api import Pictures, encoded
from tests.host.rows_basics import leaves_nothing, off_is_the_baseline, person, photo_acts
from tests.host.rows_batches import LONG, halves, mirror
from tests.host.rows_img2img import from_a_picture, scene
from tests.host.rows_works_with import alone_and_together, each_pass, stopped, with_lora
from tests.host.table import Rows, close, differ, equal, expect, more_on_the_left
from tests.host.webui import FORGES, Running

rows = Rows()
MILD = {"identity": "marked A", "weight": 0.5}
CHECKPOINT = "tiny-flux.safetensors"
FAINT = 0.02
STEPS = 2  # with 256 tokens of text at least, FLUX is slow


def asked(checkpoint: str = CHECKPOINT, **changes: Any) -> dict[str, Any]:
    """A request for a small picture; Forge's API needs the scheduler's name, its default gives NaN with FLUX."""
    settings = {"sd_model_checkpoint": checkpoint} | changes.pop("override_settings", {})
    body = {"override_settings": settings, "scheduler": "Simple", "cfg_scale": 1.0, "negative_prompt": ""}
    return body | {"width": 128, "height": 96, "steps": STEPS} | changes


def flux(host: Running, *units: Any, **changes: Any) -> Pictures:
    make = host.api.img2img if "init_images" in changes else host.api.txt2img
    made = make(*units, **asked(**changes))
    expect(made.image.std() > 1, "the picture is of one colour")  # NaN gives black
    return made


def sites_of(host: Running, *units: Any, **changes: Any) -> list[dict[str, Any]]:
    """Of each denoiser call: its rows, the blocks after which something was added to the image, how often something was
    added to the text, and how many tokens of the image got nothing where the others got something."""
    flux(host, **changes)  # the checkpoint is loaded now
    host.api.post("/host-test/watch")
    flux(host, *units, **changes)
    return host.api.get("/host-test/watch")


def expect_sites(calls: list[dict[str, Any]], count: int | None = None, missed: int = 0) -> str:
    wanted = {"double": [*range(0, 19, 2)], "single": [*range(0, 38, 4)], "text": 0, "missed": missed}
    for call in calls:
        found = {name: call[name] for name in wanted}
        expect(found == wanted, f"{found} instead of {wanted}")
    expect(bool(calls) and count in (None, len(calls)), f"{len(calls)} calls instead of {count}")
    return f"{len(calls)} calls with 10 + 10 each"


rows.add({
    "FLUX: a photo changes the picture; the same request gives the same picture":
        lambda host: photo_acts(host, partial(flux, host), 0.1, weight=1),
    "FLUX: weight 0, a unit that is off, the accordion off, the next run: bit-identical to the baseline":
        lambda host: off_is_the_baseline(host, partial(flux, host)),
    "FLUX: no hook, callback or patch is left after a run":
        lambda host: leaves_nothing(host, partial(flux, host), MILD),
    "FLUX: AND: two equal halves are the whole prompt":
        lambda host: halves(partial(flux, host, MILD, cfg_scale=3.0, negative_prompt="blurry")),
    "FLUX: positive and negative rows: batch of 3": lambda host: true_cfg(host, batch_size=3),
    "FLUX: batch count and batch size: each picture is the one made alone":
        lambda host: alone_and_together(partial(flux, host, MILD)),
    "FLUX: hires fix: both passes, first, second; weight 0 bit-identical":
        lambda host: each_pass(partial(host.api.txt2img, **hires(host)), {**MILD, "weight": 2.0}, FAINT),
    "FLUX: img2img; weight 0 bit-identical": lambda host: from_a_picture(host, MILD, **asked(denoising_strength=0.8)),
    "FLUX: LoRA on double and single blocks: both act; alone, each is what it was, to the bit":
        lambda host: with_lora(partial(flux, host), MILD, "a photo of a cat <lora:tiny-flux-lora:0.3>"),
}, FORGES)  # fmt: skip


@rows.row("FLUX: 10 + 10 injections per forward, after the blocks of the official code, none on the text", FORGES)
def sites(host: Running) -> str:
    expect_sites(sites_of(host, MILD), count=STEPS)
    without = sites_of(host)
    expect(not any(call["double"] or call["single"] for call in without), f"without PuLID: {without[0]}")
    return expect_sites(sites_of(host, MILD, batch_size=2, cfg_scale=3.0))


@rows.row("FLUX: distilled guidance, one pass: the negative tokens do not matter; the guidance does", FORGES)
def distilled(host: Running) -> str:
    calls = sites_of(host, MILD)
    expect([call["rows"] for call in calls] == [1] * STEPS, f"rows: {[call['rows'] for call in calls]}")
    equal(flux(host, MILD).image, flux(host, {**MILD, "identity": "marked C"}).image, "other negative tokens")
    other = flux(host, MILD, distilled_cfg_scale=1.5).image
    return f"{differ(flux(host, MILD).image, other, 'distilled guidance 3.5 and 1.5', FAINT):.1f} by the guidance"


def true_cfg(host: Running, **changes: Any) -> str:
    return mirror(host, **{**asked(), "negative_prompt": "blurry", "cfg_scale": 3.0} | changes)


@rows.row("FLUX: positive and negative rows: one call", FORGES)
def together(host: Running) -> str:
    seen = {call["rows"] for call in sites_of(host, MILD, cfg_scale=3.0, negative_prompt="blurry")}
    expect(seen == {2}, f"rows per call: {seen}")
    return true_cfg(host)


@rows.row("FLUX: positive and negative rows: two calls, text of uneven length", FORGES)
def uneven(host: Running) -> str:
    long = LONG * 3  # beyond T5's 256 tokens
    calls = sites_of(host, MILD, cfg_scale=3.0, prompt=long)
    expect_sites(calls, count=2 * STEPS)
    expect(all(call["rows"] == 1 for call in calls), f"rows per call: {[call['rows'] for call in calls]}")
    return true_cfg(host, prompt=long)


@rows.row("FLUX: sizes that are not divisible by 16, with a region", FORGES)
def odd_sizes(host: Running) -> str:
    """33 x 41 latent pixels are 17 x 21 packs, the last ones filled up from the other side."""
    seen = []
    for width, height in ((264, 328), (136, 104)):
        size = {"width": width, "height": height}
        expect_sites(sites_of(host, MILD, **size))
        plain, face = flux(host, **size).image, flux(host, MILD, **size).image
        everywhere = flux(host, {**MILD, "mask": encoded(np.full((8, 8, 3), 255, np.uint8))}, **size).image
        close(face, everywhere, "a region that is the whole picture", 0.01)
        seen.append(f"{plain.shape[1]}x{plain.shape[0]}: {differ(plain, face, 'with and without'):.1f}")
    return ", ".join(seen)


def hires(host: Running, **changes: Any) -> dict[str, Any]:
    """At a higher denoising strength the second pass begins with noise alone."""
    body = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": host.api.upscaler, "denoising_strength": 0.5}
    body |= {"hr_second_pass_steps": STEPS, "hr_cfg": 1.0, "hr_additional_modules": ["Use same choices"]}
    return asked(**(body | {"hr_scheduler": "Simple"} | changes))


@rows.row("FLUX: hires fix from SDXL to FLUX, from FLUX to SDXL, and back again: the face in both passes", FORGES)
def hires_switch(host: Running) -> str:
    """The pass with the other model needs a picture to begin with, not a latent."""
    unit, sdxl, seen, made = person(host, weight=1.5), "tiny-sdxl.safetensors", [], []
    for first, second in ((sdxl, CHECKPOINT), (CHECKPOINT, sdxl)):
        body = hires(host, checkpoint=first, hr_checkpoint_name=second, hr_upscaler=host.api.image_upscaler)
        plain, both = host.api.txt2img(**body).image, host.api.txt2img(unit, **body).image
        only_first = host.api.txt2img({**unit, "hires": "first"}, **body).image
        differ(both, only_first, "the face in the second pass", FAINT)
        differ(plain, only_first, "the face in the first pass", FAINT)
        seen.append(f"{first[5:9]} to {second[5:9]} {differ(plain, both, 'with and without'):.1f}")
        made.append((body, both))
    equal(made[0][1], host.api.txt2img(unit, **made[0][0]).image, "from SDXL to FLUX again")
    return ", ".join(seen)


@rows.row("FLUX: inpaint, whole picture and only masked", FORGES)
def inpaint(host: Running) -> str:
    body = asked(width=192, height=128)
    return " and ".join(rows_img2img.inpaint(host, only_masked, MILD, **body) for only_masked in (False, True))


@rows.row("FLUX: two persons in two regions", FORGES)
def regions(host: Running) -> str:
    left = np.zeros((96, 128, 3), np.uint8)
    left[:, :64] = 255
    units = [{**MILD, "identity": f"marked {n}", "mask": encoded(m)} for n, m in (("A", left), ("B", 255 - left))]
    plain, first, second, both = (flux(host, *some).image for some in ([], units[:1], units[1:], units))
    for picture in (first, second):
        differ(both, picture, "both and one", 0.3)
    return f"left: {more_on_the_left(plain, first)}; right: {more_on_the_left(plain, second, sign=-1)}"


@rows.row("FLUX: interrupt: the host's answer, then the baseline, nothing left", FORGES)
def interrupt(host: Running) -> str:
    plain = flux(host).image
    seen = stopped(host, "interrupt", **asked(steps=60))
    equal(plain, flux(host).image, "after the interrupt")
    return seen


@rows.row("FLUX: MultiDiffusion beside it; regions, which tiles cannot place, are refused", FORGES)
def tiles(host: Running) -> str:
    """Tiles of 64 x 96 pixels, four at a time. Neo has them in img2img only."""
    seen = []
    body = {"init_images": [encoded(scene())], "denoising_strength": 0.8} if host.kind == "neo" else {}
    for method in ("MultiDiffusion", "Mixture of Diffusers"):
        tiled = body | {"alwayson_scripts": {"MultiDiffusion Integrated": {"args": [True, method, 64, 96, 32, 4]}}}
        plain = flux(host, **tiled).image
        face = flux(host, MILD, **tiled).image
        calls = sites_of(host, MILD, **tiled)
        expect_sites(calls)
        expect(all(call["rows"] == 3 for call in calls), f"rows per call: {[call['rows'] for call in calls]}")
        differ(face, flux(host, MILD, **body).image, "with and without tiles", 0.3)
        seen.append(f"{method} {differ(plain, face, 'with and without'):.1f}")
    region = {**MILD, "mask": encoded(np.full((8, 8, 3), 200, np.uint8))}
    send = host.api.try_img2img if body else host.api.try_txt2img
    answer = send(region, **asked(**tiled))
    expect(answer.status == 422 and "MultiDiffusion" in answer.text, f"{answer.status}: {answer.text[:300]}")
    return ", ".join(seen)
