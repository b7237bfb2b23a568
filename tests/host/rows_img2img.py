"""What starts from a picture: img2img, inpaint, and detailers."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tests.host.api import encoded
from tests.host.rows_basics import ANNA
from tests.host.rows_works_with import MILD
from tests.host.table import Failed, Rows, differ, equal
from tests.host.webui import Running

rows = Rows()


def scene() -> np.ndarray:
    """A picture to start from, uint8 RGB [128, 192, 3]."""
    coarse = np.random.default_rng(3).integers(0, 255, (8, 12, 3), np.uint8)
    return coarse.repeat(16, axis=0).repeat(16, axis=1)


def repeated(host: Running, *units: dict[str, Any], **asked: Any) -> np.ndarray:
    """The second of two equal img2img requests: the hosts encode the picture with random numbers of which the first
    depend on what ran before."""
    host.api.img2img(*units, **asked)
    return host.api.img2img(*units, **asked).image


rows.add({
    "img2img; weight 0 bit-identical": lambda host: from_a_picture(host, ANNA, denoising_strength=0.7),
    "Inpaint, whole picture": lambda host: inpaint(host, only_masked=False),
    "Inpaint, only masked": lambda host: inpaint(host, only_masked=True),
})  # fmt: skip


def from_a_picture(host: Running, unit: dict[str, Any], **asked: Any) -> str:
    asked["init_images"] = [encoded(scene())]
    plain = repeated(host, **asked)
    equal(plain, host.api.img2img({**unit, "weight": 0}, **asked).image, "weight 0")
    return f"{differ(plain, host.api.img2img(unit, **asked).image, 'with and without'):.1f}"


@rows.row("img2img: reading a new photo draws no random numbers of the host's")
def random_numbers(host: Running) -> None:
    asked = {"init_images": [encoded(scene())], "denoising_strength": 0.7}
    plain = repeated(host, **asked)
    fresh = np.array(Image.open(host.photo("ben")).convert("RGB"))
    fresh[:8] = np.random.default_rng().integers(0, 255, 3)
    equal(plain, host.api.img2img({"images": [encoded(fresh)], "weight": 0}, **asked).image, "a new photo, weight 0")


def inpaint(host: Running, only_masked: bool, unit: dict[str, Any] = ANNA, **asked: Any) -> str:
    mask = np.zeros((128, 192, 3), np.uint8)
    mask[32:96, 96:160] = 255
    asked |= {"init_images": [encoded(scene())], "mask": encoded(mask), "mask_blur": 0, "denoising_strength": 0.8}
    asked |= {"inpainting_fill": 1, "inpaint_full_res": only_masked, "inpaint_full_res_padding": 16}
    plain, face = repeated(host, **asked), host.api.img2img(unit, **asked).image
    inside = mask[:, :, 0] > 0
    equal(plain[~inside], face[~inside], "outside of the mask")
    equal(plain, host.api.img2img({**unit, "weight": 0}, **asked).image, "weight 0")
    return f"{differ(plain[inside], face[inside], 'inside of the mask'):.1f} inside"


def half(left: bool) -> str:
    mask = np.zeros((128, 192, 3), np.uint8)
    mask[:, :96] = 255
    return encoded(mask if left else 255 - mask)


@rows.row("Inpaint, only masked, on the right: a face whose mask is the left half changes nothing, the right half all")
def mask_in_a_crop(host: Running) -> str:
    inpainted = np.zeros((128, 192, 3), np.uint8)
    inpainted[32:96, 128:176] = 255
    asked = {"init_images": [encoded(scene())], "mask": encoded(inpainted), "mask_blur": 0, "denoising_strength": 0.8}
    asked |= {"inpainting_fill": 1, "inpaint_full_res": True, "inpaint_full_res_padding": 0}
    plain = repeated(host, **asked)
    equal(plain, host.api.img2img({**ANNA, "mask": half(left=True)}, **asked).image, "the other half's mask")
    face = host.api.img2img(ANNA, **asked).image
    equal(face, host.api.img2img({**ANNA, "mask": half(left=False)}, **asked).image, "this half's mask and none")
    return f"{differ(plain, face, 'with and without'):.1f}"


@rows.row("SD upscale: a face in each tile; with a mask refused")
def tiles(host: Running) -> str:
    asked = {"init_images": [encoded(scene())], "denoising_strength": 0.5, "width": 128, "height": 128}
    titles = {title.lower(): title for title in host.api.get("/sdapi/v1/scripts")["img2img"]}
    values = [32, "None", 1.0, False] if host.kind == "neo" else [None, 32, "None", 1.0]
    asked |= {"script_name": titles["sd upscale"], "script_args": values}
    face, plain = host.api.img2img(ANNA, **asked).image, host.api.img2img(**asked).image
    answer = host.api.try_img2img({**ANNA, "mask": half(left=True)}, **asked)
    if answer.status != 422 or "processes parts of the image" not in answer.text:
        raise Failed(f"{answer.status}: {answer.text[:200]}")
    return f"{differ(plain, face, 'with and without'):.1f}"


@rows.row("A detailer (as ADetailer works): the face in the repainted part if its list names the script “pulid”")
def detailer(host: Running) -> str:
    def made(names: str, *units: dict[str, Any]) -> np.ndarray:
        beside = {"Test detailer": {"args": [names]}} if names else {}
        return host.api.txt2img(*units, alwayson_scripts=beside).image

    whole, without, with_face = made("", MILD), made("other", MILD), made("pulid", MILD)
    height, width = whole.shape[:2]
    inside = np.zeros((height, width), bool)
    inside[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    equal(whole[~inside], with_face[~inside], "outside of the detail")
    differ(made("other"), without, "with and without the face", 0.3)
    equal(whole, made("", MILD), "after the detailer")
    return f"{differ(without[inside], with_face[inside], 'detail with and without the face', 0.3):.1f} in the detail"
