"""Saved identities in the prompt: the same image as with a unit, each image of a batch its own, never a stranger."""

from __future__ import annotations

import json
from copy import copy
from types import SimpleNamespace

import pytest
import torch

from lib_pulid.errors import IdentityMismatchError, PulidError, SettingError, UnsupportedModelError
from lib_pulid.hosts.a1111 import _Window
from lib_pulid.injection import DenoiseStep, identity_rows
from lib_pulid.units import default_args
from tests.fake_modules.models import UNet, count_hooks, same
from tests.light_webui import unit

OFF = default_args(3)


@pytest.fixture
def saved(host):
    """The program, with two saved identities."""
    host.save(anna="anna", ben="ben")
    return host


def with_prompt(host, prompt, args=OFF, **how):
    """The images of a request with this prompt; the generation is left in `host.last`."""
    p = host.processing()
    for name, value in {"prompt": prompt, **how}.items():
        setattr(p, name, value)
    host.last = p
    return host.generate(args, p=p)


def rows(images, image, count):
    """Both rows of one image of a batch, cond and uncond, in every step."""
    return [step[image::count] for step in images[0]]


SHORT = {"identity": "anna", "weight": 0.6, "end": 0.7}
TEMPLATES = [unit("ben", weight=0.3, end=0.6, enabled=False), {"enabled": False, "weight": 1.5}]
AS_UNITS = {
    "one": ("a photo <pulid:anna:0.6:end=0.7>", OFF, [SHORT]),
    "two": ("<pulid:anna:0.6:end=0.7> and <PuLID:Ben>", OFF, [SHORT, {"identity": "ben"}]),
    "twice": ("<pulid:anna:0.6:end=0.7>" * 2, OFF, [SHORT] * 2),
    "beside the accordion's": ("<pulid:ben>", [SHORT], [SHORT, {"identity": "ben"}]),
    "box": ("<pulid:anna:box=0,0,0.5,1>", OFF, [{"identity": "anna", "box": [0, 0, 0.5, 1]}]),
    # Of a unit of the accordion, also one that is switched off; what the tag says itself counts more.
    "a unit's settings": ("<pulid:anna:unit=1>", TEMPLATES, [{"identity": "anna", "weight": 0.3, "end": 0.6}]),
    "of a second unit": ("<pulid:ben:0.2:unit=2>", TEMPLATES, [{"identity": "ben", "weight": 0.2}]),
    "of a list": ("<pulid:anna:unit=2>", [False, *OFF[1:]], [{"identity": "anna"}]),
}
NOTHING = {
    "no tag": {"prompt": "a <lora:x:1> photo"}, "weight 0": {"prompt": "<pulid:anna:0>"},
    "off": {"prompt": "<pulid:anna:enabled=no>"},
    "networks off": {"prompt": "<pulid:anna>", "disable_extra_networks": True},
}  # fmt: skip
SIZE = {"width": 64, "height": 64}


class TestATag:
    @pytest.mark.parametrize(("prompt", "args", "units"), AS_UNITS.values(), ids=AS_UNITS)
    def test_it_is_the_unit(self, saved, prompt, args, units):
        tagged = with_prompt(saved, prompt, args, **SIZE)
        assert saved.ui.modules.extra_networks.swallowed == saved.ui.swallowed == []
        assert saved.left_behind(saved.last) == []
        assert same(tagged, with_prompt(saved, "", units, **SIZE))
        assert not same(tagged, saved.generate(OFF))

    def test_a_box_is_a_part_of_the_image(self, saved):
        boxed, whole = (with_prompt(saved, f"<pulid:anna{box}>", **SIZE) for box in (":box=0,0,0.5,1", ""))
        assert not same(boxed, whole)

    @pytest.mark.parametrize("how", NOTHING.values(), ids=NOTHING)
    def test_it_changes_nothing(self, saved, how):
        plain = saved.generate(OFF)
        assert same(plain, with_prompt(saved, **how))
        with_prompt(saved, "<pulid:anna>")
        assert same(plain, saved.generate(OFF))


