"""Small denoisers and weight files of every layout, for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_pulid import sites
from lib_pulid.encoders import IDEncoder
from lib_pulid.weights import Adapter, ImageStreamWeights, load_adapter
from tests.host.models.parts import add_flux
from tests.host.models.unet import Layout
from tests.reference import cases
from tests.small_models import STREAM, flux_file, id_former, image_stream


def v1_encoder(seed: int = 11, **sizes: int) -> dict[str, Tensor]:
    """The IDEncoder of `cases.ID_ENCODER`, or of another token width (context_dim)."""
    official = {**cases.ID_ENCODER, **sizes}
    dim, wide = official["context_dim"], official["context_dim"] * official["num_token"]
    body = [official["width"], min(wide // 4, 1024), min(wide // 2, 1024), wide]
    return cases.fill(IDEncoder(body, [1024, 1024, 1024, dim]), seed).state_dict()


def v11_encoder(seed: int = 12) -> dict[str, Tensor]:
    """The IDFormer of `cases.ID_FORMER`."""
    p = cases.ID_FORMER
    former = id_former(p["output_dim"], 1024, p["dim"], 1024, p["depth"], p["num_queries"])
    return cases.fill(former, seed).state_dict()


def unet_adapter(path: Path, model: nn.Module) -> Adapter:
    """PuLID v1 for `unet()`, with the weights that the official one was recorded with."""
    width = cases.UNET["cross_attention_dim"]
    widths = [site.width for site in sites.find_sites(model).sites]
    shapes = {f"{2 * n + 1}.id_to_{x}.weight": (size, width) for n, size in enumerate(widths) for x in "kv"}
    pairs = cases.prefixed(cases.fill_shapes(shapes, 18), "id_adapter_attn_layers.")
    save_file(cases.prefixed(v1_encoder(context_dim=width), "id_adapter.") | pairs, path)
    return load_adapter(path)


def flux_adapter(path: Path) -> Adapter:
    """PuLID for `diffusers_flux()`, likewise."""
    modules = nn.ModuleList(image_stream(cases.FLUX["hidden_size"], 64, inner=256) for _ in range(20))
    save_file(flux_file(v11_encoder(), cases.fill(modules, 20).state_dict()), path)
    return load_adapter(path)


def image_stream_weights(module: nn.Module) -> ImageStreamWeights:
    return ImageStreamWeights(**{name: module.get_parameter(key) for name, key in STREAM.items()})


def unet() -> UNet2DConditionModel:
    return cases.fill(UNet2DConditionModel(**cases.UNET), 17)


run_unet = cases.run_unet


class SgmUNet(nn.Module):
    """diffusers' UNet under the names of the sgm layout; `named_modules` yields input, middle, output."""

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__()
        self.input_blocks = model.down_blocks
        self.middle_block = model.mid_block
        self.output_blocks = model.up_blocks
        self._whole = [model]

    def forward(self) -> Tensor:
        return run_unet(self._whole[0])


