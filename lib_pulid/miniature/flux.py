"""Opens the miniature's FLUX as diffusers' FluxPipeline, with the text encoders and VAE of its SDXL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_pulid.errors import WrongWeightsError
from lib_pulid.files.state_dict import read_state_dict
from lib_pulid.training.flux import build_transformer


def load_flux(path: Path, sdxl: Any) -> Any:
    """Loads a transformer with diffusers' names. sdxl: a StableDiffusionXLPipeline, whose VAE and device it shares.

    Raises:
        WrongWeightsError.
    """
    import diffusers

    transformer = build_transformer()
    try:
        transformer.load_state_dict({name: tensor.float() for name, tensor in read_state_dict(path).items()})
    except RuntimeError as error:
        raise WrongWeightsError(f"{path.name} is not the miniature's FLUX: {error}") from error
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_without_shift(sdxl.vae),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval().to(sdxl.device),
    )


def _without_shift(vae: Any) -> Any:
    vae.register_to_config(shift_factor=0.0)  # FLUX's latents are shifted, SDXL's are not
    return vae


def prompt_encoder(sdxl: Any) -> Callable[[str], Mapping[str, Any]]:
    """Returns a function from a prompt to FluxPipeline's arguments, with an empty negative prompt for true CFG."""

    @torch.no_grad()
    def encode(prompt: str) -> Mapping[str, Tensor]:
        embeds, negative, pooled, negative_pooled = sdxl.encode_prompt(
            prompt, device=sdxl.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    return encode
