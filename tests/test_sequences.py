"""Random afternoons: settings that change, pictures that fail, and at the end the right picture.

A sequence is a seeded list of actions on a running program; its last picture has to be the one that a fresh start makes
with the settings that the sequence arrived at, or the refusal in the same words. A failure prints the sequence, and
`play(host, actions(seed, kind))` repeats it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_pulid.errors import PulidError
from tests.fake_webui import AxisOption
from tests.faults import FAULTS, STAGES, faulty
from tests.light_webui import FILES, PHOTOS, Host, Light, write_models

SEQUENCES, BLOCKS = int(os.environ.get("PULID_SEQUENCES", "50")), 5  # of each host; make test-long plays 500
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
        return [{"enabled": self.on, "images": [PHOTOS[self.photo]], "model": self.file}]


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


def play(host: Host, sequence: list[Action]) -> Settings:
    """Returns the settings at the end. What happens on the way may fail; it may not have consequences."""
    settings = Settings()
    for name, value in sequence:
        if name in ("on", "photo", "checkpoint", "file"):
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
    """At a stage which this picture may not come to."""
    with faulty(host, STAGES[stage], FAULTS[fault]), suppress(Exception, KeyboardInterrupt):
        host.generate(settings.args, settings.checkpoint, batches=2)


def cells(host: Host, settings: Settings, weights: tuple[float, ...]) -> None:
    from lib_pulid.webui import xyz

    axes = {axis.label: axis for axis in xyz.axes(AxisOption, 1, host.library)}
    p = host.processing(settings.checkpoint)
    for weight in weights:
        cell = copy(p)
        axes["[PuLID 1] Weight"].apply(cell, weight, [])
        with suppress(PulidError):  # the grid goes on
            host.generate(settings.args, p=cell)


def outcome(host: Host, settings: Settings, **how: Any) -> list[Any]:
    """The pictures, or the words of the refusal."""
    try:
        return host.generate(settings.args, settings.checkpoint, **how)
    except PulidError as error:
        return [str(error)]


def same(a: list, b: list) -> bool:
    if isinstance(a[0], str) or isinstance(b[0], str):
        return a == b
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("light") / "models"
    write_models(folder)
    return folder


@pytest.fixture(scope="module", params=CHECKPOINTS)
def program(request, models) -> Iterator[tuple[Host, dict[Settings, list]]]:
    """With what a fresh start makes of every setting."""
    fresh: dict[Settings, list] = {}
    with pytest.MonkeyPatch.context() as patch:
        light = Light(request.param, models, patch)
        with light.running() as host:
            for on in (True, False):
                for photo in PHOTOS:
                    for checkpoint in CHECKPOINTS[host.kind]:
                        for file in ("auto", *FILES):
                            host.start_anew()
                            settings = Settings(on, photo, checkpoint, file)
                            fresh[settings] = outcome(host, settings)
        with light.running() as host:
            yield host, fresh


def test_settings_tell_pictures_apart(program):
    """Or the right picture would prove nothing."""
    _, fresh = program
    off = {settings.checkpoint: made for settings, made in fresh.items() if not settings.on}
    assert all(same(made, off[settings.checkpoint]) for settings, made in fresh.items() if not settings.on)
    faced = {settings: made for settings, made in fresh.items() if settings.on and not isinstance(made[0], str)}
    named = {settings: made for settings, made in faced.items() if settings.file != "auto"}
    assert len({made[0].numpy().tobytes() for made in (*named.values(), *off.values())}) == len(named) + len(off)
    assert {settings.photo for settings in fresh if settings not in faced and settings.on} == set(PHOTOS)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_sequence_ends_in_the_right_picture(program, block):
    host, fresh = program
    before = host.fingerprint()
    for seed in range(block, SEQUENCES, BLOCKS):
        sequence = actions(seed, host.kind)
        host.script = host.ui.script()
        try:
            settings = play(host, sequence)
            assert same(outcome(host, settings), fresh[settings]), f"not the picture of {settings}"
            assert host.left_behind() == []
            assert host.fingerprint() == before
        except BaseException as error:
            told = "\n".join(f"  {name} {value}" for name, value in sequence)
            raise AssertionError(f"{host.kind}, sequence {seed}: {error}\n{told}") from error
