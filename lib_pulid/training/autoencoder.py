"""Trains the miniature's AutoencoderKL: factor 8, 4 channels, latents of standard deviation 1 after SDXL's scaling.

    python -m lib_pulid.training.autoencoder --folder .training [--minutes 30] [--decoder-only]

It has no attention, so 64 x 64 crops train it as well as whole images. Once the denoiser is trained on its latents the
encoder must not change: --decoder-only goes on with the decoder alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_pulid.training.dataset import HELD_OUT, SCENES_EACH, SIZE, Drawn, batches
from lib_pulid.training.loop import Run

SCALE = 0.13025  # SDXL's: latents are multiplied by it before the UNet sees them
KL_WEIGHT = 1e-6
COLOR_STEPS = 600  # so long, three latent channels are led to the mean colors, which come late by themselves
NORM_GROUPS = (
    8  # at least 4 channels in each, as in SDXL; alone in its group a channel loses its mean, and so colors go
)


def build() -> Any:
    """diffusers' AutoencoderKL in SDXL's layout, 1.0 M parameters."""
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=NORM_GROUPS,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=SCALE,
        mid_block_add_attention=False,
    )


def to_input(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(made: Tensor, image: Tensor) -> Tensor:
    """L1 of pixels, of 8 x 8 means, and half of L1 of differences between neighbors, [B, 3, H, W] in -1..1."""
    loss = (made - image).abs().mean() + F.avg_pool2d(made - image, 8).abs().mean()
    for dim in (2, 3):
        loss = loss + 0.5 * (made.diff(dim=dim) - image.diff(dim=dim)).abs().mean()
    return loss


def _crops(images: np.ndarray, chosen: np.ndarray, side: int, rng: np.random.Generator) -> Tensor:
    corners = rng.integers(0, (SIZE - side) // 4 + 1, (len(chosen), 2)) * 4
    return to_input(np.stack([images[i, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners)]))


@torch.no_grad()
def psnr(vae: Any, images: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of images decoded from their latents, in dB."""
    x = to_input(images)
    made = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return float((10 * torch.log10(4 / (made - x).pow(2).mean(dim=(1, 2, 3)))).mean())


@torch.no_grad()
def whiten(vae: Any, images: np.ndarray) -> None:
    """Turns and scales the latents, in the 1 x 1 convolutions around them: SCALE then makes each channel 1 wide."""
    mean = torch.cat([vae.encode(to_input(images[i : i + 16])).latent_dist.mean for i in range(0, len(images), 16)])
    flat = mean.permute(1, 0, 2, 3).flatten(1)  # [4, N]
    center = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    forward = (vectors / values.sqrt()).T / SCALE  # latent = forward (z - center)
    back = torch.linalg.inv(forward)
    quant, post = vae.quant_conv, vae.post_quant_conv
    w, b = quant.weight[:4, :, 0, 0].clone(), quant.bias[:4].clone()
    quant.weight[:4, :, 0, 0], quant.bias[:4] = forward @ w, forward @ (b - center)
    # The variance is never used for sampling here; a small one keeps hosts that do sample close to the mean.
    quant.weight[4:], quant.bias[4:] = 0.0, -12.0
    w = post.weight[:, :, 0, 0].clone()
    post.weight[:, :, 0, 0], post.bias[:] = w @ back, post.bias + w @ center


def train(
    folder: Path, people: int, steps: int, batch: int, side: int, minutes: float | None, decoder_only: bool
) -> Any:
    """Trains or goes on training; returns the autoencoder."""
    torch.manual_seed(0)
    images = Drawn(folder, people).images()
    test = Drawn(folder, 64, HELD_OUT).images()[::SCENES_EACH]
    vae = build()
    name = "autoencoder"
    if decoder_only:
        from safetensors.torch import load_file

        vae.load_state_dict(load_file(folder / "autoencoder.safetensors"))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        name = "decoder"
    run = Run(folder / name, vae.train(), steps, rate=2e-3 if not decoder_only else 5e-4, minutes=minutes)
    stream = batches(len(images), batch, seed=3, start=run.step)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x = _crops(images, next(stream), side, np.random.default_rng([4, step]))
        latent = vae.encode(x).latent_dist
        z = (
            latent.mean.detach()
            if decoder_only
            else latent.mean + 0.02 * latent.mean.std() * torch.randn_like(latent.mean)
        )
        loss = reconstruction_loss(vae.decode(z).sample, x)
        guide = max(0.0, 1 - step / COLOR_STEPS)
        if guide and not decoder_only:
            loss = loss + guide * (latent.mean[:, :3] - F.avg_pool2d(x, 8)).abs().mean()
        spread = latent.mean.pow(2).mean()
        return loss + KL_WEIGHT * spread, {"spread": spread.item()}

    run.train(loss_of)
    return run.finish(), test, images


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".training"))
    parser.add_argument("--people", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--decoder-only", action="store_true")
    args = parser.parse_args()
    vae, test, images = train(**vars(args))
    from safetensors.torch import save_file

    if not args.decoder_only:
        whiten(vae, np.asarray(images[:: max(1, len(images) // 256)][:256]))
    print(f"held-out images: {psnr(vae, test):.2f} dB")
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, args.folder / "autoencoder.safetensors")


if __name__ == "__main__":
    main()
