"""Which part of the image the WebUIs denoise, and what a mask is there."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib_pulid.errors import SettingError
from lib_pulid.hosts.frame import WHOLE, Frame, frame_of, part_of_mask, remember_images


class Processing(SimpleNamespace):
    __hash__ = object.__hash__


def processing(*sizes: tuple[int, int], **values: Any) -> Any:
    """A StableDiffusionProcessing of 64 x 64 whose images have these sizes."""
    images = [Image.new("RGB", size) for size in sizes]
    common = {"width": 64, "height": 64, "resize_mode": 0, "inpaint_full_res": False, "image_mask": None}
    return Processing(**{**common, "init_images": images, "paste_to": None, **values})


def test_text_to_image() -> None:
    assert frame_of(SimpleNamespace(width=64, height=64), hires=False) == WHOLE
    assert frame_of(SimpleNamespace(width=64, height=64, truncate_x=0, truncate_y=0), hires=True) == WHOLE


def test_hires_fix_to_another_aspect_ratio() -> None:
    """The second pass is the first one's image without its borders."""
    p = SimpleNamespace(truncate_x=32, truncate_y=0, hr_upscale_to_x=1024, hr_upscale_to_y=1024)
    assert frame_of(p, hires=False) == WHOLE
    assert frame_of(p, hires=True) == (0.125, 0, 0.875, 1)


@pytest.mark.parametrize(("mode", "size", "frame"), [
    (0, (200, 100), WHOLE), (1, (100, 100), WHOLE), (1, (200, 100), (0.25, 0, 0.75, 1)),
    (1, (100, 200), (0, 0.25, 1, 0.75)), (2, (200, 100), (0, -0.5, 1, 1.5)), (2, (100, 200), (-0.5, 0, 1.5, 1)),
    (3, (200, 100), WHOLE),
])  # fmt: skip
def test_resize_modes(mode: int, size: tuple[int, int], frame: tuple[float, ...]) -> None:
    assert frame_of(processing(size, resize_mode=mode), hires=False) == frame


def only_masked(size: tuple[int, int], paste_to: tuple[int, ...]) -> Any:
    return processing(size, inpaint_full_res=True, image_mask=Image.new("L", size), paste_to=paste_to)


def test_inpaint_only_masked() -> None:
    """The crop; where it has another aspect ratio than the result, with the margin that the host adds."""
    crops = {(100, 20, 50, 50): (0.5, 0.2, 0.75, 0.7), (0, 0, 200, 100): (0, -0.5, 1, 1.5)}
    for paste_to, frame in crops.items():
        assert frame_of(only_masked((200, 100), paste_to), hires=False) == pytest.approx(frame)
    earlier = only_masked((200, 100), (9, 9, 9, 9))
    earlier.image_mask = None  # its rectangle counts no longer
    assert frame_of(earlier, hires=False) == WHOLE


def test_images_of_several_sizes() -> None:
    assert frame_of(processing((200, 100), (400, 200), resize_mode=1), hires=False) == (0.25, 0, 0.75, 1)
    with pytest.raises(SettingError, match="different sizes"):
        frame_of(processing((200, 100), (100, 100), resize_mode=1), hires=False)


def chosen(file: str, *, replaced: bool, size: tuple[int, int] = (64, 64)) -> Any:
    name = str(Path("scripts") / file)
    script = SimpleNamespace(filename=name, title=lambda: name)
    p = processing(size, scripts=SimpleNamespace(selectable_scripts=[script]), script_args=(1,))
    remember_images(p)
    remember_images(p)
    if replaced:
        p.init_images = [image.crop((0, 0, 32, 32)) for image in p.init_images]
    return p


def test_scripts_that_process_tiles_are_refused() -> None:
    for file in ("sd_upscale.py", "outpainting_mk_2.py", "poor_mans_outpainting.py", "somebodys.py"):
        with pytest.raises(SettingError, match=rf"Field mask: the script “scripts.{file}”.*Remove the mask"):
            frame_of(chosen(file, replaced=True), hires=False)


def test_scripts_that_process_whole_images() -> None:
    for file, replaced in (("xyz_grid.py", False), ("loopback.py", True), ("ultimate-upscale.py", True)):
        assert frame_of(chosen(file, replaced=replaced), hires=False) == WHOLE
    batch = chosen("sd_upscale.py", replaced=True)
    batch.script_args = (0,)  # a batch of files without a script
    assert frame_of(batch, hires=False) == WHOLE


def test_loopback_goes_on_with_what_it_made() -> None:
    """A mask of the input image stays where it was when that was cropped."""
    for file, frame in (("loopback.py", (0.25, 0, 0.75, 1)), ("ultimate-upscale.py", WHOLE)):
        p = chosen(file, replaced=False, size=(200, 100))
        p.resize_mode = 1
        assert frame_of(p, hires=False) == (0.25, 0, 0.75, 1)
        p.init_images = [Image.new("RGB", (64, 64))]
        assert frame_of(p, hires=False) == frame


def test_what_is_remembered_is_sent_and_copied_with_the_rest() -> None:
    """stable-diffusion-webui-distributed sends all attributes but the images as JSON; grids copy them."""
    p = chosen("sd_upscale.py", replaced=True)
    json.dumps({name: value for name, value in vars(p).items() if name not in ("init_images", "scripts")})
    with pytest.raises(SettingError, match="Field mask"):
        frame_of(copy(p), hires=False)


@pytest.mark.parametrize("size", [(100, 200), (7, 3), (1, 1), (3000, 5)])
@pytest.mark.parametrize("frame", [Frame(0.5, 0.2, 0.75, 0.7), Frame(0.1, 0.1, 0.11, 0.9), Frame(-0.5, 0, 1.5, 1)])
def test_white_stays_white(size: tuple[int, int], frame: Frame) -> None:
    assert torch.allclose(part_of_mask(torch.ones(size), frame), torch.ones(1))


def test_left_half_in_a_crop_outside_and_across() -> None:
    mask = torch.zeros(50, 100)
    mask[:, :50] = 1
    assert part_of_mask(mask, WHOLE) is mask
    assert part_of_mask(mask, Frame(0.5, 0, 1, 1)).max() == 0
    assert part_of_mask(mask, Frame(0, 0.3, 0.5, 0.6)).min() == 1
    across = part_of_mask(mask, Frame(0.25, 0.25, 0.75, 0.75))
    half = across.shape[1] // 2
    assert across[:, :half].min() == 1 and across[:, half:].max() == 0


def test_a_margin_has_the_masks_edge() -> None:
    mask = torch.zeros(10, 10)
    mask[:, 0] = 1
    wide = part_of_mask(mask, Frame(-1, 0, 2, 1)).mean(0)
    third = len(wide) // 3
    assert wide[:third].min() > 0.99 and wide[-third:].max() == 0


def test_means_of_fractions_of_pixels() -> None:
    """Against the same mask with each pixel as a thousand."""
    mask = torch.from_numpy(np.random.default_rng(1).random((4, 6), np.float32))
    frame = Frame(0.13, 0.21, 0.77, 0.9)
    part = part_of_mask(mask, frame)
    fine = mask.repeat_interleave(1000, 0).repeat_interleave(1000, 1)
    rows, columns = (round(frame.top * 4000), round(frame.bottom * 4000)), (round(0.13 * 6000), round(0.77 * 6000))
    expected = torch.nn.functional.interpolate(
        fine[rows[0] : rows[1], columns[0] : columns[1]][None, None], size=part.shape, mode="area"
    )
    assert (part - expected[0, 0]).abs().max() < 0.03
    assert abs(part.mean() - expected.mean()) < 1e-3
