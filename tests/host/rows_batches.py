"""Positive and negative rows, in every way in which the hosts cut a batch.

A mirror tells: guidance is u + s (c - u), so exchanging prompt and negative prompt, and 1 - s for s, gives the same
picture. An identity has other tokens for the two kinds of rows; "marked B" is "marked A" with them exchanged. So
(prompt, negative, s, A) and (negative, prompt, 1 - s, B) are the same picture if every row gets its own tokens, however
the host cuts the batch. With A in both places the pictures have to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from tests.host.api import Pictures
from tests.host.table import Rows, Skipped, close, differ
from tests.host.webui import NAMES, Running

rows = Rows()
LONG = "a very detailed photo of a cat, " * 20
WEIGHT = 0.3


def mirror(
    host: Running,
    people: tuple[str, str] = ("marked A", "marked B"),
    settings: Mapping[str, Any] = {"weight": WEIGHT},
    **changes: Any,
) -> str:
    """Checks one way of cutting; returns the distances.

    people: identities with each other's tokens. settings: of the unit.
    """
    prompt = changes.pop("prompt", "a photo of a cat")
    negative = changes.pop("negative_prompt", "blurry")
    scale = changes.pop("cfg_scale", 4.0)

    def made(positive: str, other: str, guidance: float, identity: str | None) -> list[np.ndarray]:
        units = [] if identity is None else [{"identity": identity, **settings}]
        asked = {"prompt": positive, "negative_prompt": other, "cfg_scale": guidance, **changes}
        return host.api.txt2img(*units, **asked).images

    straight = made(prompt, negative, scale, people[0])
    mirrored = made(negative, prompt, 1 - scale, people[1])
    wrong = made(negative, prompt, 1 - scale, people[0])
    plain = made(prompt, negative, scale, None)
    same = max(close(a, b, "the mirror picture") for a, b in zip(straight, mirrored))
    other = min(differ(a, b, "the mirror picture with rows exchanged") for a, b in zip(straight, wrong))
    differ(straight[0], plain[0], "with and without")
    return f"mirror {same:.3f}, rows exchanged {other:.1f}"


ONE_BY_ONE = {"batch_cond_uncond": False}
A1111 = ("a1111",)
WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "one call": (tuple(NAMES), {}),
    "batch of 3": (tuple(NAMES), {"batch_size": 3}),
    "call by call (batch_cond_uncond off)": (A1111, {"batch_size": 2, "override_settings": ONE_BY_ONE}),
    "uneven prompt lengths": (tuple(NAMES), {"prompt": LONG, "batch_size": 2}),
    "uneven prompt lengths, negative prompt the longer one, call by call": (
        A1111, {"negative_prompt": LONG, "batch_size": 2, "override_settings": ONE_BY_ONE},
    ),
}  # fmt: skip
for name, (hosts, changes) in WAYS.items():
    rows.row(f"Positive and negative rows: {name}", hosts)(partial(mirror, **changes))


@rows.row("Positive and negative rows: padded prompts (pad_cond_uncond)", A1111)
def padded(host: Running) -> str:
    options = host.api.get("/sdapi/v1/options")
    if "pad_cond_uncond" not in options:
        raise Skipped("no such setting")
    return mirror(host, prompt=LONG, override_settings={"pad_cond_uncond": True})


@rows.row("Positive and negative rows: uncond left out of some steps (s_min_uncond)")
def left_out(host: Running) -> str:
    """The mirror does not hold where one side is left out; the negative tokens matter in the other steps only."""

    def made(name: str) -> np.ndarray:
        return host.api.txt2img({"identity": f"marked {name}", "weight": WEIGHT}, steps=6).image

    host.api.options(s_min_uncond=4.0)  # reForge does not read the request's
    try:
        left, exchanged = (made(name) for name in "AB")
        differ(left, host.api.txt2img(steps=6).image, "with and without")
    finally:
        host.api.options(s_min_uncond=0.0)
    differ(left, exchanged, "rows exchanged")
    return f"{differ(left, made('A'), 'with and without the setting', 0.05):.1f} by the setting"


@rows.row("Guidance 1, where there are no negative rows: the negative tokens do not matter")
def without_negative(host: Running) -> None:
    one, other = (
        host.api.txt2img({"identity": f"marked {name}", "weight": WEIGHT}, cfg_scale=1.0).image for name in "AC"
    )
    close(one, other, "same positive tokens, other negative ones", 0.01)
    guided, other_guided = (host.api.txt2img({"identity": f"marked {name}", "weight": WEIGHT}).image for name in "AC")
    differ(guided, other_guided, "guidance 7, other negative tokens")


UNIT = {"identity": "marked A", "weight": WEIGHT}
rows.add({"AND: two equal halves are the whole prompt": lambda host: halves(partial(host.api.txt2img, UNIT))})


def halves(make: Callable[..., Pictures]) -> str:
    both = make(prompt="a cat :0.5 AND a cat :0.5").image
    return f"{close(make(prompt='a cat').image, both, 'halves'):.3f} of 255"


@rows.row("AND: rows are right with three parts of uneven length in a batch of 2")
def composed_uneven(host: Running) -> str:
    parts = [f"{LONG} :0.25", "a cat :0.5", "a cat :0.5"]
    one = host.api.txt2img(UNIT, prompt=" AND ".join(parts), batch_size=2)
    two = host.api.txt2img(UNIT, prompt=" AND ".join([parts[0], "a cat :1.0"]), batch_size=2)
    found = max(close(a, b, "three and two parts") for a, b in zip(one.images[-2:], two.images[-2:]))
    return f"{found:.3f} of 255"
