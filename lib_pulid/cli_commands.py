"""Implements the commands of the command line, whose arguments are in `cli`. Heavy parts are imported where used."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from lib_pulid import disk
from lib_pulid.errors import IdentityMismatchError, MissingWeightsError, SettingError
from lib_pulid.files.catalog import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor


def run_demo(arguments: argparse.Namespace) -> int:
    from lib_pulid import cli_checks, demo
    from lib_pulid.images import load_image

    if arguments.face:
        load_image(arguments.face)
        for family in FAMILIES:
            cli_checks.check_kept(arguments.out / f"demo_{family}.png", arguments.face)
    disk.check_writable(arguments.out / "demo_sdxl.png", replace=True)
    demo.run_demo(arguments.face, arguments.out, arguments.models_dir, _device(arguments.device))
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    from lib_pulid import cli_checks
    from lib_pulid.identity import Identity, with_uncond

    if bool(arguments.face) == bool(arguments.identity):
        raise SettingError("Give either --face (once or more) or --identity.")
    unit = cli_checks.checked(arguments)
    saved = Identity.load(arguments.identity) if arguments.identity else None
    mask = read_region(arguments.mask, arguments.box)
    workshop = _workshop(arguments)
    for note in workshop.check_prompt(arguments.prompt):
        print(f"note: {note}")
    family = workshop.base.family
    cli_checks.in_words(lambda: unit.check_method(workshop.adapter.method, 0))
    cli_checks.in_words(lambda: unit.check_steps(family, cli_checks.steps_of(arguments), 0))
    identity = with_uncond(saved, workshop.adapter) if saved else _identity(workshop, arguments)
    unit = unit.on(family, workshop.adapter.method)
    injection = workshop.compiled(identity, mask=mask, **unit.settings(workshop.adapter.method))
    settings = {name: getattr(arguments, name) for name in ("seed", "steps", "size", "guidance")}
    net, words = _control_net(workshop, identity, injection, unit, arguments)
    with net:
        picture, used = workshop.paint([injection], arguments.prompt, **settings)
    cli_checks.write_picture(picture, arguments.out)
    print(f"{arguments.out}: identity {identity.short_hash}, weight {unit.weight}, injected at {used} sites{words}")
    if arguments.likeness:
        print(f"likeness: {_likeness(workshop, picture, identity)}")
    return 0


def run_embed(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from lib_pulid import cli_checks
    from lib_pulid.fields import FIELD, check

    if not arguments.face:
        raise SettingError("Give at least one photo with --face.")
    cli_checks.check_faces(arguments)
    cli_checks.check_identity_file(arguments.out, cli_checks.family_of(arguments.model))
    name = cli_checks.in_words(lambda: check(FIELD["identity"], arguments.name, 0), "name")
    identity = _identity(_workshop(arguments), arguments)
    identity = replace(identity, info={**identity.info, "name": name}) if name else identity
    identity.save(arguments.out)
    print(
        f"{arguments.out}: identity {identity.short_hash}, {identity.cond.shape[1]} tokens, {identity.info['adapter']}"
    )
    return 0


def run_blend(arguments: argparse.Namespace) -> int:
    from lib_pulid.blend import read_share
    from lib_pulid.stores.folder import ModelsFolder, Settings
    from lib_pulid.stores.identities import Identities

    people = [read_share(text) for text in arguments.people]
    folder = ModelsFolder(lambda: Settings(arguments.models_dir))
    made = Identities(folder).blend(people, arguments.name)
    print(f"{made.path}: identity {made.short_hash}, {made.adapter}")
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    from lib_pulid import cli_checks
    from lib_pulid.evaluate import command

    cli_checks.check_sampling(arguments)
    return command.run(arguments, _device(arguments.device))


def run_doctor(arguments: argparse.Namespace) -> int:
    from lib_pulid import doctor

    return doctor.report(arguments.models_dir)


def run_models(arguments: argparse.Namespace) -> int:
    from lib_pulid import cli_files

    return cli_files.run(arguments.action, arguments.names, arguments.models_dir, arguments.accept_license)


def run_bench(arguments: argparse.Namespace) -> int:
    from lib_pulid import bench

    if unknown := set(arguments.parts) - set(bench.PARTS):
        raise SettingError(f"Unknown parts: {', '.join(sorted(unknown))}. bench has {', '.join(bench.PARTS)}.")
    if arguments.runs < 1 or arguments.threads < 0:
        raise SettingError(f"--runs is {arguments.runs}, --threads {arguments.threads}; use 1 or more, 0 or more.")
    _device(arguments.device)
    return bench.run(arguments)


# ---------------------------------------------------------------- helpers


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"--device {name} is not available: {str(error).splitlines()[0]}") from error
    return name


def _workshop(arguments: argparse.Namespace):
    from lib_pulid.standalone import open_workshop

    return open_workshop(arguments.model, arguments.models_dir, arguments.pulid, _device(arguments.device))


def _identity(workshop, arguments: argparse.Namespace):
    from lib_pulid.faces import FaceChoice

    def tell(name: str, face) -> None:
        x0, y0, x1, y1 = face.detection.box.round().astype(int)
        print(f"{name}: face at ({x0}, {y0}), {x1 - x0} x {y1 - y0} pixels", *face.notes, sep="\n  ")

    choice = FaceChoice(arguments.face_order, arguments.face_index)
    judge = workshop.judges[0] if getattr(arguments, "likeness", False) and workshop.judges else None
    settings = {"on_face": tell, "judge": judge, "warn": lambda text: print(f"note: {text}")}
    return workshop.identity(arguments.face, choice, fusion=arguments.fusion, **settings)


def _control_net(workshop, identity, injection, unit, arguments: argparse.Namespace):
    """Returns what runs the ControlNet of the adapter's method, if the unit has a strength for it, and words for the
    result. One that was not asked for may be missing."""
    from lib_pulid import cli_checks

    try:
        if unit.identity_net:
            net = workshop.controlled(identity, injection, cli_checks.size_of(arguments), unit.identity_net)
            return net, f"; ControlNet {unit.identity_net}"
    except (MissingWeightsError, IdentityMismatchError) as error:
        if arguments.identity_net is not None:
            raise
        print(f"note: {error}\nWithout it, only the adapter acts. --identity-net 0 hides this note.")
    return nullcontext(), ""


def _likeness(workshop, picture, identity) -> str:
    """Measures an image that is written already: what goes wrong here costs only the number."""
    try:
        return workshop.likeness(picture, identity)
    except Exception as error:
        return f"not measured ({error})"


def read_region(path: Path | None, box: Sequence[float] | None) -> Tensor | None:
    """Reads the region of the face, [H, W] float32; None: everywhere. Raises: SettingError, ImageError."""
    import torch

    from lib_pulid.boxes import read_box, within
    from lib_pulid.masks import load_mask

    mask = torch.from_numpy(load_mask(path, path.name)) if path else None
    try:
        return within(mask, read_box(box)) if box else mask
    except ValueError as error:
        raise SettingError(f"--box: {error}") from error
