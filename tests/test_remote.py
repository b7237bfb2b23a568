"""With stable-diffusion-webui-distributed: what is sent to other machines, and what they answer."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lib_pulid.methods import INSTANTID
from lib_pulid.units import PulidUnit, default_args, parse_args
from lib_pulid.webui import remote
from lib_pulid.webui.dropped import DroppedPhotos
from lib_pulid.webui.pictures import decode
from lib_pulid.webui.presets import Presets

ANNA = PulidUnit(images=("YQ==",), weight=0.6, start=0.2)
BEN = PulidUnit(identity="ben", projection="ortho")


PHOTOS = DroppedPhotos()
ADAPTERS = SimpleNamespace(method_of={"instantid.bin": INSTANTID}.get)


def sent(args: list[Any], changes: Any = None, folder: Any = None) -> list[Any]:
    """What the other extension sends: our part of the arguments, as JSON."""
    library = SimpleNamespace(presets=Presets(SimpleNamespace(path=folder)), photos=PHOTOS, adapters=ADAPTERS)
    p = SimpleNamespace(script_args=["before", *args, "after"])
    script = SimpleNamespace(args_from=1, args_to=1 + len(args))
    remote.spell_out(p, script, changes or {}, library)
    assert p.script_args[0] == "before" and p.script_args[-1] == "after"
    assert len(p.script_args) == len(args) + 2
    return json.loads(json.dumps(p.script_args[1:-1]))


def page(*units: PulidUnit) -> list[Any]:
    return [True, *(value for unit in units for value in unit.positions())]


def test_a_machine_with_one_tab_gets_all_people():
    slots = len(default_args(1))
    here, there = (
        parse_args(page(ANNA, replace(BEN, enabled=False), BEN)),
        sent(page(ANNA, replace(BEN, enabled=False), BEN)),
    )
    here = [(number, replace(unit, identity_net=None)) for number, unit in here]  # the page's value, nobody's wish
    assert parse_args(there[:slots]) == here
    assert [number for number, _ in here] == [1, 3]


def test_what_a_grid_sets_is_in_it():
    args = page(ANNA)
    [(_, unit)] = parse_args(sent(args, {1: {"weight": 0.9}}))
    assert unit == replace(ANNA, weight=0.9)


def test_photos_of_this_machine_are_sent():
    image = np.random.default_rng(1).integers(0, 256, (30, 2000, 3), np.uint8)
    [(_, unit)] = parse_args(sent(page(replace(ANNA, images=(PHOTOS.add(image), "YQ==")))))
    np.testing.assert_array_equal(decode(unit.images[0], "photo"), image)
    assert unit.images[1] == "YQ=="
    lost = page(replace(ANNA, images=("sha256:0",)))
    assert sent(lost) == lost  # the generation here will say so


def test_what_the_page_hides_is_not_sent():
    """By name it would be an error there, and here: the arguments are replaced."""
    [(_, unit)] = parse_args(sent(page(replace(ANNA, model="instantid.bin", projection="ortho", lora_weight=0.5))))
    assert (unit.model, unit.given & {"projection", "lora_weight"}) == ("instantid.bin", set())
    [(_, unit)] = parse_args(sent(page(replace(ANNA, projection="ortho", lora_weight=0.5))))
    assert unit.given & {"projection", "lora_weight"} == {"projection"}


def test_presets_of_this_machine_become_their_settings(tmp_path):
    Presets(SimpleNamespace(path=tmp_path)).save("soft", {"weight": 0.4, "end": 0.7})
    [(_, unit)] = parse_args(sent([{"images": ["YQ=="], "preset": "soft"}, *default_args(1)[1:]], None, tmp_path))
    assert (unit.weight, unit.end) == (0.4, 0.7)


@pytest.mark.parametrize("args", [default_args(2), [{"images": ["YQ=="], "weight": 99}, *default_args(1)[1:]]])
def test_off_and_wrong_arguments_stay(args):
    assert sent(args) == json.loads(json.dumps(args))


def test_only_with_that_extension():
    others = [SimpleNamespace(title=lambda: "ControlNet")]
    assert not remote.is_used(SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=others)))
    others.append(SimpleNamespace(title=lambda: "Distribute"))
    assert remote.is_used(SimpleNamespace(scripts=SimpleNamespace(alwayson_scripts=others)))
    assert not remote.is_used(SimpleNamespace())


def test_errors_of_other_machines_are_told():
    remote.Answers()  # of before a Reload UI
    answers, p = remote.Answers(), SimpleNamespace(extra_generation_params={})
    processed = SimpleNamespace(comments="A comment\n")
    log = logging.getLogger("distributed")
    log.error("worker 'b' had no response")
    log.error(
        "'b' response: Code <422> " + json.dumps({"error": "SettingError", "errors": "PuLID unit 1: no such file"})
    )
    remote.report(answers.take(), p, processed)
    assert processed.comments == "A comment\nPuLID, 'b': PuLID unit 1: no such file\n"
    assert p.extra_generation_params == {"PuLID errors elsewhere": "'b': PuLID unit 1: no such file"}
    assert answers.take() == []
