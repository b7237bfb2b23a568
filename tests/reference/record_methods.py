"""Records what the official code of InstantID and IP-Adapter returns:

    python -m tests.reference.record_methods --ip-adapter <its checkout> --instantid <its checkout>

The checkouts have to be at the commits that `method_cases.py` names, with `einops` and `opencv-python` installed.
Nothing of them is kept but the numbers, in `methods.safetensors`; inputs and weights are made by `method_cases.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.reference import cases
from tests.reference import method_cases as own
from tests.reference.record import save

FILE = Path(__file__).with_name("methods.safetensors")


def record_projectors() -> dict[str, Tensor]:
    from ip_adapter.ip_adapter import ImageProjModel
    from ip_adapter.ip_adapter_faceid import MLPProjModel, ProjPlusModel
    from ip_adapter.resampler import Resampler

    face = cases.fill(Resampler(**own.RESAMPLER, embedding_dim=own.FACE), 31)
    plus = cases.fill(Resampler(**own.RESAMPLER, embedding_dim=own.PATCH), 32)
    base = cases.fill(ImageProjModel(own.WIDTH, own.IMAGE, own.TOKENS), 33)
    face_id = cases.fill(MLPProjModel(own.WIDTH, own.FACE, own.TOKENS), 34)
    face_plus = cases.fill(ProjPlusModel(own.PLUS_WIDTH, own.FACE, own.PATCH, own.TOKENS), 35)
    return {
        "resampler_face": face(own.embedding()[:, None]),
        "resampler_plus": plus(own.patches()),
        "image_projection": base(own.image()),
        "face_projection": face_id(own.embedding()),
        "face_projection_plus": face_plus(own.embedding(), own.patches(), shortcut=True, scale=1.0),
    }


def run(unet: nn.Module, count: int) -> Tensor:
    """The official way: identity tokens behind those of the text."""
    cond, uncond = own.tokens(count)
    text = torch.cat((cases.unet_inputs()["encoder_hidden_states"], torch.cat((uncond, cond))), dim=1)
    return cases.run_unet(unet, text)


def record_unet(holder: object, count: int, seed: int) -> Tensor:
    """holder: an official pipeline or adapter with a unet, whose set_ip_adapter was called."""
    unet = holder.unet if hasattr(holder, "unet") else holder.pipe.unet  # type: ignore[attr-defined]
    layers = cases.fill(nn.ModuleList(unet.attn_processors.values()), seed)
    for layer in layers:
        if hasattr(layer, "scale"):
            layer.scale = own.SCALE
    return run(unet, count)


def holder_of(kind: type, count: int) -> object:
    """An official adapter without what its constructor would load."""
    made = kind.__new__(kind)
    unet = cases.fill(diffusers.UNet2DConditionModel(**cases.UNET), 17)
    made.pipe = type("Pipe", (), {"unet": unet})()
    made.device, made.torch_dtype, made.num_tokens, made.lora_rank = "cpu", torch.float32, count, own.RANK
    made.set_ip_adapter()
    for layer in made.pipe.unet.attn_processors.values():
        layer.float()
    return made


def record_ip_adapter() -> dict[str, Tensor]:
    from ip_adapter.ip_adapter import IPAdapter
    from ip_adapter.ip_adapter_faceid import IPAdapterFaceIDXL

    return {
        "unet_ip_adapter": record_unet(holder_of(IPAdapter, 16), 16, 41),
        "unet_face_id": record_unet(holder_of(IPAdapterFaceIDXL, own.TOKENS), own.TOKENS, 42),
    }


def record_instantid() -> dict[str, Tensor]:
    from pipeline_stable_diffusion_xl_instantid import StableDiffusionXLInstantIDPipeline, draw_kps

    unet = cases.fill(diffusers.UNet2DConditionModel(**cases.UNET), 17)
    stub, load = type("Stub", (), {"unet": unet})(), torch.load
    torch.load = lambda *args, **kwargs: {"ip_adapter": nn.ModuleList(unet.attn_processors.values()).state_dict()}
    try:
        StableDiffusionXLInstantIDPipeline.set_ip_adapter(stub, "", 16, own.SCALE)
    finally:
        torch.load = load
    points = draw_kps(Image.new("RGB", own.CONTROL_SIZE), np.array(own.CONTROL_POINTS))
    return {"unet_instantid": record_unet(stub, 16, 43), "points": torch.from_numpy(np.array(points))}


def record_identity_net() -> dict[str, Tensor]:
    """The official pipeline, with and without its ControlNet's part; final latents."""
    from ip_adapter.resampler import Resampler
    from pipeline_stable_diffusion_xl_instantid import StableDiffusionXLInstantIDPipeline, draw_kps

    made = own.parts()
    net = own.identity_net(made["unet"])
    pipe = StableDiffusionXLInstantIDPipeline(**made, controlnet=net, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.image_proj_model = cases.fill(Resampler(**own.RESAMPLER, embedding_dim=own.FACE), 31)
    pipe.image_proj_model_in_features = own.FACE
    load = torch.load
    torch.load = lambda *a, **k: {"ip_adapter": nn.ModuleList(pipe.unet.attn_processors.values()).state_dict()}
    try:
        pipe.set_ip_adapter("", 16, own.SCALE)
    finally:
        torch.load = load
    cases.fill(nn.ModuleList(pipe.unet.attn_processors.values()), 43)
    for layer in pipe.unet.attn_processors.values():
        if hasattr(layer, "scale"):
            layer.scale = own.SCALE
    points = draw_kps(Image.new("RGB", (own.SIDE, own.SIDE)), np.array(own.CONTROL_POINTS))
    found = {}
    for name, scale in (("identity_net_off", 0.0), ("identity_net_on", own.CONTROL_SCALE)):
        found[name] = pipe(
            **own.pipeline_inputs(), image_embeds=own.embedding()[0].numpy(), image=points, height=own.SIDE,
            width=own.SIDE, num_inference_steps=own.STEPS, guidance_scale=own.GUIDANCE, output_type="latent",
            controlnet_conditioning_scale=scale,
        ).images  # fmt: skip
    return found


def mend_diffusers() -> None:
    """Puts back a name that the official code imports and newer versions of diffusers have moved; it is not used."""
    import diffusers.pipelines.controlnet as old
    from diffusers.models.controlnets import multicontrolnet

    old.MultiControlNetModel = multicontrolnet.MultiControlNetModel
    sys.modules["diffusers.pipelines.controlnet.multicontrolnet"] = multicontrolnet


def of(checkout: Path, record: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Both checkouts have a package of the same name."""
    sys.path.insert(0, str(checkout))
    try:
        return record()
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name.split(".")[0] == "ip_adapter"]:
            del sys.modules[name]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ip-adapter", required=True, type=Path, help="a checkout of tencent-ailab/IP-Adapter")
    parser.add_argument("--instantid", required=True, type=Path, help="a checkout of instantX-research/InstantID")
    args = parser.parse_args()
    mend_diffusers()
    tensors = of(args.ip_adapter, record_projectors) | of(args.ip_adapter, record_ip_adapter)
    tensors |= of(args.instantid, record_instantid) | of(args.instantid, record_identity_net)
    save(FILE, tensors, ip_adapter_commit=own.IP_ADAPTER, instantid_commit=own.INSTANTID)


if __name__ == "__main__":
    main()
