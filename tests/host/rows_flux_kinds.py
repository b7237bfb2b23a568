"""FLUX in Forge, as people keep it: in 8 bits, as GGUF, without guidance; and what only looks like FLUX.1."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.host.rows_errors import refused
from tests.host.rows_flux import FAINT, MILD, STEPS, asked, expect_sites, flux, sites_of
from tests.host.table import Rows, Skipped, differ, distance, equal, expect, nothing_left
from tests.host.webui import FORGES, Running

rows = Rows()
SDXL = "tiny-sdxl.safetensors"
MODULES = {"forge_additional_modules": ["tiny-flux-modules.safetensors"]}


Pair = tuple[np.ndarray, np.ndarray]


def pair(host: Running, **changes: Any) -> Pair:
    """Without the face and with it."""
    return flux(host, **changes).image, flux(host, MILD, **changes).image


def kind(host: Running, checkpoint: str, storage: str, usual: Pair | None = None, **changes: Any) -> str:
    """The usual expectations of another form of the checkpoint. usual: tiny-flux's own pictures."""
    body = {"checkpoint": checkpoint, **changes}
    plain, face = pair(host, **body)
    told = host.api.get("/host-test/storage")
    expect(storage in told["storage"], f"stored as {told}, not as {storage}")
    equal(face, flux(host, MILD, **body).image, "twice the same")
    equal(plain, flux(host, {**MILD, "weight": 0}, **body).image, "weight 0")
    expect_sites(sites_of(host, MILD, **body), count=STEPS)
    nothing_left(host, {"hooks": 0}, "hooks")
    seen = f"stored {told['storage']}, computed {told['computation']}: {differ(plain, face, 'with and without'):.1f}"
    if usual is None:
        return seen
    apart = [distance(*two) for two in zip(usual, (plain, face))]
    return f"{seen}; from the usual pictures {apart[0]:.2f} without and {apart[1]:.2f} with the face"


rows.add({
    "FLUX: stored in 8 bits (float8_e4m3fn checkpoint)":
        lambda host: kind(host, "tiny-flux-fp8.safetensors", "float8_e4m3fn", pair(host)),
    "FLUX: GGUF, Q4_0": lambda host: kind(host, "tiny-flux-q4.gguf", "gguf", pair(host), override_settings=MODULES),
    "FLUX: schnell, which has no guidance": lambda host: kind(host, "tiny-schnell.safetensors", "float32"),
}, FORGES)  # fmt: skip


@rows.row("FLUX: “Diffusion in Low Bits”: float8-e4m3fn and e5m2 of a 16 bit checkpoint", FORGES)
def low_bits(host: Running) -> str:
    """The host looks at the setting when the checkpoint changes."""
    usual, seen = pair(host), []
    try:
        for choice in ("float8-e4m3fn", "float8-e5m2"):
            host.api.options(sd_model_checkpoint=SDXL)
            host.api.options(forge_unet_storage_dtype=choice, sd_model_checkpoint="tiny-flux.safetensors")
            seen.append(kind(host, "tiny-flux.safetensors", choice.replace("-", "_"), usual))
    finally:
        host.api.options(sd_model_checkpoint=SDXL)
        host.api.options(forge_unet_storage_dtype="Automatic", sd_model_checkpoint="tiny-flux.safetensors")
    equal(usual[1], flux(host, MILD).image, "afterwards")
    return "; ".join(seen)


@rows.row("FLUX: GGUF, Q8_0, and a LoRA on it", FORGES)
def gguf_q8(host: Running) -> str:
    body = {"checkpoint": "tiny-flux-q8.gguf", "override_settings": MODULES}
    seen = kind(host, **body, storage="gguf", usual=pair(host))
    prompt = "a photo of a cat <lora:tiny-flux-lora:0.3>"
    alone, both = (flux(host, *units, prompt=prompt, **body).image for units in ([], [MILD]))
    return f"{seen}; with a LoRA {differ(alone, both, 'LoRA, with and without the face'):.1f}"


@rows.row("FLUX: computed in bfloat16 and float16", FORGES)
def half_precision(host: Running) -> str:
    usual, seen = pair(host), []
    try:
        for dtype in ("bfloat16", "float16"):
            host.api.post("/host-test/computation", {"dtype": dtype})
            said = kind(host, "tiny-flux.safetensors", "float32", usual)
            expect(f"computed torch.{dtype}" in said, said)
            seen.append(said)
    finally:
        host.api.post("/host-test/computation", {"dtype": ""})
    equal(usual[1], flux(host, MILD).image, "afterwards")
    return "; ".join(seen)


@rows.row("FLUX: “GPU Weights” and the ways to swap: the same picture", FORGES)
def gpu_weights(host: Running) -> str:
    """On a CPU nothing is swapped: this shows that the settings and our claim on memory go together, no more."""
    usual, before = flux(host, MILD).image, host.api.get("/sdapi/v1/options")
    if "forge_inference_memory" not in before:
        raise Skipped("this Forge has no such settings")
    names = ("forge_inference_memory", "forge_async_loading", "forge_pin_shared_memory")
    try:
        host.api.options(forge_inference_memory=4096, forge_async_loading="Async", forge_pin_shared_memory="Shared")
        equal(usual, flux(host, MILD).image, "other memory settings")
    finally:
        host.api.options(**{name: before[name] for name in names})
    return "nothing is swapped on a CPU"


@rows.row("Chroma as an experiment, switched on in the settings: the face acts, and the parameters say so", FORGES)
def chroma_experiment(host: Running) -> str:
    body = asked("tiny-chroma.safetensors", cfg_scale=3.0, negative_prompt="blurry")
    plain = host.api.txt2img(**body).image
    try:
        host.api.options(pulid_chroma=True)
        made = host.api.txt2img(MILD, **body)
        expect("experiment: Chroma" in made.parameters[0], f"the parameters: {made.parameters[0]}")
        host.api.post("/host-test/watch")
        host.api.txt2img(MILD, **body)
        expect_sites(host.api.get("/host-test/watch"))
        equal(plain, host.api.txt2img({**MILD, "weight": 0}, **body).image, "weight 0")
    finally:
        host.api.options(pulid_chroma=False)
    refused(host, ["tiny-chroma", "Chroma", "Settings"], MILD, **body)
    return f"{differ(plain, made.image, 'with and without', FAINT):.1f}"


@rows.row("Refused: FLUX.2 (by the host or by us): no picture", FORGES)
def flux2(host: Running) -> str:
    seen = refused(host, [], MILD, **asked("tiny-flux2.safetensors"))
    alone = host.api.try_txt2img(**asked("tiny-flux2.safetensors"))
    return f"{seen[:160]}; without PuLID: {alone.status} {alone.text[:100]}"


@rows.row("FLUX: after the refusals the baseline, and nothing left", FORGES)
def afterwards(host: Running) -> None:
    plain = flux(host).image
    refused(host, [], MILD, **asked("tiny-chroma.safetensors"))
    equal(plain, flux(host).image, "after the refusal")
    nothing_left(host, {"hooks": 0}, "hooks")
