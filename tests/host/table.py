"""The rows of the table: what is checked, in which host, and whether it passed."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.host.webui import NAMES, Running

VISIBLE = 1.0  # mean difference, of 255, from which on two pictures count as different
ROUNDING = 1.0  # up to which they count as the same picture, computed in another order


class Failed(Exception):
    """An expectation was not met; the message says what was seen."""


class Skipped(Exception):
    """The host lacks what the row is about; the message says what."""


Check = Callable[[Running], str | None]


@dataclass(frozen=True)
class Row:
    behaviour: str
    hosts: tuple[str, ...]
    check: Check


@dataclass(frozen=True)
class Result:
    behaviour: str
    host: str
    passed: str  # "yes", "NO", "-" where it does not apply
    seen: str
    seconds: float


class Rows:
    """Rows of one group, in the order in which they are written."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, behaviour: str, hosts: tuple[str, ...] = tuple(NAMES)) -> Callable[[Check], Check]:
        """A check that raises Failed, or returns a few words on what it saw."""
        return lambda check: self.add({behaviour: check}, hosts) or check

    def add(self, checks: Mapping[str, Check], hosts: tuple[str, ...] = tuple(NAMES)) -> None:
        """Rows whose checks are short, by what they check."""
        self.rows += [Row(behaviour, hosts, check) for behaviour, check in checks.items()]


def run(row: Row, host: Running) -> Result:
    start = time.monotonic()
    try:
        seen, passed = row.check(host) or "", "yes"
    except Skipped as skipped:
        seen, passed = str(skipped), "-"
    except Failed as failed:
        seen, passed = str(failed), "NO"
    except Exception as error:  # of the host or of this program: a row that did not come to its end is not passed
        traceback.print_exc()
        seen, passed = f"{type(error).__name__}: {error}", "NO"
    for folder in (host.data, host.generated):
        seen = seen.replace(str(folder), "...")
    seen = " ".join(seen.split())[:400]
    result = Result(row.behaviour, NAMES[host.kind], passed, seen, time.monotonic() - start)
    print(f"{result.passed:4} {result.host:6} {result.behaviour} ({result.seconds:.1f} s) {result.seen}", flush=True)
    return result


def as_markdown(results: Sequence[Result]) -> str:
    lines = ["| behaviour | host | passed | seen |", "|---|---|---|---|"]
    for result in results:
        seen = result.seen.replace("|", "\\|")
        lines.append(f"| {result.behaviour} | {result.host} | {result.passed} | {seen} |")
    return "\n".join(lines) + "\n"


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of two pictures, of 255."""
    expect(one.shape == other.shape, f"the pictures are {one.shape} and {other.shape} large")
    return float(np.abs(one.astype(np.float32) - other).mean())


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


def differ(one: np.ndarray, other: np.ndarray, what: str, at_least: float = VISIBLE) -> float:
    found = distance(one, other)
    expect(found >= at_least, f"{what}: the pictures differ by {found:.3f} only")
    return found


def equal(one: np.ndarray, other: np.ndarray, what: str) -> None:
    """To the bit."""
    found = distance(one, other)
    expect(found == 0, f"{what}: not the same to the bit, they differ by {found:.4f}")


def nothing_left(host: Running, before: Mapping[str, Any], *kinds: str) -> None:
    """Of what was not there before; by default hooks, callbacks and patches are compared."""
    after = host.api.state()
    for kind in kinds or ("hooks", "callbacks", "patches"):
        expect(after[kind] == before[kind], f"{kind}: {before[kind]} -> {after[kind]}")


def more_on_the_left(plain: np.ndarray, picture: np.ndarray, sign: int = 1) -> str:
    """What acts on the left half changes that more than the right one. sign: -1, on the right."""
    half = plain.shape[1] // 2
    left, right = distance(plain[:, :half], picture[:, :half]), distance(plain[:, half:], picture[:, half:])
    expect(sign * left > sign * right, f"the left is changed by {left:.1f} and the right by {right:.1f}")
    return f"{left:.1f} left, {right:.1f} right"


def close(one: np.ndarray, other: np.ndarray, what: str, at_most: float = ROUNDING) -> float:
    found = distance(one, other)
    expect(found <= at_most, f"{what}: the pictures should be the same, but differ by {found:.3f}")
    return found
