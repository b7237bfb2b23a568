"""Finds which part of the image a pass of A1111 or Forge denoises, so that a mask stays where it was painted.

A mask belongs to the whole image: to the input image in img2img and inpainting, and to the first pass's image in
txt2img. What is denoised may be a part of it, or more than it:

    inpaint "only masked" (ADetailer, Ultimate SD upscale)   a crop around the inpaint mask
    resize mode "crop and resize", "resize and fill"         the middle of the image; the image with a margin
    hires fix to another aspect ratio                        the first pass's image without two borders
    SD upscale, outpainting scripts                          unknown: tiles, made before the host is asked
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_pulid.control import LATENT_PIXEL
from lib_pulid.errors import SettingError

GIVEN = "pulid_given_images"  # attribute of a StableDiffusionProcessing: a key of _given
_given: dict[int, list[Any]] = {}  # not in the attribute: other extensions send all of them on as JSON
# Chosen scripts that replace the images given, with what was made of them or with larger copies of them.
LOOPBACK, WHOLE_IMAGES = "loopback", "ultimate-upscale"
# What a field has in the image, and what to do where it is not known which part of the image is denoised.
THINGS = {"mask": "masks", "identity_net": "the points of a face"}
REMEDIES = {"mask": "Remove the mask", "identity_net": "Set it to 0"}
_CROP, _FILL = 1, 2  # resize modes


class Frame(NamedTuple):
    """A part of an image, as fractions of its width and height; values below 0 and above 1 are the margin around it."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def part(self, inner: Frame) -> Frame:
        """Returns the part `inner` of this part, as fractions of the whole image."""
        width, height = self.right - self.left, self.bottom - self.top
        return Frame(
            self.left + inner.left * width, self.top + inner.top * height,
            self.left + inner.right * width, self.top + inner.bottom * height,
        )  # fmt: skip


WHOLE = Frame()


def remember_images(p: Any) -> None:
    """Keeps the request's input images, before a selected script can replace them."""
    images = [image for image in getattr(p, "init_images", None) or () if image is not None]
    if images and GIVEN not in vars(p):
        setattr(p, GIVEN, id(p))
        _given[id(p)] = images
        weakref.finalize(p, _given.pop, id(p))


def frame_of(p: Any, hires: bool, field: str = "mask") -> Frame:
    """Returns the part of the image that the coming pass of `p` denoises. field: what it is asked for, in THINGS.

    Raises:
        SettingError: it is not known.
    """
    images = _input_images(p, field)
    if not images:
        return _second_pass(p) if hires else WHOLE
    frames = {_of_image(p, image.size) for image in images if hasattr(image, "size")} or {WHOLE}
    if len(frames) > 1:
        raise SettingError(
            f"Field {field}: {THINGS[field]} do not work when images of different sizes are cropped in one batch. "
            f"{REMEDIES[field]}, or use images of one size."
        )
    return frames.pop()


def part_of_mask(mask: Tensor, frame: Frame) -> Tensor:
    """Cuts the part [h, w] out of a mask [H, W]; a margin repeats the mask's edge. h and w: at most 4096.

    Each value is the mean of the mask there, with fractions of the mask's pixels.
    """
    if frame == WHOLE:
        return mask
    rows = _means(mask.shape[0], frame.top, frame.bottom)
    columns = _means(mask.shape[1], frame.left, frame.right)
    return (rows @ mask.cpu().double() @ columns.T).to(mask)


def _means(size: int, first: float, last: float) -> Tensor:
    """Returns the weight of each pixel in each of n equal parts of first..last, [n, size] float64."""
    count = min(max(64, round((last - first) * size)), 4096)
    edges = torch.linspace(first * size, last * size, count + 1, dtype=torch.float64)[:, None]
    pixels = torch.arange(size, dtype=torch.float64)
    left, right = pixels.clone(), pixels + 1
    left[0], right[-1] = min(0.0, first * size), max(float(size), last * size)  # the edges extend into the margin
    overlap = (torch.minimum(edges[1:], right) - torch.maximum(edges[:-1], left)).clamp_min(0)
    return overlap / overlap.sum(1, keepdim=True)


# ---------------------------------------------------------------- the hosts' arithmetic


def _of_image(p: Any, size: tuple[int, int]) -> Frame:
    """Returns the part of an input image. size: its width and height."""
    if getattr(p, "inpaint_full_res", False) and getattr(p, "image_mask", None) is not None and p.paste_to:
        left, top, width, height = p.paste_to
        crop = Frame(left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
        return crop.part(_fitted((width, height), (p.width, p.height), _FILL))
    return _fitted(size, (p.width, p.height), getattr(p, "resize_mode", 0))


def _fitted(size: tuple[int, int], target: tuple[int, int], mode: int) -> Frame:
    """Returns the visible part of an image of this size after the hosts' `resize_image`, which rounds down."""
    if mode not in (_CROP, _FILL) or size[0] * target[1] == size[1] * target[0]:
        return WHOLE
    is_wider = size[0] * target[1] > size[1] * target[0]  # than the target
    if is_wider == (mode == _CROP):
        resized = size[0] * target[1] // size[1], target[1]
    else:
        resized = target[0], size[1] * target[0] // size[0]
    left, top = (resized[i] // 2 - target[i] // 2 for i in (0, 1))
    return Frame(
        left / resized[0], top / resized[1], (left + target[0]) / resized[0], (top + target[1]) / resized[1]
    )  # fmt: skip


def _second_pass(p: Any) -> Frame:
    """Returns the part that hires fix keeps: it enlarges the latent to `hr_upscale_to` and crops the excess."""
    cut = [int(getattr(p, name, 0) or 0) for name in ("truncate_x", "truncate_y")]
    if not any(cut):
        return WHOLE
    size = p.hr_upscale_to_x // LATENT_PIXEL, p.hr_upscale_to_y // LATENT_PIXEL
    first = [cut[i] // 2 / size[i] for i in (0, 1)]
    last = [1 - (cut[i] + 1) // 2 / size[i] for i in (0, 1)]
    return Frame(first[0], first[1], last[0], last[1])


def _input_images(p: Any, field: str) -> list[Any]:
    """Returns the images that the mask, or another field in THINGS, belongs to.

    Raises:
        SettingError: a script replaced the input images with others, such as tiles.
    """
    images, given = list(getattr(p, "init_images", None) or ()), _given.get(vars(p).get(GIVEN, 0))
    chosen = (getattr(p, "script_args", None) or (0,))[0]
    scripts = getattr(getattr(p, "scripts", None), "selectable_scripts", ())
    if not given or not isinstance(chosen, int) or not 0 < chosen <= len(scripts):
        return images
    if all(any(image is one for one in given) for image in images):
        return images
    script = scripts[chosen - 1]
    name = Path(script.filename).stem
    if name in (LOOPBACK, WHOLE_IMAGES):
        return given if name == LOOPBACK else images
    raise SettingError(
        f"Field {field}: the script “{script.title()}” processes parts of the image without saying where they are, so "
        f"{THINGS[field]} would be applied to each of them. {REMEDIES[field]}, or use another script (Ultimate SD "
        "upscale works)."
    )
