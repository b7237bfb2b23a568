"""Trains the miniature's AutoencoderKL: factor 8, 4 channels, latents of standard deviation 1 after SDXL's scaling.

    python -m lib_pulid.training.autoencoder --folder .training [--minutes 30] [--decoder-only]

It has no attention, so 64 x 64 crops train it as well as whole images. Once the denoiser is trained on its latents the
encoder must not change: --decoder-only trains only the decoder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_pulid.training import world
from lib_pulid.training.dataset import HELD_OUT, SCENES_EACH, SIZE, Drawn, batches
from lib_pulid.training.export import save_half
from lib_pulid.training.layers import to_input
from lib_pulid.training.loop import Run, arguments

FILE = "autoencoder.safetensors"
SCALE = 0.13025  # SDXL's: latents are multiplied by it before the UNet sees them
KL_WEIGHT = 1e-6
FACE_WEIGHT = 4.0
NOISE = 0.02  # on the latents, of their own size, so that what a denoiser leaves does little harm
COLOR_STEPS = 600  # so long, three latent channels are led to the mean colors, which come late by themselves
NORM_GROUPS = (
    8  # at least 4 channels in each, as in SDXL; alone in its group a channel loses its mean, and so colors go
)


def build() -> Any:
    """Builds diffusers' AutoencoderKL in SDXL's layout, 2.4 M parameters."""
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 128),
        layers_per_block=1,
        norm_num_groups=NORM_GROUPS,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=SCALE,
        mid_block_add_attention=False,
    )


def load(path: Path) -> Any:
    """Builds it with the weights of a file."""
    from safetensors.torch import load_file

    vae = build()
    vae.load_state_dict(load_file(path))
    return vae


def reconstruction_loss(made: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Computes weighted L1 of pixels and half of L1 of neighbors' differences; squares of 8 x 8 means, for colors.

    Args:
        made, image: [B, 3, H, W] in -1..1. weight: [B, 1, H, W].
    """
    error = made - image
    loss = (weight * error.abs()).mean() + 4 * F.avg_pool2d(error, 8).pow(2).mean()
    for dim in (2, 3):
        loss = loss + 0.5 * (weight.narrow(dim, 1, weight.shape[dim] - 1) * error.diff(dim=dim).abs()).mean()
    return loss


def face_weights(data: Drawn) -> np.ndarray:
    """Returns the loss weights, float16 [N, SIZE, SIZE]: FACE_WEIGHT in faces, 1 around them, as faces are small."""
    weights = np.ones((len(data), SIZE, SIZE), np.float16)
    for index, weight in enumerate(weights):
        people, scene = data.example(index)
        for person, placement in zip(people, scene.placements):
            x0, y0, x1, y1 = world.face_box(person, placement).round().astype(int).clip(0, SIZE)
            weight[y0:y1, x0:x1] = FACE_WEIGHT
    return weights


def _crops(images: np.ndarray, chosen: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    corners = rng.integers(0, (SIZE - side) // 4 + 1, (len(chosen), 2)) * 4
    return np.stack([images[i, y : y + side, x : x + side] for i, (y, x) in zip(chosen, corners)])


@torch.no_grad()
def psnr(vae: Any, images: np.ndarray) -> float:
    """Computes the mean peak signal-to-noise ratio of images decoded from their latents, in dB."""
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


def train(args: argparse.Namespace) -> tuple[Any, Drawn]:
    """Trains or resumes training; returns the autoencoder and what it was trained on."""
    torch.manual_seed(0)
    data = Drawn(args.folder, args.people)
    images, weights = data.images(), face_weights(data)
    vae = build() if args.start is None else load(args.start)
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    name = "decoder" if args.decoder_only else "autoencoder"
    rate = 2e-3 if args.start is None else 1e-3
    run = Run(args.folder / name, vae.train(), args.steps, rate, minutes=args.minutes)
    stream = batches(len(images), args.batch, seed=3, start=run.step)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = next(stream)
        x = to_input(_crops(images, chosen, args.side, np.random.default_rng([4, step])))
        weight = torch.from_numpy(_crops(weights, chosen, args.side, np.random.default_rng([4, step]))).float()[:, None]
        mean = vae.encode(x).latent_dist.mean
        made = vae.decode(mean + NOISE * mean.std().detach() * torch.randn_like(mean)).sample
        spread = mean.pow(2).mean()
        loss = reconstruction_loss(made, x, weight) + KL_WEIGHT * spread
        if args.start is None and step < COLOR_STEPS:
            loss = loss + (1 - step / COLOR_STEPS) * (mean[:, :3] - F.avg_pool2d(x, 8)).abs().mean()
        return loss, {"spread": spread.item()}

    run.train(loss_of)
    return run.finish(), data


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, people=6000, steps=6000, batch=8)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--start", type=Path, help="weights to begin from, such as those that are shipped")
    parser.add_argument(
        "--decoder-only", action="store_true", help="leave the latents, and so the denoiser, as they are"
    )
    args = parser.parse_args()
    vae, data = train(args)
    if not args.decoder_only:
        whiten(vae, np.asarray(data.images()[:: max(1, len(data) // 256)][:256]))
    save_half(args.folder / FILE, vae.state_dict())
    held_out = Drawn(args.folder, 64, HELD_OUT).images()[::SCENES_EACH]
    print(f"held-out images: {psnr(load(args.folder / FILE), held_out):.2f} dB")


if __name__ == "__main__":
    main()
