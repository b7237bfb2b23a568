"""Base models for the command line: diffusers pipelines, the user's own or small stand-ins.

The stand-ins are diffusers' own UNet2DConditionModel and FluxTransformer2DModel with the real number of blocks
(70 and 20 sites), narrow, with seeded random weights. They have no text encoder: a prompt becomes seeded noise.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib_pulid import disk, sdxl_config
from lib_pulid.catalog import hub_cache
from lib_pulid.errors import MissingWeightsError, WrongWeightsError
from lib_pulid.heads import checkpoint_family, read_head
from lib_pulid.hosts.diffusers import denoiser_of
from lib_pulid.injection import DenoiseStep
from lib_pulid.sites import Sites, find_sites, image_stream_site
from lib_pulid.standin import random_weights

if TYPE_CHECKING:
    from PIL import Image

STAND_INS = ("tiny-sdxl", "tiny-flux")
TEXT_WIDTH = 32
POOLED_WIDTH = 16


@dataclass(frozen=True)
class Base:
    """A pipeline and how to ask it. Args: family: "sdxl" or "flux". stand_in: whether its weights are random."""

    pipeline: Any
    family: str
    stand_in: bool

    @property
    def label(self) -> str:
        kind = f"{self.family.upper()} ({type(denoiser_of(self.pipeline)).__name__})"
        return f"stand-in {kind}, random weights" if self.stand_in else kind

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's computation."""
        return next(denoiser_of(self.pipeline).parameters()).dtype


def load_base(model: str, device: str = "cpu") -> Base:
    """`tiny-sdxl`, `tiny-flux`, a single-file SDXL checkpoint, or a diffusers folder (SDXL or FLUX).

    Raises:
        MissingWeightsError, WrongWeightsError.
    """
    if model in STAND_INS:
        return Base((_tiny_sdxl if model == "tiny-sdxl" else _tiny_flux)().to(device), model[5:], stand_in=True)
    path = disk.user_path(model)
    if not (disk.is_file(path) or disk.is_folder(path)):
        raise MissingWeightsError(f"There is no model at {path}. Give a checkpoint, a diffusers folder, or a stand-in.")
    import diffusers

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        if disk.is_folder(path):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, local_files_only=True)
        else:
            pipeline = _from_single_file(path, dtype)
    except MissingWeightsError:
        raise
    except Exception as error:  # diffusers raises many kinds; for the user it is one
        raise WrongWeightsError(f"{path.name} could not be opened as an SDXL or FLUX model: {error}") from error
    return Base(pipeline.to(device), "sdxl" if hasattr(pipeline, "unet") else "flux", stand_in=False)


def _from_single_file(path: Path, dtype: torch.dtype) -> Any:
    """Without asking the hub for what we know of SDXL; of others (inpainting, the refiner) diffusers asks it."""
    import diffusers

    load = diffusers.StableDiffusionXLPipeline.from_single_file
    shape = read_head(path).get("model.diffusion_model.input_blocks.0.0.weight", ())
    if checkpoint_family(path) != "sdxl" or shape[1:2] != (sdxl_config.CONFIGS["unet/config.json"]["in_channels"],):
        return load(str(path), torch_dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="pulid-sdxl-") as folder:
        if sdxl_config.write(Path(folder), hub_cache()):
            return load(str(path), torch_dtype=dtype, config=folder, local_files_only=True)
    try:
        return load(str(path), torch_dtype=dtype)
    except Exception as error:
        raise MissingWeightsError(
            f"{path.name} is an SDXL checkpoint; to read it, {sdxl_config.VOCABULARY} is needed, and is not on this "
            f"machine: pip install open_clip_torch, or go online once. ({str(error)[:200]})"
        ) from error


@torch.no_grad()
def paint(
    base: Base, prompt: str, *, seed: int = 0, steps: int = 20, size: int = 1024, guidance: float | None = None
) -> Image.Image:
    """One picture, size x size. guidance: CFG on SDXL (7), distilled guidance on FLUX (4)."""
    pipeline = base.pipeline
    default = 7.0 if base.family == "sdxl" else 4.0
    text = _stand_in_text(base.family, prompt) if base.stand_in else {"prompt": prompt}
    return pipeline(
        **text,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        guidance_scale=default if guidance is None else guidance,
        height=size,
        width=size,
    ).images[0]


# ---------------------------------------------------------------- calls to measure


@dataclass(frozen=True)
class BenchCall:
    """A call of a denoiser with random weights. Args: step: its place in the sampling and its rows."""

    name: str
    sites: Sites
    step: DenoiseStep
    run: Callable[[], Tensor]


