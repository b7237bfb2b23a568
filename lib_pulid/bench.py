"""Measures what a face costs (`python -m lib_pulid bench`): GPU kernels and bytes, time per site and step, memory.

Times are medians of interleaved runs: on a GPU by its own events, on a CPU the process's CPU time, which other
programs hardly affect.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lib_pulid import bench_cases as cases
from lib_pulid.bench_cases import Case
from lib_pulid.gpu_cost import Cost, count, fake_gpu
from lib_pulid.injection import inject
from lib_pulid.sites import Site, Sites

if TYPE_CHECKING:
    from lib_pulid.hosts.diffusers_bench import BenchCall
    from lib_pulid.photos import Encoders
    from lib_pulid.weights import Adapter

Row = dict[str, Any]
PARTS = ("counts", "kept", "sites", "steps", "photos")


# ---------------------------------------------------------------- counted


def counts(modules: Any = None) -> list[Row]:
    """Counts kernels, stalls and bytes of each kind of site at its real size. modules: the official ones."""
    half = torch.float16
    kinds = [partial(cases.sdxl_case, *kind, "cuda", half, modules=modules) for kind in cases.SDXL_LAYERS]
    kinds += [partial(kinds[0], persons=2), partial(kinds[0], persons=2, mask=True)]
    flux = partial(cases.flux_case, cases.FLUX_TOKENS, "cuda", half, modules=modules)
    return [_counted(make) for make in (*kinds, flux, partial(flux, persons=2))]


def _counted(make: Callable[[], Case]) -> Row:
    with fake_gpu():
        case = make()
    row: Row = {"name": case.name, "sites": case.sites, "floor": case.floor}

    def cost_of(name: str) -> Cost:
        return count(lambda: getattr(make(), name))

    for who, off in (("ours", "off"), ("official", "official_off")):
        cost = cost_of(who) - cost_of(off)
        row[who] = {**asdict(cost), "floors": cost.moved / case.floor}
    return row


def kept() -> list[Row]:
    """Computes the bytes kept on the device, in 16 bit, for a person and a set of rows (cond; the same for uncond)."""
    widths = [width for (_, width), layers in cases.SDXL_LAYERS.items() for _ in range(layers)]
    with fake_gpu():
        sdxl = cases.sdxl_person(widths, "cuda", torch.float16)
        flux = cases.flux_person(20, cases.FLUX_WIDTH, "cuda", torch.bfloat16)
    persons = {"SDXL v1.1, 70 sites": sdxl, "FLUX, 20 sites": flux}
    return [{"name": name, "bytes": person.injection.nbytes // 2} for name, person in persons.items()]


# ---------------------------------------------------------------- timed


def medians(device: str, runs: int, functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Times functions in milliseconds, interleaved, after a warm-up run."""
    rounds = [{name: _timed(device, function) for name, function in functions.items()} for _ in range(runs + 1)]
    return {name: statistics.median(one[name] for one in rounds[1:]) for name in functions}


