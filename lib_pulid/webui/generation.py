"""Plans the batches of a generation: whose faces, drawn from which photos, compiled, written down and measured.

`p` is the host's StableDiffusionProcessing, which keeps the plan in attributes of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules import extra_networks, scripts

from lib_pulid import hosts
from lib_pulid.errors import SettingError, UnsupportedModelError
from lib_pulid.fields import Number
from lib_pulid.hosts.frame import remember_images
from lib_pulid.stores.encoders import Listener
from lib_pulid.tags import NAMES
from lib_pulid.units import at_unit
from lib_pulid.webui import ending, infotext, likeness, prompt, remote, settings, xyz
from lib_pulid.webui.draws import Draws
from lib_pulid.webui.library import Library
from lib_pulid.webui.plan import UnitPlan

PLAN, REQUEST, TAGS, METER = "pulid_plan", "pulid_request", "pulid_tags", "pulid_meter"  # attributes of `p`
NO_REQUEST = prompt.Request()


class Generation(scripts.Script):
    """What the script does at each of the host's calls. Its errors end the request, see `ending`."""

    library: Library
    draws: Draws
    answers: remote.Answers

    def setup(self, p: Any, *args: Any) -> None:
        remember_images(p)

    def before_process(self, p: Any, *args: Any) -> None:
        self.answers.take()
        if remote.is_used(p):
            remote.spell_out(p, self, xyz.changes_of(p), self.library)

    def process(self, p: Any, *args: Any) -> None:
        """Reads the units and compiles those of the first batch, so that whatever can fail fails before the first
        step."""
        with ending.ends_the_request(p):
            forget(p)
            self.library.encoders.settle(ending.is_interrupted)
            request = prompt.Request(id(p), args, xyz.changes_of(p))
            setattr(p, REQUEST, request)
            prompt.check_rest(p, request, self.library)
            prompt.warn_of_negative(p)
            tags = prompt.tags_of(p, 0)
            self._plan(p, tags if tags.is_final else prompt.Tags())

    def process_batch(self, p: Any, *args: Any, batch_number: int = 0, **kwargs: Any) -> None:
        """Hooks one batch at a time: between two, detailers and upscalers may sample inside this generation."""
        plan = getattr(p, PLAN, None)
        if plan is not None:
            with ending.ends_the_request(p):
                if self._draw(p, plan, batch_number):
                    prepare(p, plan)
                p.sample = ending.Sampling(p, plan)
                if not hasattr(scripts.Script, "process_before_every_sampling"):  # A1111 1.8
                    hosts.current().before_sampling(p, plan)

    def activate(self, p: Any) -> None:
        """Plans a batch anew if its prompts have other tags than were planned for.

        The host calls it for each generation, also where the script is not one of its scripts (ADetailer's own). Then
        neither `process` nor `process_batch` is called, and what they do is done here.
        """
        if getattr(p, "is_hr_pass", False) or isinstance(vars(p).get("sample"), ending.Refusal):
            return
        with ending.ends_the_request(p):
            tags = prompt.tags_of(p)
            if getattr(p, REQUEST, NO_REQUEST).is_of(p):
                if tags != getattr(p, TAGS):
                    self._plan(p, tags)
            elif tags:
                setattr(p, REQUEST, NO_REQUEST)
                p.extra_generation_params = dict(p.extra_generation_params)  # a copied `p` shares that of the outer one
                self._plan(p, tags)
                p.sample = ending.Sampling(p, getattr(p, PLAN))

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        plan = getattr(p, PLAN, None)
        if plan is not None:
            with ending.ends_the_request(p):
                hosts.current().before_sampling(p, plan)

    def postprocess_image(self, p: Any, pp: Any, *args: Any) -> None:
        if not hasattr(scripts.Script, "postprocess_image_after_composite"):  # A1111 1.8
            self.postprocess_image_after_composite(p, pp, *args)

    def postprocess_image_after_composite(self, p: Any, pp: Any, *args: Any) -> None:
        """Measures the finished image: after ADetailer, and with an inpainted part back in its place."""
        meter = getattr(p, METER, None)
        if meter is not None:
            meter.add(p, pp.image)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """Leaves the infotext alone: ADetailer calls this, with a copy of `p`, before the last images get theirs."""
        plan, meter = getattr(p, PLAN, None), getattr(p, METER, None)
        is_done = getattr(processed, "images", None) and not getattr(p, likeness.INNER, False)  # not ADetailer's calls
        if is_done and plan is not None and plan.drawn:
            self.draws.advance(getattr(p, "n_iter", 1))
        remote.report(self.answers.take(), p, processed)
        try:
            if is_done and meter is not None:
                p.extra_generation_params.pop(likeness.ENTRY, None)  # the text of a grid comes next
                meter.finish(processed)
                self.library.encoders.release()
        finally:
            forget(p)

    def _plan(self, p: Any, tags: prompt.Tags) -> None:
        """Compiles the units of the script's arguments and of a batch's prompts, and writes them into the
        parameters."""
        vars(p).pop(PLAN, None)
        infotext.clear(p.extra_generation_params)
        setattr(p, TAGS, tags)
        asked = getattr(p, REQUEST).asked(tags, self.library.presets)
        if not asked.units:
            self._measure(p, None)
            return
        # Without hires fix there is one pass, and a face that is for the second would be missing.
        has_second = getattr(p, "enable_hr", False)
        units = asked.units if has_second else [(number, unit.in_the_only_pass()) for number, unit in asked.units]
        listener = Listener(ending.tell, p.comment, ending.is_interrupted)
        plan = UnitPlan(units, self.library, listener, asked.images, asked.places)
        # ADetailer calls `process` in the middle of a request, before an image's parameters are written.
        self._draw(p, plan, getattr(p, "iteration", 0))
        self._measure(p, plan)
        try:
            prepare(p, plan)
        except UnsupportedModelError:
            if any(plan.has_face(hires=hires) for hires in _passes(p)):
                raise
            self._measure(p, None)
            return  # no face is to be added, so the model may be any
        setattr(p, PLAN, plan)

    def _measure(self, p: Any, plan: UnitPlan | None) -> None:
        """Lets the request's Meter follow a new plan; makes it if the settings or a unit ask for one."""
        meter, is_inner = getattr(p, METER, None), getattr(p, likeness.INNER, False)
        is_whole = getattr(p, REQUEST).is_of(p) and not is_inner
        wanted = plan is not None and (settings.likeness() or any(unit.keep_best for _, unit in plan.units))
        if meter is None and is_whole and wanted:
            meter = likeness.Meter(self.library, likeness.judges_of(self.library, p.comment))
            setattr(p, METER, meter)
        if meter is not None and is_whole:  # not a copied `p` with the outer one's
            meter.follow(plan, p)

    def _draw(self, p: Any, plan: UnitPlan, batch: int) -> bool:
        """Draws the photos of a batch, unless they are drawn already. Returns whether there are new ones."""
        if batch == plan.batch:
            return False
        plan.batch, size = batch, getattr(p, "batch_size", 1)
        seeds = getattr(p, "all_seeds", None) or [getattr(p, "seed", 0)]
        seed = int(seeds[min(batch * size, len(seeds) - 1)])
        draws, inner = self.draws, getattr(p, likeness.INNER, False)

        def choose(number: Number, rank: int, how: str) -> Path:
            if size > 1:
                raise SettingError("a batch has one person: set the batch size to 1, and use the batch count instead.")
            return draws.last(number) if inner else draws.draw(number, rank, how, seed, batch)

        return plan.draw(choose)


