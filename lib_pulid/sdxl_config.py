"""What diffusers has to know of an SDXL checkpoint in one file: the sizes of its parts, which the file does not tell.

diffusers would fetch them from the hub, each time if it may not keep them. The sizes are those that the SDXL paper
(arXiv 2307.01952) and the checkpoints' own tensors give. CLIP's vocabulary is not in here: it is taken from open_clip,
which the WebUIs bring, or from a tokenizer that another program has left on this machine.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lib_pulid import disk

_CLIP: Mapping[str, Any] = {
    "vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "attention_dropout": 0.0,
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
        "timestep_spacing": "leading", "steps_offset": 1,
    },
    "text_encoder/config.json": {
        **_CLIP, "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2/config.json": {
        **_CLIP, "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
        "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
        "num_attention_heads": 20, "projection_dim": 1280,
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", "sample_size": 128, "in_channels": 4, "out_channels": 4,
        "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL", "sample_size": 1024, "in_channels": 3, "out_channels": 3,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "scaling_factor": 0.13025, "force_upcast": True,
    },
}  # fmt: skip
_PADDING = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
_START, _END = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49152 - 256 - 2  # of the 49408 words: 256 bytes, each also at the end of a word, the merges, start and end
VOCABULARY = "CLIP's vocabulary (bpe_simple_vocab_16e6.txt.gz of open_clip, or a tokenizer's vocab.json and merges.txt)"


def write(folder: Path, hub_cache: Path) -> bool:
    """Writes all that diffusers asks for into a folder. Returns False where CLIP's vocabulary is nowhere to be found.

    hub_cache: of huggingface_hub, where other programs leave tokenizers.
    """
    for name, values in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    first, second = (folder / name for name in _PADDING)
    first.mkdir()
    if not _write_vocabulary(first, hub_cache):
        return False
    shutil.copytree(first, second)
    for tokenizer in (first, second):
        special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _PADDING[tokenizer.name]}
        settings = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (tokenizer / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return True


def _write_vocabulary(folder: Path, hub_cache: Path) -> bool:
    for other in _tokenizers(hub_cache):
        if all(disk.is_file(other / name) for name in ("vocab.json", "merges.txt")):
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(other / name, folder / name)
            return True
    for package in ("open_clip", "clip"):
        spec = find_spec(package)
        path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if spec and spec.origin else None
        if path is not None and disk.is_file(path):
            merges = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + _MERGES]
            (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
            (folder / "vocab.json").write_text(json.dumps(_vocabulary(merges)), encoding="utf-8")
            return True
    return False


def _tokenizers(hub_cache: Path) -> Iterator[Path]:
    """Where tokenizers of CLIP lie: in the hub's cache, and in Forge."""
    for repository in disk.listed(hub_cache):
        if repository.name.startswith("models--"):
            for snapshot in disk.listed(repository / "snapshots"):
                yield snapshot / "tokenizer"
                if "clip-vit" in repository.name.lower():
                    yield snapshot
    host = Path(__file__).parents[3]  # of extensions/sd-webui-pulid/lib_pulid
    for owner in disk.listed(host / "backend" / "huggingface"):
        for model in disk.listed(owner):
            if "xl" in model.name:
                yield model / "tokenizer"


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """Word -> number: the bytes as letters, the same at the end of a word, what the merges make, start and end."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    return {word: number for number, word in enumerate([*words, _START, _END])}
