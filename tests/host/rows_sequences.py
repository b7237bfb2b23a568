"""A hundred random sequences of settings, pictures, faults and interruptions: `make test-host-sequences`."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from tests.host.api import Answer, pictures
from tests.host.rows_basics import person
from tests.host.rows_works_with import while_sampling
from tests.host.table import Failed, Rows, equal, expect, nothing_left
from tests.host.webui import Running

rows = Rows()
SEQUENCES = 100
SIZE = {"width": 128, "height": 128}
STEPS, LONG = 2, 10
CHOICES: dict[str, tuple[Any, ...]] = {
    "on": (True, False),
    "photo": ("anna", "ben"),
    "checkpoint": ("tiny-sdxl.safetensors", "tiny-sdxl-b.safetensors"),
    "file": ("pulid_v1.1.safetensors", "pulid_v1.bin"),
}
# What fails, at which call of it, and whether after it has done its work.
FAULTS = (
    ("lib_pulid.weights.load_adapter", 1, False), ("lib_pulid.face_models.load_face_models", 1, True),
    ("lib_pulid.vision.load_vision_tower", 1, False), ("lib_pulid.faces.align", 1, True),
    ("lib_pulid.photos.encode_identity", 1, False), ("os.replace", 1, False),
    ("lib_pulid.injection.prepare_site", 30, False), ("run.begin", 1, True), ("run.enter", 2, True),
    ("run.leave", 1, False), ("torch.nn.Module.register_forward_pre_hook", 40, False),
    ("lib_pulid.injection.add_cross_attention", 100, True), ("denoiser.forward", 1, False),
    ("denoiser.forward", 2, True),
)  # fmt: skip
ERRORS = ("RuntimeError", "OutOfMemoryError", "OSError")
Action = tuple[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a user has chosen."""

    on: bool = False
    photo: str = "anna"
    checkpoint: str = CHOICES["checkpoint"][0]
    file: str = CHOICES["file"][0]

    def picture(self, host: Running, steps: int = STEPS) -> Answer:
        units = (person(host, self.photo, model=self.file, weight=0.6),) if self.on else ()
        settings = {"sd_model_checkpoint": self.checkpoint}
        return host.api.try_txt2img(*units, override_settings=settings, steps=steps, **SIZE)


def actions(seed: int) -> list[Action]:
    chosen = random.Random(seed)
    choices = CHOICES | {"generate": (None,), "fail": FAULTS, "bad photo": (None,), "interrupt": (None,)}
    names = chosen.choices(list(choices), weights=(3, 2, 1, 2, 1, 3, 1, 1), k=chosen.randint(2, 5))
    return [(name, chosen.choice(choices[name])) for name in names]


@rows.row("100 random sequences of settings, pictures, faults and interruptions: each ends in the right picture")
def sequences(host: Running) -> str:
    chosen = [Settings(False, checkpoint=checkpoint) for checkpoint in CHOICES["checkpoint"]]
    chosen += [Settings(True, *rest) for rest in product(*(CHOICES[name] for name in ("photo", "checkpoint", "file")))]
    for settings in chosen[:2]:  # a program's very first picture may differ from its later ones in the last bit
        settings.picture(host)
    right = {settings: shown(settings.picture(host)) for settings in chosen}
    expect(len({picture.tobytes() for picture in right.values()}) == len(right), "settings give the same picture")
    before = host.api.state() | {"hooks": 0}
    counts = dict.fromkeys(("actions", "faults that came", "interruptions"), 0)
    for seed in range(SEQUENCES):
        sequence = actions(seed)
        try:
            settings = play(host, sequence, counts)
            alike = settings if settings.on else Settings(False, checkpoint=settings.checkpoint)
            equal(right[alike], shown(settings.picture(host)), f"{settings}")
            nothing_left(host, before)
            strays = [path.name for path in (host.data / "models" / "pulid").rglob("*.tmp")]
            expect(not strays, f"half-written: {strays}")
        except Failed as failed:
            raise Failed(f"sequence {seed}, {sequence}: {failed}") from failed
        print(f"     sequence {seed + 1} of {SEQUENCES}", end="\r" if (seed + 1) % 10 else "\n", flush=True)
    return f"{SEQUENCES} sequences, " + ", ".join(f"{count} {name}" for name, count in counts.items())


def play(host: Running, sequence: list[Action], counts: dict[str, int]) -> Settings:
    settings = Settings()
    for name, value in sequence:
        counts["actions"] += 1
        if name in CHOICES:
            settings = replace(settings, **{name: value})
        elif name == "generate":
            settings.picture(host)
        elif name == "fail":
            counts["faults that came"] += fail(host, settings, value, counts["actions"])
        elif name == "bad photo":
            answer = host.api.try_txt2img(person(host, "nobody"), **SIZE)
            expect(answer.status >= 400 and not answer.has_picture, f"nobody's photo: {answer.status}")
        else:
            counts["interruptions"] += interrupt(host, settings)
    return settings


def fail(host: Running, settings: Settings, fault: tuple[str, int, bool], number: int) -> bool:
    """Whether it came. The photo is read again, so that all stages are passed. An error is told, or does no harm."""
    place, call, after = fault
    error = ERRORS[number % len(ERRORS)]
    host.api.post("/host-test/fail", {"place": place, "call": call, "after": after, "error": error})
    answer = settings.picture(host)
    came = host.api.post("/host-test/fail")["came"]
    if came and not (place == "os.replace" and error == "OSError"):  # a full disk: it goes without the cache
        expect(answer.status >= 400 and not answer.has_picture, f"{fault}, {error}: {answer.status}")
        expect(error != "OutOfMemoryError" or not settings.on or "not enough memory" in answer.text, answer.text[:300])
    else:
        expect(answer.status < 400, f"{answer.status}: {answer.text[:300]}")
    return came


def interrupt(host: Running, settings: Settings) -> bool:
    """Presses the button while samples are made. Whether that was in time."""
    answer, pressed = while_sampling(host, "interrupt", LONG, lambda: settings.picture(host, LONG))
    expect(answer.status < 400, f"interrupted: {answer}")
    return pressed


def shown(answer: Answer) -> np.ndarray:
    expect(answer.status < 400, f"{answer.status}: {answer.text[:300]}")
    return pictures(answer).image
