"""One unit, its settings, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.host.api import Pictures, encoded
from tests.host.table import Rows, differ, equal, expect, more_on_the_left, nothing_left
from tests.host.webui import Running

rows = Rows()
ANNA: dict[str, Any] = {"identity": "marked A"}
Make = Callable[..., Pictures]  # as Api.txt2img
# The last steps change little in these models. The hosts are deterministic, so any difference is an effect.
FAINT = 0.0003


def person(host: Running, name: str = "anna", **settings: Any) -> dict[str, Any]:
    """A unit with a photo."""
    return {"images": [encoded(host.photo(name))], **settings}


rows.add({
    "A photo changes the picture; the same request gives the same picture":
        lambda host: photo_acts(host, host.api.txt2img, 0.3),
    "Weight 0, a unit that is off, the accordion off, and the next run: bit-identical to the baseline":
        lambda host: off_is_the_baseline(host, host.api.txt2img),
    "No hook, callback or patch is left after a run": lambda host: leaves_nothing(host, host.api.txt2img, ANNA),
})  # fmt: skip


def photo_acts(host: Running, make: Make, least: float, **settings: Any) -> str:
    """least: difference of two people."""
    plain, face = make().image, make(person(host, **settings)).image
    equal(face, make(person(host, **settings)).image, "twice the same")
    differ(face, make(person(host, "ben", **settings)).image, "another person", least)
    return f"{differ(plain, face, 'with and without'):.1f} of 255"


def off_is_the_baseline(host: Running, make: Make) -> None:
    plain = make().image
    make(person(host))
    cases: dict[str, tuple[Any, ...]] = {"the next run": (), "weight 0": (person(host, weight=0),)}
    cases |= {"unit off": (person(host, enabled=False),), "accordion off": (False, person(host))}
    for what, units in cases.items():
        equal(plain, make(*units).image, what)


def leaves_nothing(host: Running, make: Make, unit: dict[str, Any]) -> None:
    make()  # the checkpoint is loaded now
    before = host.api.state() | {"hooks": 0}
    make(unit)
    nothing_left(host, before)


@rows.row("The positional list gives the same picture as the dict")
def positional(host: Running) -> None:
    order = host.api.get("/pulid/schema")["order"]
    unit = {**default_unit(host), "images": [encoded(host.photo("anna"))], "weight": 0.6}
    listed = [True, *(unit[name] for name in order)]
    equal(host.api.txt2img(person(host, weight=0.6)).image, host.api.txt2img(*listed).image, "list and dict")


def default_unit(host: Running) -> dict[str, Any]:
    return {name: field["default"] for name, field in host.api.get("/pulid/schema")["properties"].items()}


@rows.row("Before start and after end the picture is the one without the face")
def interval(host: Running) -> None:
    """Each of the four steps alone."""
    strong = {**ANNA, "weight": 2.0}
    plain = host.api.txt2img().image
    whole = host.api.txt2img(strong).image
    parts = [host.api.txt2img({**strong, "start": i / 4, "end": (i + 1) / 4}).image for i in range(4)]
    for i, part in enumerate(parts):
        differ(plain, part, f"step {i + 1} alone", FAINT)
        differ(whole, part, f"step {i + 1} alone and all", FAINT)
    equal(whole, host.api.txt2img({**strong, "start": 0.0, "end": 1.0}).image, "0 to 1")


@rows.row("Two persons in two regions: each acts in its own half")
def regions(host: Running) -> str:
    left = np.zeros((64, 96, 3), np.uint8)
    left[:, :48] = 255
    masks = [encoded(left), encoded(255 - left)]
    plain = host.api.txt2img().image
    units = [{"identity": f"marked {name}", "mask": mask, "weight": 0.5} for name, mask in zip("AB", masks)]
    first, second, both = host.api.txt2img(units[0]).image, host.api.txt2img(units[1]).image, host.api.txt2img(*units)
    for name, picture in (("first", first), ("second", second)):
        differ(plain, picture, f"the {name} person")
        differ(both.image, picture, f"both and the {name} person")
    return f"left region: {more_on_the_left(plain, first)}"


@rows.row("The parameters in the picture: all settings, hash of identity and weights; none when it is off")
def parameters(host: Running) -> str:
    text = host.api.txt2img(person(host, weight=0.65, start=0.25, preset="style")).parameters[0]
    for wanted in ("weight: 0.65", "start: 0.25", "preset: style", "projection: ortho", "num_zero: 16", "hash: "):
        expect(wanted in text, f"{wanted!r} is not in: {text}")
    expect("pulid_v1.1.safetensors" in text, f"the model is not in: {text}")
    off = host.api.txt2img().parameters[0]
    expect("PuLID" not in off, f"without PuLID: {off}")
    return text.partition("PuLID 1: ")[2]
