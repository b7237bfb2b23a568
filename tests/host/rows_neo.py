"""What Forge Neo alone has: Kontext's reference, FLUX.2 Klein, torch.compile as a setting, presets for its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.host.api import encoded
from tests.host.page import opened
from tests.host.rows_flux import MILD as FLUX_MILD
from tests.host.rows_flux import asked, expect_sites
from tests.host.rows_flux_settings import choose, shows
from tests.host.rows_img2img import repeated, scene
from tests.host.rows_works_with import MILD
from tests.host.table import Rows, Skipped, close, differ, equal, expect
from tests.host.webui import Running

rows = Rows()
NEO = ("neo",)
SITES = 20  # 10 + 10


@rows.row("FLUX Kontext: the picture's own tokens get the face, those of the reference nothing", NEO)
def kontext(host: Running) -> str:
    """The picture that img2img begins with is the reference, packed 2 x 2 of its latent to a token."""
    size, rng = {"width": 128, "height": 64}, np.random.default_rng(1)
    body = asked("tiny-kontext.safetensors", init_images=[encoded(scene())], denoising_strength=1.0, **size)
    plain = repeated(host, **body)
    other = [encoded(rng.integers(0, 255, (64, 128, 3), np.uint8))]
    differ(plain, host.api.img2img(**body | {"init_images": other}).image, "another reference", 0.02)
    host.api.post("/host-test/watch")
    face = host.api.img2img(FLUX_MILD, **body).image
    seen = expect_sites(host.api.get("/host-test/watch"), missed=SITES * 8 * 4)
    equal(plain, host.api.img2img({**FLUX_MILD, "weight": 0}, **body).image, "weight 0")
    return f"{differ(plain, face, 'with and without'):.1f}; {seen}, of 64 tokens 32 with the face"


@rows.row("Refused: FLUX.2 Klein, which has the class of FLUX.1", NEO)
def klein(host: Running) -> str:
    said = host.api.get("/host-test/klein")["said"]
    expect("FLUX.2" in said and "PuLID" in said, said)
    return said


@rows.row("The host's own torch.compile: the face as without it, or a message", NEO)
def compiled(host: Running) -> str:
    """With the graph as it is traced, and the backend that runs it as it stands: inductor takes minutes on a CPU."""
    script = next(
        (name for name in host.api.get("/sdapi/v1/scripts")["txt2img"] if "compil" in name or "编译" in name), ""
    )
    if not script:
        raise Skipped("it is not there: triton is missing")

    def asking(choice: str) -> dict[str, Any]:
        return {"alwayson_scripts": {script: {"args": [choice]}}}

    plain, face = host.api.txt2img().image, host.api.txt2img(MILD).image
    host.api.post("/host-test/compile", {"backend": "eager"})
    try:
        close(plain, host.api.txt2img(**asking("guard_filter_fn")).image, "compiled, without the face")
        answer = host.api.try_txt2img(MILD, **asking("guard_filter_fn"))
        if answer.status >= 400:
            expect("compile" in answer.text, f"{answer.status}: {answer.text[:300]}")
            seen = f"{answer.status} {answer.text[:200]}"
        else:
            made = host.api.txt2img(MILD, **asking("guard_filter_fn")).image
            seen = f"the face as without it, by {close(face, made, 'compiled, with the face'):.3f} of 255"
    finally:
        host.api.txt2img(**asking("Disable"))
        host.api.post("/host-test/compile", {"backend": ""})
    equal(face, host.api.txt2img(MILD).image, "afterwards, with the face")
    return seen


@rows.row("The folder for temporary images, which the host itself does not make, is there", NEO)
def temporary(host: Running) -> None:
    folder = host.api.get("/sdapi/v1/options")["temp_dir"]
    expect(bool(folder) and Path(folder).is_dir(), f"temp_dir: {folder}")


@rows.row("Page: the host's presets choose another checkpoint, and the accordion follows", NEO)
def presets(host: Running) -> None:
    def preset(name: str) -> None:
        page.choose(page.find("#forge_ui_preset input").first, name)
        page.inner.wait_for_timeout(1000)

    with opened(host) as page:
        page.open(advanced=True)
        for name, checkpoint, family in (("xl", "tiny-sdxl", "sdxl"), ("flux", "tiny-flux", "flux")):
            preset(name)
            choose(page, checkpoint)
            shows(page, family)
        preset("xl")
        shows(page, "sdxl")
        preset("flux")
        shows(page, "flux")
        choose(page, "tiny-sdxl")
        shows(page, "sdxl")
