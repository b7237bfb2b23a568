"""The WebUI's door: script callbacks in, units out; the one place where errors are caught and told.

The hosts print what a script hook raises and go on, and a picture of a stranger would come out. So whatever goes wrong
here is kept and raised where the hosts let it end the request: when they ask the generation for its samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib_pulid import hosts
from lib_pulid.errors import OutOfMemoryError, PulidError, is_out_of_memory
from lib_pulid.hosts.webui import add_callback, chosen_checkpoint
from lib_pulid.units import PulidUnit, at_unit, parse_args
from lib_pulid.webui import accordion, infotext, routes, settings, xyz
from lib_pulid.webui.actions import Actions
from lib_pulid.webui.library import Library
from lib_pulid.webui.plan import UnitPlan

from modules import scripts, shared  # isort: skip

PLAN = "pulid_plan"  # attribute of a StableDiffusionProcessing


class PulidScript(scripts.Script):
    library = Library(settings.models_dir, settings.device, settings.keep_encoders)

    def title(self) -> str:
        return "PuLID"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        tab = "img2img" if is_img2img else "txt2img"
        actions = Actions(self.library, checkpoint_family)
        built = accordion.build(tab, settings.units(), self.library, actions, hosts.current().FAMILIES)
        self.infotext_fields, self.paste_field_names = built.infotext_fields, built.paste_field_names
        return built.controls

    # ------------------------------------------------------------ a generation

    def process(self, p: Any, *args: Any) -> None:
        """Everything that can be known to fail fails here, before the prompt is read."""
        with ends_the_request(p):
            forget(p)
            infotext.clear(p.extra_generation_params)
            units = parse_args(args, xyz.changes_of(p))
            if not units:
                return
            plan = UnitPlan(units, self.library, tell, p.comment)
            model = model_for(p, units)
            facts = plan.prepare(model)
            for number, unit in units:
                p.extra_generation_params[infotext.key(number)] = infotext.write(unit, model.family, facts[number])
            setattr(p, PLAN, plan)

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        """What comes between two batches is not ours: detailers and upscalers may sample inside this generation."""
        plan = getattr(p, PLAN, None)
        if plan is not None:
            with ends_the_request(p):
                p.sample = Sampling(p, hosts.current().start(p, plan))

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(p, PLAN, None) is not None:
            with ends_the_request(p):
                hosts.current().before_sampling(p)

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        """The parameters stay: ADetailer calls this, with a copy of `p`, before the last pictures get theirs."""
        forget(p)


def model_for(p: Any, units: list[tuple[int, PulidUnit]]) -> hosts.LoadedModel:
    try:
        return hosts.current().loaded_model(p)
    except PulidError as error:
        raise at_unit(units[0][0], "model", error) from error


def checkpoint_family(name: str = "") -> str:
    """Of the checkpoint of this name, else of the one that is chosen; "" where it cannot be told."""
    from modules import sd_models

    try:
        chosen, loaded = chosen_checkpoint(name), sd_models.model_data.sd_model
        if chosen is None or getattr(getattr(loaded, "sd_checkpoint_info", None), "filename", "") == chosen.filename:
            return hosts.current().loaded_model(SimpleNamespace(sd_model=loaded)).family
        return PulidScript.library.checkpoint_family(Path(chosen.filename))
    except PulidError:
        return ""


def tell(text: str) -> None:
    """Into the WebUI's progress line."""
    shared.state.textinfo = text or None


def forget(p: Any) -> None:
    """Also called where PuLID is off: after an error the hosts do not call `postprocess`."""
    hosts.current().stop()
    vars(p).pop(PLAN, None)
    if isinstance(sample := vars(p).get("sample"), Refusal):
        del p.sample
    elif isinstance(sample, Sampling):
        sample.leave()


class Sampling:
    """Stands in the place of one generation's `sample`, for one call. After an error the hosts call no script; here
    its end is seen however it comes, and what was put into the model for it is taken out."""

    def __init__(self, p: Any, run: hosts.Run) -> None:
        self._p, self._run = p, run
        before = vars(p).get("sample")
        self._before = before._before if isinstance(before, Sampling) else before  # another extension's

    def leave(self) -> None:
        if vars(self._p).get("sample") is self:
            del self._p.sample
            if self._before is not None:
                self._p.sample = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.leave()
        sample = self._before or partial(type(self._p).sample, self._p)
        self._run.is_sampling = True
        try:
            samples = sample(*args, **kwargs)
            self._run.check()
            return samples
        except Exception as error:
            raise short_of_memory(error) or error  # noqa: B904  it has its cause
        finally:
            self._run.is_sampling = False
            hosts.current().stop()


class Refusal:
    """Stands in the place of one generation's `sample`, or of one sampler's, and raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error


def short_of_memory(error: Exception) -> OutOfMemoryError | None:
    """What to say in the place of an error that tells of a lack of memory, else None."""
    if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
        return None
    # Forge Neo drops the message of every exception with these three words in it, whatever its class.
    reason = re.sub("out of memory", "not enough memory", str(error), flags=re.IGNORECASE)[:300]
    short = OutOfMemoryError(
        "PuLID: the memory did not suffice. What helps: a smaller picture or batch, one person fewer, "
        f"{hosts.current().less_memory()}, photos read on the CPU (Settings, PuLID), fewer other programs. "
        f"({type(error).__name__}: {reason})"
    )
    short.__cause__ = error
    return short


@contextmanager
def ends_the_request(p: Any) -> Iterator[None]:
    """Whatever is raised inside, a fault of ours as well, is raised again when samples are asked for."""
    try:
        yield
    except Exception as raised:
        tell("")
        error = short_of_memory(raised) or raised
        refusal = Refusal(error)
        p.sample = refusal
        sampler = getattr(p, "sampler", None)
        if sampler is not None:  # in the middle of a sampling
            sampler.sample = sampler.sample_img2img = refusal
        p.comment(str(error))  # a grid goes on with the next cell, and shows this below
        if not hosts.current().tells_errors(p):
            shared.state.interrupted = True  # before the first batch: no picture, and the comment below
        hosts.current().stop()
    except BaseException:
        hosts.current().stop()
        raise


# ---------------------------------------------------------------- the program around


def on_app_started(demo: Any, app: Any) -> None:
    settings.make_temp_folder()
    routes.add_error_handler(app)
    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        routes.add_routes(app, PulidScript.library, shared.cmd_opts.api_auth)


for event, callback in {
    "app_started": on_app_started,
    "ui_settings": settings.add_settings,
    "before_ui": lambda: xyz.add_axes(settings.units(), PulidScript.library),
    "script_unloaded": lambda: hosts.current().stop(),
}.items():
    add_callback(event, callback, __file__)
