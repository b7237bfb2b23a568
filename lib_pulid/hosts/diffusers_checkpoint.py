"""Opens a single-file SDXL checkpoint in diffusers, without the hub.

diffusers needs a configuration beside the weights and would download it. Almost all of it follows from the file's
shapes; the rest is the same for every SDXL. The tokenizer is CLIP's merge table.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lib_pulid import disk
from lib_pulid.errors import MissingWeightsError, WrongWeightsError
from lib_pulid.files.checkpoint_header import read_header, under
from lib_pulid.files.state_dict import read_state_dict

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPEN_CLIP = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
# One tensor of each part of a complete checkpoint.
_PARTS = {
    "the UNet": f"{_UNET}input_blocks.0.0.weight",
    "the size and text conditions of SDXL's base": f"{_UNET}label_emb.0.0.weight",
    "the text encoder CLIP-L": f"{_CLIP}embeddings.token_embedding.weight",
    "the text encoder OpenCLIP-bigG": f"{_OPEN_CLIP}token_embedding.weight",
    "the VAE": f"{_VAE}decoder.conv_in.weight",
}
_TIME_WIDTH = 256  # of each of six sizes: original height and width, the crop's corner, target height and width
_HEAD = 64  # width of an attention head
_START, _END = 49406, 49407  # tokens; CLIP's last
_VOCABULARY = 49408


def load_sdxl(path: Path, dtype: torch.dtype) -> Any:
    """Loads a checkpoint with SDXL's own names as diffusers' StableDiffusionXLPipeline.

    Raises:
        MissingWeightsError, WrongWeightsError.
    """
    import diffusers

    shapes = read_header(path) or {name: tuple(tensor.shape) for name, tensor in read_state_dict(path).items()}
    if lacking := [part for part, name in _PARTS.items() if name not in shapes]:
        raise WrongWeightsError(f"{path.name} is not a complete SDXL checkpoint; it lacks {', '.join(lacking)}.")
    channels = shapes[_PARTS["the UNet"]][1]
    if channels != 4:
        raise WrongWeightsError(f"{path.name} is for inpainting ({channels} channels). Use a text-to-image checkpoint.")
    with TemporaryDirectory(prefix="pulid-config-") as folder, _quiet():
        write_configuration(Path(folder), shapes)
        return diffusers.StableDiffusionXLPipeline.from_single_file(
            str(path), config=folder, torch_dtype=dtype, local_files_only=True
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides diffusers' progress bar of loading a pipeline."""
    from diffusers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def write_configuration(folder: Path, shapes: Shapes) -> None:
    """Writes the configuration that diffusers reads beside a checkpoint of these shapes."""
    for name, config in configuration(shapes).items():
        _write_json(folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"), config)
    merges = merge_table()
    write_tokenizer(folder / "tokenizer", merges, "<|endoftext|>")
    write_tokenizer(folder / "tokenizer_2", merges, "!")
    index: Config = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    index |= {name: ["diffusers", kind] for name, kind in _DIFFUSERS.items()}
    index |= {name: ["transformers", kind] for name, kind in _TRANSFORMERS.items()}
    _write_json(folder / "model_index.json", index)


_DIFFUSERS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "EulerDiscreteScheduler"}
_TRANSFORMERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
_TRANSFORMERS |= {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}


def configuration(shapes: Shapes) -> dict[str, Config]:
    """Returns diffusers' configuration of each part of an SDXL checkpoint."""
    return {
        "unet": _unet(under(shapes, _UNET)),
        "vae": _vae(under(shapes, _VAE)),
        "scheduler": _scheduler(shapes),
        "text_encoder": _clip(under(shapes, _CLIP)),
        "text_encoder_2": _open_clip(under(shapes, _OPEN_CLIP)),
    }


