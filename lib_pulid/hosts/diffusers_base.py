"""Loads base models for the command line as diffusers pipelines, from an SDXL checkpoint or a diffusers folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lib_pulid import disk
from lib_pulid.errors import MissingWeightsError, PulidError, WrongWeightsError
from lib_pulid.hosts.diffusers import denoiser_of
from lib_pulid.hosts.diffusers_checkpoint import load_sdxl

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Base:
    """A pipeline and its defaults.

    Args:
        family: "sdxl" or "flux".
        text: converts prompts, one per image, to the pipeline's arguments.
        size, steps, guidance: the defaults; guidance is CFG on SDXL, distilled guidance on FLUX.
        guidance_argument: the pipeline's name for it; "true_cfg_scale" for a FLUX without distilled guidance.
        name: for captions; by default the denoiser's class.
    """

    pipeline: Any
    family: str
    text: Callable[[list[str]], Mapping[str, Any]] = lambda prompts: {"prompt": prompts}
    size: int = 1024
    steps: int = 20
    guidance: float = 0.0
    guidance_argument: str = "guidance_scale"
    name: str = ""

    @property
    def denoiser(self) -> torch.nn.Module:
        """The pipeline's UNet or transformer."""
        return denoiser_of(self.pipeline)


def load_base(path: str | Path, device: str = "cpu") -> Base:
    """Opens a single-file SDXL checkpoint or a diffusers folder (SDXL or FLUX).

    Raises:
        MissingWeightsError, WrongWeightsError.
    """
    path = disk.user_path(path)
    if not (disk.is_file(path) or disk.is_folder(path)):
        raise MissingWeightsError(f"No model at {path}. Give a checkpoint, a diffusers folder, or miniature.")
    import diffusers

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        if disk.is_folder(path):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
        else:
            pipeline = load_sdxl(path, dtype)
    except (PulidError, ImportError):  # a missing package is not the file's fault
        raise
    except Exception as error:  # diffusers raises many kinds
        raise WrongWeightsError(f"{path.name} cannot be opened as an SDXL or FLUX model: {error}") from error
    is_sdxl = hasattr(pipeline, "unet")
    return Base(pipeline.to(device), "sdxl" if is_sdxl else "flux", guidance=7.0 if is_sdxl else 4.0)


@torch.no_grad()
def paint(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    size: int | None = None,
    guidance: float | None = None,
) -> list[Image.Image]:
    """Generates an image, size x size, of each prompt with its seed, in one batch. None: the base's default."""
    return base.pipeline(
        **base.text(list(prompts)),
        **{base.guidance_argument: base.guidance if guidance is None else guidance},
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=base.steps if steps is None else steps,
        height=size or base.size,
        width=size or base.size,
    ).images
