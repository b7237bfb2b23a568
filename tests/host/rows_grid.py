"""The X/Y/Z plot."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.host.rows_basics import ANNA, FAINT, person
from tests.host.table import Rows, differ, equal, expect
from tests.host.webui import Running

rows = Rows()
SMALL = {"width": 128, "height": 128, "steps": 3}
SCRIPT = "x/y/z plot"


def grid(host: Running, axes: list[tuple[str, str]], *units: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """axes: (label, values as typed) for X, Y, Z."""
    known = next(
        one for one in host.api.get("/sdapi/v1/script-info") if one["name"] == SCRIPT and not one["is_img2img"]
    )
    values = {one["label"]: one.get("value") for one in known["args"]}
    choices = {one["label"]: one.get("choices") for one in known["args"]}
    for letter in "XYZ":
        values[f"{letter} type"] = 0
    for letter, (label, typed) in zip("XYZ", axes):
        expect(label in choices[f"{letter} type"], f"no axis {label!r} among {choices[f'{letter} type'][-20:]}")
        values[f"{letter} type"], values[f"{letter} values"] = choices[f"{letter} type"].index(label), typed
    values |= {"Include Sub Images": True, "Use text inputs instead of dropdowns": True}
    args = [values[one["label"]] for one in known["args"]]
    return {"script_name": SCRIPT, "script_args": args, **SMALL, **changes}


def cells(
    host: Running, count: int, axes: list[tuple[str, str]], *units: dict[str, Any], **changes: Any
) -> list[np.ndarray]:
    made = host.api.txt2img(*units, **grid(host, axes, **changes))
    expect(len(made.images) > count, f"{len(made.images)} images for a grid of {count}")
    return made.images[-count:]


def values_of(host: Running) -> dict[str, str]:
    return {
        "Saved identity": "marked A, marked B",
        "PuLID model": "pulid_v1.1.safetensors, pulid_v1.bin",
        "Weight": "0.4, 1.2",
        "Preset": "fidelity, neutral",
        "Projection": "none, ortho_v2",
        "Zero tokens": "0, 60",
        "Start": "0, 0.6",
        "End": "0.3, 1",
        "Use this person": "yes, no",
    }


@rows.row("X/Y/Z: an axis for every setting; the cells differ")
def axes(host: Running) -> str:
    for name, typed in values_of(host).items():
        unit = {**ANNA, "weight": 1.5} if name == "Saved identity" else person(host, weight=1.5)
        one, other = cells(host, 2, [(f"[PuLID 1] {name}", typed)], unit)
        differ(one, other, name, FAINT)
    return ", ".join(values_of(host))


@rows.row("X/Y/Z: the API cannot read files by the axis Photo file")
def photo_file(host: Running) -> str:
    for path in (host.photo("anna"), host.photo("anna").with_name("gone.png"), "/etc/passwd"):
        answer = host.api.try_txt2img(ANNA, **grid(host, [("[PuLID 1] Photo file", str(path))]))
        expect(answer.status == 422 and "works only in the page" in answer.text, f"{answer.status} {answer.text[:300]}")
    return answer.text[:200]


@rows.row("X/Y/Z: a cell is the picture that is made with its settings alone")
def cell(host: Running) -> None:
    made = cells(host, 2, [("[PuLID 1] Weight", "0.4, 1.2")], ANNA)
    for picture, weight in zip(made, (0.4, 1.2)):
        equal(picture, host.api.txt2img({**ANNA, "weight": weight}, **SMALL).image, f"weight {weight}")


@rows.row("X/Y/Z: a grid of weight x projection encodes the photo once")
def once(host: Running) -> str:
    weights = ("[PuLID 1] Weight", "0.3, 0.6, 0.9")
    projections = ("[PuLID 1] Projection", "none, ortho_v2")
    before = host.api.get("/host-test/photos")["read"]
    made = cells(host, 6, [weights, projections], {**person(host, "small"), "num_zero": 3})
    read = host.api.get("/host-test/photos")["read"] - before
    expect(read == 1, f"{read} photos were read")
    for i, one in enumerate(made):
        for other in made[i + 1 :]:
            differ(one, other, "two cells", 0.02)
    return f"{read} photo read for 6 cells"


@rows.row("X/Y/Z: across checkpoints")
def checkpoints(host: Running) -> None:
    made = cells(host, 2, [("Checkpoint name", "tiny-sdxl.safetensors, tiny-sdxl-b.safetensors")], ANNA)
    differ(*made, "two checkpoints")
    host.api.options(sd_model_checkpoint="tiny-sdxl.safetensors")
    equal(made[0], host.api.txt2img(ANNA, **SMALL).image, "the first")


@rows.row("X/Y/Z: a wrong value is told before the grid begins")
def wrong(host: Running) -> str:
    answer = host.api.try_txt2img(ANNA, **grid(host, [("[PuLID 1] Weight", "0.4, 99")]))
    expect(answer.status >= 400 and not answer.has_picture, f"{answer.status}, picture: {answer.has_picture}")
    return f"{answer.status} {answer.text[:200]}"


@rows.row("X/Y/Z: parameters of a cell have its own settings; none in a cell without PuLID")
def cell_parameters(host: Running) -> None:
    made = host.api.txt2img(ANNA, **grid(host, [("[PuLID 1] Use this person", "yes, no")]))
    on, off = made.parameters[-2:]
    expect("PuLID 1" in on, f"with: {on}")
    expect("PuLID" not in off, f"without: {off}")
