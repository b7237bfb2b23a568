"""The WebUI's entry point: turns script callbacks into units, and catches and reports errors.

The hosts print what a script hook raises and carry on, which would give an image of a stranger. So an error is kept
here, and raised where the hosts let it end the request: when they ask the generation for its samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib_pulid import hosts
from lib_pulid.errors import OutOfMemoryError, PulidError, SettingError, is_out_of_memory
from lib_pulid.fields import Number, page_words
from lib_pulid.hosts.base import add_callback
from lib_pulid.hosts.families import chosen_checkpoint
from lib_pulid.hosts.frame import remember_images
from lib_pulid.units import PulidUnit, at_unit
from lib_pulid.webui import accordion, infotext, likeness, network, prompt, remote, routes, settings, xyz
from lib_pulid.webui.actions import Actions
from lib_pulid.webui.draws import Draws
from lib_pulid.webui.library import Library
from lib_pulid.webui.plan import UnitPlan

from modules import scripts, shared  # isort: skip

# Attributes of a StableDiffusionProcessing.
PLAN, REQUEST, TAGS, METER = "pulid_plan", "pulid_request", "pulid_tags", "pulid_meter"
NO_REQUEST = prompt.Request()


class PulidScript(scripts.Script):
    library = Library(
        settings.models_dir, settings.device, settings.keep_encoders, settings.likeness, settings.portraits
    )
    draws = Draws(settings.photo_folder)
    answers = remote.Answers()

    def title(self) -> str:
        return "PuLID"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        tab = "img2img" if is_img2img else "txt2img"
        actions = Actions(self.library, checkpoint_family)
        built = accordion.build(tab, settings.units(), self.library, actions, hosts.current().families)
        self.infotext_fields, self.paste_field_names = built.infotext_fields, built.paste_field_names
        return built.controls

    # ------------------------------------------------------------ a generation

    def setup(self, p: Any, *args: Any) -> None:
        remember_images(p)

    def before_process(self, p: Any, *args: Any) -> None:
        self.answers.take()
        if remote.is_used(p):
            remote.spell_out(p, self, xyz.changes_of(p), self.library.presets)

    def process(self, p: Any, *args: Any) -> None:
        """Reads the units and compiles them, so that whatever can fail fails before the first step."""
        with ends_the_request(p):
            forget(p)
            self.library.settle(is_interrupted)
            request = prompt.Request(id(p), args, xyz.changes_of(p))
            setattr(p, REQUEST, request)
            prompt.check_rest(p, request, self.library)
            prompt.warn_of_negative(p)
            tags = prompt.tags_of(p, 0)
            plan_batch(p, tags if tags.is_final else prompt.Tags())

    def process_batch(self, p: Any, *args: Any, batch_number: int = 0, **kwargs: Any) -> None:
        """Hooks one batch at a time: between two, detailers and upscalers may sample inside this generation."""
        plan = getattr(p, PLAN, None)
        if plan is not None:
            with ends_the_request(p):
                if draw(p, plan, batch_number):
                    prepare(p, plan)
                p.sample = Sampling(p, plan)
                if not hasattr(scripts.Script, "process_before_every_sampling"):  # A1111 1.8
                    hosts.current().before_sampling(p, plan)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        plan = getattr(p, PLAN, None)
        if plan is not None:
            with ends_the_request(p):
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
                self.library.release()
        finally:
            forget(p)


def plan_batch(p: Any, tags: prompt.Tags) -> None:
    """Compiles the units of the script's arguments and of a batch's prompts, and writes them into the parameters."""
    vars(p).pop(PLAN, None)
    infotext.clear(p.extra_generation_params)
    setattr(p, TAGS, tags)
    asked = getattr(p, REQUEST).asked(tags, PulidScript.library.presets)
    if not asked.units:
        measure(p, None)
        return
    plan = UnitPlan(asked.units, PulidScript.library, tell, p.comment, is_interrupted, asked.images, asked.places)
    # ADetailer calls `process` in the middle of a request, before an image's parameters are written.
    draw(p, plan, getattr(p, "iteration", 0))
    measure(p, plan)
    prepare(p, plan)
    setattr(p, PLAN, plan)


def prepare(p: Any, plan: UnitPlan) -> None:
    """Compiles the units, and writes them into the parameters."""
    model = model_for(p, plan.units)
    facts = plan.prepare(model)
    written = {number: infotext.write(unit, model.family, facts[number]) for number, unit in plan.units}
    p.extra_generation_params.update(prompt.parameters(plan, written, len(getattr(p, TAGS).first)))


def measure(p: Any, plan: UnitPlan | None) -> None:
    """Lets the request's Meter follow a new plan; makes it if the settings or a unit ask for one."""
    meter, is_whole = getattr(p, METER, None), getattr(p, REQUEST).is_of(p) and not getattr(p, likeness.INNER, False)
    wanted = plan is not None and (settings.likeness() or any(unit.keep_best for _, unit in plan.units))
    if meter is None and is_whole and wanted:
        meter = likeness.Meter(PulidScript.library, likeness.judges_of(PulidScript.library, p.comment))
        setattr(p, METER, meter)
    if meter is not None and is_whole:  # not a copied `p` with the outer one's
        meter.follow(plan, p)


