"""Writes the trained miniature in the file formats of the real models, in 16 bit.

    python -m lib_pulid.training.checkpoint --folder .training --pulid FILE --pack
    python -m lib_pulid.training.checkpoint --folder .training --family flux --pulid FILE --pack

The base becomes a single-file checkpoint with the names of SDXL's own code (sgm, open_clip), which diffusers, A1111 and
Forge read; FLUX's transformer keeps diffusers' names. The adapter is in the layout of pulid_v1.1.safetensors, or of
pulid_flux_v0.9.1.safetensors, already; of several files, the mean of the weights is written.
"""

from __future__ import annotations

import argparse
import lzma
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_pulid.training import world
from lib_pulid.training.export import halved, save_half

Rename = tuple[str, Callable[[re.Match[str]], str]]
State = Mapping[str, Tensor]

_PART = {"resnets": 0, "attentions": 1}
UNET: Sequence[Rename] = (
    (r"conv_in\.", lambda m: "input_blocks.0.0."),
    (r"time_embedding\.linear_(\d)\.", lambda m: f"time_embed.{2 * int(m[1]) - 2}."),
    (r"add_embedding\.linear_(\d)\.", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}."),
    (
        r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.",
        lambda m: f"input_blocks.{3 * int(m[1]) + int(m[3]) + 1}.{_PART[m[2]]}.",
    ),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv\.", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op."),
    (
        r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.",
        lambda m: f"output_blocks.{3 * int(m[1]) + int(m[3])}.{_PART[m[2]]}.",
    ),
    (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2."),
    (r"mid_block\.resnets\.(\d)\.", lambda m: f"middle_block.{2 * int(m[1])}."),
    (r"mid_block\.attentions\.0\.", lambda m: "middle_block.1."),
    (r"conv_norm_out\.", lambda m: "out.0."),
    (r"conv_out\.", lambda m: "out.2."),
)
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
UNET_RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}

VAE: Sequence[Rename] = (
    (r"(en|de)coder\.mid_block\.resnets\.(\d)\.", lambda m: f"{m[1]}coder.mid.block_{int(m[2]) + 1}."),
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"encoder.down.{m[1]}.block.{m[2]}."),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", lambda m: f"encoder.down.{m[1]}.downsample."),
    (r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}."),
    (r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"decoder.up.{3 - int(m[1])}.upsample."),
    (r"(en|de)coder\.conv_norm_out\.", lambda m: f"{m[1]}coder.norm_out."),
    (r"((en|de)coder\.conv_(in|out)|(post_)?quant_conv)\.", lambda m: m[0]),
)
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}

OPEN_CLIP: Sequence[Rename] = (
    (r"embeddings\.token_embedding\.", lambda m: "token_embedding."),
    (r"embeddings\.position_embedding\.weight", lambda m: "positional_embedding"),
    (r"encoder\.layers\.(\d+)\.self_attn\.", lambda m: f"transformer.resblocks.{m[1]}.attn."),
    (r"encoder\.layers\.(\d+)\.layer_norm(\d)\.", lambda m: f"transformer.resblocks.{m[1]}.ln_{m[2]}."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.", lambda m: f"transformer.resblocks.{m[1]}.mlp.c_fc."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.", lambda m: f"transformer.resblocks.{m[1]}.mlp.c_proj."),
    (r"final_layer_norm\.", lambda m: "ln_final."),
)


def sdxl_checkpoint(unet: Any, text: tuple[Any, Any], vae: Any, words: Collection[int]) -> dict[str, Tensor]:
    """Collects the modules' weights under SDXL's own names, float16.

    Args:
        unet, vae: diffusers' modules in SDXL's layout. text: CLIPTextModel, CLIPTextModelWithProjection.
        words: the token numbers that were trained; what the text encoders make of all others is left out.
    """
    first, second = ({k: v.detach().cpu() for k, v in model.state_dict().items()} for model in text)
    parts = {
        "model.diffusion_model.": _renamed(unet.state_dict(), UNET, UNET_RESNET),
        "conditioner.embedders.0.transformer.text_model.": {k.removeprefix("text_model."): v for k, v in first.items()},
        "conditioner.embedders.1.model.": _open_clip(second),
        "first_stage_model.": _renamed(vae.state_dict(), VAE, VAE_RESNET) | dict(_no_attention(vae)),
    }
    state = {root + name: tensor for root, part in parts.items() for name, tensor in part.items()}
    for name in [name for name in state if name.endswith("token_embedding.weight")]:
        known = torch.zeros(len(state[name]), 1)
        known[sorted(words)] = 1
        state[name] = state[name] * known
    state["v_pred"] = torch.zeros(0)  # how a checkpoint says that it predicts v
    return {name: halved(name, tensor) for name, tensor in state.items()}


