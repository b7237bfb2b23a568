"""What PuLID has to work beside: the host's own features."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from tests.host.api import Answer, encoded, pictures
from tests.host.rows_basics import ANNA, FAINT, Make
from tests.host.rows_batches import WEIGHT
from tests.host.rows_errors import refused
from tests.host.table import Rows, Skipped, close, differ, distance, equal, expect, nothing_left
from tests.host.webui import FORGES, Running

rows = Rows()
MILD = {**ANNA, "weight": WEIGHT}
STRONG = {**ANNA, "weight": 2.0}
SMALL = {"width": 128, "height": 128}


rows.add({
    "Batch count and batch size: each picture is the one made alone":
        lambda host: alone_and_together(partial(host.api.txt2img, MILD, **SMALL)),
    "Hires fix: both passes, first, second; weight 0 bit-identical":
        lambda host: each_pass(partial(host.api.txt2img, **hires(host)), STRONG, FAINT),
    "LoRA on the layers that PuLID reads":
        lambda host: with_lora(host.api.txt2img, MILD, "a photo of a cat <lora:tiny-lora:0.5>"),
    "Interrupt: the host's answer, then the baseline, nothing left": lambda host: stopped(host, "interrupt", steps=60),
    "Skip: the host's answer, then the baseline, nothing left": lambda host: stopped(host, "skip", steps=40, n_iter=2),
})  # fmt: skip


def alone_and_together(make: Make) -> str:
    alone = [make(seed=seed).image for seed in range(1, 5)]
    together = make(n_iter=2, batch_size=2).images[-4:]
    return f"{max(close(a, b, 'alone and in a batch') for a, b in zip(alone, together)):.3f} of 255"


def hires(host: Running, **changes: Any) -> dict[str, Any]:
    body = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": host.api.upscaler, "denoising_strength": 0.9}
    body |= {"hr_second_pass_steps": 4, **SMALL}
    if host.kind in FORGES:
        body["hr_additional_modules"] = ["Use same choices"]
    return body | changes


def each_pass(make: Make, unit: dict[str, Any], least: float) -> str:
    made = {"none": make().image}
    made |= {name: make({**unit, "hires": name}).image for name in ("both", "first", "second")}
    equal(made["none"], make({**unit, "weight": 0}).image, "weight 0")
    pairs = [(a, b) for a in made for b in made if a < b]
    return ", ".join(f"{a}/{b} {differ(made[a], made[b], f'{a} and {b}', least):.1f}" for a, b in pairs)


@rows.row("Checkpoint switch in the middle: another SDXL checkpoint for the hires pass")
def hires_checkpoint(host: Running) -> str:
    asked = hires(host, hr_checkpoint_name="tiny-sdxl-b.safetensors")
    plain, both = host.api.txt2img(**asked).image, host.api.txt2img(STRONG, **asked).image
    first = host.api.txt2img({**STRONG, "hires": "first"}, **asked).image
    differ(both, first, "the second pass has the face", FAINT)
    return f"{differ(plain, both, 'with and without'):.1f}"


@rows.row("Checkpoint switch in the middle: to Stable Diffusion 1.5: a message, no picture")
def hires_sd15(host: Running) -> str:
    seen = refused(host, ["tiny-sd15"], MILD, **hires(host, hr_checkpoint_name="tiny-sd15.safetensors"))
    nothing_left(host, {"hooks": 0}, "hooks")
    return seen


@rows.row("Checkpoint switch between runs, and back")
def between_runs(host: Running) -> None:
    first = host.api.txt2img(MILD).image
    other = {"sd_model_checkpoint": "tiny-sdxl-b.safetensors"}
    plain, face = host.api.txt2img(override_settings=other).image, host.api.txt2img(MILD, override_settings=other).image
    differ(plain, face, "the other checkpoint, with and without")
    equal(first, host.api.txt2img(MILD).image, "back")


@rows.row("Refiner: another SDXL checkpoint from half of the steps on")
def refiner(host: Running) -> str:
    asked = {"refiner_checkpoint": "tiny-sdxl-b.safetensors", "refiner_switch_at": 0.5, "steps": 6}
    plain, whole = host.api.txt2img(**asked).image, host.api.txt2img(STRONG, **asked).image
    before = host.api.txt2img({**STRONG, "end": 0.5}, **asked).image
    after = host.api.txt2img({**STRONG, "start": 0.5}, **asked).image
    differ(plain, after, "the face after the switch only", FAINT)
    differ(whole, before, "the face before the switch only", FAINT)
    return f"{differ(plain, whole, 'with and without'):.1f}"


@rows.row("Refiner: SDXL's own: the face until the switch, or a message; not a picture without the face in silence")
def own_refiner(host: Running) -> str:
    asked = {"refiner_checkpoint": "tiny-refiner.safetensors", "refiner_switch_at": 0.5, "steps": 6}
    alone = host.api.try_txt2img(**asked)
    if alone.status >= 400:
        raise Skipped(f"without PuLID, too, this program cannot use it: {alone.text[:200]}")
    plain = pictures(alone).image
    equal(plain, host.api.txt2img({**MILD, "weight": 0}, **asked).image, "weight 0")
    refused(host, ["422", "refiner takes over before"], {**MILD, "start": 0.8}, **asked)
    answer = host.api.try_txt2img(MILD, **asked)
    if answer.status >= 400:
        expect("refiner" in answer.text, f"{answer.status}: {answer.text[:300]}")
        return f"{answer.status} {answer.text[:300]}"
    return f"made, {differ(plain, host.api.txt2img(MILD, **asked).image, 'with and without'):.1f}"


@rows.row("Prompt editing")
def prompt_editing(host: Running) -> str:
    plain = host.api.txt2img(MILD, prompt="a cat").image
    close(plain, host.api.txt2img(MILD, prompt="a [cat:cat:0.5]").image, "edited to the same", 0.01)
    edited = host.api.txt2img(MILD, prompt="a [cat:dog and a house:0.25]").image
    differ(plain, edited, "edited", FAINT)
    without = host.api.txt2img(prompt="a [cat:dog and a house:0.25]").image
    return f"{differ(edited, without, 'with and without'):.1f}"


@rows.row("Every sampler of the host")
def samplers(host: Running) -> str:
    """The Forges list samplers for FLUX and other rectified flows (RF), too; they are left out."""
    names = [one["name"] for one in host.api.get("/sdapi/v1/samplers")]
    names = [name for name in names if "flux" not in name.lower() and "RF" not in name.split()]
    failed, least = [], 255.0
    for name in names:
        asked = {"sampler_name": name, "steps": 3, **SMALL}
        plain, answer = host.api.try_txt2img(**asked), host.api.try_txt2img(MILD, **asked)
        if plain.status >= 400:  # not for this model or machine, with or without us
            continue
        if answer.status >= 400:
            failed.append(f"{name}: {answer.status} {answer.text[:200]}")
            continue
        found = distance(*(pictures(one).image for one in (plain, answer)))
        least = min(least, found)
        if found < 0.5:
            failed.append(f"{name}: {found:.2f}")
    expect(not failed, "; ".join(failed))
    return f"{len(names)} samplers, least difference {least:.1f}"


@rows.row("Start and end with samplers of second order: half of the steps is half of the steps")
def second_order(host: Running) -> None:
    for name in ("Heun", "DPM2", "DPM++ SDE"):
        asked = {"sampler_name": name, "steps": 4, **SMALL}
        plain, whole = host.api.txt2img(**asked).image, host.api.txt2img(STRONG, **asked).image
        for part in ({"start": 0.5}, {"end": 0.5}):
            made = host.api.txt2img({**STRONG, **part}, **asked).image
            differ(plain, made, f"{name}, {part} and without", FAINT)
            differ(whole, made, f"{name}, {part} and all steps", FAINT)


@rows.row("Every attention optimisation of the host", ("a1111",))
def attention(host: Running) -> str:
    names = ["None", *host.api.get("/host-test/optimisations")]
    made = {}
    try:
        for name in names:
            host.api.options(cross_attention_optimization=name)
            made[name] = (host.api.txt2img().image, host.api.txt2img(MILD).image)
    finally:
        host.api.options(cross_attention_optimization="Automatic")
    plain, face = made["None"]
    for name, (other_plain, other_face) in made.items():
        close(plain, other_plain, f"{name}, without the face")
        close(face, other_face, f"{name}, with the face")
    differ(plain, face, "with and without")
    return ", ".join(names)


def with_lora(make: Make, unit: dict[str, Any], prompt: str) -> str:
    plain, face = make().image, make(unit).image
    alone, both = make(prompt=prompt).image, make(unit, prompt=prompt).image
    differ(plain, alone, "the LoRA alone", 0.3)
    equal(alone, make(prompt=prompt).image, "the LoRA alone, after the face")
    equal(face, make(unit).image, "the face alone, after the LoRA")
    return f"face {differ(alone, both, 'LoRA and both', 0.3):.1f}, LoRA {differ(face, both, 'face and both', 0.3):.1f}"


def while_sampling(host: Running, button: str, steps: int, make: Callable[[], Answer]) -> tuple[Answer, bool]:
    """Starts a generation of so many steps and presses a button in the middle. Whether that was in time."""
    pressed = False
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(make)
        while not run.done() and not pressed:
            state = host.api.get("/sdapi/v1/progress?skip_current_image=true")["state"]
            if state["sampling_step"] > 1 and state["sampling_steps"] == steps:
                host.api.post(f"/sdapi/v1/{button}")
                pressed = True
            time.sleep(0.02)
    return run.result(), pressed


def while_making(host: Running, *units: dict[str, Any], **asked: Any) -> tuple[Answer, list[dict[str, Any]]]:
    """A generation, and what the host's progress route says of it all the while."""
    told: list[dict[str, Any]] = []
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(host.api.try_txt2img, *units, **asked)
        while not run.done():
            told.append(host.api.get("/sdapi/v1/progress"))
            time.sleep(0.05)
    return run.result(), told


