"""Runs the command `evaluate`: loads the models and the judges, and runs the trial."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib_pulid import fields, miniature
from lib_pulid.errors import SettingError, UnsupportedModelError
from lib_pulid.evaluate import options, results
from lib_pulid.evaluate.clip import open_clip_model
from lib_pulid.evaluate.judges import HOW_TO_GET, OWN, FaceJudge, by_recogniser, open_judges
from lib_pulid.evaluate.subjects import drawn_people, read_folder, read_prompts
from lib_pulid.evaluate.trial import Method, Panel, Row, count_images, read_sitters, run_trial
from lib_pulid.files import catalog
from lib_pulid.methods import has, usual
from lib_pulid.photos import IdentityCache
from lib_pulid.standalone import Workshop, keeping, open_workshop
from lib_pulid.weights import load_adapter


def run(arguments: argparse.Namespace, device: str) -> int:
    """Runs the command."""
    weights = options.check(arguments)
    if arguments.faces is None and arguments.model not in miniature.MODELS:
        raise SettingError("Give --faces, a folder with a photo or a subfolder of photos of each person.")
    variants = [options.variant(text) for text in arguments.variant] or [("", {})]
    files = [options.named_file(text) for text in arguments.pulid]
    prompts = read_prompts(arguments.prompts) if arguments.prompts else []
    people = read_folder(arguments.faces, prompts or read_prompts(), arguments.each or 4) if arguments.faces else None
    workshop = keeping(open_workshop(arguments.model, arguments.models_dir, files[0][1] if files else None, device))
    methods = _methods(workshop, files, variants)
    for note in dict.fromkeys(note for prompt in prompts for note in workshop.check_prompt(prompt.text)):
        print(f"note: {note}", file=sys.stderr)
    panel = _panel(arguments, workshop, device)
    if people is None:
        people = drawn_people(arguments.people, arguments.each or 1, lambda image: bool(panel.faces(image)), prompts)
    sitters = read_sitters(people, panel)
    workshop.base.pipeline.set_progress_bar_config(disable=True)
    workshop = replace(workshop, cache=IdentityCache())  # in memory only: there may be hundreds of people
    rows = _watched(workshop, panel, methods, sitters, weights, arguments)
    settings = {**vars(arguments), "weights": weights}
    results.write(results.collect(settings, methods, panel, sitters, rows), arguments.out, arguments.json)
    return 0


def _methods(
    workshop: Workshop, files: Sequence[tuple[str, Path]], variants: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[Method]:
    family = workshop.base.family
    for name, settings in variants:
        if foreign := [key for key in settings if fields.FIELD[key].family not in ("", family)]:
            raise SettingError(f"--variant {name}: {foreign[0]} has no effect on {family.upper()}. Leave it out.")
    adapters = [(workshop.adapter.path.stem, workshop.adapter)]
    if files:
        adapters = [(files[0][0], workshop.adapter), *((name, load_adapter(path)) for name, path in files[1:])]
    for _, adapter in adapters:
        if adapter.family != family:
            raise UnsupportedModelError(
                f"{adapter.path.name} is for {adapter.family.upper()}, but --model is {family.upper()}."
            )
        for name, settings in variants:
            if foreign := [key for key in settings if not has(adapter.method, key)]:
                raise SettingError(
                    f"--variant {name}: {adapter.label} has no {foreign[0]}. Leave it out, or compare it by itself."
                )
        workshop.readers(adapter.method)  # before the work: a file may be missing
    alone = len({name for name, _ in adapters}) == 1
    return [
        Method(variant if alone and variant else ", ".join(filter(None, (name, variant))), adapter, settings)
        for name, adapter in adapters
        for variant, settings in variants
    ]


# ---------------------------------------------------------------- models and judges


def _panel(arguments: argparse.Namespace, workshop: Workshop, device: str) -> Panel:
    drawn = arguments.model in miniature.MODELS
    own = None if drawn else catalog.require_encoders(arguments.models_dir)["recogniser"]
    judges: list[FaceJudge] = []
    if drawn:
        judge = miniature.judge()
        judges.append(FaceJudge("miniature", lambda image, face: judge.read(image, face.landmarks)))
    if arguments.judge or not drawn:
        judges += open_judges(arguments.judge, own, arguments.models_dir, device)
    if not judges:
        print(f"note: the only judge is {OWN} recognizer, which overestimates likeness. {HOW_TO_GET}", file=sys.stderr)
    models = workshop.readers(usual(workshop.base.family))[0]().faces
    assert models is not None and models.recogniser is not None, "PuLID reads faces"
    return Panel(
        models=models,
        judges=(*judges, by_recogniser(OWN, models.recogniser)),
        scene=miniature.scene_judge() if drawn else None,
        clip=open_clip_model(arguments.clip, device) if arguments.clip else None,
    )


def _watched(workshop, panel, methods, sitters, weights, arguments: argparse.Namespace) -> list[Row]:
    """Collects all rows, with a progress bar."""
    from PIL import Image
    from tqdm import tqdm

    settings = {"steps": arguments.steps, "size": arguments.size, "guidance": arguments.guidance}
    made = run_trial(workshop, panel, methods, sitters, weights, arguments.seeds, **settings)
    total, rows = count_images(sitters, methods, weights, arguments.seeds), []
    for number, (row, image) in enumerate(tqdm(made, total=total, desc="generating", unit="image")):
        rows.append(row)
        if arguments.save_images:  # the number in results.json goes first: prompts may begin alike
            words = (row.person, row.method, row.file, f"{row.weight:g}", row.prompt[:40], str(row.seed))
            name = re.sub(r"[^\w.,]+", "-", "_".join(filter(None, words)))
            (arguments.out / "images").mkdir(exist_ok=True)
            Image.fromarray(image).save(arguments.out / "images" / f"{number:04}_{name}.png")
    return rows