def draw(p: Any, plan: UnitPlan, batch: int) -> bool:
    """Draws the photos of a batch, unless they are drawn already. Returns whether there are new ones."""
    if batch == plan.batch:
        return False
    plan.batch, size = batch, getattr(p, "batch_size", 1)
    seeds = getattr(p, "all_seeds", None) or [getattr(p, "seed", 0)]
    seed = int(seeds[min(batch * size, len(seeds) - 1)])
    draws, inner = PulidScript.draws, getattr(p, likeness.INNER, False)

    def choose(number: Number, rank: int, how: str) -> Path:
        if size > 1:
            raise SettingError("a batch has one person: set the batch size to 1, and use the batch count instead.")
        return draws.last(number) if inner else draws.draw(number, rank, how, seed, batch)

    return plan.draw(choose)


def activate(p: Any) -> None:
    """Plans a batch anew if its prompts have other tags than were planned for.

    The host calls it for each generation, also where the script is not one of its scripts (ADetailer's own). Then
    `process` was not called, and what `process_batch` does is done here.
    """
    if getattr(p, "is_hr_pass", False) or isinstance(vars(p).get("sample"), Refusal):
        return
    with ends_the_request(p):
        tags = prompt.tags_of(p)
        if getattr(p, REQUEST, NO_REQUEST).is_of(p):
            if tags != getattr(p, TAGS):
                plan_batch(p, tags)
        elif tags:
            setattr(p, REQUEST, NO_REQUEST)
            p.extra_generation_params = dict(p.extra_generation_params)  # a copied `p` shares that of the outer one
            plan_batch(p, tags)
            p.sample = Sampling(p, getattr(p, PLAN))


def model_for(p: Any, units: Sequence[tuple[Number, PulidUnit]]) -> hosts.LoadedModel:
    """Returns the loaded model; an error names the first unit and its field `model`."""
    try:
        return hosts.current().loaded_model(p)
    except PulidError as error:
        raise at_unit(units[0][0], "model", error) from error


def checkpoint_family(name: str = "") -> str:
    """Returns the family of the checkpoint with this name, or of the selected one; "" if it is not known."""
    from modules import sd_models

    try:
        chosen, loaded = chosen_checkpoint(name), sd_models.model_data.sd_model
        if chosen is None or getattr(getattr(loaded, "sd_checkpoint_info", None), "filename", "") == chosen.filename:
            return hosts.current().loaded_model(SimpleNamespace(sd_model=loaded)).family
        return PulidScript.library.checkpoint_family(Path(chosen.filename))
    except PulidError:
        return ""


def tell(text: str) -> None:
    """Shows a text in the WebUI's progress line."""
    shared.state.textinfo = text or None


def is_interrupted() -> bool:
    """Whether the host would start no further batch."""
    return shared.state.interrupted or getattr(shared.state, "stopping_generation", False)


