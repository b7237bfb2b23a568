"""The X/Y/Z plot."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.host.rows_basics import ANNA, FAINT, person
from tests.host.rows_errors import refused
from tests.host.table import Rows, differ, equal, expect
from tests.host.webui import Running

rows = Rows()
SMALL = {"width": 128, "height": 128, "steps": 3}
SCRIPT = "x/y/z plot"


def script_info(host: Running, name: str) -> dict[str, Any]:
    return next(one for one in host.api.get("/sdapi/v1/script-info") if one["name"] == name and not one["is_img2img"])


def grid(host: Running, axes: list[tuple[str, str]], *units: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """axes: (label, values as typed) for X, Y, Z."""
    known = script_info(host, SCRIPT)
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


VALUES = {
    "Saved identity": "marked A, marked B", "PuLID model": "pulid_v1.1.safetensors, pulid_v1.bin", "Weight": "0.4, 1.2",
    "Preset": "fidelity, neutral", "Projection": "none, ortho_v2", "Zero tokens": "0, 60", "Start": "0, 0.6",
    "End": "0.3, 1", "Use this person": "yes, no",
}  # fmt: skip


@rows.row("X/Y/Z: an axis for every setting; the cells differ")
def axes(host: Running) -> str:
    for name, typed in VALUES.items():
        unit = {**ANNA, "weight": 1.5} if name == "Saved identity" else person(host, weight=1.5)
        one, other = cells(host, 2, [(f"[PuLID 1] {name}", typed)], unit)
        differ(one, other, name, FAINT)
    return ", ".join(VALUES)


@rows.row("X/Y/Z: the API cannot read files by the axis Photo file")
def photo_file(host: Running) -> str:
    for path in (host.photo("anna"), host.photo("anna").with_name("gone.png"), "/etc/passwd"):
        seen = refused(
            host, ["422", "works only in the page"], ANNA, **grid(host, [("[PuLID 1] Photo file", str(path))])
        )
    return seen


@rows.row("X/Y/Z: a cell is the picture that is made with its settings alone")
def cell(host: Running) -> None:
    made = cells(host, 2, [("[PuLID 1] Weight", "0.4, 1.2")], ANNA)
    for picture, weight in zip(made, (0.4, 1.2)):
        equal(picture, host.api.txt2img({**ANNA, "weight": weight}, **SMALL).image, f"weight {weight}")


@rows.row("X/Y/Z: across checkpoints")
def checkpoints(host: Running) -> None:
    made = cells(host, 2, [("Checkpoint name", "tiny-sdxl.safetensors, tiny-sdxl-b.safetensors")], ANNA)
    differ(*made, "two checkpoints")
    host.api.options(sd_model_checkpoint="tiny-sdxl.safetensors")
    equal(made[0], host.api.txt2img(ANNA, **SMALL).image, "the first")


@rows.row("X/Y/Z: a wrong value is reported before the grid starts")
def wrong(host: Running) -> str:
    return refused(host, [], ANNA, **grid(host, [("[PuLID 1] Weight", "0.4, 99")]))


@rows.row("X/Y/Z: parameters of a cell have its own settings; none in a cell without PuLID")
def cell_parameters(host: Running) -> None:
    made = host.api.txt2img(ANNA, **grid(host, [("[PuLID 1] Use this person", "yes, no")]))
    on, off = made.parameters[-2:]
    expect("PuLID 1" in on, f"with: {on}")
    expect("PuLID" not in off, f"without: {off}")
