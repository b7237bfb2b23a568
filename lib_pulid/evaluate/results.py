"""Writes the results of the command `evaluate`: table.md, results.json, plots."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lib_pulid import __version__
from lib_pulid.disk import fingerprint
from lib_pulid.evaluate.judges import OWN
from lib_pulid.evaluate.plot import draw_plot
from lib_pulid.evaluate.report import Line, equal_likeness, summarize, table, traits_table
from lib_pulid.evaluate.trial import Method, Panel, Row, Sitter, judge_range, traits_on_photos

PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "insightface", "numpy", "pillow")


def collect(
    settings: Mapping[str, Any], methods: Sequence[Method], panel: Panel, sitters: Sequence[Sitter], rows: Sequence[Row]
) -> dict[str, Any]:
    """Collects the content of results.json. settings: the command's arguments."""
    lines, judges = summarize(rows), []
    for judge in panel.judges:
        same, different = judge_range(sitters, judge.name)
        judges.append({"name": judge.name, "same_person": same, "different_people": different})
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items() if key != "run"}
    return {
        "settings": plain,
        "methods": [_method(method) for method in methods],
        "judges": judges,
        "clip": panel.clip.name if panel.clip else None,
        "people": [{"name": sitter.subject.name, "photos": 1 + len(sitter.targets)} for sitter in sitters],
        "traits_on_photos": traits_on_photos(sitters),
        "versions": _versions(),
        "summary": [asdict(line) for line in lines],
        "equal_likeness": equal_likeness(lines, panel.judges[0].name),
        "images": [asdict(row) for row in rows],
    }


def _method(method: Method) -> dict[str, Any]:
    path = method.adapter.path
    digits = fingerprint(path)
    return {"name": method.name, "file": path.name, "fingerprint": digits, "settings": dict(method.settings)}


def _versions() -> dict[str, str]:
    found = {"sd-webui-pulid": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(results: Mapping[str, Any], out: Path, as_json: bool) -> None:
    """Writes the files into a folder and prints the tables, or the JSON."""
    lines = [Line(**line) for line in results["summary"]]
    plain = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (out / "results.json").write_text(plain, encoding="utf-8")
    words = _words(results, lines)
    (out / "table.md").write_text(words, encoding="utf-8")
    written, judge = ["table.md", "results.json"], results["judges"][0]["name"]
    text = (
        f"{len(results['people'])} people, {results['settings']['seeds']} seeds; numbers: weight; bars: {_over(lines)}"
    )
    y = f"likeness by {judge}{' recognizer, which overestimates' * (judge == OWN)}"
    for name, figure, label in PLOTS:
        if any(line.figures[figure] is not None for line in lines):
            draw_plot(lines, figure, f"likeness, {judge}", text, (label, y)).save(out / name)
            written.append(name)
    print(plain if as_json else words, end="")
    print(f"wrote {', '.join(written)} into {out}", file=sys.stderr)


def _words(results: Mapping[str, Any], lines: Sequence[Line]) -> str:
    """Formats the tables and sentences for a terminal."""
    judges = [judge["name"] for judge in results["judges"]]
    parts = [table(lines, judges), f"Means over {len(results['people'])} people; ± is the {_over(lines)}."]
    for judge in results["judges"]:
        same, different = (judge[key] for key in ("same_person", "different_people"))
        found = {"two photos of one person": same, "photos of different people": different}
        ranges = [f"{whom} {value:.3f}" for whom, value in found.items() if value is not None]
        if ranges:
            parts.append(f"By {judge['name']}{' recognizer' * (judge['name'] == OWN)}: {', '.join(ranges)}.")
    parts += [" ".join(results["equal_likeness"]), traits_table(lines, results["traits_on_photos"])]
    return "\n\n".join(filter(None, parts)) + "\n"


PLOTS = (
    ("plot.png", "change / another seed's", "change outside the head (1: as much as another seed changes)"),
    ("plot_clip.png", "CLIP-I", "1 - CLIP-I, against the image without"),
)


def _over(lines: Sequence[Line]) -> str:
    """Describes the error bars."""
    trainings = any(len(line.runs) > 1 and not next(iter(line.runs)).startswith("seed ") for line in lines)
    between = "trainings of a method, or seeds if it has one" if trainings else "seeds"
    return f"standard deviation between {between}"
