"""Small FLUX checkpoints of several kinds beside checkpoints.tiny-flux, with the same tensors where names are the same.

tiny-schnell             no guidance embedding
tiny-flux-fp8            the transformer stored in 8 bits
tiny-flux-q8, -q4        the transformer alone, as GGUF; text encoders and VAE are in tiny-flux-modules
tiny-kontext             tiny-flux itself: Forge Neo takes a checkpoint of this name for Kontext
tiny-chroma, tiny-flux2  what PuLID refuses
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.host.models.checkpoints import FLUX_WIDTH as WIDTH
from tests.host.models.checkpoints import flux_layout, lora_on, random_tensor, write
from tests.host.models.gguf import Q4_0, Q8_0, gguf
from tests.host.models.unet import Layout

ROOT = "model.diffusion_model."
MODULES = "tiny-flux-modules.safetensors"
CHROMA_LAYERS = 2


def without(layout: Layout, *parts: str) -> Layout:
    """The layout less the transformer's tensors with one of these in their names."""
    out = Layout()
    for name, shape in layout.shapes.items():
        if not (name.startswith(ROOT) and any(part in name for part in parts)):
            out.raw(name, *shape)
    return out


def chroma_layout() -> Layout:
    """No modulations of its own in any block; one small network makes them all."""
    out = without(flux_layout(), "_mod.", ".modulation.", "adaLN", "time_in", "vector_in", "guidance_in")
    guidance = f"{ROOT}distilled_guidance_layer."
    out.linear(f"{guidance}in_proj", 64, WIDTH)
    for index in range(CHROMA_LAYERS):
        out.linear(f"{guidance}layers.{index}.in_layer", WIDTH, WIDTH)
        out.linear(f"{guidance}layers.{index}.out_layer", WIDTH, WIDTH)
        out.raw(f"{guidance}norms.{index}.scale", WIDTH)
    out.linear(f"{guidance}out_proj", WIDTH, WIDTH)
    return out


def flux2_layout() -> Layout:
    """FLUX.2: one modulation for all blocks of a kind, no pooled text, fewer double and more single blocks."""
    kept = without(flux_layout(), "_mod.", ".modulation.", "vector_in")
    out = without(kept, *(f"double_blocks.{index}." for index in range(8, 19)))
    for index in range(38, 48):
        for name, shape in flux_layout().shapes.items():
            if ".single_blocks.0." in name and ".modulation." not in name:
                out.raw(name.replace("single_blocks.0.", f"single_blocks.{index}."), *shape)
    for name, count in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
        out.linear(f"{ROOT}{name}.lin", WIDTH, count * WIDTH, bias=False)
    out.linear(f"{ROOT}single_stream_modulation.lin", WIDTH, 3 * WIDTH, bias=False)
    return out


def write_flux_kinds(checkpoints: Path, lora: Path, modules: Path) -> None:
    """Into the folders of checkpoints, of LoRAs, and of text encoders and VAEs."""
    full = flux_layout()
    write(checkpoints / "tiny-schnell.safetensors", without(full, "guidance_in"), dtype=torch.bfloat16)
    tensors = {name: random_tensor(name, shape, 0).bfloat16() for name, shape in full.shapes.items()}
    transformer = {name: tensor for name, tensor in tensors.items() if name.startswith(ROOT)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in transformer}
    modules.mkdir(parents=True, exist_ok=True)
    save_file(rest, modules / MODULES, metadata={"format": "pt"})
    save_file({**rest, **in_8_bits(transformer)}, checkpoints / "tiny-flux-fp8.safetensors", metadata={"format": "pt"})
    bare = {name[len(ROOT) :]: tensor for name, tensor in transformer.items()}
    for name, kind in (("q8", Q8_0), ("q4", Q4_0)):
        (checkpoints / f"tiny-flux-{name}.gguf").write_bytes(gguf(bare, kind, {"general.architecture": "flux"}))
    kontext = checkpoints / "tiny-kontext.safetensors"
    kontext.unlink(missing_ok=True)
    kontext.symlink_to("tiny-flux.safetensors")
    both = lora_on(full, ".img_attn.qkv", ".txt_attn.proj", ".linear1", ".linear2")  # attention and MLP
    write(lora / "tiny-flux-lora.safetensors", both)
    for name, layout in {"tiny-chroma": chroma_layout(), "tiny-flux2": flux2_layout()}.items():
        write(checkpoints / f"{name}.safetensors", layout, dtype=torch.bfloat16)


def in_8_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