def bench_call(family: str, device: str, dtype: torch.dtype, small: bool) -> BenchCall:
    """SDXL's UNet, or two double and four single blocks of FLUX, a tenth of it with as much of its sites.

    512 x 512 pixels on a CPU, 1024 x 1024 on a GPU. small: narrow stand-ins at 256 x 256.
    """
    side = 32 if small else 128 if device.startswith("cuda") else 64
    return (_bench_sdxl if family == "sdxl" else _bench_flux)(side, device, dtype, small)


def _bench_sdxl(side: int, device: str, dtype: torch.dtype, small: bool) -> BenchCall:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**(_TINY_SDXL if small else _SDXL))
    unet = _random(unet, device, dtype)
    text, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim
    pooled -= 6 * unet.config.addition_time_embed_dim
    like: Any = {"device": device, "dtype": dtype}
    added = {"text_embeds": torch.randn(2, pooled, **like), "time_ids": torch.zeros(2, 6, **like)}
    args = (torch.randn(2, 4, side, side, **like), torch.tensor(500, device=device), torch.randn(2, 77, text, **like))
    step = DenoiseStep(0.0, [False, True], (side, side))
    name = f"SDXL UNet, {8 * side} x {8 * side}, 2 rows" + ", narrow" * small
    return BenchCall(name, find_sites(unet), step, lambda: unet(*args, added_cond_kwargs=added).sample)


def _bench_flux(side: int, device: str, dtype: torch.dtype, small: bool) -> BenchCall:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    heads, head = (2, 32) if small else (24, 128)
    width, tokens = heads * head, (side // 2) ** 2
    with torch.device("meta"):
        blocks = FluxTransformerBlock(width, heads, head), FluxSingleTransformerBlock(width, heads, head)
    double, single = (_random(block, device, dtype) for block in blocks)
    once, twice = _Again(double), _Again(single)
    like: Any = {"device": device, "dtype": dtype}
    image, text, vec = (torch.randn(*s, width, **like) for s in ((1, tokens), (1, 512), (1,)))
    angles = torch.zeros(512 + tokens, head, device=device)
    given = {"temb": vec, "image_rotary_emb": (angles.cos(), angles.sin())}

    def run() -> Tensor:
        x, y = image, text
        for block in (once, double, twice, single, single, single):
            y, x = block(hidden_states=x, encoder_hidden_states=y, **given)
        return x

    sites = tuple(image_stream_site(name, block, width, 1) for name, block in (("double", once), ("single", twice)))
    name = f"FLUX, 2 double and 4 single blocks, {8 * side} x {8 * side}" + ", narrow" * small
    return BenchCall(name, Sites("flux", sites), DenoiseStep(0.0, True), run)


class _Again(torch.nn.Module):
    """A block under another name, so that only one of its calls is hooked."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self._block = [block]

    def forward(self, **kwargs: Any) -> Any:
        return self._block[0](**kwargs)


def _random(module: Any, device: str, dtype: torch.dtype) -> Any:
    """Of a module on "meta"; values of a size that keeps activations finite."""
    module = torch.nn.Module.to(module, dtype).to_empty(device=device)  # diffusers' own `to` warns of nothing
    module = module.eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1)
    return module


# ---------------------------------------------------------------- stand-ins


_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
_TINY_SDXL = _SDXL | {
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
    "attention_head_dim": (2, 2, 2),
    "cross_attention_dim": TEXT_WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * 8,
}


def _tiny_sdxl() -> Any:
    import diffusers

    unet = diffusers.UNet2DConditionModel(**_TINY_SDXL)
    return diffusers.StableDiffusionXLPipeline(
        vae=_tiny_vae(scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=_seeded(unet, 11),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )


def _tiny_flux() -> Any:
    import diffusers

    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_tiny_vae(scaling_factor=0.3611),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=_seeded(transformer, 12),
    )


def _tiny_vae(scaling_factor: float) -> Any:
    import diffusers

    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=scaling_factor,
        shift_factor=0.0,
    )
    return _seeded(vae, 13)


def _seeded(module: Any, seed: int) -> Any:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    module.load_state_dict(random_weights(shapes, seed), strict=False)  # buffers stay as they are
    return module.eval().requires_grad_(False)


def _stand_in_text(family: str, prompt: str) -> dict[str, Tensor]:
    """What a text encoder would give, as noise that depends on the prompt alone."""
    names = {"prompt_embeds": (1, 16, TEXT_WIDTH), "pooled_prompt_embeds": (1, POOLED_WIDTH)}
    negative = {f"negative_{name}": shape for name, shape in names.items()} if family == "sdxl" else {}
    texts = {**{name: (shape, prompt) for name, shape in names.items()}, **{n: (s, "") for n, s in negative.items()}}
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32((name[-13:] + text).encode())))
        for name, (shape, text) in texts.items()
    }
