"""Builds the miniature's FLUX: a rectified-flow transformer of 19 double and 38 single blocks, at a small width.

It reads the text encoders that were trained with the miniature's SDXL, in the places of T5 and CLIP-L, and draws in
the same latents, of which it takes 2 x 2 as one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_pulid.errors import WrongWeightsError
from lib_pulid.files.state_dict import read_state_dict
from lib_pulid.training import schedule

HEADS, HEAD_WIDTH = 2, 24
CHANNELS = 4
CONTEXT, POOLED = 64, 40


def build_transformer() -> Any:
    """Builds diffusers' FLUX transformer at width 48, with 20 sites; at first, no block adds anything."""
    import diffusers

    model: Any = diffusers.FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=False,
        axes_dims_rope=(4, 10, 10),
    )
    for name, parameter in model.named_parameters():
        if ".norm" in name and ".linear." in name or name.startswith(("proj_out", "norm_out")):
            nn.init.zeros_(parameter)
    return model


class FluxBase(nn.Module):
    """FLUX: the transformer; text: `base.TextEncoders`, trained before and left as they are."""

    schedule = schedule.flux()

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.transformer, self.text = build_transformer(), text

    @property
    def denoiser(self) -> nn.Module:
        """What identities go into."""
        return self.transformer

    def blocks(self) -> Iterator[nn.Module]:
        """Returns the parts that are worth compiling one by one, since many are alike."""
        yield from self.transformer.transformer_blocks
        yield from self.transformer.single_transformer_blocks

    def predict(self, noisy: Tensor, t: Tensor, context: Tensor, pooled: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Predicts v [B, 4, h, w] of noisy latents at steps t [B]; FLUX has no size conditions."""
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack((torch.zeros_like(row), row, column), -1).reshape(-1, 3).to(noisy)
        v = self.transformer(
            hidden_states=pack(noisy),
            timestep=self.schedule.sigmas.to(t.device)[t],
            encoder_hidden_states=context,
            pooled_projections=pooled,
            txt_ids=torch.zeros(context.shape[1], 3).to(noisy),
            img_ids=places,
        ).sample
        return unpack(v, height, width)


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, 2h, 2w] -> tokens [B, h w, 4C], as diffusers' FluxPipeline does."""
    batch, channels, height, width = latents.shape
    parts = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, height width, 4C] -> latents [B, C, 2 height, 2 width]."""
    parts = tokens.unflatten(1, (height, width)).unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    return parts.flatten(4, 5).flatten(2, 3)


# ---------------------------------------------------------------- as a pipeline


def load_pipeline(path: Path, sdxl: Any) -> Any:
    """Loads a transformer with diffusers' names into a FluxPipeline.

    sdxl: a StableDiffusionXLPipeline, whose VAE and device it shares.

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


def prompt_encoder(sdxl: Any) -> Callable[[list[str]], Mapping[str, Any]]:
    """Returns a function from prompts to FluxPipeline's arguments, with empty negative prompts for true CFG."""

    @torch.no_grad()
    def encode(prompts: list[str]) -> Mapping[str, Tensor]:
        embeds, negative, pooled, negative_pooled = sdxl.encode_prompt(
            prompts, device=sdxl.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    return encode