def _passes(p: Any) -> tuple[bool, ...]:
    """Lists the passes of a generation: whether each is that of hires fix, which may start from a finished image."""
    if not getattr(p, "enable_hr", False):
        return (False,)
    return (False, True) if getattr(p, "firstpass_image", None) is None else (True,)


def prepare(p: Any, plan: UnitPlan) -> None:
    """Compiles the units, and writes them into the parameters."""
    with at_unit(plan.units[0][0], "model"):
        model = hosts.current().loaded_model(p)
    facts = plan.prepare(model)
    written = {number: infotext.write(unit, model.family, facts[number]) for number, unit in plan.units}
    p.extra_generation_params.update(prompt.parameters(plan, written, len(getattr(p, TAGS).first)))


def forget(p: Any) -> None:
    """Removes all of ours from `p` and the host; with PuLID off, too, as an error skips `postprocess`."""
    hosts.current().stop()
    for name in (PLAN, REQUEST, TAGS, METER):
        vars(p).pop(name, None)
    ending.restore(p)


class PulidNetwork(extra_networks.ExtraNetwork):
    """`<pulid:...>`, in one spelling, as one of the host's extra networks, so that it removes the tags from the
    prompts."""

    def __init__(self, script: Generation, spelling: str) -> None:
        super().__init__(spelling)
        self._script = script

    def activate(self, p: Any, params_list: Any) -> None:
        """Called once or more often before each batch and each second pass, also without any tags."""
        self._script.activate(p)

    def deactivate(self, p: Any) -> None:
        """Nothing is left to undo: hooks live for one sampling."""


def register(script: Generation) -> None:
    """Registers the networks; to be called from on_before_ui, since the host forgets its networks on Reload UI."""
    for spelling in NAMES:  # not as aliases, which ersatzForge does not have
        extra_networks.register_extra_network(PulidNetwork(script, spelling))
