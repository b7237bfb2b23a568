"""Random afternoons: settings that change, images that fail, and at the end the right image.

A sequence is a seeded list of actions on a running program; its last image has to be the one that a fresh start makes
with the settings that the sequence arrived at, or the refusal in the same words. A failure prints the sequence, and
`play(host, actions(seed, kind))` repeats it.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lib_pulid.errors import PulidError
from tests.fake_webui import AxisOption
from tests.faults import FAULTS, STAGES, faulty
from tests.light_webui import FILES, PHOTOS, Host, unit

SEQUENCES, BLOCKS = int(os.environ.get("PULID_SEQUENCES", "15")), 5  # of each host; make test-long plays 500
CHECKPOINTS = {"a1111": ("sdxl", "sdxl-b", "sd15"), "forge": ("sdxl", "sdxl-b", "flux", "sd15")}
SUDDEN = ("error", "no memory", "ctrl-c", "interrupt", "skip")


@dataclass(frozen=True)
class Settings:
    """What a user has chosen."""

    on: bool = True
    photo: str = "anna"
    checkpoint: str = "sdxl"
    file: str = "auto"

    @property
    def args(self) -> list[dict[str, Any]]:
        return [unit(self.photo, enabled=self.on, model=self.file)]


Action = tuple[str, Any]


def actions(seed: int, kind: str) -> list[Action]:
    chosen = random.Random(f"{kind} {seed}")
    choices = {
        "on": (True, False),
        "photo": tuple(PHOTOS),
        "checkpoint": CHECKPOINTS[kind],
        "file": ("auto", "auto", *FILES),
        "generate": (1, 2),  # batches
        "fail": [(stage, fault) for stage in range(len(STAGES)) for fault in SUDDEN],
        "cells": ((0.3, 1.5), (0.0, 0.8)),  # weights of a grid
        "forget": (None,),  # the photos that were read
    }
    names = chosen.choices(list(choices), weights=(2, 3, 2, 2, 3, 4, 1, 1), k=chosen.randint(3, 6))
    return [(name, chosen.choice(choices[name])) for name in names]


def end(sequence: list[Action]) -> Settings:
    """The settings that a sequence arrives at."""
    return replace(Settings(), **{name: value for name, value in sequence if name in vars(Settings())})


def play(host: Host, sequence: list[Action]) -> Settings:
    """Returns the settings at the end. What happens on the way may fail; it may not have consequences."""
    settings = Settings()
    for name, value in sequence:
        if name in vars(settings):
            settings = replace(settings, **{name: value})
        elif name == "generate":
            outcome(host, settings, batches=value)
        elif name == "fail":
            fail(host, settings, *value)
        elif name == "cells":
            cells(host, settings, value)
        else:
            host.forget_photos()
    return settings


def fail(host: Host, settings: Settings, stage: int, fault: str) -> None:
    """At a stage which this image may not come to."""
    with faulty(host, STAGES[stage], FAULTS[fault]), suppress(Exception, KeyboardInterrupt):
        host.generate(settings.args, settings.checkpoint, batches=2)


def cells(host: Host, settings: Settings, weights: tuple[float, ...]) -> None:
    from lib_pulid.webui import xyz

    axes = {axis.label: axis for axis in xyz.axes(AxisOption, 1, host.library, ("sdxl", "flux"))}
    p = host.processing(settings.checkpoint)
    for weight in weights:
        cell = copy(p)
        axes["[PuLID 1] Weight"].apply(cell, weight, [])
        with suppress(PulidError):  # the grid goes on
            host.generate(settings.args, p=cell)


def outcome(host: Host, settings: Settings, **how: Any) -> list[Any]:
    """The images, or the words of the refusal."""
    try:
        return host.generate(settings.args, settings.checkpoint, **how)
    except PulidError as error:
        return [str(error)]


def same(a: list, b: list) -> bool:
    if isinstance(a[0], str) or isinstance(b[0], str):
        return a == b
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


FRESH: dict[tuple[str, Settings], list[Any]] = {}


def fresh(host: Host, settings: Settings) -> list[Any]:
    """What the program makes of settings right after its start."""
    if (host.kind, settings) not in FRESH:
        host.start_anew()
        FRESH[host.kind, settings] = outcome(host, settings)
    return FRESH[host.kind, settings]


def test_settings_tell_pictures_apart(host):
    """Or the right image would prove nothing. Whatever is changed, it is another one; where PuLID is off, none is."""
    base = Settings(file=FILES[0])
    changes = [
        {}, {"on": False}, {"photo": "ben"}, {"photo": "cleo"}, {"file": FILES[1]}, {"checkpoint": "sdxl-b"},
    ]  # fmt: skip
    made = [fresh(host, replace(base, **change)) for change in changes]
    made += [fresh(host, Settings(checkpoint="flux", photo=photo)) for photo in ("anna", "ben") if host.kind == "forge"]
    assert len({one[0].numpy().tobytes() for one in made}) == len(made)
    assert same(fresh(host, Settings(on=False, photo="nobody")), fresh(host, replace(base, on=False)))
    refused = [fresh(host, one) for one in (Settings(photo="nobody"), Settings(checkpoint="sd15"))]
    assert all(isinstance(one[0], str) for one in refused)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_sequence_ends_in_the_right_picture(host, block):
    before = host.fingerprint()
    for seed in range(block, SEQUENCES, BLOCKS):
        sequence = actions(seed, host.kind)
        expected = fresh(host, end(sequence))
        host.script = host.ui.script()
        try:
            settings = play(host, sequence)
            assert settings == end(sequence)
            assert same(outcome(host, settings), expected), f"not the picture of {settings}"
            assert host.left_behind() == []
            assert host.fingerprint() == before
        except BaseException as error:
            told = "\n".join(f"  {name} {value}" for name, value in sequence)
            raise AssertionError(f"{host.kind}, sequence {seed}: {error}\n{told}") from error
