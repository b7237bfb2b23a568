"""Small seeded random weights in the file formats of InstantID and IP-Adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lib_pulid.encoders import HEAD_DIM
from lib_pulid.projectors import FacePlusProjection, FaceProjection, ImageProjection, Resampler
from tests.small_models import TOKEN_WIDTH, random_weights

if TYPE_CHECKING:
    from diffusers import ControlNetModel

FACE = 512  # width of a face embedding
CLIP_WIDTH, CLIP_IMAGE = 64, 48  # of patches (1280 in ViT-H), and of image embeddings (1024)
RANK = 4
POOLED = 2816  # SDXL's pooled text, and its sizes as sinusoids


def resampler(input_dim: int, output_dim: int = TOKEN_WIDTH, num_queries: int = 16, dim: int = HEAD_DIM) -> Resampler:
    return Resampler(
        dim=dim, depth=4, inner_dim=2 * HEAD_DIM, ff_dim=4 * dim, num_queries=num_queries, output_dim=output_dim,
        input_dim=input_dim,
    )  # fmt: skip


def face_plus(output_dim: int = TOKEN_WIDTH, input_dim: int = CLIP_WIDTH, face: int = FACE) -> FacePlusProjection:
    perceiver = {"dim": output_dim, "depth": 4, "inner_dim": max(1, output_dim // HEAD_DIM) * HEAD_DIM}
    perceiver |= {"ff_dim": 4 * output_dim, "output_dim": output_dim, "input_dim": input_dim}
    return FacePlusProjection(face, 2 * face, output_dim, 4, perceiver=perceiver)


def lora(widths: Sequence[int], text_width: int, rank: int = RANK, seed: int = 22) -> dict[str, Tensor]:
    """ "{i}.to_{q,k,v,out}_lora.{down,up}.weight", i = 0, 1, 2, ...; odd ones are cross-attentions."""
    return random_weights(lora_shapes(widths, text_width, rank), seed)


def lora_shapes(widths: Sequence[int], text_width: int, rank: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for n, width in enumerate(widths):
        for i in (2 * n, 2 * n + 1):
            for part in ("q", "k", "v", "out"):
                fan_in = text_width if i % 2 and part in "kv" else width
                shapes[f"{i}.to_{part}_lora.down.weight"] = (rank, fan_in)
                shapes[f"{i}.to_{part}_lora.up.weight"] = (width, rank)
    return shapes


def layers(
    widths: Sequence[int], token_width: int = TOKEN_WIDTH, seed: int = 2, gain: float = 1.0
) -> dict[str, Tensor]:
    """ "{i}.to_k_ip.weight" and "{i}.to_v_ip.weight", i = 1, 3, 5, ..."""
    shapes = {f"{2 * n + 1}.to_{x}_ip.weight": (width, token_width) for n, width in enumerate(widths) for x in "kv"}
    return random_weights(shapes, seed, gain)


def method_files(
    widths: Sequence[int],
    token_width: int = TOKEN_WIDTH,
    text_width: int = 0,
    gain: float = 1.0,
    only: Sequence[str] = (),
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The contents of each method's file, nested as the pickles are. text_width: of the denoiser's text, for the LoRA;
    by default that of the tokens, as in SDXL."""
    projectors = {
        "instantid": resampler(FACE, token_width),
        "portrait_unnorm": resampler(FACE, token_width),
        "ip_adapter": ImageProjection(CLIP_IMAGE, token_width, 4),
        "plus": resampler(CLIP_WIDTH, token_width),
        "face_id": FaceProjection(FACE, 2 * FACE, token_width, 4),
        "face_id_plus": face_plus(token_width),
        "portrait": FaceProjection(FACE, 2 * FACE, token_width, 16),
    }
    made = {}
    for seed, (kind, projector) in enumerate(projectors.items(), 1):
        if only and kind not in only:
            continue
        weights, table = random_weights(projector.state_dict(), seed), layers(widths, token_width, 10 * seed, gain)
        if kind.startswith("face_id"):
            table |= lora(widths, text_width or token_width, seed=10 * seed + 1)
        is_half = {"instantid": (False, False), "portrait_unnorm": (False, True)}.get(kind, (True, True))
        both = (half(state) if to_half else dict(state) for state, to_half in zip((weights, table), is_half))
        made[kind] = dict(zip(("image_proj", "ip_adapter"), both))
    return made


def identity_net(channels: int = 32, text_width: int = TOKEN_WIDTH) -> ControlNetModel:
    """A ControlNet in the real file's layout and depth, without its width. Layers that are zero at first are filled."""
    net = empty_identity_net(channels, text_width)
    net.load_state_dict(random_weights(net.state_dict(), 33), assign=True)
    return net.eval().requires_grad_(False)


def empty_identity_net(channels: int, text_width: int) -> ControlNetModel:
    """Without memory, to be loaded with `assign`."""
    from diffusers import ControlNetModel

    widths = [channels * factor for factor in (1, 2, 4)]
    with torch.device("meta"):
        return ControlNetModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=widths,
            layers_per_block=2, transformer_layers_per_block=[1, 2, 10], cross_attention_dim=text_width,
            attention_head_dim=[max(1, width // HEAD_DIM) for width in widths], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=POOLED,
        )  # fmt: skip


def clip_vision(width: int = CLIP_WIDTH, image: int = CLIP_IMAGE, depth: int = 3) -> dict[str, Tensor]:
    """transformers' CLIPVisionModelWithProjection, as in h94/IP-Adapter's image_encoder."""
    root, side = "vision_model.", 16 * 16 + 1
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}embeddings.class_embedding": (width,),
        f"{root}embeddings.patch_embedding.weight": (width, 3, 14, 14),
        f"{root}embeddings.position_embedding.weight": (side, width),
        "visual_projection.weight": (image, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    linear: dict[str, tuple[int, int]] = {}
    for layer in (f"encoder.layers.{i}" for i in range(depth)):
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        linear |= {f"{layer}.self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        linear |= {f"{layer}.mlp.fc1": (2 * width, width), f"{layer}.mlp.fc2": (width, 2 * width)}
    shapes |= {f"{root}{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}
    shapes |= {f"{root}{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{root}{name}.bias": shape[:1] for name, shape in linear.items()}
    return random_weights(shapes, 7)


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.half() for key, value in state.items()}


def flat(nested: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As in a safetensors file."""
    return {f"{table}.{key}": value for table, state in nested.items() for key, value in state.items()}


def write(path: Path, nested: Mapping[str, Mapping[str, Tensor]]) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(flat(nested), path)
    else:
        torch.save({table: dict(state) for table, state in nested.items()}, path)
    return path