def _unet(shapes: Shapes) -> Config:
    levels = list(_levels(shapes))
    widths, depths, blocks = zip(*levels)
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    context = next(shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    return {
        "_class_name": _DIFFUSERS["unet"],
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": blocks[0],
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "transformer_layers_per_block": [max(1, depth) for depth in depths],
        "attention_head_dim": [_heads(width) for width in widths],  # diffusers' name for their number
        "cross_attention_dim": context,
        "use_linear_projection": True,
        "norm_num_groups": _groups(min(widths), 8),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TIME_WIDTH,
        "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        "sample_size": 128,
    }


def _levels(shapes: Shapes) -> Iterator[tuple[int, int, int]]:
    """Yields, for each resolution from the finest: width, transformer layers per attention, residual blocks."""
    number, width, depth, blocks = 1, 0, 0, 0
    while f"input_blocks.{number}.0.op.weight" in shapes or f"input_blocks.{number}.0.in_layers.0.weight" in shapes:
        if f"input_blocks.{number}.0.op.weight" in shapes:
            yield width, depth, blocks
            blocks = 0
        else:
            width = shapes[f"input_blocks.{number}.0.out_layers.3.weight"][0]
            depth, blocks = _count(shapes, f"input_blocks.{number}.1.transformer_blocks."), blocks + 1
        number += 1
    yield width, depth, blocks


def _vae(shapes: Shapes) -> Config:
    levels = _count(shapes, "encoder.down.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return {
        "_class_name": _DIFFUSERS["vae"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, "encoder.down.0.block."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": _groups(min(widths), 4),
        "scaling_factor": 0.13025,
        "sample_size": 1024,
        "force_upcast": True,
    }


def _scheduler(shapes: Shapes) -> Config:
    """Returns the scheduler's configuration. The tensors v_pred and ztsnr mark v prediction and zero terminal SNR."""
    pure_noise = "ztsnr" in shapes
    return {
        "_class_name": _DIFFUSERS["scheduler"],
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction" if "v_pred" in shapes else "epsilon",
        "rescale_betas_zero_snr": pure_noise,
        "timestep_spacing": "trailing" if pure_noise else "leading",
        "steps_offset": 1,
    }


def _clip(shapes: Shapes) -> Config:
    layers = under(shapes, "encoder.layers.")
    return _text("CLIPTextModel", shapes["embeddings.token_embedding.weight"], layers, "mlp.fc1.weight", "quick_gelu")


def _open_clip(shapes: Shapes) -> Config:
    layers = under(shapes, "transformer.resblocks.")
    text = _text("CLIPTextModelWithProjection", shapes["token_embedding.weight"], layers, "mlp.c_fc.weight", "gelu")
    return text | {"projection_dim": shapes["text_projection"][1]}


def _text(kind: str, table: tuple[int, ...], layers: Shapes, inner: str, activation: str) -> Config:
    words, width = table
    return {
        "model_type": "clip_text_model",
        "architectures": [kind],
        "vocab_size": words,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": layers[f"0.{inner}"][0],
        "num_hidden_layers": _count(layers, ""),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "bos_token_id": _START,
        "eos_token_id": _END,
    }


def _heads(width: int) -> int:
    return max(1, width // _HEAD)


def _groups(width: int, at_least: int) -> int:
    """Returns a normalization's number of groups: 32, or fewer for narrow layers; no shape tells."""
    return max(1, min(32, width // at_least))


def _count(shapes: Shapes, prefix: str) -> int:
    """Counts the different numbers after a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


# ---------------------------------------------------------------- tokenizer


def merge_table() -> list[str]:
    """Reads CLIP's merges, "a b" each, in order, from the open_clip package or the hub's cache.

    Raises:
        MissingWeightsError: they are in neither.
    """
    spec = find_spec("open_clip")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder, "bpe_simple_vocab_16e6.txt.gz")
        if disk.is_file(path):
            return read_merges(path)
    from huggingface_hub import try_to_load_from_cache

    for repo in ("stabilityai/stable-diffusion-xl-base-1.0", "openai/clip-vit-large-patch14"):
        for name in ("tokenizer/merges.txt", "merges.txt"):
            if isinstance(found := try_to_load_from_cache(repo, name), str):
                lines = Path(found).read_text(encoding="utf-8").split("\n")
                return [line for line in lines if line and not line.startswith("#version")]
    raise MissingWeightsError(
        "A single-file checkpoint needs CLIP's vocabulary, which comes with open_clip: pip install open-clip-torch"
    )


def read_merges(path: Path) -> list[str]:
    """Reads the merges from open_clip's bpe_simple_vocab_16e6.txt.gz."""
    return gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 1 + _VOCABULARY - 2 * 256 - 2]


def write_tokenizer(folder: Path, merges: list[str], padding: str) -> None:
    """Writes CLIP's tokenizer as transformers reads it. padding: the token that fills a short prompt."""
    symbols = list(_byte_symbols())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    if len(words) != _VOCABULARY:
        raise WrongWeightsError(f"CLIP's merge table gives {len(words)} words, not {_VOCABULARY}; reinstall open_clip.")
    _write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    end = "<|endoftext|>"
    tokens = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": padding}
    kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    _write_json(folder / "tokenizer_config.json", {**kind, **tokens})


def _byte_symbols() -> Iterator[str]:
    """Yields CLIP's byte alphabet: printable Latin-1 bytes map to themselves, the others to code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from map(chr, printable)
    yield from map(chr, range(256, 512 - len(printable)))


def _write_json(path: Path, value: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