def _timed(device: str, function: Callable[[], object]) -> float:
    if not device.startswith("cuda"):
        start = time.process_time()
        function()
        return 1e3 * (time.process_time() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def sites(device: str, dtype: torch.dtype, runs: int) -> list[Row]:
    """Times one site of each kind, for 1024 x 1024 pixels on a GPU and 512 x 512 on a CPU."""
    smaller = 1 if device.startswith("cuda") else 4
    kinds = [
        partial(cases.sdxl_case, tokens // smaller, width, device, dtype, persons=persons)
        for tokens, width in cases.SDXL_LAYERS
        for persons in (1, 2)
    ]
    flux = partial(cases.flux_case, cases.FLUX_TOKENS // smaller, device, dtype)
    rows = []
    for make in (*kinds, flux, partial(flux, persons=2)):
        case = make()
        work = {"ours": case.ours, "official": case.official}
        taken = medians(device, runs, {"off": case.off, **work})
        row: Row = {"name": case.name, **{who: taken[who] - taken["off"] for who in work}}
        if "persons" not in case.name:
            exact = case.exact()
            for who, made in work.items():
                row[f"error {who}"] = ((made().double() - exact).norm() / exact.norm()).item()
        rows.append(row)
    return rows


def steps(device: str, dtype: torch.dtype, runs: int, small: bool) -> list[Row]:
    """Times whole calls of a UNet, and FLUX's blocks, with random weights: without, with one and two people, official.

    Two calls of half a minute differ by more than a face costs. So on a CPU, the mean time of what is added at the
    sites is measured inside the calls, too: "added by one person".

    small: narrow stand-ins with all their sites, to try it out.
    """
    from lib_pulid.hosts.diffusers_bench import bench_call

    calls = (bench_call(family, device, dtype, small) for family in ("sdxl", "flux"))
    return [_timed_call(call, cases.person_for(call.sites, device, dtype), device, runs) for call in calls]


def _timed_call(call: BenchCall, person: cases.Person, device: str, runs: int) -> Row:
    spent: dict[str, float] = defaultdict(float)

    def ours(name: str, persons: int) -> None:
        with inject(_clocked(call.sites, spent, name), [person.injection] * persons, call.step):
            call.run()

    def official() -> None:
        with cases.official_at(_clocked(call.sites, spent, "official"), person):
            call.run()

    works: dict[str, Callable[[], object]] = {
        "without": call.run,
        "one person": partial(ours, "one person", 1),
        "two persons": partial(ours, "two persons", 2),
        "official": official,
    }
    row: Row = {"name": call.name, **medians(device, runs, works)}
    if not device.startswith("cuda"):
        return row | {f"added by {name}": total / (runs + 1) for name, total in spent.items()}
    for name, work in works.items():
        torch.cuda.reset_peak_memory_stats()
        work()
        row[f"peak {name}, bytes"] = torch.cuda.max_memory_allocated()
    return row


def _clocked(sites: Sites, spent: dict[str, float], name: str) -> Sites:
    """Returns the sites, with the milliseconds of CPU time that is spent in what is attached to them counted."""

    def attach(site: Site, add: Callable[..., Any]) -> Iterable[Any]:
        def timed(*args: Any) -> Any:
            start = time.process_time()
            try:
                return add(*args)
            finally:
                spent[name] += 1e3 * (time.process_time() - start)

        return site.attach(timed)

    return replace(sites, sites=tuple(replace(site, attach=partial(attach, site)) for site in sites.sites))


# ---------------------------------------------------------------- photos


def photos(models_dir: Path, photo: Path | None, device: str, runs: int) -> list[Row]:
    """Times the way from a photo to an identity, with the real weights if they are there. Wall time, seconds."""
    from lib_pulid import miniature
    from lib_pulid.demo import sample_photo
    from lib_pulid.images import load_image
    from lib_pulid.photos import IdentityCache, make_identity
    from lib_pulid.standalone import open_workshop, real_model

    model = real_model("sdxl", models_dir)
    workshop = open_workshop(model or "miniature", models_dir, device=device)
    image = load_image(photo or (sample_photo() if model else miniature.portrait(0)))
    start = time.perf_counter()
    encoders = workshop.encoders()
    loading = time.perf_counter() - start
    cache = IdentityCache()
    taken = []
    for shade in range(runs + 1):
        changed = image.copy()
        changed[0, 0] = shade  # another photo of the same person, to the cache
        for _ in range(2):
            start = time.perf_counter()
            make_identity([changed], workshop.adapter, encoders=lambda: encoders, encoders_id="bench", cache=cache)
            taken.append(time.perf_counter() - start)
    warm, known = statistics.median(taken[2::2]), statistics.median(taken[3::2])
    row = {"name": "photo to identity, seconds", "loading": loading, "first": taken[0], "warm": warm, "known": known}
    stages = {"name": "its stages, milliseconds", **_stages(image, encoders, workshop.adapter, device, runs)}
    return [{**row, "of": workshop.label}, stages]


def _stages(image: np.ndarray, encoders: Encoders, adapter: Adapter, device: str, runs: int) -> dict[str, float]:
    from lib_pulid.faces import read_face
    from lib_pulid.identity import encode_identity
    from lib_pulid.images import resize_long_edge
    from lib_pulid.readings import face_features

    bgr, models = np.ascontiguousarray(resize_long_edge(image)[:, :, ::-1]), encoders.faces
    tower: Any = encoders.tower
    assert models is not None and models.recogniser is not None and models.parser is not None
    face = read_face(image, models)
    work: dict[str, Callable[[], object]] = {"detect": partial(models.detector.detect, bgr)}
    if models.landmarker is not None:
        work["landmarks"] = partial(models.landmarker.detect, bgr)
    work["recognize"] = partial(models.recogniser.embed, bgr, face.detection)
    work["parse"] = partial(models.parser.labels, face.aligned)
    work["vision"] = partial(face_features, [face], tower)
    work["encode"] = partial(encode_identity, face_features([face], tower), adapter)
    return medians(device, runs, work)


@torch.no_grad()
def run(arguments: Any) -> int:
    """Runs the command; see `cli`."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    modules = cases.official_modules(arguments.official) if arguments.official else None
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU ({platform.machine()})"
    found: dict[str, Any] = {"torch": torch.__version__, "device": where, "threads": torch.get_num_threads()}
    found["dtype"] = arguments.dtype
    work: dict[str, Callable[[], list[Row]]] = {
        "counts": lambda: counts(modules=modules),
        "kept": kept,
        "sites": lambda: sites(device, dtype, arguments.runs),
        "steps": lambda: steps(device, dtype, arguments.runs, arguments.small),
        "photos": lambda: photos(arguments.models_dir, arguments.face, device, arguments.runs),
    }
    if not arguments.json:
        print(*(f"{key} {value}" for key, value in found.items()), sep=", ")
    for part in arguments.parts or PARTS[:3]:
        found[part] = work[part]()
        if not arguments.json:
            print(f"\n{part}", *map(_line, found[part]), sep="\n", flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1))
    return 0


def _line(row: Row) -> str:
    parts = [f"{row['name']:44}"]
    for key, value in row.items():
        if isinstance(value, dict):
            parts.append(f"{key}: {value['kernels']} kernels, {value['stalls']} stalls, {value['floors']:.1f} floors")
        elif isinstance(value, float):
            parts.append(f"{key} {value:.3g}")
        elif key not in ("name", "floor"):
            parts.append(f"{key} {value}")
    return "   ".join(parts)
