"""PuLID files that fit the small checkpoints, the models that read photos, photos, and marked identities."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lib_pulid.control import Pose
from lib_pulid.identity import Identity
from tests import small_models
from tests.face_standins import blank, draw_face, write_face_files
from tests.host.models.checkpoints import FLUX_WIDTH, sdxl_layout
from tests.host.models.unet import cross_attention_widths

TOWER = "EVA02_CLIP_L_336_psz14_s6B.pt"
TOKENS = 32  # of an identity in v1.1


def write_models(models: Path) -> None:
    """Below a models folder, under the real names; all three PuLID files have tokens TOKEN_WIDTH wide."""
    folder = models / "pulid"
    widths = cross_attention_widths(sdxl_layout())
    made = small_models.write_files(folder, widths, FLUX_WIDTH)
    _write_v1(folder / "pulid_v1.bin", widths)
    made.sdxl.rename(folder / "pulid_v1.1.safetensors")
    made.flux.rename(folder / "pulid_flux_v0.9.1.safetensors")
    made.tower.rename(folder / TOWER)
    insightface = models / "insightface"
    files = write_face_files(insightface)
    (models / "facexlib").mkdir(exist_ok=True)
    for file in (files["landmarker"], files["parser"]):
        file.rename(models / "facexlib" / file.name)
    for path in (*folder.iterdir(), *(models / "facexlib").iterdir()):
        if path.suffix in (".pt", ".pth", ".bin"):
            as_of_old(path)
    _check(folder)


def as_of_old(path: Path) -> None:
    """Leaves out what torch has added to its files since the real ones were made; A1111's own check refuses it."""
    known = re.compile(r"[^/]+/(data/\d+|version|data\.pkl)")
    old = path.with_suffix(".old")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            if known.fullmatch(name):
                target.writestr(name, source.read(name))
    old.replace(path)


def _write_v1(path: Path, widths: list[int]) -> None:
    encoder = small_models.random_weights(small_models.id_encoder().state_dict(), seed=11)
    pairs = nn.ModuleList(small_models.cross_attention_pair(width, small_models.TOKEN_WIDTH) for width in widths)
    state = small_models.sdxl_file(encoder, small_models.random_weights(pairs.state_dict(), seed=12))
    nested: dict[str, dict[str, torch.Tensor]] = {}  # the real file is a pickle of two tables
    for key, value in state.items():
        table, name = key.split(".", 1)
        nested.setdefault(table, {})[name] = value
    torch.save(nested, path)


def _check(folder: Path) -> None:
    layers = sum(key.endswith("id_to_k.weight") for key in load_file(folder / "pulid_v1.1.safetensors"))
    if layers != 70:
        raise ValueError(f"the small SDXL has {layers} cross-attention layers instead of 70")


def write_marked_identities(folder: Path) -> None:
    """Identities whose tokens are drawn, not read off a photo: "marked A" has other tokens for the negative rows than
    for the positive ones, "marked B" has them exchanged, and "marked C" shares A's positive ones only."""
    write_marked(folder, 21, TOKENS, {"A": (0, 1), "B": (1, 0), "C": (0, 2)}, {})  # who made them is not said


def write_marked(
    folder: Path,
    seed: int,
    count: int,
    names: dict[str, tuple[int, int]],
    info: dict[str, str],
    pose: Pose | None = None,
) -> None:
    """names: of the drawn tokens, which are for positive and which for negative rows."""
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(1, count, small_models.TOKEN_WIDTH, generator=draw) for _ in range(3)]
    for name, (cond, uncond) in names.items():
        about = {**info, "photos": "1", "name": f"marked {name}"}
        Identity(drawn[cond], drawn[uncond], about, pose=pose).save(folder / f"marked {name}.safetensors")


def photo(shade: int = 0, side: int = 200, size: int = 400, faces: int = 1) -> np.ndarray:
    """A photo of one person (told apart by `shade`, 0..8), or of several; uint8 RGB [H, W, 3]."""
    image = blank(size * faces, size)
    for i in range(faces):
        draw_face(image, (size // 2 + i * size, size // 2), side - 20 * i, shade=shade + i)
    return image


def write_photos(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"anna": photo(0), "ben": photo(8), "two": photo(0, faces=2)}
    kinds |= {"nobody": blank(400, 400), "anna-2": photo(1, side=240)}
    for name, image in kinds.items():
        Image.fromarray(image).save(folder / f"{name}.png")
