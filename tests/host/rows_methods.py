"""InstantID, IP-Adapter and FaceID in a real host: each changes the image, rows are right, off is the baseline."""

from __future__ import annotations

from typing import Any

from tests.host.api import encoded
from tests.host.models.methods import FILES, NET
from tests.host.rows_basics import person
from tests.host.rows_batches import LONG, ONE_BY_ONE, WEIGHT, mirror
from tests.host.rows_controlnet import controlnet, controls
from tests.host.rows_img2img import scene
from tests.host.table import Rows, Skipped, differ, equal, expect
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
    ways: tuple[dict[str, Any], ...] = ({}, {"batch_size": 2}, {"prompt": LONG})
    settings = {"weight": WEIGHT, "identity_net": 0}
    return "; ".join(mirror(host, people, settings, **way) for way in ways)


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


@rows.row("FaceID in a batch, and with hires fix")
def passes(host: Running) -> None:
    in_a_batch_and_with_hires_fix(host, one(host, "face_id"))


def in_a_batch_and_with_hires_fix(host: Running, unit: dict[str, Any], **in_hires: Any) -> float:
    """in_hires: settings of the unit with hires fix. Returns the difference there."""
    plain = host.api.txt2img(batch_size=2)
    for before, after in zip(plain.images, host.api.txt2img(unit, batch_size=2).images):
        differ(before, after, "a batch", SEEN)
    larger = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": host.api.upscaler, "denoising_strength": 0.6}
    larger |= {"hr_additional_modules": ["Use same choices"]} if host.kind != "a1111" else {}
    with_unit = host.api.txt2img({**unit, **in_hires}, **larger).image
    return differ(host.api.txt2img(**larger).image, with_unit, "hires", SEEN)


# ---------------------------------------------------------------- InstantID's ControlNet, IdentityNet

WITH_NETS = ("neo", "forge", "a1111")  # A1111: with the extension sd-webui-controlnet


def pose(host: Running, name: str = "anna", strength: float = 1.0, **settings: Any) -> dict[str, Any]:
    return one(host, "instantid", name, identity_net=strength, **settings)


@rows.row("InstantID with IdentityNet changes the picture beyond the adapter half; twice the same; strength 0 is the "
          "adapter half to the bit; the next run is the baseline", WITH_NETS)  # fmt: skip
def identity_net(host: Running) -> str:
    controls(host)
    plain, adapter = host.api.txt2img().image, host.api.txt2img(pose(host, strength=0)).image
    both = host.api.txt2img(pose(host))
    seen = differ(adapter, both.image, "IdentityNet beside the adapter half", SEEN)
    alone = host.api.txt2img(pose(host, weight=0)).image
    differ(plain, alone, "IdentityNet alone", SEEN)
    differ(both.image, alone, "IdentityNet with and without the adapter half", SEEN)
    equal(both.image, host.api.txt2img(pose(host)).image, "twice")
    equal(adapter, host.api.txt2img(pose(host, strength=0)).image, "strength 0")
    equal(plain, host.api.txt2img(pose(host, strength=0, weight=0)).image, "both at 0")
    equal(plain, host.api.txt2img().image, "the next run")
    expect("identity_net: 1" in both.parameters[0] and f"net: {NET}" in both.parameters[0], both.parameters[0])
    expect(host.api.state()["hooks"] == 0, f"{host.api.state()['hooks']} hooks are left")
    return f"{seen:.1f} of 255"


@rows.row("IdentityNet, positive and negative rows: one call, a batch of 2, uneven prompts; in A1111 call by call",
          WITH_NETS)  # fmt: skip
def both_rows_of_the_net(host: Running) -> str:
    controls(host)
    ways: list[dict[str, Any]] = [{}, {"batch_size": 2}, {"prompt": LONG}]
    ways += [{"batch_size": 2, "override_settings": ONE_BY_ONE}] if host.kind == "a1111" else []
    people, settings = ("marked I", "marked J"), {"weight": 0, "identity_net": 1}
    return "; ".join(mirror(host, people, settings, **way) for way in ways)


@rows.row("IdentityNet beside the host's own ControlNet unit: each changes what the other makes", WITH_NETS)
def beside_controlnet(host: Running) -> str:
    return controlnet(host, pose(host, weight=0))


@rows.row("IdentityNet's range: start and end act; in a batch of 2; with hires fix; in img2img", WITH_NETS)
def identity_net_passes(host: Running) -> str:
    controls(host)
    full = host.api.txt2img(pose(host, weight=0)).image
    for part in ({"end": 0.5}, {"start": 0.5}):
        differ(full, host.api.txt2img(pose(host, weight=0, **part)).image, f"with {part}", 0.05)
    second = in_a_batch_and_with_hires_fix(host, pose(host, weight=0), hires="second")
    start = {"init_images": [encoded(scene())], "denoising_strength": 0.8}
    differ(host.api.img2img(**start).image, host.api.img2img(pose(host, weight=0), **start).image, "img2img", SEEN)
    return f"second pass {second:.1f} of 255"


@rows.row("InstantID's adapter half where there is no IdentityNet: the picture is made, and the result says so",
          ("a1111",))  # fmt: skip
def only_the_adapter(host: Running) -> str:
    try:
        controls(host)
    except Skipped:
        images = [host.api.txt2img(pose(host, strength=strength)).image for strength in (0, 1)]
        equal(*images, "strengths 0 and 1")
        text = host.api.txt2img(pose(host)).parameters[0]
        for words in ("identity_net: 0", "does not run in this WebUI; A1111 needs the extension sd-webui-controlnet"):
            expect(words in text, f"{words!r} is not in: {text}")
        return text.partition("left out: ")[2][:100]
    raise Skipped("sd-webui-controlnet is there")
