"""Test only, Forge: a preprocessor that gives the IP-Adapter an image embedding without an image encoder."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

WIDTH = 64


def add_preprocessor() -> None:
    from modules_forge.shared import add_supported_preprocessor
    from modules_forge.supported_preprocessor import Preprocessor

    class Embedding(Preprocessor):
        def __init__(self) -> None:
            super().__init__()
            self.name = "test embedding"
            self.tags = ["IP-Adapter"]
            self.show_control_mode = False

        def __call__(self, input_image: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            given = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(int(input_image.sum()) % 1000))
            embeds = torch.stack((given, torch.zeros_like(given)))
            return {"embeds": embeds, "weight_type": "original", "noise": 0.0, "unfold_batch": False}

    add_supported_preprocessor(Embedding())


if importlib.util.find_spec("modules_forge") is not None:
    add_preprocessor()
