"""Small seeded random weights in the real file formats, of any size; the real loaders read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lib_pulid.encoders import IDEncoder, IDFormer
from lib_pulid.vision import HEAD_DIM, tower_shapes

TOKEN_WIDTH = 64  # 2048 in the real files
TOWER_WIDTH = 128  # 1024 in the real tower
ID_COND = 512 + 768


@dataclass(frozen=True)
class SmallFiles:
    """What `write_files` wrote. Args: sdxl, flux: PuLID files. tower: an EVA-CLIP file."""

    sdxl: Path
    flux: Path
    tower: Path


def write_files(folder: str | Path, sdxl_widths: Sequence[int], flux_width: int, sites: int = 20) -> SmallFiles:
    """Writes a PuLID v1.1 file, a PuLID FLUX file and a vision tower, of sizes that fit small denoisers.

    Args:
        sdxl_widths: width of each cross-attention layer, in the order down, up, mid.
        flux_width: hidden size of the transformer, and its number of sites.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = SmallFiles(
        folder / "standin_pulid_sdxl.safetensors", folder / "standin_pulid_flux.safetensors", folder / "standin_eva.pt"
    )
    encoders = [random_weights(id_former().state_dict(), seed) for seed in (1, 6)]
    pairs = nn.ModuleList(cross_attention_pair(width, TOKEN_WIDTH) for width in sdxl_widths)
    modules = nn.ModuleList(image_stream(flux_width, TOKEN_WIDTH) for _ in range(sites))
    save_file(sdxl_file(encoders[0], random_weights(pairs.state_dict(), seed=2)), files.sdxl)
    save_file(flux_file(encoders[1], random_weights(modules.state_dict(), seed=3)), files.flux)
    tower = random_weights(tower_shapes(TOWER_WIDTH, 768), seed=4)
    torch.save({f"visual.{key}": value for key, value in tower.items()}, files.tower)
    return files


@cache
def pulid_files(widths: tuple[int, ...], stream_width: int, sites: int, seed: int = 1) -> dict[str, dict[str, Tensor]]:
    """The contents of a PuLID file of each layout, "v1", "v1.1" and "flux"; sizes as in `write_files`."""
    pairs = nn.ModuleList(cross_attention_pair(width, TOKEN_WIDTH) for width in widths).state_dict()
    modules = nn.ModuleList(image_stream(stream_width, TOKEN_WIDTH) for _ in range(sites)).state_dict()
    v1, v11 = (random_weights(encoder.state_dict(), seed) for encoder in (id_encoder(), id_former()))
    layers = random_weights(pairs, 2)
    flux = flux_file(v11, random_weights(modules, 3))
    return {"v1": sdxl_file(v1, layers), "v1.1": sdxl_file(v11, layers), "flux": flux}


def random_weights(shapes: Mapping[str, Tensor | tuple[int, ...]], seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Random values that keep activations at their size; gains of norms lie around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, like in sorted(shapes.items()):
        shape = tuple(like.shape) if isinstance(like, Tensor) else like
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 1 + 0.1 * values if name.endswith(("weight", "scale")) else 0.1 * values
        else:
            weights[name] = values * gain / values[0].numel() ** 0.5
    return weights


# ---------------------------------------------------------------- the files' parts


def sdxl_file(encoder: Mapping[str, Tensor], pairs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """pulid_v1.bin's and pulid_v1.1.safetensors' layout. pairs: "{n}.id_to_k.weight", n counts cross-attentions."""
    state = {f"id_adapter.{key}": value for key, value in encoder.items()}
    for key, value in pairs.items():
        n, name = key.split(".", 1)
        state[f"id_adapter_attn_layers.{2 * int(n) + 1}.{name}"] = value
    return state


def flux_file(encoder: Mapping[str, Tensor], modules: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """pulid_flux_v0.9.x.safetensors' layout. modules: "{n}.to_q.weight" ..."""
    state = {f"pulid_encoder.{key}": value for key, value in encoder.items()}
    return state | {f"pulid_ca.{key}": value for key, value in modules.items()}


def id_encoder(output_dim: int = TOKEN_WIDTH, vit_width: int = TOWER_WIDTH, hidden: int = 256) -> IDEncoder:
    return IDEncoder([ID_COND, hidden, hidden, 5 * output_dim], [vit_width, vit_width, vit_width, output_dim])


def id_former(output_dim: int = TOKEN_WIDTH, vit_width: int = TOWER_WIDTH, dim: int = 64) -> IDFormer:
    return IDFormer(
        dim=dim,
        depth=10,
        inner_dim=2 * HEAD_DIM,
        ff_dim=4 * dim,
        num_queries=32,
        output_dim=output_dim,
        id_mapping=[ID_COND, 256, 256, 5 * dim],
        mapping=[vit_width, vit_width, vit_width, dim],
    )


def cross_attention_pair(width: int, token_width: int) -> nn.ModuleDict:
    names = ("id_to_k", "id_to_v")
    return nn.ModuleDict({name: nn.Linear(token_width, width, bias=False) for name in names})


def image_stream(width: int, token_width: int, inner: int = 128) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "norm1": nn.LayerNorm(token_width),
            "norm2": nn.LayerNorm(width),
            "to_q": nn.Linear(width, inner, bias=False),
            "to_kv": nn.Linear(token_width, 2 * inner, bias=False),
            "to_out": nn.Linear(inner, width, bias=False),
        }
    )
