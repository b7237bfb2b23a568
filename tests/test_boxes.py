"""Boxes: regions of a face as fractions of the image, from the page, the API and the command line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_pulid.boxes import LEAST, SOFT, Box, mask_of, read_box, within
from lib_pulid.fields import schema
from lib_pulid.units import PulidUnit

LEFT = "0 0 0.5 1"


def test_numbers_text_and_no_box():
    numbers = "0.1 0.2 0.3 0.4"
    for box in (numbers, "0.1, 0.2, 0.3, 0.4", [0.1, 0.2, 0.3, 0.4], (0.1, 0.2, 0.3, 0.4)):
        assert PulidUnit.from_mapping({"box": box}, 1).box == numbers
    for empty in (None, "", " ", [], "None"):
        assert PulidUnit.from_mapping({"box": empty}, 1).box == ""
    assert schema()["properties"]["box"]["items"] == {"type": "number"}


@given(st.lists(st.floats(-0.5, 1.5), min_size=4, max_size=4))
def test_whatever_is_accepted_lies_in_the_image_and_reads_back(numbers):
    try:
        box = read_box(numbers)
    except ValueError:
        return
    assert min(box) >= 0
    assert min(box.width, box.height) >= LEAST
    assert box.x + box.width <= 1 + 1e-9
    assert box.y + box.height <= 1 + 1e-9
    assert read_box(str(box)) == pytest.approx(box, abs=1e-3)


@given(st.integers(0, 960), st.sampled_from([20, 40, 100]))
def test_a_box_inside_the_image_keeps_its_numbers(start, length):
    """Also the smallest: a place must not make it smaller."""
    start, length = min(start, 1000 - length) / 1000, length / 1000
    assert read_box([start, 0, length, 1]) == pytest.approx((start, 0, length, 1), abs=1e-12)
    assert str(read_box([0, start, 1, length])) == f"0 {start:g} 1 {length:g}"


def test_a_mask_is_one_inside_and_fades_at_the_edge():
    mask = mask_of(Box(0.25, 0.25, 0.5, 0.5), 200)
    assert mask[100, 100] == 1
    assert mask[100, 30] == mask[30, 100] == 0
    assert mask[100, 50] == pytest.approx(0.5, abs=0.05)  # the edge itself
    row = mask[100, 30:101]
    assert (row.diff() >= 0).all()
    assert ((row > 0) & (row < 1)).sum() == pytest.approx(SOFT * 0.5 * 200, abs=2)


def test_edges_of_the_image_do_not_fade_and_two_halves_add_up():
    mask = mask_of(read_box(LEFT), 100)
    assert (mask[:, :40] == 1).all()
    assert (mask[:, 60:] == 0).all()
    rounded = read_box(str(read_box([0.07798955, 0, 1 - 0.07798955, 1])))  # to 0.07799 and 0.922
    assert (mask_of(rounded, 100)[:, 60:] == 1).all()
    assert torch.allclose(mask_of(read_box(LEFT)) + mask_of(read_box("0.5 0 0.5 1")), torch.ones(1))


def test_box_and_mask():
    mask = torch.ones(20, 30)
    mask[:, 15:] = 0
    both = within(mask, read_box("0 0 1 0.5"))
    assert both.shape == mask.shape
    assert both[2, 2] == pytest.approx(1)
    assert both[:, 15:].any() == both[15:].any() == False  # noqa: E712
    for beside in ("0.8 0 0.2 1", "0.5 0 0.5 1", "0.53 0 0.47 1"):  # the last two overlap with their soft edge only
        with pytest.raises(ValueError, match="do not overlap"):
            within(mask, read_box(beside))
    assert within(mask, read_box("0.45 0 0.5 1")).any()
    assert within(torch.full((1000, 1000), 0.1), read_box("0.5 0.5 0.02 0.02")).any()
