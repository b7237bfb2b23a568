"""Drawn people in the miniature: the host's images are as like them as those of diffusers, by the same judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib_pulid import miniature
from lib_pulid.hosts.diffusers import apply
from lib_pulid.injection import Injection, compile_injection
from lib_pulid.photos import IdentityCache, make_identity
from lib_pulid.standalone import Workshop, open_workshop
from lib_pulid.training.world import Placement, Scene, describe
from tests.host.api import encoded
from tests.host.rows_works_with import hires
from tests.host.table import Rows, expect
from tests.host.webui import FORGES, Running

rows = Rows()
PEOPLE = range(4)
SEEDS = (1, 2)
STEPS = miniature.STEPS["sdxl"]
WEIGHT = 1.0
NEAR = 0.02  # of likeness
REPEATS, KNOWN, NEW = 5, 0.1, 1.0  # seconds
SCENE = Scene((Placement(expression="smiling", clothes="striped shirt", clothes_color="red"),), "dots", "yellow")
# An empty negative prompt is zeros in diffusers and some hosts, the text encoders' answer to "" in Forge Neo.
BODY: dict[str, Any] = {"prompt": describe(SCENE), "negative_prompt": "pencil drawing"}
BODY |= {"cfg_scale": miniature.GUIDANCE["sdxl"]}
BODY |= {"width": miniature.SIZE, "height": miniature.SIZE, "steps": STEPS}
FACE = (32, 16, 96, 80)  # left, top, right, bottom of the repainted part; multiples of 8, as latents have them
STRENGTH = 0.6
SCALE = 1.5  # of hires fix, whose second pass takes all STEPS for its part of the noise levels
SECOND = {"steps": int(STEPS / STRENGTH), "strength": (STEPS + 0.5) / int(STEPS / STRENGTH)}

Make = Callable[[int, int], np.ndarray]  # number of a person, seed -> image


@cache
def workshop() -> Workshop:
    from pathlib import Path

    return replace(open_workshop("miniature", Path()), cache=IdentityCache())  # on no disk


@cache
def injection(number: int) -> Injection:
    shop = workshop()
    identity = make_identity(
        [miniature.portrait(number)], shop.adapter, encoders=shop.encoders, encoders_id="", cache=IdentityCache()
    )
    return compile_injection(shop.adapter, identity, weight=WEIGHT)


def pipeline(kind: str) -> Any:
    """kind: "", "Img2Img" or "Inpaint", on the noise levels of the hosts' samplers."""
    found = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(**workshop().base.pipeline.components)
    config = found.scheduler.config
    found.scheduler = diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="linspace")
    found.set_progress_bar_config(disable=True)
    if kind == "Inpaint":  # it would draw its noise after the encoder's, and so another one than the hosts
        found._encode_vae_image = partial(_encoded, type(found)._encode_vae_image, found)
    return found


def _encoded(encode: Callable[..., Tensor], pipe: Any, image: Tensor, generator: Any) -> Tensor:
    return encode(pipe, image, torch.Generator().manual_seed(0))


def drawn(kind: str, number: int | None, seed: int, *, steps: int = STEPS, **asked: Any) -> Any:
    pipe = pipeline(kind)
    with apply(pipe, [] if number is None else [injection(number)]):
        made = pipe(
            BODY["prompt"], negative_prompt=BODY["negative_prompt"], num_inference_steps=steps,
            guidance_scale=BODY["cfg_scale"], generator=torch.Generator().manual_seed(seed), **asked,
        )  # fmt: skip
    return made.images if "output_type" in asked else np.asarray(made.images[0])


SQUARE = {"height": miniature.SIZE, "width": miniature.SIZE}


def text_to_image(number: int | None, seed: int) -> np.ndarray:
    return drawn("", number, seed, **SQUARE)


def high_resolution(number: int, seed: int) -> np.ndarray:
    latents: Tensor = drawn("", number, seed, **SQUARE, output_type="latent")
    larger = torch.nn.functional.interpolate(latents, scale_factor=SCALE, mode="bilinear")
    return drawn("Img2Img", number, seed, image=larger, **SECOND)


@torch.no_grad()
def high_resolution_of_image(number: int, seed: int) -> np.ndarray:
    """As hosts without upscalers of latents do it; they cut fractions off between the passes."""
    side, pipe = int(SCALE * miniature.SIZE), workshop().base.pipeline
    small = (255 * drawn("", number, seed, **SQUARE, output_type="np")[0]).astype(np.uint8)
    larger = Image.fromarray(small).resize((side, side), Image.Resampling.LANCZOS)
    encoded = pipe.vae.encode(pipe.image_processor.preprocess(larger)).latent_dist.mean
    return drawn("Img2Img", number, seed, image=encoded * pipe.vae.config.scaling_factor, **SECOND)


def strength() -> float:
    """The hosts take one step more than STRENGTH says."""
    return (int(STRENGTH * STEPS) + 1.5) / STEPS


@cache
def somebody(seed: int) -> np.ndarray:
    """An image of nobody in particular, uint8 RGB, whose face is repainted."""
    return text_to_image(None, seed)


def mask(box: Sequence[int] = FACE) -> np.ndarray:
    marked = np.zeros((miniature.SIZE, miniature.SIZE, 3), np.uint8)
    marked[box[1] : box[3], box[0] : box[2]] = 255
    return marked


def inpainted(number: int, seed: int) -> np.ndarray:
    return repainted(somebody(seed), mask(), number, seed)


