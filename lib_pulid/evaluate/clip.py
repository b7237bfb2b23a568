"""Loads CLIP from a user's files, to measure how well an image fits its prompt, and how alike two images are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_pulid import disk
from lib_pulid.clip_vision import clip_input
from lib_pulid.errors import MissingWeightsError, PulidError, SettingError, WrongWeightsError


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model.

    image: uint8 RGB [H, W, 3] -> [D]. text -> [D]; longer texts are cut off.
    """

    name: str
    image: Callable[[np.ndarray], np.ndarray]
    text: Callable[[str], np.ndarray]


def open_clip_model(source: str, device: str = "cpu") -> Clip:
    """Opens transformers' CLIP from a folder, or open_clip's from "ARCHITECTURE=FILE", ViT-L-14=weights.pt.

    Raises:
        SettingError, MissingWeightsError, WrongWeightsError.
    """
    architecture, _, file = source.partition("=")
    path = disk.user_path(file or source)
    if not (disk.is_file(path) or disk.is_folder(path)):
        raise MissingWeightsError(f"--clip: nothing found at {path}. Give a folder of transformers, or ViT-L-14=FILE.")
    if disk.is_folder(path) == bool(file):
        raise SettingError(
            f"--clip is {source}; give a transformers folder, or open_clip's architecture and file: ViT-L-14=FILE."
        )
    try:
        return _open_clip(architecture, path, device) if file else _transformers(path, device)
    except (PulidError, ImportError):
        raise
    except Exception as error:  # both libraries raise many kinds
        raise WrongWeightsError(f"{path.name} cannot be opened as CLIP: {error}") from error


def _transformers(folder: Path, device: str) -> Clip:
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = CLIPModel.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32).eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    side, longest = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def image(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def text(words: str) -> Tensor:
        tokens = tokenizer([words], return_tensors="pt", truncation=True, max_length=longest).to(device)
        return model.text_projection(model.text_model(**tokens).pooler_output)

    return _clip(folder.name, image, text, side, device)


def _open_clip(architecture: str, path: Path, device: str) -> Clip:
    import open_clip

    if architecture not in open_clip.list_models():
        raise SettingError(
            f"--clip: open_clip has no architecture {architecture}. Use one of {', '.join(open_clip.list_models())}."
        )
    model = open_clip.create_model(architecture, pretrained=str(path), device=device).eval()
    tokenizer = open_clip.get_tokenizer(architecture)
    side: Any = model.visual.image_size

    def text(words: str) -> Tensor:
        return model.encode_text(tokenizer([words]).to(device))

    return _clip(architecture, model.encode_image, text, side[0] if isinstance(side, tuple) else side, device)


def _clip(name: str, image: Callable[[Tensor], Tensor], text: Callable[[str], Tensor], side: int, device: str) -> Clip:
    @torch.no_grad()
    def of_image(pixels: np.ndarray) -> np.ndarray:
        return image(clip_input(pixels, side).to(device))[0].float().cpu().numpy()

    @cache
    @torch.no_grad()
    def of_text(words: str) -> np.ndarray:
        return text(words)[0].float().cpu().numpy()

    return Clip(name, of_image, of_text)
