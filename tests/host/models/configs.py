"""What A1111 has to be told of the small checkpoints: a config beside each, and a tokenizer's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lib_pulid.hosts.diffusers_checkpoint import read_merges, write_tokenizer
from tests.host.models.parts import CLIP_POSITIONS, CLIP_VOCAB, TIME_ROWS, VAE_CHANNELS, VAE_MULT
from tests.host.models.unet import REFINER, RES_BLOCKS, SD15, SDXL, UNetSpec

OPEN_CLIP_NAME, MINIATURE_OPEN_CLIP = "tiny-bigG", "tiny-bigG-miniature"
CLIP_FOLDER = "tiny-clip-l"


def node(target: str, **params: Any) -> dict[str, Any]:
    return {"target": target, "params": params} if params else {"target": target}


def vae_node(target: str) -> dict[str, Any]:
    sizes = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": VAE_CHANNELS}
    sizes |= {"ch_mult": list(VAE_MULT), "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    return node(target, embed_dim=4, monitor="val/rec_loss", ddconfig=sizes, lossconfig=node("torch.nn.Identity"))


def unet_params(spec: UNetSpec) -> dict[str, Any]:
    return {
        "in_channels": 4, "out_channels": 4, "model_channels": spec.channels,
        "attention_resolutions": [2**level for level, depth in enumerate(spec.depths) if depth],
        "num_res_blocks": RES_BLOCKS, "channel_mult": list(spec.mult), "use_spatial_transformer": True,
        "context_dim": spec.context, "use_checkpoint": False, "legacy": False,
    }  # fmt: skip


def sdxl_conditioner(clip_folder: Path, refiner: bool, layers: int = 2, arch: str = OPEN_CLIP_NAME) -> dict[str, Any]:
    """layers: of CLIP-L. arch: name of the other one's architecture."""
    encoders = "sgm.modules.encoders.modules."
    clip_l = node(f"{encoders}FrozenCLIPEmbedder", version=str(clip_folder), layer="hidden", layer_idx=layers - 1)
    clip_g = node(
        f"{encoders}FrozenOpenCLIPEmbedder2", arch=arch, version="", layer="penultimate", freeze=True,
        always_return_pooled=True, legacy=False,
    )  # fmt: skip
    texts, sizes = [clip_l, clip_g], ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    if refiner:
        texts, sizes = [clip_g], ("original_size_as_tuple", "crop_coords_top_left", "aesthetic_score")
    embedders = [{"input_key": "txt", **text} for text in texts]
    for key in sizes:
        embedders.append({"input_key": key, **node(f"{encoders}ConcatTimestepEmbedderND", outdim=TIME_ROWS)})
    models = [{"is_trainable": False, **embedder} for embedder in embedders]
    return node("sgm.modules.GeneralConditioner", emb_models=models)


def refiner_config(clip_folder: Path) -> dict[str, Any]:
    sizes = unet_params(REFINER) | {"adm_in_channels": 2560, "transformer_depth": 4}
    return _sgm_config(sizes, sdxl_conditioner(clip_folder, refiner=True))


def sdxl_config(clip_folder: Path) -> dict[str, Any]:
    sizes = unet_params(SDXL) | {"adm_in_channels": 2816, "transformer_depth": [1, 2, 10]}
    return _sgm_config(sizes, sdxl_conditioner(clip_folder, refiner=False))


def miniature_config(clip_folder: Path) -> dict[str, Any]:
    """Of lib_pulid/miniature's SDXL, which predicts v."""
    spec = UNetSpec(64, (1, 1, 1), (0, 2, 10), 10, context=64, vector=40 + 6 * TIME_ROWS)
    sizes = unet_params(spec) | {"adm_in_channels": spec.vector, "transformer_depth": [1, 2, 10]}
    config = _sgm_config(sizes, sdxl_conditioner(clip_folder, False, 3, MINIATURE_OPEN_CLIP), "V")
    config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["ch_mult"] = [1, 1, 2, 4]
    return config


def _sgm_config(sizes: dict[str, Any], conditioner: dict[str, Any], predicts: str = "Eps") -> dict[str, Any]:
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
        weighting_config=node(f"{parts}denoiser_weighting.{predicts}Weighting"),
        scaling_config=node(f"{parts}denoiser_scaling.{predicts}Scaling"),
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


def sd15_config(clip_folder: Path) -> dict[str, Any]:
    unet = unet_params(SD15) | {"image_size": 32, "num_heads": 8, "transformer_depth": 1}
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


def open_clip_config(width: int = 1280, layers: int = 2) -> dict[str, Any]:
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32}
    text = {"context_length": CLIP_POSITIONS, "vocab_size": CLIP_VOCAB, "width": width, "layers": layers}
    return {"embed_dim": width, "vision_cfg": vision, "text_cfg": text | {"heads": max(1, width // 64)}}


def clip_config(width: int = 768, inner: int = 768, layers: int = 2) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "projection_dim": width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": max(1, width // 64)}
    sizes |= {"max_position_embeddings": CLIP_POSITIONS, "vocab_size": CLIP_VOCAB}
    return {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", **sizes}


def write_clip_folder(folder: Path, bpe: Path, config: dict[str, Any]) -> None:
    """Writes CLIP's tokenizer and a text encoder's configuration. bpe: the merge table in the open_clip package."""
    write_tokenizer(folder, read_merges(bpe), "<|endoftext|>")
    write_json(folder / "config.json", config)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
