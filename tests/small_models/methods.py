"""Small seeded random weights in the file formats of InstantID and IP-Adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lib_pulid.encoders import HEAD_DIM
from lib_pulid.projectors import Resampler
from tests.small_models import TOKEN_WIDTH, random_weights

FACE = 512  # width of a face embedding


def resampler(input_dim: int, output_dim: int = TOKEN_WIDTH, num_queries: int = 16, dim: int = HEAD_DIM) -> Resampler:
    return Resampler(
        dim=dim, depth=4, inner_dim=2 * HEAD_DIM, ff_dim=4 * dim, num_queries=num_queries, output_dim=output_dim,
        input_dim=input_dim,
    )  # fmt: skip


def layers(widths: Sequence[int], token_width: int = TOKEN_WIDTH, seed: int = 2, gain: float = 1.0) -> dict[str, Tensor]:
    """ "{i}.to_k_ip.weight" and "{i}.to_v_ip.weight", i = 1, 3, 5, ..."""
    shapes = {f"{2 * n + 1}.to_{x}_ip.weight": (width, token_width) for n, width in enumerate(widths) for x in "kv"}
    return random_weights(shapes, seed, gain)


def method_files(widths: Sequence[int], token_width: int = TOKEN_WIDTH) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The contents of each method's file, nested as the pickles are."""
    of_faces = [random_weights(resampler(FACE, token_width).state_dict(), seed) for seed in (1, 11)]
    return {
        "instantid": {"image_proj": of_faces[0], "ip_adapter": layers(widths, token_width, 2)},
        "portrait_unnorm": {"image_proj": of_faces[1], "ip_adapter": half(layers(widths, token_width, 12))},
    }


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
