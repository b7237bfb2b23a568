"""Runs the command line: `python -m lib_pulid demo | generate | embed | blend | evaluate | doctor | models | bench`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lib_pulid import __version__, cli_commands, disk
from lib_pulid.errors import PulidError, is_out_of_memory
from lib_pulid.files import catalog

MODEL = "single-file SDXL checkpoint, diffusers folder (SDXL or FLUX), miniature or miniature-flux (of drawn people)"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], "", False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0 for success, 1 for an error (shown on stderr)."""
    _be_quiet()
    try:
        arguments = _parser().parse_args(argv)
        status = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (words := _in_words(error)):
            raise
        print(words, file=sys.stderr)
        return 1


def _in_words(error: Exception) -> str:
    """Says what happened and what to do; "" for a bug of ours, whose traceback is needed."""
    name, reason = type(error).__name__, str(error)
    if is_out_of_memory(error):
        return (
            f"OutOfMemoryError: not enough memory ({reason[:300] or name}). "
            "Try a smaller --size, fewer people, --device cpu, or closing other programs."
        )
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] != "lib_pulid":
        return f"{name}: {reason}. Run: pip install -r requirements-standalone.txt"
    return f"{name}: {reason}" if isinstance(error, (PulidError, OSError)) else ""


def _be_quiet() -> None:
    """Silences the libraries' warnings."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name may contain what the terminal cannot encode
            stream.reconfigure(errors="backslashreplace")


# ---------------------------------------------------------------- arguments


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return disk.user_path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lib_pulid",
        description="PuLID: put a person's face into images of SDXL and FLUX, from a single photo. Try `demo` first.",
    )
    parser.add_argument("--version", action="version", version=f"sd-webui-pulid {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_generate, _add_embed, _add_blend, _add_evaluate, _add_models, _add_bench):
        add(commands)
    _command(commands, "doctor", cli_commands.run_doctor, "check packages, GPU and files, and say what to do")
    return parser


def _command(commands, name: str, run, help: str, description: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description or help, formatter_class=_Formatter)
    parser.set_defaults(run=run)
    models_dir = disk.user_path(os.environ.get(catalog.MODELS_DIR_VARIABLE, "").strip() or "models").absolute()
    where = f"folder with the weights; ${catalog.MODELS_DIR_VARIABLE} sets the default"
    parser.add_argument("--models-dir", type=_path, default=models_dir, help=where)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (the GPU, if torch can use one), cpu, cuda, cuda:1 ...")


def _add_demo(commands) -> None:
    text = "make contact sheets of people; works without the real weights"
    parser = _command(commands, "demo", cli_commands.run_demo, text)
    add = parser.add_argument
    add("--face", type=_path, help="your photo; for the miniature, a drawing (default: people not seen in training)")
    add("-o", "--out", type=_path, default=Path("outputs"), help="folder for the sheets")
    _add_device(parser)


def _add_faces(parser: argparse.ArgumentParser, *settings: str) -> None:
    """Adds photos, adapter, device, and these settings of a unit besides those that the photos have."""
    from lib_pulid.fields import FIELD

    add = parser.add_argument
    photos = "photo of the person; repeat it for several photos of the same person"
    add("--face", type=_path, action="append", default=[], help=photos)
    pulid = "PuLID file, or another method's (default: the first PuLID file there)"
    add("--pulid", "--adapter", type=_path, help=pulid)
    settings += ("face_order", "face_index", "fusion")
    parser.set_defaults(settings=settings)
    for name in settings:
        field, option = FIELD[name], f"--{name.replace('_', '-')}"
        kind = {"int": int, "float": float}.get(field.kind, str)
        add(option, type=kind, choices=field.choices or None, default=field.default, help=field.tip)
    _add_device(parser)


def _add_generate(commands) -> None:
    parser = _command(commands, "generate", cli_commands.run_generate, "make an image of a person")
    add = parser.add_argument
    add("--prompt", required=True, help="what the image shows")
    add("--model", default="miniature", help=MODEL)
    _add_faces(parser, "weight", "projection", "num_zero", "lora_weight", "identity_net", "start", "end", "start_step")
    add("--identity", type=_path, help="a saved identity, instead of photos")
    add("--mask", type=_path, help="image that is white where the face may appear")
    region = "region of the face, as fractions of the image"
    add("--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"), help=region)
    add("--seed", type=int, default=0, help="0 or more; the same seed gives the same image")
    add("--steps", type=int, help="denoising steps (default: 20, miniature 12, miniature-flux 4)")
    add("--size", type=int, help="side in pixels (default: 1024, miniature 128)")
    guidance = "CFG on SDXL (default: 7, miniature 1.2), guidance on FLUX (default: 4, miniature-flux 1.5)"
    add("--guidance", type=float, help=guidance)
    add("--likeness", action="store_true", help="measure how like the person the image is")
    add("-o", "--out", type=_path, default=Path("outputs/picture.png"), help="file to write")


def _add_embed(commands) -> None:
    parser = _command(commands, "embed", cli_commands.run_embed, "save an identity, to use later without photos")
    add = parser.add_argument
    add("--model", default="miniature", help="base model to use it with, as in generate")
    _add_faces(parser)
    add("--name", default="", help="name to store in the file")
    kinds = "file to write: .safetensors, or .pulidembd for stable-diffusion.cpp (FLUX)"
    add("-o", "--out", type=_path, default=Path("outputs/identity.safetensors"), help=kinds)


def _add_blend(commands) -> None:
    text = "blend saved identities into a new one"
    where = f"{text}, in the folder pulid/identities of --models-dir"
    parser = _command(commands, "blend", cli_commands.run_blend, text, where)
    add = parser.add_argument
    share = "name of a saved identity and its share, as in anna:0.7 ben:0.3"
    add("people", nargs="+", metavar="NAME:SHARE", help=share)
    add("--name", required=True, help="name of the new identity")


def _add_evaluate(commands) -> None:
    from lib_pulid.evaluate.options import add_arguments

    text = "measure likeness and side effects, by weight and method"
    where = f"{text}; docs/evaluate.md explains the results"
    parser = _command(commands, "evaluate", cli_commands.run_evaluate, text, where)
    add_arguments(parser, _path)
    _add_device(parser)


def _add_models(commands) -> None:
    text = "list, download or verify the weight files"
    parser = _command(commands, "models", cli_commands.run_models, text, f"{text}, with sizes, sources and licenses")
    add = parser.add_argument
    add("action", choices=("list", "download", "verify"), help="what to do")
    names = "file names, or sdxl, or flux (default: all; for download: what sdxl and flux need)"
    add("names", nargs="*", help=names)
    accept = ("--accept-license", "--accept-licence")  # the second is the old spelling
    add(*accept, action="store_true", help="accept non-commercial licenses without asking")


def _add_bench(commands) -> None:
    parser = _command(commands, "bench", cli_commands.run_bench, "measure what a face costs in time and memory")
    add = parser.add_argument
    parts = (
        "counts (kernels and bytes on a GPU), kept (memory), sites (time of one layer), steps (time of a whole "
        "call), photos (time from photo to identity); default: the first three"
    )
    add("parts", nargs="*", metavar="PART", help=parts)
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="for the timings")
    add("--runs", type=int, default=7, help="number of runs; the median is reported")
    add("--threads", type=int, default=1, help="CPU threads; 0: torch's default")
    add("--small", action="store_true", help="steps: use a narrow model")
    add("--face", type=_path, help="photos: your photo (default: a sample photo from insightface)")
    add("--official", type=_path, help="counts: a checkout of ToTheBeginning/PuLID to compare with")
    add("--json", action="store_true", help="print JSON")
