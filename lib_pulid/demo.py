"""The demo: a photo in, contact sheets of that person out, on SDXL and on FLUX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from lib_pulid.faces import Face
from lib_pulid.hosts.diffusers import denoiser_of
from lib_pulid.identity import Identity
from lib_pulid.images import load_image
from lib_pulid.injection import compile_injection
from lib_pulid.photos import IdentityCache
from lib_pulid.sites import find_sites
from lib_pulid.standalone import Workshop, has_real_weights, open_workshop, real_model

WEIGHTS = {"sdxl": (0.4, 0.8, 1.2), "flux": (0.5, 1.0, 1.5)}
PROMPT = "portrait, colour, cinematic, in a garden, soft light, detailed face"
TILE = 256


def sample_photo() -> Path:
    """The group photograph in insightface's own package."""
    spec = find_spec("insightface")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("insightface is not installed; give a photo with --face")
    return Path(spec.origin).parent / "data" / "images" / "t1.jpg"


def run_demo(photo: Path, out: Path, models_dir: Path, device: str = "cpu") -> list[Path]:
    """Writes one contact sheet per family and says in one line each what it did. Returns the sheets' paths."""
    out.mkdir(parents=True, exist_ok=True)
    print(f"Photo: {photo}")
    return [_run_family(family, photo, out, models_dir, device) for family in ("sdxl", "flux")]


def _run_family(family: str, photo: Path, out: Path, models_dir: Path, device: str) -> Path:
    real = has_real_weights(family, models_dir)
    print(f"\n{family.upper()}: loading {'your models' if real else 'stand-in models'} ...", flush=True)
    model = (real_model(family, models_dir) if real else None) or f"tiny-{family}"
    # A demo shows the whole way each time, so nothing is remembered.
    workshop = replace(open_workshop(model, models_dir, device=device), cache=IdentityCache())
    if not real:
        torch.set_num_threads(2)  # small models are slower on more
    for note in workshop.notes:
        print(f"  stand-in   {note}")
    identity = _identity(workshop, photo)
    size, steps = (1024, 20) if real else (256, 8)
    settings = {"seed": 42, "steps": steps, "size": size}
    count = len(find_sites(denoiser_of(workshop.base.pipeline)).sites)
    plain, _ = workshop.paint([], PROMPT, **settings)
    print("  painted    without the identity")
    pictures = []
    for weight in WEIGHTS[family]:
        injection = compile_injection(
            workshop.adapter, identity, weight=weight, device=device, dtype=workshop.base.dtype
        )
        picture, used = workshop.paint([injection], PROMPT, **settings)
        pictures.append(picture)
        kept = f"{injection.nbytes / 1e6:.1f} MB kept for sampling"
        print(f"  painted    weight {weight}: injected at {used} of {count} sites, {kept}", flush=True)
    sheet = _sheet(photo, identity, plain, pictures, WEIGHTS[family], workshop)
    path = out / f"demo_{family}.png"
    sheet.save(path)
    print(f"  wrote      {path}")
    return path


def _identity(workshop: Workshop, photo: Path) -> Identity:
    def tell(name: str, face: Face) -> None:
        x0, y0, x1, y1 = face.detection.box.round().astype(int)
        print(f"  face       {name}: found at ({x0}, {y0}), {x1 - x0} x {y1 - y0} pixels")
        for note in face.notes:
            print(f"             {note}")

    identity = workshop.identity([photo], on_face=tell)
    tokens = "x".join(map(str, identity.cond.shape[1:]))
    print(f"  identity   {identity.short_hash}: {tokens} tokens, by the encoder of {workshop.adapter.path.name}")
    return identity


# ---------------------------------------------------------------- contact sheet


def _sheet(
    photo: Path, identity: Identity, plain: Image.Image, pictures: Sequence[Image.Image], weights: Sequence[float],
    workshop: Workshop,
) -> Image.Image:  # fmt: skip
    """Reference, aligned face, the picture without and with the identity, and what changed (at the middle weight)."""
    aligned = identity.thumbnail if identity.thumbnail is not None else np.zeros((96, 96, 3), np.uint8)
    middle = pictures[len(pictures) // 2]
    change = np.abs(np.asarray(middle, np.int16) - np.asarray(plain, np.int16)).astype(np.uint8)
    tiles = [
        ("reference", Image.fromarray(load_image(photo, photo.name))),
        ("aligned face", Image.fromarray(aligned)),
        ("without identity", plain),
        *((f"weight {weight}", picture) for weight, picture in zip(weights, pictures)),
        (f"difference at {weights[len(weights) // 2]}", Image.fromarray(change)),
    ]
    sheet = Image.new("RGB", (len(tiles) * (TILE + 8) + 8, TILE + 64), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 8), workshop.label, fill="black")
    for i, (caption, picture) in enumerate(tiles):
        fitted = ImageOps.contain(picture.convert("RGB"), (TILE, TILE))
        x = 8 + i * (TILE + 8)
        sheet.paste(fitted, (x + (TILE - fitted.width) // 2, 32 + (TILE - fitted.height) // 2))
        draw.text((x, TILE + 40), caption, fill="black")
    return sheet