@rows.row("The progress line says what PuLID does while a new photo is read")
def progress_line(host: Running) -> str:
    fresh = np.array(Image.open(host.photo("ben")).convert("RGB"))
    fresh[:8] = np.random.default_rng().integers(0, 255, 3)
    answer, told = while_making(host, {"images": [encoded(fresh)]})
    expect(answer.has_picture, f"{answer.status}: {answer.text[:300]}")
    lines = list(dict.fromkeys(str(one.get("textinfo") or "") for one in told))
    ours = [line for line in lines if line.startswith("PuLID")]
    expect(bool(ours), f"the line said: {lines}")
    expect(not str(host.api.get("/sdapi/v1/progress").get("textinfo") or ""), "it is still there afterwards")
    return "; ".join(ours)


@rows.row("Live previews: the same picture")
def live_previews(host: Running) -> str:
    usual = host.api.txt2img(MILD, steps=8).image
    host.api.options(live_previews_enable=True, show_progress_every_n_steps=1)
    try:
        answer, told = while_making(host, MILD, steps=8)
    finally:
        host.api.options(live_previews_enable=False)
    equal(usual, pictures(answer).image, "with previews")
    shown = {one["current_image"] for one in told} - {None, ""}
    expect(len(shown) > 1, f"{len(shown)} previews were seen")
    return f"{len(shown)} previews were seen"


def stopped(host: Running, button: str, **changes: Any) -> str:
    plain, before = host.api.txt2img().image, host.api.state() | {"hooks": 0}
    start = time.monotonic()
    answer, pressed = while_sampling(host, button, changes["steps"], lambda: host.api.try_txt2img(MILD, **changes))
    seconds = time.monotonic() - start
    expect(pressed and answer.status < 400, f"{answer.status}: {answer.text[:300]}")
    nothing_left(host, before, "hooks", "callbacks")
    equal(plain, host.api.txt2img().image, f"after {button}")
    return f"answered after {seconds:.1f} s"


@rows.row("Reload UI: the same pictures before and after, nothing doubled")
def reload_ui(host: Running) -> None:
    plain, face = host.api.txt2img().image, host.api.txt2img(MILD).image
    starts = host.log_text().count("Startup time")
    host.api.post("/host-test/reload-ui")
    host.wait_until_ready(starts + 1)
    time.sleep(1)
    equal(face, host.api.txt2img(MILD).image, "with the face")
    equal(plain, host.api.txt2img().image, "without")
    nothing_left(host, {"hooks": 0}, "hooks")
