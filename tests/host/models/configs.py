"""What A1111 has to be told of the small checkpoints: a config beside each, and a tokenizer's folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.host.models.parts import CLIP_POSITIONS, CLIP_VOCAB, TIME_ROWS, VAE_CHANNELS, VAE_MULT
from tests.host.models.unet import UNetSpec, refiner_spec, sd15_spec, sdxl_spec

OPEN_CLIP_NAME = "tiny-bigG"
CLIP_FOLDER = "tiny-clip-l"


def node(target: str, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": params} if params else {"target": target}


def vae_node(target: str) -> dict[str, Any]:
    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": VAE_CHANNELS}
    sizes |= {"ch_mult": list(VAE_MULT), "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    return node(target, embed_dim=4, monitor="val/rec_loss", ddconfig=sizes, lossconfig=node("torch.nn.Identity"))


def unet_params(spec: UNetSpec) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": spec.channels,
        "attention_resolutions": [2**level for level, depth in enumerate(spec.depths) if depth],
        "num_res_blocks": spec.res_blocks,
        "channel_mult": list(spec.mult),
        "use_spatial_transformer": True,
        "context_dim": spec.context,
        "use_checkpoint": False,
        "legacy": False,
    }


def sdxl_conditioner(clip_folder: Path, refiner: bool) -> dict[str, Any]:
    encoders = "sgm.modules.encoders.modules."
    clip_l = node(f"{encoders}FrozenCLIPEmbedder", version=str(clip_folder), layer="hidden", layer_idx=1)
    clip_g = node(
        f"{encoders}FrozenOpenCLIPEmbedder2",
        arch=OPEN_CLIP_NAME,
        version="",
        layer="penultimate",
        freeze=True,
        always_return_pooled=True,
        legacy=False,
    )
    texts, sizes = [clip_l, clip_g], ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    if refiner:
        texts, sizes = [clip_g], ("original_size_as_tuple", "crop_coords_top_left", "aesthetic_score")
    embedders = [{"input_key": "txt", **text} for text in texts]
    for key in sizes:
        embedders.append({"input_key": key, **node(f"{encoders}ConcatTimestepEmbedderND", outdim=TIME_ROWS)})
    models = [{"is_trainable": False, **embedder} for embedder in embedders]
    return node("sgm.modules.GeneralConditioner", emb_models=models)


def refiner_config(channels: int, clip_folder: Path) -> dict[str, Any]:
    sizes = unet_params(refiner_spec(channels)) | {"adm_in_channels": 2560, "transformer_depth": 4}
    return _sgm_config(sizes, sdxl_conditioner(clip_folder, refiner=True))


def sdxl_config(channels: int, clip_folder: Path) -> dict[str, Any]:
    sizes = unet_params(sdxl_spec(channels)) | {"adm_in_channels": 2816, "transformer_depth": [1, 2, 10]}
    return _sgm_config(sizes, sdxl_conditioner(clip_folder, refiner=False))


def _sgm_config(sizes: dict[str, Any], conditioner: dict[str, Any]) -> dict[str, Any]:
    parts = "sgm.modules.diffusionmodules."
    unet = sizes | {
        "num_classes": "sequential",
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "spatial_transformer_attn_type": "softmax-xformers",
    }
    denoiser = node(
        f"{parts}denoiser.DiscreteDenoiser",
        num_idx=1000,
        weighting_config=node(f"{parts}denoiser_weighting.EpsWeighting"),
        scaling_config=node(f"{parts}denoiser_scaling.EpsScaling"),
        discretization_config=node(f"{parts}discretizer.LegacyDDPMDiscretization"),
    )
    return {
        "model": node(
            "sgm.models.diffusion.DiffusionEngine",
            scale_factor=0.13025,
            disable_first_stage_autocast=True,
            denoiser_config=denoiser,
            network_config=node(f"{parts}openaimodel.UNetModel", **unet),
            conditioner_config=conditioner,
            first_stage_config=vae_node("sgm.models.autoencoder.AutoencoderKLInferenceWrapper"),
        )
    }


def sd15_config(channels: int, clip_folder: Path) -> dict[str, Any]:
    unet = unet_params(sd15_spec(channels)) | {"image_size": 32, "num_heads": 8, "transformer_depth": 1}
    return {
        "model": node(
            "ldm.models.diffusion.ddpm.LatentDiffusion",
            linear_start=0.00085,
            linear_end=0.012,
            num_timesteps_cond=1,
            log_every_t=200,
            timesteps=1000,
            first_stage_key="jpg",
            cond_stage_key="txt",
            image_size=64,
            channels=4,
            cond_stage_trainable=False,
            conditioning_key="crossattn",
            monitor="val/loss_simple_ema",
            scale_factor=0.18215,
            use_ema=False,
            unet_config=node("ldm.modules.diffusionmodules.openaimodel.UNetModel", **unet),
            first_stage_config=vae_node("ldm.models.autoencoder.AutoencoderKL"),
            cond_stage_config=node("ldm.modules.encoders.modules.FrozenCLIPEmbedder", version=str(clip_folder)),
        )
    }


def open_clip_config() -> dict[str, Any]:
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32}
    text = {"context_length": CLIP_POSITIONS, "vocab_size": CLIP_VOCAB, "width": 1280, "heads": 20, "layers": 2}
    return {"embed_dim": 1280, "vision_cfg": vision, "text_cfg": text}


def clip_config() -> dict[str, Any]:
    sizes = {"hidden_size": 768, "intermediate_size": 768, "projection_dim": 768, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 12, "max_position_embeddings": CLIP_POSITIONS, "vocab_size": CLIP_VOCAB}
    return {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", **sizes}


def byte_symbols() -> Iterator[str]:
    """CLIP's byte alphabet: printable Latin-1 bytes stand for themselves, the others for code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from map(chr, range(256, 512 - len(printable)))


def write_clip_folder(folder: Path, bpe: Path) -> None:
    """Write CLIP's published merge table the way transformers reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = gzip.decompress(bpe.read_bytes()).decode().split("\n")
    merges = lines[1 : CLIP_VOCAB - 2 * 256 - 2 + 1]
    symbols = list(byte_symbols())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    if len(words) != CLIP_VOCAB:
        raise ValueError(f"{bpe} gives {len(words)} words, not {CLIP_VOCAB}")
    write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    write_json(folder / "config.json", clip_config())


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
