"""Two WebUIs that share batches by stable-diffusion-webui-distributed, where its folder is given with --extension."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tests.host.api import Pictures, encoded
from tests.host.rows_grid import SMALL
from tests.host.rows_works_with import MILD
from tests.host.table import Check, Result, Row, Skipped, close, differ, expect, run
from tests.host.webui import Checkout, Running, running

EXTENSION = "stable-diffusion-webui-distributed"
PAIR = {"batch_size": 2}


def run_all(checkout: Checkout, generated: Path, extensions: list[Path], match: str) -> list[Result]:
    wanted = {name: check for name, check in CHECKS.items() if match.lower() in name.lower()}
    if not wanted or not any(folder.name == EXTENSION for folder in extensions):
        return []
    with running(checkout, generated) as other:
        config = other.data / "distributed.json"
        config.write_text(json.dumps(world(int(other.api.url.rpartition(":")[2]))), encoding="utf-8")
        with running(checkout, generated, ["--distributed-config", str(config)], extensions) as host:
            rows = [
                Row(name, (checkout.kind,), where_it_loads(partial(check, other=other)))
                for name, check in wanted.items()
            ]
            return [run(row, host) for row in rows]


def where_it_loads(check: Check) -> Check:
    def checked(host: Running) -> str | None:
        if "Error loading script: distributed.py" in host.log_text():
            raise Skipped("the extension's own script does not load in this host")
        return check(host)

    return checked


def world(port: int) -> dict:
    """Both as fast, so that each gets half of a batch."""
    common = {"avg_ipm": 10.0, "state": 1}
    here, there = {**common, "master": True}, {**common, "address": "127.0.0.1", "port": port}
    return {"workers": [{"master": here}, {"other": there}], "benchmark_payload": {}, "complement_production": False}


def shared(host: Running, made: Pictures, count: int) -> Pictures:
    """Without the grid. That the other one took part is in the log; the extension's own label is not in every text."""
    expect(f"'other' - {count // 2} image(s)" in host.log_text(), "the batch was not shared")
    return Pictures(made.images[-count:], made.parameters[-count:])


def batch(host: Running, other: Running) -> str:
    together = shared(host, host.api.txt2img(MILD, **PAIR, **SMALL), 2)
    lacking = [i for i, text in enumerate(together.parameters, 1) if "PuLID 1:" not in text]
    expect(not lacking, f"no parameters of PuLID in the pictures {lacking}")
    alone = [other.api.txt2img(MILD, seed=seed, **SMALL).image for seed in (1, 2)]
    plain = [other.api.txt2img(seed=seed, **SMALL).image for seed in (1, 2)]
    seen = max(close(a, b, "shared and alone") for a, b in zip(together.images, alone))
    return (
        f"{seen:.3f} from those made alone, {min(differ(a, b, 'face') for a, b in zip(alone, plain)):.1f} by the face"
    )


def img2img(host: Running, other: Running) -> str:
    first = other.api.txt2img(**SMALL)
    asked = {"init_images": [encoded(first.image)], "denoising_strength": 0.8, **SMALL}
    together = shared(host, host.api.img2img(MILD, **PAIR, **asked), 2)
    alone = [other.api.img2img(MILD, seed=seed, **asked).image for seed in (1, 2)]
    seen = max(close(a, b, "shared and alone") for a, b in zip(together.images, alone))
    return f"{seen:.3f} from those made alone"


def error(host: Running, other: Running) -> str:
    """A saved identity that only this machine has."""
    name = "marked A"
    theirs = next(path for path in other.identities.iterdir() if path.stem == name)
    theirs.unlink()
    answer = host.api.try_txt2img({"identity": name}, **PAIR, **SMALL)
    told = json.loads(answer.body["info"])["extra_generation_params"].get("PuLID errors elsewhere", "")
    expect(
        "'other'" in told and "PuLID unit 1, field identity" in told, f"{answer.status}: {told or answer.text[-600:]}"
    )
    expect(len(answer.body["images"]) < 3, f"{len(answer.body['images'])} images")
    return told


CHECKS = {
    "Two machines: each picture of a batch has the face, as when made alone": batch,
    "Two machines: img2img": img2img,
    "Two machines: an error of the other one is reported": error,
}