def repainted(image: np.ndarray, marked: np.ndarray, number: int, seed: int) -> np.ndarray:
    asked = {"image": Image.fromarray(image), "mask_image": Image.fromarray(marked), "strength": strength()}
    made = drawn("Inpaint", number, seed, **asked, **SQUARE)
    return np.where(marked > 0, made, image)


def detailed(number: int, seed: int) -> np.ndarray:
    """The part alone, enlarged to the whole image's size, and put back."""
    image, lanczos = Image.fromarray(somebody(seed)), Image.Resampling.LANCZOS
    large = np.asarray(image.crop(FACE).resize((miniature.SIZE, miniature.SIZE), lanczos))
    made = Image.fromarray(repainted(large, np.full_like(large, 255), number, seed))
    image.paste(made.resize((FACE[2] - FACE[0], FACE[3] - FACE[1]), lanczos), FACE[:2])
    return np.asarray(image)


@cache
def eyes() -> tuple[Any, Any]:
    return miniature.face_models().detector, miniature.judge()


def reading(image: np.ndarray) -> Any:
    """What the judge reads off the largest face; None without a face."""
    detector, judge = eyes()
    found = detector.detect(np.ascontiguousarray(image[:, :, ::-1]))
    if not found:
        return None
    return judge.read(image, max(found, key=lambda face: np.prod(face.box[2:] - face.box[:2])).landmarks)


def likeness(make: Make) -> float:
    """Mean over people and seeds; an image without a face counts 0."""
    wanted = {number: reading(miniature.portrait(number)) for number in PEOPLE}
    seen = [(number, reading(make(number, seed))) for number in PEOPLE for seed in SEEDS]
    return float(np.mean([0.0 if read is None else read.likeness(wanted[number]) for number, read in seen]))


def unit(number: int) -> dict[str, Any]:
    return {"images": [encoded(miniature.portrait(number))], "weight": WEIGHT}


def compare(here: Make, there: Make) -> str:
    ours, theirs = likeness(here), likeness(there)
    expect(abs(ours - theirs) <= NEAR, f"likeness {ours:.3f}, diffusers {theirs:.3f}")
    return f"likeness {ours:.3f}, diffusers {theirs:.3f}, {len(PEOPLE)} people x {len(SEEDS)} seeds"


@rows.row("Miniature: the likeness in txt2img is that of diffusers")
def txt2img(host: Running) -> str:
    return compare(lambda number, seed: host.api.txt2img(unit(number), **BODY, seed=seed).image, text_to_image)


@rows.row("Miniature: without PuLID nobody is alike")
def without(host: Running) -> str:
    found = likeness(lambda number, seed: host.api.txt2img(**BODY, seed=seed).image)
    expect(found < 0.2, f"likeness {found:.3f}")
    return f"likeness {found:.3f}"


@rows.row("Miniature: the likeness after hires fix is that of diffusers")
def second_pass(host: Running) -> str:
    asked = hires(host, hr_scale=SCALE, hr_second_pass_steps=0, denoising_strength=STRENGTH) | BODY
    if host.kind in FORGES:  # 1 unless given
        asked["hr_cfg"] = BODY["cfg_scale"]
    there = high_resolution if host.api.upscaler == "Latent" else high_resolution_of_image
    return compare(lambda number, seed: host.api.txt2img(unit(number), **asked, seed=seed).image, there)


def repaint(host: Running, only_masked: bool, there: Make) -> str:
    asked = BODY | {
        "mask": encoded(mask()),
        "mask_blur": 0,
        "denoising_strength": STRENGTH,
        "inpainting_fill": 1,
    }
    # Without a margin the part becomes twice as large, and the mask falls on whole latents: no rounding.
    asked |= {"inpaint_full_res": only_masked, "inpaint_full_res_padding": 0}

    def here(number: int, seed: int) -> np.ndarray:
        return host.api.img2img(unit(number), **asked, init_images=[encoded(somebody(seed))], seed=seed).image

    return compare(here, there)


rows.add({
    "Miniature: the likeness of an inpainted face is that of diffusers": lambda host: repaint(host, False, inpainted),
    "Miniature: the likeness of a face painted at full size, as ADetailer does, is that of diffusers":
        lambda host: repaint(host, True, detailed),
})  # fmt: skip


@rows.row("Miniature: a known photo adds under 0.1 s of CPU time to an image, a new one under 1 s")
def cost_of_a_photo(host: Running) -> str:
    """On the last step alone, so that what is added is what happens before and after sampling."""
    random = np.random.default_rng()

    def asked(photo: np.ndarray) -> dict[str, Any]:
        return {"images": [encoded(photo)], "start": 1 - 1.5 / STEPS}

    def new() -> dict[str, Any]:
        photo = miniature.portrait(0).copy()
        photo[:2] = random.integers(0, 255, 3)
        return asked(photo)

    known = asked(miniature.portrait(0))
    kinds: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "without": list, "known": lambda: [known], "new": lambda: [new()],
    }  # fmt: skip
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 + REPEATS):  # the first loads the encoders
        for kind, units in kinds.items():
            before = host.cpu_seconds()
            host.api.txt2img(*units(), **BODY)
            took[kind].append(host.cpu_seconds() - before)
    # The least of each: what else the machine does only adds.
    without, known_photo, new_photo = (min(seconds[1:]) for seconds in took.values())
    seen = f"known {known_photo - without:.2f}, new {new_photo - without:.2f} s, to an image of {without:.2f} s"
    expect(known_photo - without < KNOWN and new_photo - without < NEW, seen)
    return seen
