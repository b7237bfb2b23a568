"""A folder like `generated`, of the trained miniature and of drawn people, for rows in which somebody is recognized."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

from lib_pulid import miniature
from lib_pulid.training import world
from tests.face_standins import write_retinaface
from tests.host.models import configs

CHECKPOINT = "miniature.safetensors"
# Where the product looks for them in a models folder, under the names of the real ones.
PLACES = {
    "detector.onnx": "insightface/models/antelopev2/scrfd_10g_bnkps.onnx",
    "recogniser.onnx": "insightface/models/antelopev2/glintr100.onnx",
    "parser.onnx": "facexlib/parsing_bisenet.pth",
    "tower.safetensors": "pulid/EVA02_CLIP_L_336_psz14_s6B.pt",
    "pulid_sdxl.safetensors": "pulid/pulid_v1.1.safetensors",
}


def write(folder: Path) -> None:
    """Checkpoint, PuLID file, encoders and photos; what else `generated` has is empty."""
    for name in ("checkpoints", "models", "photos", "lora", "controlnet", "modules"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(miniature.checkpoint("sdxl"), folder / "checkpoints" / CHECKPOINT)
    for name, place in PLACES.items():
        target = folder / "models" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(miniature.FOLDER / name, target)
    # The second detector sees nobody among drawn people, so the first one's landmarks count.
    write_retinaface(folder / "models" / "facexlib" / "detection_Resnet50_Final.pth")
    smiling = world.Scene((world.Placement(expression="smiling", tilt=5.0, turn=0.3),), "dots", "green")
    photos = {"anna": miniature.portrait(0), "anna-2": miniature.portrait(0, smiling), "ben": miniature.portrait(1)}
    photos |= {"two": miniature.group((0, 1))}
    photos |= {"nobody": world.draw([], world.Scene((), "hills", "teal"), miniature.REFERENCE_SIZE)}
    for name, image in photos.items():
        Image.fromarray(image).save(folder / "photos" / f"{name}.png")


def write_configs(folder: Path, bpe: Path) -> None:
    """For A1111, beside the checkpoint. bpe: CLIP's merge table, as in the open_clip package."""
    checkpoints = folder / "checkpoints"
    clip_folder = (checkpoints / "miniature-clip-l").resolve()
    configs.write_clip_folder(clip_folder, bpe, configs.clip_config(24, 96, 3))
    configs.write_json(checkpoints / "miniature.yaml", configs.miniature_config(clip_folder))
    configs.write_json(checkpoints / f"{configs.MINIATURE_OPEN_CLIP}.json", configs.open_clip_config(40, 3))
