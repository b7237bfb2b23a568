"""What the first bytes of a checkpoint tell, of files in the real formats."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_pulid.files.checkpoint_header import checkpoint_family, read_header

FLUX = {
    **{f"double_blocks.{i}.img_attn.qkv.weight": (3, 4) for i in range(19)},
    **{f"single_blocks.{i}.linear1.weight": (3, 4) for i in range(38)},
}
SDXL = {f"input_blocks.4.1.transformer_blocks.{i}.attn2.to_k.weight": (4, 2048) for i in range(2)}
ROOT = "model.diffusion_model."


def safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, {"format": "pt"})
    return path


def gguf(path: Path, shapes: dict[str, tuple[int, ...]], version: int = 3) -> Path:
    """As the format's description says, with an entry of every kind of value."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("flux"),
        text("general.file_type") + struct.pack("<II", 4, 7),
        text("a.flag") + struct.pack("<I?", 7, True),
        text("a.long") + struct.pack("<IQ", 10, 1),
        text("a.number") + struct.pack("<Id", 12, 1.0),
        text("a.list") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0),
        text("some.texts") + struct.pack("<IIQ", 9, 8, 2) + text("one") + text("two"),
        text("some.lists") + struct.pack("<IIQ", 9, 9, 2) + 2 * (struct.pack("<IQ", 0, 3) + bytes(3)),
    ]
    tensors = [
        text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], 8, 0) for name, shape in shapes.items()
    ]
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(entries))
    path.write_bytes(head + b"".join(entries) + b"".join(tensors) + bytes(64))
    return path


def rooted(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {ROOT + name: shape for name, shape in shapes.items()}


KINDS = {
    "flux": (FLUX, "flux"),
    "flux with everything": ({**rooted(FLUX), "vae.x": (1,)}, "flux"),
    "sdxl": (rooted(SDXL), "sdxl"),
    "sdxl in miniature": ({f"x.{i}.attn2.to_k.weight": (4, 64) for i in range(70)}, "sdxl"),
    "chroma": ({**FLUX, "distilled_guidance_layer.in_proj.weight": (2, 2)}, ""),
    "more blocks": ({**FLUX, "single_blocks.38.linear1.weight": (2, 2)}, ""),
    "fewer blocks": ({name: FLUX[name] for name in FLUX if not name.startswith("double_blocks.18")}, ""),
    "sd 1.5": (dict.fromkeys(rooted(SDXL), (4, 768)), ""),
    "refiner": (dict.fromkeys(rooted(SDXL), (4, 1280)), ""),
    "nothing": ({"x": (1,)}, ""),
}


@pytest.mark.parametrize("write", [safetensors, gguf])
@pytest.mark.parametrize("kind", KINDS)
def test_families(tmp_path, kind, write):
    shapes, family = KINDS[kind]
    path = write(tmp_path / f"model.{write.__name__}", shapes)
    assert dict(read_header(path)) == shapes
    assert checkpoint_family(path) == family


def test_a_folder_is_none_and_the_rest_of_a_large_file_is_not_read(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    assert checkpoint_family(tmp_path / "folder.safetensors") == ""
    path = safetensors(tmp_path / "x.safetensors", FLUX)
    with path.open("r+b") as file:
        file.truncate(20_000_000_000)  # a hole, no bytes on the disk
    start = time.process_time()
    assert checkpoint_family(path) == "flux"
    assert time.process_time() - start < 1  # reading all of it would take ten times as long
