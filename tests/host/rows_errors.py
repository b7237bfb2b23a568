"""What is refused, and how: HTTP 4xx or 5xx, a message that names unit and field, no picture."""

from __future__ import annotations

from typing import Any

from tests.host.api import encoded
from tests.host.rows_basics import ANNA, person
from tests.host.table import Rows, equal, expect, nothing_left
from tests.host.webui import Running

rows = Rows()


def refused(host: Running, words: list[str], *units: Any, **changes: Any) -> str:
    """Status and message; every one of the words has to be in them."""
    answer = host.api.try_txt2img(*units, **changes)
    expect(answer.status >= 400, f"{answer.status} for {str(units)[:80]}, picture: {answer.has_picture}")
    expect(not answer.has_picture, "a picture came with the error")
    text = f"{answer.status} {answer.body.get('detail') or answer.body.get('errors') or answer.text}"
    absent = [word for word in words if word.lower() not in text.lower()]
    expect(not absent, f"{absent} not in the message: {text}")
    return text


# What else a unit may get wrong is the same in every host: see test_webui, test_units and test_bad_requests.
rows.add({
    "Refused: unknown field": lambda host: refused(host, ["unit 1", "wieght"], person(host, wieght=1)),
    "Refused: a photo without a face":
        lambda host: refused(host, ["unit 2", "images", "no face"], ANNA, person(host, "nobody")),
})  # fmt: skip


@rows.row("Refused: Stable Diffusion 1.5")
def sd15(host: Running) -> str:
    settings = {"sd_model_checkpoint": "tiny-sd15.safetensors"}
    seen = refused(host, ["tiny-sd15", "Stable Diffusion 1"], ANNA, override_settings=settings)
    expect(host.api.txt2img(override_settings=settings).image.any(), "without PuLID there is no picture either")
    host.api.txt2img()
    return seen


@rows.row("Refused: a checkpoint that is only a refiner")
def refiner(host: Running) -> str:
    settings = {"sd_model_checkpoint": "tiny-refiner.safetensors"}
    return refused(host, ["tiny-refiner", "refiner"], ANNA, override_settings=settings)


@rows.row("After an error the next run is the baseline, and nothing is left")
def after_error(host: Running) -> None:
    plain = host.api.txt2img().image
    before = host.api.state() | {"hooks": 0}
    refused(host, [], person(host, "nobody"))
    nothing_left(host, before, "hooks", "callbacks")
    equal(plain, host.api.txt2img().image, "after the error")


@rows.row("The host fails before it samples (8-bit weights, on a CPU): nothing of ours is left", hosts=("a1111",))
def host_fails(host: Running) -> str:
    before = host.api.state()
    answer = host.api.try_txt2img(person(host), override_settings={"fp8_storage": "Enable"})
    after = host.api.state()
    for value in ("Enable", "Disable"):  # the host keeps the 8-bit weights until this changes
        host.api.options(fp8_storage=value)
    expect(answer.status >= 500, f"{answer.status}: {answer.text[:200]}")
    expect(after["hooks"] == before["hooks"] and after["callbacks"] == before["callbacks"], f"left: {after}")
    return f"{answer.status}"


@rows.row("Preview of a photo without a face: an error with a message")
def detect_nobody(host: Running) -> str:
    answer = host.api.send("POST", "/pulid/detect", {"images": [encoded(host.photo("nobody"))]})
    expect(answer.status >= 400 and "no face" in answer.text, f"{answer.status}: {answer.text}")
    return f"{answer.status}"


@rows.row("Refused: 10,000 units, a body nested without end; the log holds no photo")
def strangers(host: Running) -> str:
    seen = refused(host, ["units are too many"], *[{}] * 10_000)
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    refused(host, ["unit 1", "images"], {"images": deep})
    refused(host, ["unit 2", "weight"], person(host), person(host, weight=10**400))
    refused(host, ["unit 1", "wieght"], person(host) | {"wieght": person(host)})
    text = encoded(host.photo("anna"))
    pieces = [text[at : at + 60] for at in range(100, len(text) - 60, 60)]
    expect(len(pieces) > 10, f"the photo is {len(text)} characters")
    expect(not any(piece in host.log_text() for piece in pieces), "a photo is in the log")
    return seen
