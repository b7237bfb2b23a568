"""A hundred pictures in a row: `make test-host-long`."""

from __future__ import annotations

from typing import Any

from tests.host.rows_basics import ANNA, person
from tests.host.rows_flux import asked
from tests.host.table import Rows, equal, expect
from tests.host.webui import FORGES, Running

rows = Rows()
RUNS, WARM_UP, GROWTH = 100, 10, 0.01


@rows.row("100 pictures, PuLID on and off in turn: memory grows by less than 1 % after the first ten, no hook left")
def memory(host: Running) -> str:
    return hundred(host, width=128, height=128)


@rows.row("FLUX: 100 pictures, PuLID on and off in turn: memory as above, no hook left", FORGES)
def memory_flux(host: Running) -> str:
    return hundred(host, **asked())


def hundred(host: Running, **asked_for: Any) -> str:
    plain = host.api.txt2img(**asked_for).image
    first = last = None
    for number in range(1, RUNS + 1):
        units = ((), (person(host, "anna" if number % 4 else "ben", weight=0.2 + number / 100),), (), (ANNA,))[
            number % 4
        ]
        picture = host.api.txt2img(*units, **asked_for).image
        if not units:
            equal(plain, picture, f"picture {number}, without the face")
        if number in (WARM_UP, RUNS):
            first, last = last, host.api.state()
    expect(last["hooks"] == 0, f"{last['hooks']} hooks are left")
    expect(last["callbacks"] == first["callbacks"], f"callbacks: {first['callbacks']} -> {last['callbacks']}")
    grown = {name: last[name] / first[name] - 1 for name in ("resident_bytes", "tensor_bytes", "tensors")}
    seen = ", ".join(f"{name} {value:+.2%}" for name, value in grown.items())
    expect(max(grown.values()) < GROWTH, seen)
    return f"{seen} from {first['resident_bytes'] / 2**20:.0f} MB"