def flux_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a FLUX.1-dev checkpoint in BFL's layout, with the sizes of `cases.FLUX`."""
    p, w, layout = cases.FLUX, cases.FLUX["hidden_size"], Layout()
    add_flux(layout, "", w, p["context_in_dim"], w // p["num_heads"])
    ends = {"img_in.weight": (w, p["in_channels"]), "vector_in.in_layer.weight": (w, p["vec_in_dim"])}
    ends |= {"final_layer.linear.weight": (p["in_channels"], w), "final_layer.linear.bias": (p["in_channels"],)}
    return layout.shapes | ends


def flux_transformer(hidden: int, heads: int, text: int, pooled: int, axes: Sequence[int]) -> FluxTransformer2DModel:
    """diffusers' transformer with the real number of blocks."""
    return FluxTransformer2DModel(
        in_channels=16, num_layers=19, num_single_layers=38, attention_head_dim=hidden // heads,
        num_attention_heads=heads, joint_attention_dim=text, pooled_projection_dim=pooled, guidance_embeds=True,
        axes_dims_rope=tuple(axes),
    )  # fmt: skip


def diffusers_flux(seed: int = 19) -> FluxTransformer2DModel:
    """diffusers' transformer with the weights that the official one was recorded with."""
    p = cases.FLUX
    model = flux_transformer(p["hidden_size"], p["num_heads"], p["context_in_dim"], p["vec_in_dim"], p["axes_dim"])
    model.load_state_dict(_to_diffusers(cases.fill_shapes(flux_shapes(), seed)), strict=True)
    return model.eval().requires_grad_(False)


_RENAMED = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in": "time_text_embed.timestep_embedder", "guidance_in": "time_text_embed.guidance_embedder",
    "vector_in": "time_text_embed.text_embedder", "in_layer": "linear_1", "out_layer": "linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks", "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp": "ff.net",
    "txt_mlp": "ff_context.net", "net.0.": "net.0.proj.", "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight", "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight", "modulation.lin": "norm.linear", "linear2": "proj_out",
    ".norm.query_norm.scale": ".attn.norm_q.weight", ".norm.key_norm.scale": ".attn.norm_k.weight",
}  # fmt: skip
_SPLIT = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def _to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    width, converted = cases.FLUX["hidden_size"], {}
    for key, value in state.items():
        split = next((old for old in _SPLIT if f".{old}." in key), None)
        if key.startswith("final_layer.adaLN"):  # (shift, scale) there, (scale, shift) here
            value = torch.cat(value.chunk(2)[::-1])
        new = key
        for old, name in _RENAMED.items():
            new = new.replace(old, name)
        if split is None:
            converted[new] = value
            continue
        sizes = [width, width, width, *([len(value) - 3 * width] if split == "linear1" else [])]
        for name, part in zip(_SPLIT[split], value.split(sizes)):
            converted[new.replace(split, name)] = part
    return converted


def run_flux(model: nn.Module) -> Tensor:
    i = cases.flux_inputs()
    return model(
        hidden_states=i["img"], img_ids=i["img_ids"][0], encoder_hidden_states=i["txt"], txt_ids=i["txt_ids"][0],
        timestep=i["timesteps"], pooled_projections=i["y"], guidance=i["guidance"], return_dict=False,
    )[0]  # fmt: skip


class _BflDouble(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: object) -> tuple[Tensor, Tensor]:
        txt, img = self.block(hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=pe)
        return img, txt


class _BflSingle(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.text = 0

    def forward(self, x: Tensor, vec: Tensor, pe: object) -> Tensor:
        both = self.block(hidden_states=x[:, self.text :], encoder_hidden_states=x[:, : self.text], temb=vec,
                          image_rotary_emb=pe)  # fmt: skip
        return torch.cat(both, dim=1)


class BflFlux(nn.Module):
    """diffusers' blocks, called as BFL's (and Forge's) transformer calls its own: text and image as one sequence."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        super().__init__()
        self.hidden_size = model.inner_dim
        self.double_blocks = nn.ModuleList(map(_BflDouble, model.transformer_blocks))
        self.single_blocks = nn.ModuleList(map(_BflSingle, model.single_transformer_blocks))
        self._whole = [model]

    def forward(self, extra_tokens: int = 0) -> Tensor:
        i, model = cases.flux_inputs(), self._whole[0]
        ids = torch.cat((i["txt_ids"][0], i["img_ids"][0], i["img_ids"][0][:extra_tokens]))
        vec = model.time_text_embed(i["timesteps"] * 1000, i["guidance"] * 1000, i["y"])
        img, txt, pe = model.x_embedder(i["img"]), model.context_embedder(i["txt"]), model.pos_embed(ids)
        img = torch.cat((img, img[:, :extra_tokens]), dim=1)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            block.text = txt.shape[1]
            x = block(x, vec=vec, pe=pe)
        return model.proj_out(model.norm_out(x[:, txt.shape[1] :], vec))