class TestNeverAStranger:
    @pytest.mark.parametrize(("prompt", "words"), [
        ("<pulid:ana>", r"tag 1, field identity: ana is not in .*Did you mean anna\?"),
        ("<pulid:zzzzz>", "zzzzz is not in .*Saved identities: anna, ben"),
        ("<pulid:anna><pulid:ben:9>", "tag 2, field weight: 9.0 is out of range"), ("<pulid:anna", "not complete"),
        ("《pulid:anna》", "not complete"), ("＜PuLID：anna＞", "not complete"),
        ("<pulid:anna:start=0.5:end=0.4>", "tag 1, field start"),
        ("<pulid:anna:start=0.9>", "tag 1, field start: PuLID would never be active"),
        ("<pulid:anna:preset=realistic>", "tag 1, field preset: realistic is for FLUX"),
        ("<pulid:anna>" * 11, "11 people are too many"),
        ("<pulid:anna:unit=4>", "tag 1, field unit: there is no unit 4"),
    ])  # fmt: skip
    def test_what_is_wrong_ends_the_request(self, saved, prompt, words):
        with pytest.raises(PulidError, match=words):
            with_prompt(saved, prompt)
        assert len(saved.last.comments) <= 1
        assert saved.left_behind(saved.last) == []

    def test_in_a_later_batch_it_is_told_before_the_first(self, saved):
        done = []
        p = saved.processing(batches=2)
        p.prompt, p.before_step = ["<pulid:anna>", "<pulid:bem>"], done.append
        with pytest.raises(IdentityMismatchError, match="tag 1, field identity: bem is not in .*ben"):
            saved.generate(OFF, p=p)
        assert done == []

    def test_in_the_negative_prompt_it_is_told(self, saved):
        plain = saved.generate(OFF)
        assert same(plain, with_prompt(saved, "", negative_prompt="<pulid:anna>"))
        assert "negative prompt" in saved.last.comments[0]
        with_prompt(saved, "", all_hr_negative_prompts=["<pulid:anna>"])
        assert "negative prompt" in saved.last.comments[0]

    def test_two_people_without_regions_are_told_that_they_mix(self, saved):
        """As when a photo was left in the panel and a card was clicked."""
        notes = []
        for more, prompt in (
            ({}, "<pulid:ben>"), ({}, "<pulid:anna>"), ({"weight": 0}, "<pulid:ben>"),
            ({"end": 0.5}, "<pulid:ben:start=0.5>"),
            ({"box": [0, 0, 0.5, 1]}, "<pulid:ben:box=0.5,0,0.5,1>"), ({"hires": "second"}, "<pulid:ben:hires=first>"),
        ):  # fmt: skip
            p = saved.processing()
            p.prompt, p.enable_hr = prompt, True
            saved.generate([{"identity": "anna", **more}], p=p)
            notes.append([text for text in p.comments if "mix" in text])
        assert [len(texts) for texts in notes] == [1, 0, 0, 0, 0, 0]
        assert "unit 1 and tag 1 have no region, so their faces mix into one" in notes[0][0]


class TestBatches:
    def test_each_batch_has_its_own(self, saved):
        p = saved.processing(batches=3)
        p.prompt = ["<pulid:anna>", "nobody", "<pulid:ben>"]
        seen = []
        made = saved.ui.generate(
            saved.script, p, OFF, between=lambda batch: seen.append(dict(p.extra_generation_params))
        )
        for image, args in zip(made, ([{"identity": "anna"}], OFF, [{"identity": "ben"}])):
            assert same([image], saved.generate(args))
        assert [list(entries) for entries in seen] == [["PuLID tag 1"], [], ["PuLID tag 1"]]
        assert "identity: ben" in seen[2]["PuLID tag 1"]

    def test_each_image_of_a_batch_has_its_own(self, saved):
        mixed = with_prompt(saved, ["<pulid:anna>", "nobody", "<pulid:ben:0.5>"], batch_size=3)
        entries = saved.last.extra_generation_params["PuLID tag 1"]
        for i, prompt in enumerate(("<pulid:anna>", "nobody", "<pulid:ben:0.5>")):
            alone = with_prompt(saved, prompt, batch_size=3)
            for one, other in zip(rows(mixed, i, 3), rows(alone, i, 3)):
                assert torch.equal(one, other)
        assert "identity: anna" in entries[0] and entries[1] is None and "weight: 0.5" in entries[2]
        assert not same(mixed, with_prompt(saved, "<pulid:anna>", batch_size=3))

    def test_what_all_images_have_is_one_unit(self, saved):
        with_prompt(saved, ["<pulid:anna><pulid:ben>", "x <pulid:anna>"], batch_size=2)
        entries = saved.last.extra_generation_params
        assert isinstance(entries["PuLID tag 1"], str) and entries["PuLID tag 2"][1] is None

    def test_a_wrong_one_is_named_with_its_image(self, saved):
        with pytest.raises(SettingError, match="PuLID image 2, tag 1, field weight"):
            with_prompt(saved, ["<pulid:anna>", "<pulid:anna:x>"], batch_size=2)

    def test_wildcards_are_waited_for(self, saved):
        """Another extension replaces them after our `process`."""
        p = saved.processing()
        p.prompt = "<pulid:{anna|ben}:0.6>"

        def replace(p):
            p.prompts = [text.replace("{anna|ben}", "ben") for text in p.prompts]

        p.rewrite_prompts = replace
        assert same(saved.generate(OFF, p=p), saved.generate([{"identity": "ben", "weight": 0.6}]))
        with pytest.raises(PulidError, match=r"\{anna\|ben\} is not in"):
            with_prompt(saved, "<pulid:{anna|ben}:0.6>")

    def test_prompts_that_change_between_process_and_batch(self, saved):
        """Or are made there: an extension adds a tag of its own."""
        p = saved.processing()
        p.rewrite_prompts = lambda p: p.prompts.__setitem__(0, "<pulid:anna>")
        assert same(saved.generate(OFF, p=p), saved.generate([{"identity": "anna"}]))


