"""FLUX's own settings: start step, true CFG from a step on, presets, and what the page shows for which checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.host import rows_flux, rows_page
from tests.host.api import encoded
from tests.host.page import Page, opened
from tests.host.rows_basics import FAINT, person
from tests.host.table import Rows, close, differ, equal, expect
from tests.host.webui import FORGES, Running

rows = Rows()
STEPS = 6
FLUX = rows_flux.asked(height=128, steps=STEPS)
GUIDED = {**FLUX, "cfg_scale": 3.0, "negative_prompt": "blurry"}


def made(host: Running, *units: dict[str, Any], **asked: Any) -> np.ndarray:
    return host.api.txt2img(*units, **{**FLUX, **asked}).image


@rows.row("FLUX: start step n is step n, also with samplers of second order and in img2img", FORGES)
def start_step(host: Running) -> str:
    """The share of steps, which has rows of its own, tells the same step in other words."""
    plain, whole, seen = made(host), made(host, person(host)), []
    steps = [made(host, person(host, start_step=i)) for i in range(STEPS)]
    equal(steps[0], whole, "start step 0")
    for i in range(1, STEPS):
        equal(steps[i], made(host, person(host, start=i / STEPS)), f"start step {i} and start {i}/{STEPS}")
        differ(steps[i - 1], steps[i], f"start steps {i - 1} and {i}", FAINT)
        seen.append(f"{differ(plain, steps[i], f'start step {i} and without the face', FAINT):.1f}")
    for asked in ({"sampler_name": "Heun"}, {"sampler_name": "DPM2"}):
        equal(made(host, person(host, start_step=3), **asked), made(host, person(host, start=0.5), **asked), str(asked))
    picture = {**FLUX, "init_images": [encoded(plain)], "denoising_strength": 0.5, "steps": 9}  # of nine, five are made
    units = [person(host, **at) for at in ({"start_step": 2}, {"start": 0.4}, {"start": 0.2}, {"start": 0.6})]
    half = [host.api.img2img(unit, **picture).image for unit in units]
    equal(half[0], half[1], "img2img")
    for other in half[2:]:
        differ(half[0], other, "img2img, another step", FAINT)
    return "from 1 on, against without: " + ", ".join(seen)


@rows.row("FLUX: true CFG from a step on: as the host's own early steps without CFG, and CFG 1 if it is none", FORGES)
def cfg_start_step(host: Running) -> str:
    always = made(host, person(host), **GUIDED)
    first = made(host, person(host, cfg_start_step=1), **GUIDED)
    seen = differ(always, first, "the first step without the negative prompt", FAINT)
    if host.kind != "neo":  # whose own setting leaves the first step as it is
        try:
            host.api.options(skip_early_cond=0.01)  # of the steps; the first is 0 of them
            equal(first, made(host, person(host), **GUIDED), "Forge's own setting")
        finally:
            host.api.options(skip_early_cond=0.0)
    never = made(host, person(host, cfg_start_step=STEPS), **GUIDED)
    # With another layout of what is compiled, see `hires_guidance`.
    close(never, made(host, person(host), **{**GUIDED, "cfg_scale": 1.0}), "CFG 1", 0.001)
    two = [person(host, cfg_start_step=1, weight=0.5), person(host, "ben", weight=0.5)]
    equal(made(host, *two, **GUIDED), made(host, two[0], {**two[1], "cfg_start_step": 1}, **GUIDED), "the largest")
    plain = made(host, **GUIDED)
    for unit in (person(host, cfg_start_step=2, weight=0), person(host, cfg_start_step=2, enabled=False)):
        equal(plain, made(host, unit, **GUIDED), "a unit that does not act")
    equal(plain, made(host, **GUIDED), "afterwards")
    equal(always, made(host, person(host), **GUIDED), "afterwards, with the face")
    return f"{seen:.1f} of 255"


@rows.row("FLUX: hires fix with a CFG of its own: 1 and 3, 3 and 1", FORGES)
def hires_guidance(host: Running) -> str:
    """At CFG 1 nothing is compiled for negative rows; the other pass has to get it. What is compiled has another layout
    then, and in newer versions of torch another rounding."""
    asked: dict[str, Any] = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": host.api.upscaler, "steps": 4}
    asked |= {"denoising_strength": 0.7, "hr_second_pass_steps": 4, "hr_scheduler": "Simple"}
    asked |= {"hr_additional_modules": ["Use same choices"]}
    seen = []
    for first, second in ((1.0, 3.0), (3.0, 1.0)):
        scales = {"cfg_scale": first, "hr_cfg": second, "negative_prompt": "blurry"}
        face = made(host, person(host), **asked, **scales)
        late = made(host, person(host, cfg_start_step=20), **asked, **scales)
        without = made(host, person(host), **asked, **{**scales, "cfg_scale": 1.0, "hr_cfg": 1.0})
        close(late, without, f"{first:g} and {second:g}, without the negative prompt")
        seen.append(f"{differ(face, late, 'with the negative prompt', FAINT):.1f}")
    return ", ".join(seen)


SDXL_ONLY, FLUX_ONLY = ("projection", "num_zero"), ("start_step", "cfg_start_step")
PRESETS = {"sdxl": ["v1.1", "fidelity", "style", "neutral", "custom"], "flux": ["realistic", "stylized", "custom"]}


def choose(page: Page, checkpoint: str) -> None:
    page.choose(page.find(".model_selection input").first, f"{checkpoint}.safetensors")


def shows(page: Page, family: str, person: int = 1) -> None:
    """Waits until the page shows what this family has, and nothing else."""
    labels = f"[...gradioApp().querySelectorAll('#pulid_{page.tab}_{person}_preset label')]"
    names = f"{labels}.map((label) => label.innerText.trim())"
    page.until(f"JSON.stringify({names}) === JSON.stringify({PRESETS[family]})", f"the presets of {family}")
    for own, names_of in (("sdxl", SDXL_ONLY), ("flux", FLUX_ONLY)):
        for name in names_of:
            visible = page.part(f"{person}_{name}").is_visible()
            expect(visible == (own == family), f"{family}: {name} is {'shown' if visible else 'hidden'}")


@rows.row("Page: the accordion shows what the chosen checkpoint's family has, and moves the weight with it", FORGES)
def follows(host: Running) -> str:
    with opened(host) as page:
        page.open(advanced=True)
        page.drop("anna")
        choose(page, "tiny-sdxl")  # the rows before may have ended with FLUX
        shows(page, "sdxl")
        page.keep(rows_page.SCREENSHOTS, "sdxl", "#pulid_txt2img")
        choose(page, "tiny-flux")
        shows(page, "flux")
        page.until(rows_page.value("1_weight", "1"), "weight 1")
        expect(page.part("1_preset").locator("input:checked").get_attribute("value") == "stylized", "the preset")
        page.keep(rows_page.SCREENSHOTS, "flux", "#pulid_txt2img")
        page.part("1_preset").locator("label").filter(has_text="realistic").first.click()
        page.until(rows_page.value("1_start_step", "4"), "start step 4")
        page.set_number("1_start_step", 2)
        page.until(f"{rows_page.checked('1_preset')}?.value === 'custom'", "custom")
        page.set_number("1_start_step", 4)
        page.until(f"{rows_page.checked('1_preset')}?.value === 'realistic'", "realistic")
        badge = page.badge()
        choose(page, "tiny-sdxl-b")
        shows(page, "sdxl")
        page.until(rows_page.value("1_weight", "0.8"), "weight 0.8")
        page.set_number("1_weight", 0.65)
        choose(page, "tiny-flux")
        shows(page, "flux")
        expect(page.number("1_weight") == 0.65, f"a weight that was set: {page.number('1_weight')}")
        expect(page.number("1_start_step") == 4, f"start step: {page.number('1_start_step')}")
    with opened(host) as page:  # opened anew, with FLUX chosen
        page.open(advanced=True)
        shows(page, "flux")
        expect(page.number("1_weight") == 1, f"weight: {page.number('1_weight')}")
        page.choose_tab("img2img")
        page.open(advanced=True)
        shows(page, "flux")
        choose(page, "tiny-sd15")
        page.part("1_num_zero").wait_for(state="visible")
        expect(page.part("1_start_step").is_visible(), "neither SDXL nor FLUX: both are shown")
        choose(page, "tiny-sdxl")
        shows(page, "sdxl")
    return badge


@rows.row("Page: parameters of a FLUX picture pasted back give the same picture", FORGES)
def paste(host: Running) -> str:
    unit = person(host, preset="realistic", cfg_start_step=2, weight=0.9)
    asked = {**GUIDED, "scheduler": "Simple"}
    picture = host.api.txt2img(unit, **asked)
    with opened(host) as page:
        choose(page, "tiny-flux")
        page.find("#txt2img_prompt textarea").fill(picture.parameters[0])
        page.find("#txt2img_tools #paste, #paste").first.click()
        page.until("(new Pulid('txt2img')).units()[0]?.text.includes('0.9')", "the weight")
        page.inner.wait_for_timeout(1500)  # the preset's own change of a slider
        for name, wanted in (("1_start_step", 4), ("1_cfg_start_step", 2)):
            expect(page.number(name) == wanted, f"{name}: {page.number(name)}")
        image = page.generate()
        if host.kind == "neo":  # its page and its API differ without any extension, too
            page.drop("anna")
            equal(page.generate(), image, "the person found by the hash, and the photo")
        else:
            equal(picture.image, image, "the pasted settings")
        choose(page, "tiny-sdxl")
        return page.badge()
