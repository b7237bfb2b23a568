"""Files of the other methods that fit the small checkpoints, what reads photos for them, and marked identities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from lib_pulid.control import Pose
from tests import small_models
from tests.face_standins import write_arcface
from tests.host.models.checkpoints import sdxl_layout
from tests.host.models.pulid import as_of_old, write_marked
from tests.host.models.unet import CHANNELS, cross_attention_widths
from tests.small_models import methods

FILES = {
    "instantid": "ip-adapter_instant_id_sdxl.bin",
    "portrait_unnorm": "ip-adapter-faceid-portrait_sdxl_unnorm.bin",
    "ip_adapter": "ip-adapter_sdxl_vit-h.safetensors",
    "plus": "ip-adapter-plus_sdxl_vit-h.safetensors",
    "face_id": "ip-adapter-faceid_sdxl.bin",
    "face_id_plus": "ip-adapter-faceid-plusv2_sdxl.bin",
    "portrait": "ip-adapter-faceid-portrait_sdxl.bin",
}
NET = "control_instant_id_sdxl.safetensors"
CLIP = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
TEXT_WIDTH = 2048
TOKENS = 16  # of an InstantID identity


def write_models(models: Path) -> None:
    """Below a models folder, under the real names."""
    made = methods.method_files(cross_attention_widths(sdxl_layout()), text_width=TEXT_WIDTH)
    for kind, name in FILES.items():
        path = methods.write(models / "pulid" / name, made[kind])
        if path.suffix == ".bin":
            as_of_old(path)
    net = methods.half(methods.identity_net(CHANNELS, small_models.TOKEN_WIDTH).state_dict())
    save_file(net, models / "pulid" / NET)
    buffalo, clip = models / "insightface" / "models" / "buffalo_l", models / "clip_vision"
    for folder in (buffalo, clip):
        folder.mkdir(parents=True, exist_ok=True)
    write_arcface(buffalo / "w600k_r50.onnx", seed=5)
    save_file(methods.clip_vision(), clip / CLIP)


def write_marked_identities(folder: Path) -> None:
    """As in `pulid.py`, for InstantID: "marked I", and "marked J" with the tokens of both kinds of rows exchanged."""
    points = np.array([[150, 160], [250, 150], [205, 210], [165, 260], [240, 255]], np.float32)
    people, info = {"I": (0, 1), "J": (1, 0)}, {"adapter": "InstantID for SDXL"}
    write_marked(folder, 22, TOKENS, people, info, Pose(points, (400, 400)))
