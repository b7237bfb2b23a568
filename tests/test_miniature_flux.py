"""The miniature's FLUX as it is shipped, by the judge that no training of the adapter saw."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from lib_pulid import miniature
from lib_pulid.injection import Injection, compile_injection
from lib_pulid.standalone import Workshop
from lib_pulid.training import world
from tests.small_models.shops import miniature_shop

PEOPLE, STEPS = (10, 11, 12, 13), 4
STANDING = world.Placement(y=0.45, scale=0.74, clothes="striped shirt", clothes_color="red")
SCENE = world.Scene((STANDING,), "dots", "green")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Workshop:
    return miniature_shop("miniature-flux", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def paint(shop):
    """Everybody in PEOPLE, in one batch; made once for the same arguments."""
    identities = [shop.identity([miniature.portrait(number)]) for number in PEOPLE]

    @cache
    def _paint(weight: float, start_step: int) -> np.ndarray:
        people: list[list[Injection]] = [
            [compile_injection(shop.adapter, one, weight=weight, start_step=start_step)] for one in identities
        ]
        made, _ = shop.paint_batch(people, [world.describe(SCENE)] * len(people), [5] * len(people), steps=STEPS)
        return np.array([np.asarray(image, float) for image in made])

    return _paint


def test_weight_0_changes_nothing(shop, paint):
    plain, used = shop.paint([], world.describe(SCENE), seed=5, steps=STEPS)
    assert used == 0
    assert np.abs(paint(0.0, 0) - np.asarray(plain, float)).max() <= 1  # of a batch, and alone


def test_likeness_rises_with_the_weight(shop, paint):
    judge, detector = miniature.judge(), shop.encoders().faces.detector

    def read(image: np.ndarray) -> Any:
        found = detector.detect(np.ascontiguousarray(image[:, :, ::-1].astype(np.uint8)))
        return judge.read(image.astype(np.uint8), found[0].landmarks) if found else None

    wanted = [read(miniature.portrait(number)) for number in PEOPLE]
    seen = {}
    for weight in (0.0, 1.0):
        readings = [read(image) for image in paint(weight, 0)]
        seen[weight] = np.mean([one.likeness(of) if one else 0.0 for one, of in zip(readings, wanted)])
    assert seen[1.0] > seen[0.0] + 0.1, seen


def test_a_later_start_changes_less(paint):
    plain = paint(0.0, 0)
    changed = [np.abs(paint(1.0, step) - plain).mean() for step in (0, 1, 2)]
    assert 0 < changed[2] < changed[1] < changed[0], changed
