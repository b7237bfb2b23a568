"""Summarizes a trial: means over its images, as tables and as points of a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib_pulid.evaluate.judges import OWN
from lib_pulid.evaluate.measures import change_at, mean, slope, spread
from lib_pulid.evaluate.trial import WITHOUT, Row

POSE = ("roll", "turn")  # of `measures.pose`
Figures = dict[str, "float | None"]


@dataclass(frozen=True)
class Line:
    """A method at a weight. figures: means over all images. spreads: standard deviations between `runs`.

    runs: the same means over the images of each training of the method, or of each seed if it has one training.
    """

    method: str
    weight: float
    images: int
    figures: Figures
    spreads: Figures
    runs: Mapping[str, Figures]


def summarize(rows: Sequence[Row]) -> list[Line]:
    """Computes the means over the images of each method and weight, in the order of the rows."""

    def grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
        return {one: [row for row in rows if key(row) == one] for one in dict.fromkeys(map(key, rows))}

    def measured(rows: Sequence[Row]) -> tuple[Figures, dict[str, Figures]]:
        """Computes the figures over all rows, and over those of each run."""
        several = len({row.file for row in methods[rows[0].method]}) > 1
        runs = grouped(rows, lambda row: row.file if several else f"seed {row.seed}")
        return _figures(rows), {run: _figures(members) for run, members in runs.items()}

    methods = grouped(rows, lambda row: row.method)
    plain, plain_runs = measured(methods[WITHOUT])
    lines = []
    for (method, weight), group in grouped(rows, lambda row: (row.method, row.weight)).items():
        figures, runs = measured(group)
        for run, base in ((figures, plain), *((run, plain_runs.get(name, plain)) for name, run in runs.items())):
            kept, usual = run["prompt kept"], base["prompt kept"]
            run["prompt kept / without's"] = kept / usual if kept is not None and usual else None
        spreads = {name: spread([run[name] for run in runs.values()]) for name in figures}
        lines.append(Line(method, weight, len(group), figures, spreads, runs))
    return lines


def _figures(rows: Sequence[Row]) -> Figures:
    changes, others = mean([row.change for row in rows]), mean([row.other_seed for row in rows])
    figures: Figures = {f"likeness, {name}": mean([row.likeness[name] for row in rows]) for name in rows[0].likeness}
    figures["no face"] = mean([float(row.faces == 0) for row in rows])
    figures["change"] = changes
    figures["change / another seed's"] = changes / others if changes is not None and others else None
    figures["CLIP-T"] = mean([row.clip_t for row in rows])
    figures["CLIP-I"] = mean([row.clip_i for row in rows])
    figures["prompt kept"] = mean([float(value) for row in rows for value in row.kept.values()])
    figures |= {f"copy-paste, {name}": mean([row.copy_paste[name] for row in rows]) for name in rows[0].copy_paste}
    figures |= {f"{name} copied": slope([row.pose[name] for row in rows if name in row.pose]) for name in POSE}
    figures |= {f"trait {name}": mean([float(row.traits[name]) for row in rows]) for name in rows[0].traits}
    figures |= {f"prompt {name}": mean([float(row.kept[name]) for row in rows if name in row.kept])
                for name in sorted({name for row in rows for name in row.kept})}  # fmt: skip
    return figures


def equal_likeness(lines: Sequence[Line], judge: str) -> list[str]:
    """Writes a sentence for each of several methods: its change outside the head at a likeness that all reach."""
    methods = list(dict.fromkeys(line.method for line in lines if line.method != WITHOUT))
    name = f"likeness, {judge}"
    best = [max((line.figures[name] or 0.0 for line in lines if line.method == m), default=0.0) for m in methods]
    if len(methods) < 2:
        return []
    level = min(best)
    sentences = []
    for method in methods:
        curve = sorted((line for line in lines if line.method in (WITHOUT, method)), key=lambda line: line.weight)
        runs = {run for line in curve if line.method == method for run in line.runs}
        whole, *each = (
            change_at(level, [(figures[name], figures["change"]) for figures in of_run])
            for of_run in ([line.runs.get(run, line.figures) for line in curve] for run in ("", *sorted(runs)))
        )
        sentences.append(f"At likeness {level:.3f} {method} changes {_cell(whole, spread(each), '.4f')}.")
    return sentences


# ---------------------------------------------------------------- table


def table(lines: Sequence[Line], judges: Sequence[str]) -> str:
    """Formats the lines as a markdown table."""
    first = lines[0].figures
    columns: list[tuple[str, Callable[[Line], str]]] = [
        ("method", lambda line: line.method),
        ("weight", lambda line: f"{line.weight:g}"),
        *(
            (f"likeness by {judge}{' recognizer (overestimates)' * (judge == OWN)}", _show(f"likeness, {judge}", ".3f"))
            for judge in judges
        ),
        ("no face", _show("no face", ".1%")),
        ("change outside the head", _show("change", ".4f")),
        ("... of another seed's", _show("change / another seed's", ".1%")),
    ]
    if first["prompt kept"] is None or any(line.figures["CLIP-T"] is not None for line in lines):
        columns += [("CLIP-T", _show("CLIP-T", ".2f")), ("CLIP-I", _show("CLIP-I", ".3f"))]
    if first["prompt kept"] is not None:
        columns.append(("prompt attributes kept", _show("prompt kept", ".1%")))
        columns.append(("... of those without", _show("prompt kept / without's", ".1%")))
    columns.append((f"copy-paste, by {judges[0]}", _show(f"copy-paste, {judges[0]}", ".3f")))
    columns += [(f"{name} copied", _show(f"{name} copied", ".2f")) for name in POSE]
    return _markdown(lines, columns)


def traits_table(lines: Sequence[Line], on_photos: Mapping[str, float]) -> str:
    """Tabulates how often each trait and prompt attribute was seen in the images; "" if no judge can.

    on_photos: for each trait, how often it is seen in the person's own photos.
    """
    parts = []
    for kind in ("trait ", "prompt "):
        names = [name for name in lines[0].figures if name.startswith(kind) and "kept" not in name]
        columns: list[tuple[str, Callable[[Line], str]]] = [
            ("method", lambda line: line.method),
            ("weight", lambda line: f"{line.weight:g}" if line.images else ""),
            *((name.removeprefix(kind).replace("_", " "), _show(name, ".1%")) for name in names),
        ]
        photos: Figures = {f"trait {name}": value for name, value in on_photos.items()}
        first = [Line("their photos", 0, 0, photos, dict.fromkeys(photos), {})] if kind == "trait " else []
        if names:
            parts.append(_markdown([*first, *lines], columns))
    return "\n\n".join(parts)


def _show(name: str, form: str) -> Callable[[Line], str]:
    return lambda line: _cell(line.figures[name], line.spreads[name], form)


def _cell(value: float | None, deviation: float | None, form: str) -> str:
    if value is None:
        return "not measured"
    shown = format(value, form)
    if not shown.strip("-0.%"):  # never "-0.00"
        shown = shown.removeprefix("-")
    return shown + (f" ± {format(deviation, form)}" if deviation is not None else "")


def _markdown(lines: Sequence[Line], columns: Sequence[tuple[str, Callable[[Line], str]]]) -> str:
    rows = [[heading for heading, _ in columns], *([show(line) for _, show in columns] for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)
