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
from lib_pulid.errors import PulidError
from lib_pulid.files import catalog


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], "", False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0 for success, 1 for an error (shown on stderr)."""
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
    for add in (_add_demo, _add_generate, _add_embed, _add_blend, _add_evaluate, _add_doctor, _add_models, _add_bench):
        add(commands)
    return parser


def _command(commands, name: str, run, help: str, description: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description or help, formatter_class=_Formatter)
    parser.add_argument(
        "--models-dir",
        type=_path,
        default=catalog.default_models_dir(),
        help=f"folder with the weights; ${catalog.MODELS_DIR_VARIABLE} sets the default",
    )
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands) -> None:
    parser = _command(
        commands, "demo", cli_commands.run_demo, "make contact sheets of people; works without the real weights"
    )
    parser.add_argument(
        "--face", type=_path, help="your photo; for the miniature, a drawing (default: people not seen in training)"
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
        help="photo of the person; repeat it for several photos of the same person",
    )
    parser.add_argument(
        "--pulid",
        "--adapter",
        type=_path,
        help="PuLID file, or another method's (default: the first PuLID file there)",
    )
    parser.add_argument(
        "--face-order", choices=FACE_ORDERS, default="largest", help="how faces are ordered if a photo has several"
    )
    parser.add_argument("--face-index", type=int, default=0, help="0 for the first face in that order, 1 for the next")
    parser.add_argument("--fusion", choices=FUSIONS, default="official", help="how several photos become one identity")
    parser.add_argument("--device", default="auto", help="auto (the GPU, if torch can use one), cpu, cuda, cuda:1 ...")


def _add_generate(commands) -> None:
    from lib_pulid.attention import PROJECTIONS

    parser = _command(commands, "generate", cli_commands.run_generate, "make an image of a person")
    parser.add_argument("--prompt", required=True, help="what the image shows")
    parser.add_argument(
        "--model",
        default="miniature",
        help="single-file SDXL checkpoint, diffusers folder (SDXL or FLUX), or miniature: a small SDXL of drawn people",
    )
    _add_faces(parser)
    parser.add_argument("--identity", type=_path, help="a saved identity, instead of photos")
    parser.add_argument("--weight", type=float, help="likeness strength (default: 0.8 on SDXL, 1 on FLUX; 0: off)")
    parser.add_argument(
        "--projection",
        choices=PROJECTIONS,
        help="PuLID for SDXL: how the identity is decoupled from the prompt (default: ortho_v2)",
    )
    parser.add_argument(
        "--num-zero", type=int, help="PuLID for SDXL, 0-80: more stays closer to the prompt (default: 20)"
    )
    parser.add_argument("--lora-weight", type=float, help="FaceID, 0-2: strength of its LoRA (default: 1)")
    parser.add_argument(
        "--identity-net",
        type=float,
        help="InstantID, 0-2: strength of its ControlNet, which keeps the pose (default: 0.8 if it is there)",
    )
    parser.add_argument("--start", type=float, default=0.0, help="start after this fraction of the steps")
    parser.add_argument("--end", type=float, default=1.0, help="stop after this fraction of the steps")
    parser.add_argument("--start-step", type=int, default=0, help="FLUX: first step with the face, counted from 0")
    parser.add_argument("--mask", type=_path, help="image that is white where the face may appear")
    parser.add_argument(
        "--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"), help="region of the face, as fractions of the image"
    )
    parser.add_argument("--seed", type=int, default=0, help="0 or more; the same seed gives the same image")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 20, miniature 12)")
    parser.add_argument("--size", type=int, help="side in pixels (default: 1024, miniature 128)")
    parser.add_argument(
        "--guidance", type=float, help="CFG on SDXL (default 7, miniature 2), distilled guidance on FLUX (default 4)"
    )
    parser.add_argument("--likeness", action="store_true", help="measure how like the person the image is")
    parser.add_argument("-o", "--out", type=_path, default=Path("outputs/picture.png"), help="file to write")


def _add_embed(commands) -> None:
    parser = _command(commands, "embed", cli_commands.run_embed, "save an identity, to use later without photos")
    parser.add_argument("--model", default="miniature", help="base model to use it with, as in generate")
    _add_faces(parser)
    parser.add_argument("--name", default="", help="name to store in the file")
    parser.add_argument(
        "-o",
        "--out",
        type=_path,
        default=Path("outputs/identity.safetensors"),
        help="file to write: .safetensors, or .pulidembd for stable-diffusion.cpp (FLUX)",
    )


def _add_blend(commands) -> None:
    text = "blend saved identities into a new one"
    parser = _command(
        commands, "blend", cli_commands.run_blend, text, f"{text}, in the folder pulid/identities of --models-dir"
    )
    parser.add_argument(
        "people", nargs="+", metavar="NAME:SHARE", help="name of a saved identity and its share, as in anna:0.7 ben:0.3"
    )
    parser.add_argument("--name", required=True, help="name of the new identity")


def _add_evaluate(commands) -> None:
    from lib_pulid.evaluate.options import add_arguments

    text = "measure likeness and side effects, by weight and method"
    add_arguments(
        _command(
            commands, "evaluate", cli_commands.run_evaluate, text, f"{text}; docs/evaluate.md explains the results"
        )
    )


def _add_doctor(commands) -> None:
    _command(commands, "doctor", cli_commands.run_doctor, "check packages, GPU and files, and say what to do")


def _add_models(commands) -> None:
    text = "list, download or verify the weight files"
    parser = _command(commands, "models", cli_commands.run_models, text, f"{text}, with sizes, sources and licenses")
    parser.add_argument("action", choices=("list", "download", "verify"), help="what to do")
    parser.add_argument(
        "names", nargs="*", help="file names, or sdxl, or flux (default: all; for download: what sdxl and flux need)"
    )
    parser.add_argument(
        "--accept-license",
        "--accept-licence",  # the old spelling
        action="store_true",
        help="accept non-commercial licenses without asking",
    )


def _add_bench(commands) -> None:
    parser = _command(commands, "bench", cli_commands.run_bench, "measure what a face costs in time and memory")
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help="counts (kernels and bytes on a GPU), kept (memory), sites (time of one layer), steps (time of a whole "
        "call), photos (time from photo to identity); default: the first three",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="for the timings"
    )
    parser.add_argument("--runs", type=int, default=7, help="number of runs; the median is reported")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0: torch's default")
    parser.add_argument("--small", action="store_true", help="steps: use a narrow model")
    parser.add_argument("--face", type=Path, help="photos: your photo (default: a sample photo from insightface)")
    parser.add_argument("--official", type=Path, help="counts: a checkout of ToTheBeginning/PuLID to compare with")
    parser.add_argument("--json", action="store_true", help="print JSON")
