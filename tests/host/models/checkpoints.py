"""Whole checkpoints, and what goes beside them: LoRA, ControlNet, IP-Adapter.

    tiny-sdxl, tiny-sdxl-b   SDXL's 70 cross-attentions, context 2048; two different ones
    tiny-refiner             the layout of SDXL's refiner, context 1280
    tiny-sd15                16 cross-attentions, context 768
    tiny-flux                19 double and 38 single blocks, hidden size 128, text encoders and VAE inside

Every tensor is random, also those a fresh network would start at zero: with a zero output projection, attention would
change nothing and no test could see it. A tensor depends on the seed and its own name only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.host.models import configs
from tests.host.models.parts import add_clip, add_flux, add_open_clip, add_t5, add_vae
from tests.host.models.unet import REFINER, SD15, SDXL, Layout, add_controlnet, add_unet, cross_attention_widths

FLUX_WIDTH = 128  # of its text, too
LORA_RANK = 4
CLIP_IMAGE_WIDTH = 64  # of the image embedding that the IP-Adapter reads


def sdxl_layout() -> Layout:
    out = Layout()
    add_unet(out, "model.diffusion_model.", SDXL)
    add_clip(out, "conditioner.embedders.0.transformer.text_model.", 768)
    add_open_clip(out, "conditioner.embedders.1.model.")
    add_vae(out, "first_stage_model.", latent=4, quant=True)
    return out


def refiner_layout() -> Layout:
    out = Layout()
    add_unet(out, "model.diffusion_model.", REFINER)
    add_open_clip(out, "conditioner.embedders.0.model.")
    add_vae(out, "first_stage_model.", latent=4, quant=True)
    return out


def sd15_layout() -> Layout:
    out = Layout()
    add_unet(out, "model.diffusion_model.", SD15)
    add_clip(out, "cond_stage_model.transformer.text_model.", 768)
    add_vae(out, "first_stage_model.", latent=4, quant=True)
    return out


def flux_layout() -> Layout:
    out = Layout()
    add_flux(out, "model.diffusion_model.", FLUX_WIDTH, FLUX_WIDTH)
    add_clip(out, "text_encoders.clip_l.transformer.text_model.", FLUX_WIDTH)
    add_t5(out, "text_encoders.t5xxl.transformer.", FLUX_WIDTH)
    add_vae(out, "vae.", latent=16, quant=False)
    return out


def lora_on(checkpoint: Layout, *ends: str) -> Layout:
    """A LoRA on the denoiser's layers with these names."""
    out, root = Layout(), "model.diffusion_model."
    for name, shape in checkpoint.shapes.items():
        if name.startswith(root) and name.endswith(tuple(f"{end}.weight" for end in ends)):
            module = "lora_unet_" + name[len(root) : -len(".weight")].replace(".", "_")
            out.raw(f"{module}.lora_down.weight", LORA_RANK, shape[1])
            out.raw(f"{module}.lora_up.weight", shape[0], LORA_RANK)
    return out


def ip_adapter_layout() -> Layout:
    out = Layout()
    out.linear("image_proj.proj", CLIP_IMAGE_WIDTH, 4 * 2048)
    out.norm("image_proj.norm", width=2048)
    for index, width in enumerate(cross_attention_widths(sdxl_layout())):
        for part in ("to_k_ip", "to_v_ip"):
            out.linear(f"ip_adapter.{2 * index + 1}.{part}", 2048, width, bias=False)
    return out


def random_tensor(name: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Scale keeps activations near 1: gains around 1, biases small, matrices by fan-in."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    noise = torch.randn(tuple(shape), generator=generator)
    if name.endswith(("bias", "logit_scale")):
        return noise * 0.02
    if len(shape) == 1:
        return 1 + noise * 0.1
    if "embedding" in name or "shared" in name:
        return noise * 0.5
    return noise / math.sqrt(math.prod(shape[1:]))


def write(path: Path, layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: random_tensor(name, shape, seed).to(dtype) for name, shape in layout.shapes.items()}
    save_file(tensors, path, metadata={"format": "pt"})


KINDS = {
    "tiny-sdxl": (sdxl_layout, 0, configs.sdxl_config),
    "tiny-sdxl-b": (sdxl_layout, 1, configs.sdxl_config),
    "tiny-refiner": (refiner_layout, 0, configs.refiner_config),
    "tiny-sd15": (sd15_layout, 0, configs.sd15_config),
}


def write_checkpoints(folder: Path) -> None:
    for name, (layout, seed, _) in KINDS.items():
        write(folder / f"{name}.safetensors", layout(), seed)
    write(folder / "tiny-flux.safetensors", flux_layout(), 0, torch.bfloat16)


def write_configs(folder: Path, bpe: Path) -> None:
    """For A1111, beside the checkpoints. bpe: CLIP's merge table, as in the open_clip package."""
    clip_folder = (folder / configs.CLIP_FOLDER).resolve()
    for name, (_, _, config) in KINDS.items():
        configs.write_json(folder / f"{name}.yaml", config(clip_folder))  # JSON is YAML
    configs.write_clip_folder(clip_folder, bpe, configs.clip_config())
    configs.write_json(folder / f"{configs.OPEN_CLIP_NAME}.json", configs.open_clip_config())


def write_companions(lora_dir: Path, controlnet_dir: Path) -> None:
    # On everything that PuLID's hooks sit on or read: the queries and outputs of the cross-attentions.
    write(lora_dir / "tiny-lora.safetensors", lora_on(sdxl_layout(), ".attn2.to_q", ".attn2.to_out.0"))
    controlnet = Layout()
    add_controlnet(controlnet, "control_model.", SDXL)
    write(controlnet_dir / "tiny-controlnet.safetensors", controlnet)
    write(controlnet_dir / "tiny-ip-adapter.safetensors", ip_adapter_layout())
