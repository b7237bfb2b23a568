"""python -m tests.host WEBUI_DIR [--python ...]: runs the rows and prints the table."""

from __future__ import annotations

import argparse
import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from tests.host import detector, rows_distributed, rows_flags, rows_page, rows_start, rows_weights
from tests.host.models import checkpoints, flux, methods, miniature, pulid
from tests.host.table import Result, Row, as_markdown, run
from tests.host.webui import NAMES, ROOT, Checkout, running

# In the order in which they run.
NAMES_OF_GROUPS = """start basics batches works-with methods img2img controlnet adetailer grid errors faces
    flux flux-kinds flux-settings neo page miniature likeness long sequences"""
GROUPS = {name: import_module(f"tests.host.rows_{name.replace('-', '_')}") for name in NAMES_OF_GROUPS.split()}
WITH_MINIATURE = ("page", "miniature", "likeness")  # somebody looks at their images
ON_DEMAND = ("long", "sequences")  # they take many minutes
WITH_OWN_STARTS = ("distributed", "flags", "weights")


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the WebUI is stopped, too
    checkout = Checkout(args.webui.resolve(), args.python or args.webui.resolve() / "venv" / "bin" / "python")
    print(f"{checkout.version}, {checkout.python}", flush=True)
    generated = generate(args.work / "generated", checkout)
    write_detector(generated, checkout, args.extension)
    rows_page.SCREENSHOTS = args.screenshots
    before, packages = checkout.changes(), checkout.packages()
    results, beside = [], [path for path in args.extension if path.name != rows_distributed.EXTENSION]
    for folder, is_small in ((generated, False), (generated / "miniature", True)):
        names = [name for name in args.only or GROUPS if (name in WITH_MINIATURE) == is_small]
        chosen = [row for name in names for row in rows_of(name, args) if checkout.kind in row.hosts]
        results += in_one_run(checkout, folder, chosen, beside) if chosen else []
    if not args.only or "distributed" in args.only:
        results += rows_distributed.run_all(checkout, generated, args.extension, args.match)
    if not args.only or "flags" in args.only:
        results += rows_flags.run_all(checkout, generated, args.match)
    if not args.only or "weights" in args.only:
        results += rows_weights.run_all(checkout, generated, args.match)
    if not args.only or "start" in args.only:
        results += rows_start.after_all(checkout, before, packages)
    text = as_markdown(results)
    (args.work / f"{checkout.kind}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}", flush=True)
    failed = [result for result in results if result.passed == "NO"]
    passed = sum(result.passed == "yes" for result in results)
    print(f"{NAMES[checkout.kind]}: {passed} of {len(results)} rows passed, {len(failed)} failed", flush=True)
    return 1 if failed or not results else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.host", description=__doc__)
    parser.add_argument("webui", type=Path, help="a checkout of A1111 or Forge that runs")
    parser.add_argument("--python", type=Path, help="its interpreter; default: venv/bin/python in it")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "host", help="folder for generated models")
    only = f"groups of rows; default: all but {' and '.join(ON_DEMAND)}"
    parser.add_argument("--only", nargs="+", choices=(*GROUPS, *WITH_OWN_STARTS), help=only)
    parser.add_argument("--match", default="", help="only rows with this in their name")
    parser.add_argument("--extension", type=Path, action="append", default=[], help="folder of one more extension")
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the page")
    return parser.parse_args()


def rows_of(name: str, args: argparse.Namespace) -> Iterable[Row]:
    if name in WITH_OWN_STARTS or (name in ON_DEMAND and not args.only):
        return []
    return [row for row in GROUPS[name].rows.rows if args.match.lower() in row.behaviour.lower()]


def in_one_run(checkout: Checkout, generated: Path, chosen: list[Row], extensions: list[Path]) -> list[Result]:
    with running(checkout, generated, extensions=extensions) as host:
        results = [run(row, host) for row in chosen]
        (generated.parent / f"{host.kind}.log").write_text(host.log_text(), encoding="utf-8")
    return results


def generate(folder: Path, checkout: Checkout) -> Path:
    """Checkpoints and the rest, unless they are there already as this program would write them."""
    tests, package = ROOT / "tests", ROOT / "lib_pulid"
    places = (tests / "host" / "models", tests / "small_models", package / "miniature", package / "training")
    stamp = fingerprint([tests / "face_standins.py", *(path for place in places for path in sorted(place.iterdir()))])
    made = folder / "made.txt"
    if not made.is_file() or made.read_text(encoding="utf-8") != stamp:
        print(f"Writing small models into {folder} (2 GB) ...", flush=True)
        checkpoints.write_checkpoints(folder / "checkpoints")
        checkpoints.write_companions(folder / "lora", folder / "controlnet")
        flux.write_flux_kinds(folder / "checkpoints", folder / "lora", folder / "modules")
        pulid.write_models(folder / "models")
        methods.write_models(folder / "models")
        pulid.write_photos(folder / "photos")
        miniature.write(folder / "miniature")
        made.write_text(stamp, encoding="utf-8")
    if (merge_table := checkout.merge_table()) is not None:
        checkpoints.write_configs(folder / "checkpoints", merge_table)
        miniature.write_configs(folder / "miniature", merge_table)
    return folder


def write_detector(generated: Path, checkout: Checkout, extensions: list[Path]) -> None:
    """Where ADetailer is among the extensions; ultralytics' files cannot be read by each of its versions."""
    target = generated / "models" / "adetailer" / detector.NAME
    if any((extension / name).is_dir() for extension in extensions for name in ("adetailer", "lib_adetailer")):
        subprocess.run([str(checkout.python), detector.__file__, str(target)], stdout=subprocess.DEVNULL, check=True)


def fingerprint(sources: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in filter(Path.is_file, sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
