"""ADetailer itself, where its folder is given with --extension. Its detector is models/detector.py's."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.host import detector
from tests.host.api import Pictures
from tests.host.rows_works_with import MILD
from tests.host.table import Rows, Skipped, differ, equal, expect, nothing_left
from tests.host.webui import Running

rows = Rows()
RIM = 4  # pixels; at the border of what is repainted some come out as they were


class Detailer:
    """Pictures that ADetailer has gone over; `names` is its setting ad_script_names."""

    def __init__(self, host: Running, names: str, **asked: Any) -> None:
        self._host, self._names, self._asked = host, names, asked

    def __call__(self, *units: dict[str, Any], **own: Any) -> Pictures:
        """own: more settings of ADetailer's."""
        own_size = {"ad_match_inpaint_bbox_size": "Off"}  # ADetailer-Neo repaints at 1024 x 1024 otherwise
        self._host.api.options(ad_script_names=self._names, **own_size)
        unit = {"ad_model": detector.NAME, "ad_denoising_strength": 0.7, "ad_mask_k": 1, "ad_mask_blur": 0, **own}
        return self._host.api.txt2img(*units, alwayson_scripts={"ADetailer": {"args": [unit]}}, **self._asked)


def usual_names(host: Running) -> str:
    if host.api.send("GET", "/adetailer/v1/version").status >= 400:
        raise Skipped("ADetailer is not there: give its folder with --extension")
    models = host.api.get("/adetailer/v1/ad_model")["ad_model"]
    expect(detector.NAME in models, f"ADetailer's models: {models}")
    return str(host.api.get("/sdapi/v1/options").get("ad_script_names", "")).removesuffix(",pulid")


@rows.row("ADetailer itself: the face in the repainted part if ad_script_names holds “pulid”, else not")
def adetailer(host: Running) -> str:
    usual = usual_names(host)
    left, handed = Detailer(host, usual), Detailer(host, f"{usual},pulid")
    left()  # ultralytics sets torch's number of threads at its first use, and with it the last bits of every picture
    before, plain, whole = host.api.state(), host.api.txt2img().image, host.api.txt2img(MILD).image
    painted = handed().image
    inside = box_around((painted != plain).any(axis=2))
    expect(0.01 < inside.mean() < 0.5, f"{inside.mean():.2f} of the picture is repainted")
    without, with_face = left(MILD).image, handed(MILD).image
    for what, made in {"without the face": without, "with the face": with_face}.items():
        equal(whole[~inside], made[~inside], f"outside of the part repainted {what}")
    seen = differ(without[inside], with_face[inside], "the part with and without the face", 0.3)
    equal(painted, handed({**MILD, "weight": 0}).image, "weight 0")
    equal(painted, left().image, "afterwards, with ADetailer alone")
    equal(plain, host.api.txt2img().image, "afterwards, without both")
    nothing_left(host, before)
    return f"{seen:.1f} in the part, {100 * inside.mean():.0f} % of the picture"


@rows.row("ADetailer itself: in each picture of two batches of two, and in its parameters")
def adetailer_batches(host: Running) -> str:
    usual = usual_names(host)
    asked = {"n_iter": 2, "batch_size": 2}
    without, together = Detailer(host, usual, **asked)(MILD), Detailer(host, f"{usual},pulid", **asked)(MILD)
    lacking = [i for i, text in enumerate(together.parameters[-4:], 1) if "PuLID 1:" not in text]
    expect(not lacking, f"no parameters of PuLID in the pictures {lacking} of 4")
    pairs = zip(without.images[-4:], together.images[-4:])
    return f"{min(differ(a, b, 'the picture with and without the face', 0.03) for a, b in pairs):.1f} of 255"


def box_around(marked: np.ndarray) -> np.ndarray:
    """marked: bool [H, W]. An upright box that has all of it, and RIM more on each side, as bool [H, W]."""
    box = np.zeros_like(marked)
    rows_of, columns = np.flatnonzero(marked.any(axis=1)), np.flatnonzero(marked.any(axis=0))
    if len(rows_of):
        top, left = (max(0, found[0] - RIM) for found in (rows_of, columns))
        box[top : rows_of[-1] + 1 + RIM, left : columns[-1] + 1 + RIM] = True
    return box
