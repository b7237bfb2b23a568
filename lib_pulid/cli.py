"""The command line: `python -m lib_pulid demo | generate | embed | evaluate | doctor | models | bench`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lib_pulid import __version__, disk
from lib_pulid.errors import PulidError, SettingError
from lib_pulid.files import catalog


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default only where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], "", False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0 done, 1 something is missing or wrong (said on stderr)."""
    arguments = _parser().parse_args(argv)
    _be_quiet()
    try:
        return arguments.run(arguments)
    except (PulidError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _be_quiet() -> None:
    """Keeps the libraries' chatter off a terminal that is meant to be read."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold what no encoding has
            stream.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------- arguments


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; a path is needed")
    return disk.user_path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib_pulid",
        description="PuLID: a person's face in pictures of SDXL and FLUX, from one photo. Try `demo` first.",
    )
    parser.add_argument("--version", action="version", version=f"sd-webui-pulid {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_generate, _add_embed, _add_evaluate, _add_doctor, _add_models, _add_bench):
        add(commands)
    return parser


def _command(commands, name: str, run, help: str, description: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description or help, formatter_class=_Formatter)
    parser.add_argument(
        "--models-dir",
        type=_path,
        default=catalog.default_models_dir(),
        help=f"where the weights are; ${catalog.MODELS_DIR_VARIABLE} sets the default",
    )
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands) -> None:
    parser = _command(commands, "demo", run_demo, "people in, contact sheets out; needs no weights")
    parser.add_argument(
        "--face", type=_path, help="your photo; in miniature a drawing (default: people whom no training saw)"
    )
    parser.add_argument("-o", "--out", type=_path, default=Path("outputs"), help="folder for the sheets")
    parser.add_argument("--device", default="auto", help="auto (the GPU, if torch can use one), cpu, cuda, cuda:1 ...")


def _add_faces(parser: argparse.ArgumentParser) -> None:
    from lib_pulid.faces import FACE_ORDERS
    from lib_pulid.identity import FUSIONS

    parser.add_argument(
        "--face",
        type=_path,
        action="append",
        default=[],
        help="photo of the person; repeat it for several of one person",
    )
    parser.add_argument("--pulid", type=_path, help="PuLID file (default: the first that fits in the models folder)")
    parser.add_argument(
        "--face-order", choices=FACE_ORDERS, default="largest", help="which face, if a photo has several"
    )
    parser.add_argument("--face-index", type=int, default=0, help="0 for the first face in that order, 1 for the next")
    parser.add_argument("--fusion", choices=FUSIONS, default="official", help="how several photos become one identity")
    parser.add_argument("--device", default="auto", help="auto (the GPU, if torch can use one), cpu, cuda, cuda:1 ...")


def _add_generate(commands) -> None:
    from lib_pulid.attention import PROJECTIONS

    parser = _command(commands, "generate", run_generate, "make a picture of a person")
    parser.add_argument("--prompt", required=True, help="what to paint")
    parser.add_argument(
        "--model",
        default="miniature",
        help="single-file SDXL checkpoint, diffusers folder (SDXL or FLUX), or miniature: a small SDXL of drawn people",
    )
    _add_faces(parser)
    parser.add_argument("--identity", type=_path, help="a saved identity, in the place of photos")
    parser.add_argument("--weight", type=float, help="strength (default: 0.8 on SDXL, 1 on FLUX; 0 changes nothing)")
    parser.add_argument(
        "--projection", choices=PROJECTIONS, default="ortho_v2", help="SDXL: how the face is kept apart"
    )
    parser.add_argument("--num-zero", type=int, default=20, help="SDXL, 0-80: more leaves more to the prompt")
    parser.add_argument("--start", type=float, default=0.0, help="share of the steps before the face begins to act")
    parser.add_argument("--end", type=float, default=1.0, help="share of the steps after which it no longer acts")
    parser.add_argument("--start-step", type=int, default=0, help="FLUX: first step in which it acts, 0 is the first")
    parser.add_argument("--mask", type=_path, help="picture whose white part is where the face may act")
    parser.add_argument("--seed", type=int, default=0, help="0 or more; the same seed gives the same picture")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 20, miniature 12)")
    parser.add_argument("--size", type=int, help="side in pixels (default: 1024, miniature 128)")
    parser.add_argument(
        "--guidance", type=float, help="CFG on SDXL (default 7, miniature 2), distilled guidance on FLUX (default 4)"
    )
    parser.add_argument("-o", "--out", type=_path, default=Path("outputs/picture.png"), help="where to write it")


def _add_embed(commands) -> None:
    parser = _command(commands, "embed", run_embed, "photos -> a saved identity, which later needs no photo")
    parser.add_argument("--model", default="miniature", help="the base model that it is for, as in generate")
    _add_faces(parser)
    parser.add_argument("--name", default="", help="kept in the file")
    parser.add_argument(
        "-o",
        "--out",
        type=_path,
        default=Path("outputs/identity.safetensors"),
        help="where to write: .safetensors, or .pulidembd for stable-diffusion.cpp (FLUX)",
    )


def _add_evaluate(commands) -> None:
    from lib_pulid.evaluate.options import add_arguments

    text = "measure likeness and what else changes, over weights and methods"
    add_arguments(_command(commands, "evaluate", run_evaluate, text, f"{text}; docs/evaluate.md says how to read it"))


def _add_doctor(commands) -> None:
    _command(commands, "doctor", run_doctor, "what is there, what is missing, and what to do about it")


def _add_models(commands) -> None:
    text = "list, download or verify the weight files"
    parser = _command(commands, "models", run_models, text, f"{text}: what, how large, from where, under which licence")
    parser.add_argument("action", choices=("list", "download", "verify"), help="what to do")
    parser.add_argument(
        "names", nargs="*", help="files, or sdxl, or flux (default: all; download: what sdxl and flux need)"
    )
    parser.add_argument(
        "--accept-licence", action="store_true", help="accept non-commercial licences without being asked"
    )


def _add_bench(commands) -> None:
    parser = _command(commands, "bench", run_bench, "what a face costs, counted and timed")
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help="counts (kernels and bytes, as on a GPU), kept (memory), sites (times of one layer), steps (of a whole "
        "call), photos (to an identity); default: the first three",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the times")
    parser.add_argument("--runs", type=int, default=7, help="of which the median is told")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; 0 takes torch's default")
    parser.add_argument("--small", action="store_true", help="steps: of narrow stand-ins")
    parser.add_argument("--face", type=Path, help="photos: your photo (default: a sample photograph of a library)")
    parser.add_argument("--official", type=Path, help="counts: a checkout of ToTheBeginning/PuLID to count as well")
    parser.add_argument("--json", action="store_true", help="for programs")


# ---------------------------------------------------------------- commands


def run_demo(arguments: argparse.Namespace) -> int:
    from lib_pulid import demo
    from lib_pulid.images import load_image

    if arguments.face:
        load_image(arguments.face)
    disk.check_writable(arguments.out / "demo_sdxl.png", replace=True)
    demo.run_demo(arguments.face, arguments.out, arguments.models_dir, _device(arguments.device))
    return 0


def run_generate(arguments: argparse.Namespace) -> int:
    from lib_pulid import cli_checks
    from lib_pulid.identity import with_uncond
    from lib_pulid.injection import compile_injection

    if bool(arguments.face) == bool(arguments.identity):
        raise SettingError("Give either --face (once or more) or --identity.")
    unit, mask, saved = cli_checks.checked(arguments), _mask(arguments.mask), cli_checks.saved(arguments.identity)
    workshop = _workshop(arguments)
    for note in workshop.check_prompt(arguments.prompt):
        print(f"note: {note}")
    family = workshop.base.family
    cli_checks.in_words(lambda: unit.check_steps(family, cli_checks.steps_of(arguments), 0))
    identity = with_uncond(saved, workshop.adapter) if saved else _identity(workshop, arguments)
    weight = unit.on(family).weight or 0.0
    injection = compile_injection(
        workshop.adapter,
        identity,
        weight=weight,
        projection=unit.projection,
        num_zero=unit.num_zero,
        start=unit.start,
        end=unit.end,
        start_step=unit.start_step if family == "flux" else 0,
        mask=mask,
        device=workshop.device,
        dtype=workshop.base.dtype,
    )
    settings = {name: getattr(arguments, name) for name in ("seed", "steps", "size", "guidance")}
    picture, used = workshop.paint([injection], arguments.prompt, **settings)
    cli_checks.write_picture(picture, arguments.out)
    print(f"{arguments.out}: identity {identity.short_hash}, weight {weight}, injected at {used} sites")
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


def run_evaluate(arguments: argparse.Namespace) -> int:
    from lib_pulid.evaluate import command

    return command.run(arguments, _device(arguments.device))


def run_doctor(arguments: argparse.Namespace) -> int:
    from lib_pulid import doctor

    return doctor.report(arguments.models_dir)


def run_models(arguments: argparse.Namespace) -> int:
    from lib_pulid import cli_files

    return cli_files.run(arguments.action, arguments.names, arguments.models_dir, arguments.accept_licence)


def run_bench(arguments: argparse.Namespace) -> int:
    from lib_pulid import bench

    if unknown := set(arguments.parts) - set(bench.PARTS):
        raise SettingError(f"bench does not know {', '.join(sorted(unknown))}; its parts: {', '.join(bench.PARTS)}.")
    return bench.run(arguments)


# ---------------------------------------------------------------- helpers


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
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
    return workshop.identity(arguments.face, choice, arguments.fusion, tell)


def _mask(path: Path | None):
    if path is None:
        return None
    import torch

    from lib_pulid.images import load_region

    return torch.from_numpy(load_region(path, path.name))