class TestHires:
    @pytest.mark.parametrize(("prompt", "hr_prompt", "units"), [
        ("<pulid:anna>", "", [{"identity": "anna"}]),
        ("<pulid:anna>", "larger", [{"identity": "anna", "hires": "first"}]),
        ("<pulid:anna:hires=second>", "", [{"identity": "anna", "hires": "second"}]),
        ("<pulid:anna>", "larger <pulid:ben:0.5>",
         [{"identity": "anna", "hires": "first"}, {"identity": "ben", "weight": 0.5, "hires": "second"}]),
    ], ids=["both passes", "first", "second", "a prompt of its own"])  # fmt: skip
    def test_passes(self, saved, prompt, hr_prompt, units):
        tagged = with_prompt(saved, prompt, hr_prompt=hr_prompt, enable_hr=True)
        names = [name for name, where in (("PuLID tag 1", prompt), ("PuLID hires tag 1", hr_prompt)) if "<" in where]
        assert list(saved.last.extra_generation_params) == names
        assert same(tagged, with_prompt(saved, "", units, enable_hr=True))

    def test_a_tag_for_one_pass_in_the_prompt_of_the_other(self, saved):
        with pytest.raises(SettingError, match="tag 1, field hires: the tag says second"):
            with_prompt(saved, "<pulid:anna:hires=second>", hr_prompt="larger", enable_hr=True)

    def test_for_the_second_pass_without_hires_fix(self, saved):
        """The only pass has the face: an image of a stranger, with PuLID in its parameters, would be wrong."""
        wanted = saved.generate([{"identity": "anna"}])
        assert same(with_prompt(saved, "", [{"identity": "anna", "hires": "second"}]), wanted)
        assert "hires: both" in saved.last.extra_generation_params["PuLID 1"]
        assert same(with_prompt(saved, "<pulid:anna:hires=second>"), wanted)

    @pytest.mark.parametrize("asked", [{"hires": "first"}, {"weight": 0}, {}], ids=str)
    def test_a_pass_that_needs_no_face_may_have_any_model(self, saved, asked):
        """Another checkpoint for the second pass, one that PuLID is not for."""
        p = saved.processing()
        p.enable_hr, first, other = True, p._pass, UNet(2048, (1, 0, 1))

        def load_for_second(*args):
            if p.is_hr_pass:
                p.load(other, "short")
            return first(*args)

        p._pass = load_for_second
        if asked:
            assert saved.generate([{"identity": "anna", **asked}], p=p)
        else:
            with pytest.raises(UnsupportedModelError, match="shortened SDXL"):
                saved.generate([{"identity": "anna"}], p=p)
        assert saved.left_behind(p) == [] and count_hooks(other) == 0

    @pytest.mark.parametrize("asked", [{"weight": 0}, {"hires": "first"}, {}], ids=str)
    def test_an_image_to_enlarge_with_any_model(self, saved, asked):
        """The hosts' button below a finished image: hires fix without a first pass, beside a model loaded for it."""
        p = saved.processing("sd15")
        p.enable_hr, p.firstpass_image, first = True, object(), p._pass
        p._pass = lambda *args: first(*args) if p.is_hr_pass else []
        if asked:
            assert saved.generate([{"identity": "anna", "keep_best": 1, **asked}], p=p)
            assert p.extra_generation_params == {}
        else:
            with pytest.raises(UnsupportedModelError, match=r"sd15: this is a Stable Diffusion 1\.x model"):
                saved.generate([{"identity": "anna"}], p=p)
        assert saved.left_behind(p) == [] and saved.ui.swallowed == []


