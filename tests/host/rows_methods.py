"""InstantID, IP-Adapter and FaceID in a real host: each changes the image, rows are right, off is the baseline."""

from __future__ import annotations

from typing import Any

from tests.host.models.methods import FILES
from tests.host.rows_basics import person
from tests.host.rows_batches import mirror
from tests.host.table import Rows, differ, equal, expect
from tests.host.webui import Running

rows = Rows()
SEEN = 0.3  # of 255


def one(host: Running, kind: str, name: str = "anna", **settings: Any) -> dict[str, Any]:
    return person(host, name, model=FILES[kind], **settings)


@rows.row("Each method: a photo changes the picture, twice the same, another person another; weight 0 and the next run "
          "are the baseline to the bit")  # fmt: skip
def each(host: Running) -> str:
    plain, seen = host.api.txt2img().image, []
    for kind in FILES:
        made = host.api.txt2img(one(host, kind)).image
        seen.append(f"{kind} {differ(plain, made, kind, SEEN):.1f}")
        equal(made, host.api.txt2img(one(host, kind)).image, f"{kind}, twice")
        differ(made, host.api.txt2img(one(host, kind, "ben")).image, f"{kind}, another person", 0.01)
        equal(plain, host.api.txt2img(one(host, kind, weight=0)).image, f"{kind}, weight 0")
        equal(plain, host.api.txt2img().image, f"{kind}, the next run")
    return ", ".join(seen)


@rows.row("InstantID, positive and negative rows: one call, a batch of 2, uneven prompts")
def both_rows(host: Running) -> str:
    people = ("marked I", "marked J")
    ways: tuple[dict[str, Any], ...] = ({}, {"batch_size": 2}, {"prompt": "a very detailed photo of a cat, " * 20})
    return "; ".join(mirror(host, people=people, **way) for way in ways)


@rows.row("FaceID's LoRA acts by its strength, and is undone: no hook, the next picture is the baseline to the bit")
def lora(host: Running) -> str:
    before = host.api.txt2img().image
    full = host.api.txt2img(one(host, "face_id")).image
    none = host.api.txt2img(one(host, "face_id", lora_weight=0)).image
    half = host.api.txt2img(one(host, "face_id", lora_weight=0.5)).image
    expect(host.api.state()["hooks"] == 0, f"{host.api.state()['hooks']} hooks are left")
    equal(before, host.api.txt2img().image, "the next picture")
    differ(none, half, "strengths 0 and 0.5", SEEN)
    return f"{differ(none, full, 'strengths 0 and 1', SEEN):.1f} of 255"


@rows.row("PuLID and InstantID in one picture; the parameters name both files")
def together(host: Running) -> str:
    both = host.api.txt2img(person(host), one(host, "instantid", "ben"))
    differ(both.image, host.api.txt2img(person(host)).image, "with and without InstantID", SEEN)
    differ(both.image, host.api.txt2img(one(host, "instantid", "ben")).image, "with and without PuLID", SEEN)
    text = both.parameters[0]
    for words in ("pulid_v1.1.safetensors", FILES["instantid"], "method: InstantID for SDXL"):
        expect(words in text, f"{words!r} is not in: {text}")
    return text.partition("PuLID 2: ")[2]


@rows.row("A setting that a method does not have ends the request with a message")
def settings(host: Running) -> str:
    answer = host.api.try_txt2img(one(host, "instantid", projection="ortho"))
    expect(answer.status >= 400, f"status {answer.status}")
    expect("InstantID for SDXL has no such setting" in answer.text, answer.text[:300])
    return answer.text[:200]


@rows.row("FaceID in a batch, and with hires fix")
def passes(host: Running) -> None:
    plain = host.api.txt2img(batch_size=2)
    for before, after in zip(plain.images, host.api.txt2img(one(host, "face_id"), batch_size=2).images):
        differ(before, after, "a batch", SEEN)
    larger = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": host.api.upscaler, "denoising_strength": 0.6}
    larger |= {"hr_additional_modules": ["Use same choices"]} if host.kind != "a1111" else {}
    differ(host.api.txt2img(**larger).image, host.api.txt2img(one(host, "face_id"), **larger).image, "hires", SEEN)