def forget(p: Any) -> None:
    """Removes all of ours from `p` and the host; with PuLID off, too, as an error skips `postprocess`."""
    hosts.current().stop()
    for name in (PLAN, REQUEST, TAGS, METER):
        vars(p).pop(name, None)
    if isinstance(sample := vars(p).get("sample"), Refusal):
        del p.sample
    elif isinstance(sample, Sampling):
        sample.leave()


class Sampling:
    """Replaces `p.sample` for one call, so that hooks are removed even when sampling raises."""

    def __init__(self, p: Any, plan: hosts.Plan) -> None:
        self._p, self._plan = p, plan
        before = vars(p).get("sample")
        self._before: Any = before._before if isinstance(before, Sampling) else before  # another extension's

    def leave(self) -> None:
        if vars(self._p).get("sample") is self:
            del self._p.sample
            if self._before is not None:
                self._p.sample = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.leave()
        sample = self._before or partial(type(self._p).sample, self._p)
        try:
            with hosts.current().sampling(self._p, self._plan):
                return sample(*args, **kwargs)
        except Exception as error:
            PulidScript.library.release()  # what measured the likeness of earlier batches
            raise short_of_memory(error) or error  # noqa: B904  its cause is set


class Refusal:
    """Replaces the `sample` of a generation or of a sampler, and raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error


def short_of_memory(error: Exception) -> OutOfMemoryError | None:
    """Returns the message to show instead of an out-of-memory error; None for other errors."""
    if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
        return None
    # Forge Neo replaces the message of every exception that contains these three words, so ours must not.
    reason = re.sub("out of memory", "not enough memory", str(error), flags=re.IGNORECASE)[:300]
    short = OutOfMemoryError(
        "PuLID: not enough memory. Try a smaller image or batch, fewer people, "
        f"{hosts.current().less_memory()}, reading photos on the CPU (Settings, PuLID), or closing other programs. "
        f"({type(error).__name__}: {reason})"
    )
    short.__cause__ = error
    return short


def in_page_words(error: Exception) -> Exception:
    """Returns an error that names person and label, as the page does, where it named unit and field."""
    words = page_words(str(error))
    if not isinstance(error, PulidError) or words == str(error):
        return error
    told = type(error)(words)
    told.__cause__ = error
    return told


@contextmanager
def ends_the_request(p: Any) -> Iterator[None]:
    """Keeps any exception raised inside, even a bug of ours, and raises it again when the host asks for samples."""
    try:
        yield
    except Exception as raised:
        tell("")
        error = short_of_memory(raised) or raised
        if not getattr(p, "is_api", False):
            error = in_page_words(error)
        refusal = Refusal(error)
        p.sample = refusal
        sampler = getattr(p, "sampler", None)
        if sampler is not None:  # in the middle of a sampling
            sampler.sample = sampler.sample_img2img = refusal
        p.comment(str(error))  # a grid continues with the next cell, and shows this below the image
        if not hosts.current().tells_errors(p):
            shared.state.interrupted = True  # before the first batch: no image, and the comment below
        hosts.current().stop()
    except BaseException:
        hosts.current().stop()
        raise


# ---------------------------------------------------------------- the host's callbacks


def on_before_ui() -> None:
    xyz.add_axes(settings.units(), PulidScript.library, hosts.current().families)
    network.register(activate)
    from lib_pulid.webui import cards  # not above: it is made of the host's page, which takes a while to import

    cards.register(PulidScript.library)


def on_app_started(demo: Any, app: Any) -> None:
    settings.make_temp_folder()
    routes.add_error_handler(app)
    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        routes.add_routes(app, PulidScript.library, shared.cmd_opts.api_auth)


CALLBACKS: dict[str, Callable[..., Any]] = {
    "app_started": on_app_started,
    "ui_settings": settings.add_settings,
    "before_ui": on_before_ui,
    **hosts.current().callbacks(),
}
for event, callback in CALLBACKS.items():
    add_callback(event, callback, __file__)
