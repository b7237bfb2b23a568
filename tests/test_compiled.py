"""A person's tensors serve all images, whatever their settings; another person or file is computed anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib_pulid import injection as core
from lib_pulid.injection import compile_injection
from lib_pulid.webui import compiled
from lib_pulid.webui.compiled import CompiledInjections
from tests.light_webui import FILES, unit
from tests.test_injection import person

SETTINGS = {"weight": 0.8, "dtype": torch.float32, "mask": torch.ones(4, 4), "start": 0.1}


@pytest.fixture
def counted(monkeypatch) -> list:
    """A site for each that is compiled from now on."""
    seen: list = []
    prepare = core.prepare_site
    monkeypatch.setattr(core, "prepare_site", lambda *args: seen.append(args) or prepare(*args))
    return seen


def same(a: core.Injection, b: core.Injection) -> bool:
    plain = replace(a, sites=(), mask=None) == replace(b, sites=(), mask=None)
    return plain and all(torch.equal(x.tokens, y.tokens) for x, y in zip(a.sites, b.sites, strict=True))


def test_only_person_and_file_are_computed_anew(adapter, counted):
    kept = CompiledInjections()
    variants = [
        ((1,), person(), {}),
        ((2,), person(), {}),  # the file has changed
        ((1,), person(78), {}),
        ((1,), replace(person(), uncond=None), {}),
        ((1,), replace(person(), uncond=person(78).uncond), {}),
        ((1,), person(), {"weight": 0.7}),
        ((1,), person(), {"dtype": torch.bfloat16}),
        ((1,), person(), {"mask": torch.eye(4)}),
        ((1,), person(), {"mask": torch.ones(2, 8)}),
        ((1,), person(), {"mask": None}),
        ((1,), person(), {"start": 0.2}),
        ((1,), person(), {"num_zero": 8}),
    ]
    for number, (stamp, who, changes) in enumerate(variants):
        how = {**SETTINGS, **changes}
        counted.clear()
        made = kept.get(adapter, stamp, who, torch.device("cpu"), **how)
        assert bool(counted) == (number < 5)
        anew = compile_injection(adapter, who, **how)
        assert same(made, anew)
        assert made.mask is anew.mask is None or torch.equal(made.mask, anew.mask)


def test_the_last_ones_are_kept_as_far_as_there_is_room(adapter, counted, monkeypatch):
    size = compile_injection(adapter, person(), **SETTINGS).nbytes
    monkeypatch.setattr(compiled, "MOST", 2.5 * size)
    kept = CompiledInjections()

    def get(seed: int) -> bool:
        """Whether it was there."""
        counted.clear()
        kept.get(adapter, (), person(seed), torch.device("cpu"), **SETTINGS)
        return not counted

    assert [get(seed) for seed in (1, 2, 1, 3, 1, 2)] == [False, False, True, False, True, False]
    monkeypatch.setattr(compiled, "MOST", 0)  # the last one in any case
    assert [get(seed) for seed in (5, 5)] == [False, True]


def test_the_next_picture_of_a_person_compiles_nothing(host, counted):
    first = host.generate([unit("anna")])
    assert counted
    counted.clear()
    again = host.generate([unit("anna")])
    assert counted == []
    assert all(map(torch.equal, first, again))
    host.generate([unit("anna", model=FILES[1])])
    assert counted
