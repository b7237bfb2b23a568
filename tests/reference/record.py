"""Records what the official code returns: `python -m tests.reference.record --official <its checkout>`.

The checkout of ToTheBeginning/PuLID has to be at the commit that `cases.py` names, with `einops` and `ftfy`
installed. Nothing of it is kept but the numbers, in `official.safetensors`; inputs and weights are made by `cases.py`.
"""

from __future__ import annotations

import argparse
import platform
import sys
from functools import partial
from pathlib import Path

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.reference import cases

FILE = Path(__file__).with_name("official.safetensors")


def record_encoders() -> dict[str, Tensor]:
    from pulid.encoders import IDEncoder
    from pulid.encoders_transformer import IDFormer

    id_cond, hidden = cases.faces(1)
    v1 = cases.fill(IDEncoder(**cases.ID_ENCODER), 11)
    v11 = cases.fill(IDFormer(**cases.ID_FORMER), 12)
    three = [cases.faces(seed) for seed in (1, 21, 41)]
    stacked = torch.stack([c[:1] for c, _ in three], dim=1)
    joined = [torch.cat([h[i][:1] for _, h in three], dim=1) for i in range(5)]
    return {"v1": v1(id_cond, hidden), "v11": v11(id_cond, hidden), "v11_three_photos": v11(stacked, joined)}


def official_tower() -> nn.Module:
    from eva_clip.eva_vit_model import EVAVisionTransformer

    width = cases.VISION_WIDTH
    return EVAVisionTransformer(
        img_size=336, patch_size=14, num_classes=32, use_mean_pooling=False, embed_dim=width, depth=24,
        num_heads=width // 64, mlp_ratio=2.6667, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        xattn=True, rope=True, pt_hw_seq_len=16, intp_freq=True, naiveswiglu=True, subln=True,
    )  # fmt: skip


def record_tower() -> dict[str, Tensor]:
    tower = cases.fill(official_tower(), 13)
    token, hidden = tower(
        cases.normal(61, 1, 3, 336, 336), return_all_features=False, return_hidden=True, shuffle=False
    )
    return {"tower": token, **{f"tower_hidden_{i}": h[:, ::24].contiguous() for i, h in enumerate(hidden)}}


def set_official_mode(projection: str, num_zero: int) -> None:
    from pulid import attention_processor as official

    official.NUM_ZERO, official.ORTHO, official.ORTHO_v2 = num_zero, projection == "ortho", projection == "ortho_v2"


def record_cross_attention() -> dict[str, Tensor]:
    from diffusers.models.attention_processor import Attention
    from pulid.attention_processor import IDAttnProcessor2_0

    attention = cases.fill(Attention(**cases.CROSS_ATTENTION), 14)
    attention.set_processor(cases.fill(IDAttnProcessor2_0(128, 64), 15))
    x, text, identity = cases.normal(71, 2, 40, 128), cases.normal(72, 2, 7, 48), torch.cat(cases.tokens(73))
    out = {"attention_off": attention(x, text)}
    for projection, num_zero in cases.SETTINGS:
        set_official_mode(projection, num_zero)
        out[f"attention_{projection}_{num_zero}"] = attention(x, text, id_embedding=identity, id_scale=0.8)
    return out


def record_image_stream() -> dict[str, Tensor]:
    from pulid.encoders_transformer import PerceiverAttentionCA

    module = cases.fill(PerceiverAttentionCA(**cases.IMAGE_STREAM), 16)
    return {"image_stream": module(cases.tokens(75)[0], cases.normal(76, 1, 40, 96))}


def record_unet() -> dict[str, Tensor]:
    from pulid.pipeline_v1_1 import PuLIDPipeline

    unet = cases.fill(diffusers.UNet2DConditionModel(**cases.UNET), 17)
    out = {"unet_off": cases.run_unet(unet)}
    holder = PuLIDPipeline.__new__(PuLIDPipeline)
    holder.hack_unet_attn_layers(unet)  # it makes identity tokens as wide as the text's
    cases.fill(holder.id_adapter_attn_layers, 18)
    cond, uncond = cases.tokens(77, width=cases.UNET["cross_attention_dim"])
    for projection, num_zero in cases.SETTINGS:
        set_official_mode(projection, num_zero)
        both = torch.cat((uncond, cond))
        out[f"unet_{projection}_{num_zero}"] = cases.run_unet(unet, id_embedding=both, id_scale=0.8)
    return out


def record_flux() -> dict[str, Tensor]:
    from flux.model import Flux, FluxParams
    from pulid.encoders_transformer import PerceiverAttentionCA

    model = cases.fill(Flux(FluxParams(**cases.FLUX)), 19)
    model.pulid_ca = cases.fill(nn.ModuleList(PerceiverAttentionCA(**cases.FLUX_STREAM) for _ in range(20)), 20)
    cond, uncond = cases.tokens(79)
    inputs = cases.flux_inputs()
    on = model(**inputs, id=torch.cat((cond, uncond)), id_weight=0.9)
    return {"flux_off": model(**inputs), "flux_on": on}


def save(path: Path, tensors: dict[str, Tensor], **commits: str) -> None:
    note = {**commits, "torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=note)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size:,} bytes, {note}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", required=True, type=Path, help="a checkout of ToTheBeginning/PuLID")
    sys.path.insert(0, str(parser.parse_args().official))
    for missing in ("basicsr", "basicsr.utils", "torchsde"):  # imported by the pipelines, not used here
        sys.modules.setdefault(missing, type(sys)(missing))
    sys.modules["basicsr.utils"].img2tensor = sys.modules["basicsr.utils"].tensor2img = None  # type: ignore[attr-defined]
    recorders = (record_encoders, record_tower, record_cross_attention, record_image_stream, record_unet, record_flux)
    save(FILE, {name: t for recorder in recorders for name, t in recorder().items()}, official_commit=cases.COMMIT)


if __name__ == "__main__":
    main()
