"""Small seeded random weights in the real file formats, of any size; the real loaders read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib_pulid.encoders import IDEncoder, IDFormer
from lib_pulid.vision import HEAD_DIM, tower_shapes
from tests.reference.cases import scaled

TOKEN_WIDTH = 64  # 2048 in the real files
TOWER_WIDTH = 128  # 1024 in the real tower
ID_COND = 512 + 768


# Of a FLUX site's weights: the product's name of each, and the file's.
STREAM = {
    "norm_id_weight": "norm1.weight", "norm_id_bias": "norm1.bias", "norm_image_weight": "norm2.weight",
    "norm_image_bias": "norm2.bias", "to_q": "to_q.weight", "to_kv": "to_kv.weight", "to_out": "to_out.weight",
}  # fmt: skip


class SmallFiles(NamedTuple):
    """What `write_files` wrote: two PuLID files and an EVA-CLIP file."""

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
    save_file(pulid_files(tuple(sdxl_widths), flux_width, sites)["v1.1"], files.sdxl)
    save_file(pulid_files(tuple(sdxl_widths), flux_width, sites, seed=6)["flux"], files.flux)
    write_tower(files.tower)
    return files


def write_tower(path: Path) -> None:
    tower = random_weights(tower_shapes(TOWER_WIDTH, 768), seed=4)
    torch.save({f"visual.{key}": value for key, value in tower.items()}, path)


@cache
def pulid_files(widths: tuple[int, ...], stream_width: int, sites: int, seed: int = 1) -> dict[str, dict[str, Tensor]]:
    """The contents of a PuLID file of each layout, "v1", "v1.1" and "flux"; sizes as in `write_files`."""
    pairs = nn.ModuleList(cross_attention_pair(width, TOKEN_WIDTH) for width in widths).state_dict()
    modules = nn.ModuleList(image_stream(stream_width, TOKEN_WIDTH) for _ in range(sites)).state_dict()
    v1, v11 = (random_weights(encoder.state_dict(), seed) for encoder in (id_encoder(), id_former()))
    layers = random_weights(pairs, 2)
    flux = flux_file(v11, random_weights(modules, 3))
    return {"v1": sdxl_file(v1, layers), "v1.1": sdxl_file(v11, layers), "flux": flux}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_weights(shapes: Mapping[str, Tensor | tuple[int, ...]], seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """`cases.scaled`, by torch's generator. gain: of matrices."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: tuple(like.shape) if isinstance(like, Tensor) else like for name, like in shapes.items()}
    made = scaled(sizes, lambda shape: torch.randn(shape, generator=generator))
    return {name: values * gain if values.ndim > 1 else values for name, values in made.items()}


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


def id_former(
    output_dim: int = TOKEN_WIDTH, vit_width: int = TOWER_WIDTH, dim: int = 64, hidden: int = 256, depth: int = 10,
    num_queries: int = 32,
) -> IDFormer:  # fmt: skip
    return IDFormer(
        dim=dim, depth=depth, inner_dim=2 * HEAD_DIM, ff_dim=4 * dim, num_queries=num_queries, output_dim=output_dim,
        id_mapping=[ID_COND, hidden, hidden, 5 * dim], mapping=[vit_width, vit_width, vit_width, dim],
    )  # fmt: skip


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
