"""Several at once: page and API beside a generation, one generation inside another. Nobody gets another's face."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from lib_pulid import disk, hosts
from lib_pulid.webui import routes
from tests import light_webui
from tests.fake_modules.models import same
from tests.light_webui import FILES, PHOTOS, Host, unit

PEOPLE = ("anna", "ben", "cleo")


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as can be."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def at_once(*works: Callable[[], None]) -> None:
    """All of them in threads; raises what went wrong."""
    pool = ThreadPoolExecutor(len(works))
    ended, hanging = wait(
        [pool.submit(work) for work in works], timeout=600
    )  # none of them waits; a busy machine is slow
    assert not hanging, "a thread hangs"
    for one in ended:
        one.result()


def test_page_and_api_beside_generations(host, restless):
    hashes = {(name, file): host.encode(name, file).short_hash for name in PEOPLE for file in FILES[:2]}
    pictures = {name: host.generate([unit(name)]) for name in PEOPLE}
    aligned = {name: routes.detect({"images": [PHOTOS[name]]}, host.library)["photos"] for name in PEOPLE}
    assert len(set(hashes.values())) == 6
    actions = host.actions()

    def generate() -> None:
        chosen = random.Random(1)
        for _ in range(10):
            name = chosen.choice(PEOPLE)
            assert same(host.generate([unit(name)]), pictures[name])
            host.forget_photos()

    def encode(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(6):
            name, file = chosen.choice(list(hashes))
            assert host.encode(name, file).short_hash == hashes[name, file]
            host.library.encoders.release()

    def look() -> None:
        chosen = random.Random(3)
        for number in range(6):
            name = chosen.choice(PEOPLE)
            assert routes.detect({"images": [PHOTOS[name]]}, host.library)["photos"] == aligned[name]
            actions.preview(json.dumps([PHOTOS[name]]), "None", "largest", 0)
            note = actions.save(f"{name} {number}", json.dumps([PHOTOS[name]]), FILES[0], "largest", 0, "official")[2]
            assert f"({hashes[name, FILES[0]]}) for PuLID" in note
            assert host.library.identities.load(f"{name} {number}").short_hash == hashes[name, FILES[0]]

    at_once(generate, lambda: encode(1), lambda: encode(2), look)
    assert host.left_behind() == [] and host.ui.swallowed == []


def test_nobody_lets_go_of_what_another_reads_with(host, monkeypatch):
    reading, go_on, let_go = threading.Event(), threading.Event(), threading.Event()
    detect = light_webui.Detector.detect

    def slow(detector: Any, image: Any) -> list:
        reading.set()
        assert go_on.wait(30)
        return detect(detector, image)

    def release() -> None:
        assert reading.wait(30)
        host.library.encoders.release()
        let_go.set()

    def look() -> None:
        assert reading.wait(30)
        try:
            assert not let_go.wait(0.2) and host.library.encoders._models
        finally:
            go_on.set()

    monkeypatch.setattr(light_webui.Detector, "detect", slow)
    at_once(lambda: host.encode("anna"), release, look)


def test_the_same_processing_again(host):
    """Scripts that loop use one for several pictures."""
    plain, p = host.generate([]), host.processing()
    for args in ([unit("anna")], []):
        made = host.generate(args, p=p)
        assert same(made, plain) == (not args)
    host.ui.hook("process", host.script, p, unit("anna"))  # and then the prompt could not be read
    assert same(host.generate([], p=p), plain)


def test_a_file_that_goes_while_the_list_is_made(host, monkeypatch):
    host.library.identities.save("Stays", host.encode("anna", FILES[0]))
    listed = disk.listed
    gone = host.library.identities.folder / "Gone.safetensors"
    monkeypatch.setattr(disk, "listed", lambda *args: [gone, *listed(*args)])
    assert [one.name for one in host.library.identities.listed()] == ["Stays"]
    assert {file.name for file in host.library.adapters.listed()} >= set(FILES)


def inside(host: Host, outer: Any, args: list, **how: Any) -> list:
    """Another extension generates with the model that `outer` uses, through all scripts."""
    p = host.processing(**how)
    p.sd_model = outer.sd_model
    if host.kind == "forge":
        p._unpatched = outer._unpatched
    return host.generate(args, p=p)


PLACES = ("before a step", "between two batches")
INNER = {"off": [], "another person": [unit("ben")], "the same person": [unit("anna")]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("inner", INNER)
def test_a_generation_inside_another(host, place, inner):
    expected = {"outer": host.generate([unit("anna")], batches=2), "inner": host.generate(INNER[inner])}
    assert not same(expected["outer"][:1], host.generate([]))
    p, made = host.processing(batches=2), []

    def detail(number: int) -> None:
        if number == 1 or place == "between two batches":
            made.append(inside(host, p, INNER[inner]))

    if place == "before a step":
        p.before_step = detail
        outer = host.generate([unit("anna")], p=p)
    else:
        outer = host.ui.generate(host.script, p, [unit("anna")], between=detail)
    assert same(outer, expected["outer"])
    assert len(made) == 2 and all(same(one, expected["inner"]) for one in made)
    assert host.left_behind() == []


def test_a_generation_that_fails_inside_another(host):
    """It ends alone; and what fails in the outer one, in the middle, ends that."""
    expected = host.generate([unit("anna")])
    p = host.processing()

    def detail(step: int) -> None:
        with pytest.raises(Exception, match="no face"):
            inside(host, p, [unit("nobody")])

    p.before_step = detail
    assert same(host.generate([unit("anna")], p=p), expected)

    p = host.processing()
    p.before_step = lambda step: 1 / 0 if step == 1 else inside(host, p, [unit("ben")])
    with pytest.raises(ZeroDivisionError):
        host.generate([unit("anna")], p=p)
    assert host.left_behind() == []


def test_reload_ui_while_a_picture_is_made(host):
    """The program unloads scripts; the image under way keeps its face."""
    expected, p = host.generate([unit("anna")]), host.processing()

    def reload(step: int) -> None:
        for unloaded in host.ui.modules.script_callbacks.callback_map["callbacks_script_unloaded"]:
            unloaded.callback()

    p.before_step = reload
    assert same(host.generate([unit("anna")], p=p), expected)
    assert host.left_behind() == []


@pytest.fixture(params=["1.9", "1.8"])
def since(host, request, monkeypatch) -> str:
    """A1111 1.8 calls no script between process_batch and the first step."""
    if request.param == "1.8":
        if host.kind != "a1111":
            pytest.skip("A1111 only")
        for script in (host.ui.modules.scripts.Script, type(host.script).__base__):
            monkeypatch.delattr(script, "process_before_every_sampling")
    return request.param


@pytest.mark.parametrize("calls_ours", [True, False])
def test_another_extension_in_the_place_of_sample(host, calls_ours):
    """One that does not call what it found samples with the face all the same."""
    expected, p, calls = host.generate([unit("anna")], batches=2), host.processing(batches=2), []
    before = p.sample if calls_ours else lambda: type(p).sample(p)
    p.sample = lambda: calls.append(1) or before()
    assert same(host.generate([unit("anna")], p=p), expected)
    assert calls == [1] * 2
    assert host.left_behind() == []


def test_another_extension_in_the_place_of_ours(host, since):
    """A script after ours: the face is there all the same, and nothing stays."""
    expected, p, ours = host.generate([unit("anna")]), host.processing(), host.script.process_batch

    def process_batch(p: Any, *args: Any, **kwargs: Any) -> None:
        ours(p, *args, **kwargs)
        p.sample = lambda: type(p).sample(p)

    host.script.process_batch = process_batch
    assert same(host.generate([unit("anna")], p=p), expected)
    assert host.left_behind() == []


def test_a_request_that_ends_between_two_stages(host, since):
    """The hosts read the prompt after process_batch, and tell nobody when that fails: nothing was put in before."""
    plain, faced = host.generate([], batches=2), host.generate([unit("anna")], batches=2)
    p, other = host.processing(), host.processing(batches=2)
    for hook in ("process", "process_batch"):
        host.ui.hook(hook, host.script, p, unit("anna"))
    waiting = ["runs: 1"] if since == "1.8" else []  # for the first step, with nothing hooked
    assert host.left_behind() == waiting
    assert same([other.sample(), other.sample()], plain)  # another extension's, without scripts
    assert host.left_behind() == waiting
    assert same(host.generate([unit("anna")], batches=2), faced)
    assert host.left_behind() == []


def test_a_family_that_comes_in_the_middle_leaves_no_encoder_loaded(host):
    """The plan compiles again, in the middle of sampling, for the model that a refiner or a hires pass brings."""
    if host.kind != "forge":
        pytest.skip("A1111 has no FLUX")
    p, flux = host.processing(), host.processing("flux")
    host.ui.hook("process", host.script, p, unit("anna"))
    injections = p.pulid_plan.injections(hosts.current().loaded_model(flux), hires=True)
    assert [injection.family for injection in injections] == ["flux"]
    host.ui.hook("postprocess", host.script, p, None)
    assert host.left_behind() == []
