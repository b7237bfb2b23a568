"""Loads CLIP's image encoders, ViT-H-14 and ViT-bigG-14 of OpenCLIP, with transformers, for IP-Adapter.

What is read off them: official `IPAdapter.get_image_embeds` and `IPAdapterPlusXL.get_image_embeds` in
`ip_adapter/ip_adapter.py` (tencent-ailab/IP-Adapter, 62e4af9d).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib_pulid.errors import PulidError, WrongWeightsError
from lib_pulid.faces import CLIP_MEAN, CLIP_STD, normalise, to_tensor
from lib_pulid.files.checkpoint_header import unwrapped
from lib_pulid.files.state_dict import check_numbers, describe, read_state_dict

SIDE = 224
HEADS = 16  # of both; no shape in a file tells it
_VISION_HALF = ("vision_model.", "visual_projection.")  # of a file of the whole CLIP
_POSITIONS = "vision_model.embeddings.position_ids"  # 0, 1, 2, ...; in older files and older transformers


class ClipVision(nn.Module):
    """CLIP's image encoder. model: transformers' CLIPVisionModelWithProjection."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, pooled: bool) -> Tensor:
        """Encodes images [B, 3, 224, 224] as made by `clip_input`.

        Returns:
            float32; pooled: the projected image embedding [B, P], not normalized. Else the input of the last block,
            [B, 257, W], the class token first.
        """
        made = self.model(pixels.to(self.model.dtype), output_hidden_states=not pooled)
        return (made.image_embeds if pooled else made.hidden_states[-2]).float()


def clip_input(image: np.ndarray, side: int = SIDE) -> Tensor:
    """Converts an image, uint8 [H, W, 3], to CLIP's input [1, 3, side, side]: short edge `side`, bicubic, center, CLIP
    mean and std. Equal to transformers' CLIPImageProcessor with its defaults, which changed between versions."""
    from PIL import Image

    height, width = image.shape[:2]
    short = min(height, width)
    size = max(side, int(side * width / short)), max(side, int(side * height / short))
    small = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return normalise(to_tensor(small[top : top + side, left : left + side]), CLIP_MEAN, CLIP_STD)


def load_clip_vision(path: str | Path, device: str = "cpu") -> ClipVision:
    """Loads an image encoder strictly, in eval mode: float32 on the CPU, float16 on a GPU, as in the official code.

    Args:
        path: transformers' `model.safetensors` or `pytorch_model.bin` of a CLIPVisionModelWithProjection. All sizes
            are taken from its shapes, except the number of heads, 16.

    Raises:
        MissingWeightsError, WrongWeightsError: the message says what the file is.
    """
    path = Path(path)
    stored = read_state_dict(path)
    state = {key: value for key, value in unwrapped(stored).items() if key.startswith(_VISION_HALF)}
    if "vision_model.post_layernorm.weight" not in state or "visual_projection.weight" not in state:
        raise WrongWeightsError(
            f"{path.name} is {describe(stored)}. Needed: a CLIP image encoder with its projection, in transformers' "
            "format, as in h94/IP-Adapter."
        )
    state.pop(_POSITIONS, None)
    check_numbers(state, path)
    dtype = torch.float32 if str(device) == "cpu" else torch.float16
    try:
        from transformers import CLIPVisionModelWithProjection
    except ImportError as error:
        raise PulidError(f"transformers is needed for IP-Adapter, but cannot be imported ({error}).") from error
    try:
        with torch.random.fork_rng(devices=()):  # transformers draws initial weights; keep the host's random state
            model = CLIPVisionModelWithProjection(_config(state))
        own = {key: tensor for key, tensor in model.state_dict().items() if key == _POSITIONS}
        model.load_state_dict({**own, **{key: tensor.float() for key, tensor in state.items()}}, strict=True)
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise WrongWeightsError(f"{path.name} is not a CLIP image encoder: {str(error)[:300]}") from error
    return ClipVision(model).eval().requires_grad_(False).to(device=device, dtype=dtype)


def _config(state: Mapping[str, Tensor]) -> Any:
    from transformers import CLIPVisionConfig

    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    side = round((state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5) * patch
    if side != SIDE:
        raise ValueError(f"it reads {side} x {side} pixels, not {SIDE} x {SIDE}")
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(key.endswith(".layer_norm1.weight") for key in state),
        num_attention_heads=HEADS,
        projection_dim=state["visual_projection.weight"].shape[0],
        image_size=side,
        patch_size=patch,
        hidden_act="gelu",
    )
