"""Works with stable-diffusion-webui-distributed, which has other machines make a part of a batch.

It sends the script's arguments to their API before the generation starts here (`before_process`): without what a grid
sets in a cell, without the photos and presets of this machine, and cut to the other machine's number of tabs. So the
arguments become dicts that say all of it. What another machine answers instead of images is only in its log.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lib_pulid.errors import PulidError
from lib_pulid.fields import FAMILIES, FIELD
from lib_pulid.methods import SPECIAL, has, usual
from lib_pulid.units import PulidUnit, default_args, parse_args
from lib_pulid.webui.library import Library
from lib_pulid.webui.presets import asked

TITLE, LOGGER = "Distribute", "distributed"  # the extension's
ENTRY = "PuLID errors elsewhere"
LEFT_OUT = ("enabled", "preset")  # a preset's values are in the other fields


def is_used(p: Any) -> bool:
    """Whether the extension is among the generation's scripts."""
    some = getattr(getattr(p, "scripts", None), "alwayson_scripts", None) or ()
    return any(script.title() == TITLE for script in some)


def spell_out(p: Any, script: Any, changes: Mapping[int, Mapping[str, Any]], library: Library) -> None:
    """Writes the units into the script's part of a generation's arguments, as dicts. Wrong arguments stay as they are.

    Args:
        p: the host's StableDiffusionProcessing. script: ours, with the range of its arguments.
        changes: see `units.parse_args`.
    """
    args = list(p.script_args)
    mine = slice(script.args_from, script.args_to)
    with contextlib.suppress(PulidError):  # `process` reads them again, and reports it
        changes = {number: library.presets.expand(values, number) for number, values in changes.items()}
        units = dict(parse_args(library.presets.expand_args(args[mine]), changes))
        if units:
            dicts = [
                _spelled(units[n], library) if n in units else {"enabled": False} for n in range(1, max(units) + 1)
            ]
            args[mine] = [*dicts, *default_args(len(args[mine]) // len(FIELD))[len(dicts) :]]
            p.script_args = args


def _spelled(unit: PulidUnit, library: Library) -> dict[str, Any]:
    """Returns what differs from the defaults, without what the page hides because the method has no such setting."""
    defaults, values = PulidUnit().values(), unit.values()
    values["images"] = [library.photos.sendable(text, f"photo {i}") for i, text in enumerate(unit.images, 1)]
    method = library.adapters.method_of(unit.model)
    methods = [usual(family) for family in FAMILIES] if method is None else [method]
    hidden = {name for name in SPECIAL if name not in unit.given and not any(has(one, name) for one in methods)}
    return asked({
        name: value
        for name, value in values.items()
        if name not in LEFT_OUT and name not in hidden and value not in (defaults[name], [])
    })  # fmt: skip


class Answers(logging.Handler):
    """Collects what the extension logs of errors that other machines' PuLID answered."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._found: list[str] = []
        self.name, log = "PuLID", logging.getLogger(LOGGER)
        for earlier in [one for one in log.handlers if one.name == self.name]:  # of before a Reload UI
            log.removeHandler(earlier)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "PuLID" in text:
            self._found.append(_message(text))

    def take(self) -> list[str]:
        """Returns the messages since the last call, each once."""
        found, self._found = self._found, []
        return list(dict.fromkeys(found))


def report(answers: Sequence[str], p: Any, processed: Any) -> None:
    """Says below the image, and to the API in `info`, what other machines answered instead of images."""
    if answers:
        processed.comments += "".join(f"PuLID, {answer}\n" for answer in answers)
        p.extra_generation_params[ENTRY] = "; ".join(answers)  # after the images' texts: only `info` has it


def _message(text: str) -> str:
    """Returns "'machine': message" of the extension's line "'machine' response: Code <500> {...}"."""
    machine, _, rest = text.partition(" response: ")
    try:
        body = json.loads(rest[rest.index("{") :])
        return f"{machine}: {body.get('errors') or body.get('detail')}"
    except ValueError:
        return text