def _renamed(state: State, table: Sequence[Rename], resnet: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        found = [(match, write) for pattern, write in table if (match := re.match(pattern, name))]
        if len(found) != 1:
            raise ValueError(f"{name} has no place in SDXL's layout")
        (match, write), rest = found[0], name[found[0][0].end() :]
        if ".resnets." in name:
            part, _, kind = rest.rpartition(".")
            rest = f"{resnet[part]}.{kind}"
        renamed[write(match) + rest] = tensor
    return renamed


def _open_clip(state: State) -> dict[str, Tensor]:
    """Renames transformers' weights to open_clip's, with queries, keys and values in one tensor."""
    inner = {k.removeprefix("text_model."): v for k, v in state.items() if k.startswith("text_model.")}
    apart = _renamed(inner, OPEN_CLIP, {})
    joined = {name: tensor for name, tensor in apart.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in apart:
        if ".q_proj." in name:
            parts = [apart[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
            joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    joined["text_projection"] = state["text_projection.weight"].T
    joined["logit_scale"] = torch.tensor(4.6052)
    return joined


def _no_attention(vae: Any) -> Iterator[tuple[str, Tensor]]:
    """Makes the attention in the middle of SDXL's VAE from zeros, which add nothing."""
    width = vae.config.block_out_channels[-1]
    for half in ("encoder", "decoder"):
        root = f"{half}.mid.attn_1"
        for part in ("q", "k", "v", "proj_out"):
            yield f"{root}.{part}.weight", torch.zeros(width, width, 1, 1)
            yield f"{root}.{part}.bias", torch.zeros(width)
        yield f"{root}.norm.weight", torch.ones(width)
        yield f"{root}.norm.bias", torch.zeros(width)


def world_tokens() -> set[int]:
    """Returns CLIP's tokens for all words of the drawn world's prompts, and for start, end and padding."""
    from open_clip.tokenizer import SimpleTokenizer

    words = " ".join([*sorted(world.vocabulary()), ","])
    return {*SimpleTokenizer().encode(words), 49406, 49407, 0}


def rounded(tensor: Tensor) -> Tensor:
    """Rounds float16 numbers to bfloat16's 7 bits after the point; they pack smaller."""
    return ((tensor.half().view(torch.int16) + 4) & ~7).view(torch.float16)


def pack(path: Path) -> None:
    """Replaces a file with NAME.xz, in which the rows of unknown words take no space."""
    packed = path.with_name(f"{path.name}.xz")
    # The bytes of a 16-bit number alternate, which lp and pb say.
    kind = {"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 1, "pb": 1}
    packed.write_bytes(lzma.compress(path.read_bytes(), filters=[kind]))
    path.unlink()
    print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB")


def mean_weights(states: Sequence[State]) -> State:
    """Averages the weights of several trainings that began with the same ones, float32 (arXiv 2203.05482).

    Raises:
        ValueError: their names differ.
    """
    if any(state.keys() != states[0].keys() for state in states):
        raise ValueError("files of different layouts have no mean")
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}


def main() -> None:
    """Runs the command line."""
    from safetensors.torch import load_file

    from lib_pulid.training import autoencoder
    from lib_pulid.training.base import FILES, Base

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".training"), help="with base and autoencoder")
    parser.add_argument("--family", choices=FILES, default="sdxl")
    parser.add_argument("--pulid", type=Path, nargs="+", help="what training.adapter has written; of several, the mean")
    parser.add_argument("--out", type=Path, default=Path("lib_pulid/miniature"))
    parser.add_argument("--pack", action="store_true", help="write FAMILY.safetensors.xz instead")
    args = parser.parse_args()
    state, path = load_file(args.folder / f"{FILES[args.family]}.safetensors"), args.out / f"{args.family}.safetensors"
    if args.family == "flux":
        root = "transformer."
        whole = {name.removeprefix(root): tensor for name, tensor in state.items() if name.startswith(root)}
    else:
        base, vae = Base(), autoencoder.load(args.folder / autoencoder.FILE)
        base.load_state_dict(state)
        whole = sdxl_checkpoint(base.unet, (base.text.first, base.text.second), vae, world_tokens())
    save_half(path, {name: rounded(tensor) for name, tensor in whole.items()})
    if args.pack:
        pack(path)
    if args.pulid:
        save_half(args.out / f"pulid_{args.family}.safetensors", mean_weights([load_file(one) for one in args.pulid]))


if __name__ == "__main__":
    main()