class TestParameters:
    def test_the_hash_is_beside_the_tag_and_no_unit_is_pasted(self, saved):
        with_prompt(saved, "<pulid:anna:0.6>")
        entries = saved.last.extra_generation_params
        (one,) = (known for known in saved.library.identities.listed() if known.name == "anna")
        assert f"hash: {one.short_hash}" in entries["PuLID tag 1"] and "weight: 0.6" in entries["PuLID tag 1"]
        saved.script.ui(False)
        pasted = {str(name): name(entries) for _, name in saved.script.infotext_fields}
        assert pasted["PuLID on"] is False and pasted["PuLID 1 enabled"] is False
        assert json.loads(json.dumps(entries)) == entries

    def test_another_cell_of_a_grid_does_not_keep_them(self, saved):
        p = saved.processing()
        p.prompt = "<pulid:anna>"
        saved.generate(OFF, p=p)
        cell = copy(p)
        cell.prompt = "nobody"
        assert same(saved.generate(OFF, p=cell), saved.generate(OFF))
        assert p.extra_generation_params == {}


class TestWithoutTheScript:
    """ADetailer runs only the scripts that its setting lists. Extra networks it runs always."""

    def repaint(self, saved, p):
        p.setup_prompts()
        p.begin_batch(0)
        return [p.sample()]

    @pytest.mark.parametrize("copied", [False, True])
    def test_the_tag_acts(self, saved, copied):
        p = outer = saved.processing()
        if copied:  # with all that an outer generation put there
            outer.prompt = "<pulid:ben>"
            outer.setup_prompts()
            saved.ui.hook("process", saved.script, outer, {"identity": "ben", "keep_best": 1})
            p = copy(outer)
        p.prompt, p.before_sampling = "<pulid:anna>", lambda p: None
        assert same(self.repaint(saved, p), saved.generate([{"identity": "anna"}]))
        if copied:
            assert list(outer.extra_generation_params) == ["PuLID 1", "PuLID tag 1"]
            assert "identity: ben" in outer.extra_generation_params["PuLID tag 1"]
            assert outer.pulid_meter.plan is outer.pulid_plan  # likeness is measured with the outer one's people
        assert all(count_hooks(unet) == 0 for unet in saved.unets.values())

    def test_no_tag_no_face(self, saved):
        assert same(self.repaint(saved, saved.processing()), saved.generate(OFF))

    def test_errors_end_it(self, saved):
        p = saved.processing()
        p.prompt = "<pulid:anna:unit=2>"
        with pytest.raises(SettingError, match="ADetailer"):
            self.repaint(saved, p)

    def test_a_dummy_that_the_host_activates_with(self, saved):
        """A1111 does, when it loads a model."""
        saved.ui.modules.extra_networks.activate(SimpleNamespace(), {})
        assert saved.ui.modules.extra_networks.swallowed == []


class TestRows:
    def injection(self, images):
        from lib_pulid.injection import Injection

        return Injection("sdxl", (), True, 1.0, "none", 0, 0.0, 1.0, None, images=images)

    def test_only_the_images_that_are_meant(self):
        step = DenoiseStep(0.0, [True, True, False, False], images=[0, 1, 0, 1])
        assert identity_rows(self.injection(frozenset({1})), step, 4) == [None, 0, None, 1]
        assert identity_rows(self.injection(None), step, 4) == [0, 0, 1, 1]

    def test_rows_of_which_it_is_not_known_are_refused(self):
        with pytest.raises(SettingError, match="batch size 1"):
            identity_rows(self.injection(frozenset({1})), DenoiseStep(0.0, [True, False]), 2)

    @pytest.mark.parametrize(
        ("conds", "rows", "count", "images"),
        [(2, 4, 2, [0, 1, 0, 1]), (2, 2, 2, [0, 1]), (3, 5, 2, None), (4, 6, 2, None)],
        ids=["usual", "no uncond", "AND in one", "AND in both"],
    )
    def test_a1111(self, conds, rows, count, images):
        params = SimpleNamespace(text_cond=torch.zeros(conds, 1), x=torch.zeros(rows, 1))
        assert _Window(params).take(rows, count)[1] == images
