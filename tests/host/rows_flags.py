"""Command line flags of the hosts, each with a start of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.host import rows_flux
from tests.host.rows_works_with import MILD
from tests.host.table import Result, Row, close, differ, distance, equal, expect, run
from tests.host.webui import FORGES, NAMES, Checkout, Running, running

# Forge has no flags for little video memory beside --always-cpu.
ATTENTION = (["--attention-split"], ["--attention-quad"], ["--attention-pytorch"])
FORGE = (*ATTENTION, ["--always-offload-from-vram"], ["--unet-in-bf16"], ["--unet-in-fp8-e4m3fn"])
FLAGS = {
    "neo": (["--use-pytorch-cross-attention"], ["--disable-smart-memory"], ["--bf16-unet"], ["--fp8_e4m3fn-unet"]),
    "a1111": (["--medvram"], ["--lowvram"], ["--medvram-sdxl", "--opt-sub-quad-attention"]),
    "forge": FORGE,
    "ersatz": FORGE[1:],
    "first-forge": (*ATTENTION, ["--always-offload-from-vram"], ["--unet-in-bf16"]),
}
# Flags that change the picture.
ANOTHER_PICTURE = ("--unet-in-bf16", "--unet-in-fp8-e4m3fn", "--bf16-unet", "--fp8_e4m3fn-unet")


def run_all(checkout: Checkout, generated: Path, match: str) -> list[Result]:
    """The pictures have to be those without the flag, with the face and without."""
    wanted = [flags for flags in FLAGS[checkout.kind] if match.lower() in " ".join(flags)]
    if not wanted:
        return []
    with running(checkout, generated) as host:
        usual = pictures(host)
    return [one_start(checkout, generated, flags, usual) for flags in wanted]


def pictures(host: Running) -> tuple[np.ndarray, np.ndarray]:
    return host.api.txt2img().image, host.api.txt2img(MILD).image


def one_start(checkout: Checkout, generated: Path, flags: list[str], usual: tuple[np.ndarray, np.ndarray]) -> Result:
    name = "Flags " + " ".join(flags)
    try:
        with running(checkout, generated, flags) as host:
            return run(Row(name, (checkout.kind,), lambda host: check(host, flags, usual)), host)
    except RuntimeError as error:  # it did not start
        return Result(name, NAMES[checkout.kind], "NO", " ".join(str(error).split())[-300:], 0.0)


def check(host: Running, flags: list[str], usual: tuple[np.ndarray, np.ndarray]) -> str:
    plain, face = pictures(host)
    differ(plain, face, "with and without")
    equal(plain, host.api.txt2img().image, "the next run")
    hooks = host.api.state()["hooks"]  # A1111's own hooks of --lowvram are there without us, too
    host.api.txt2img(MILD)
    expect(host.api.state()["hooks"] == hooks, "hooks are left")
    also = f"; FLUX {check_flux(host)}" if host.kind in FORGES else ""
    if any(flag in ANOTHER_PICTURE for flag in flags):
        return f"{distance(face, usual[1]):.3f} from the picture without the flag{also}"
    seen = [close(plain, usual[0], "without the face"), close(face, usual[1], "with the face")]
    return f"the pictures without the flag, by {max(seen):.3f} of 255{also}"


def check_flux(host: Running) -> str:
    """With the face and without; the next run and weight 0 are the baseline."""
    plain, face = rows_flux.flux(host).image, rows_flux.flux(host, rows_flux.MILD).image
    equal(plain, rows_flux.flux(host).image, "FLUX, the next run")
    equal(plain, rows_flux.flux(host, {**rows_flux.MILD, "weight": 0}).image, "FLUX, weight 0")
    return f"{differ(plain, face, 'FLUX, with and without'):.1f} by the face"
