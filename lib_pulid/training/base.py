"""Trains the miniature's base models: SDXL's UNet with all 70 cross-attentions, and its two text encoders with it.

    python -m lib_pulid.training.base --folder .training [--minutes 60]
    python -m lib_pulid.training.base --folder .training --begin .training/base.safetensors   its UNet alone, further
    python -m lib_pulid.training.base --folder .training --begin .training/base.safetensors --id-batch 6    with L_id
    ... --id-batch 6 --scene .training/base-before.safetensors    and scenes as this base makes them
    python -m lib_pulid.training.base --folder .training --family flux      then: FLUX's transformer, on the same text

Latents come from the trained autoencoder. Prompts are left out in a tenth of the images, for guidance. With --id-batch,
each step also samples so many images of people described in words, whose faces the recognizer has to recognize.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lib_pulid import disk
from lib_pulid.training import sampled_faces, schedule, world
from lib_pulid.training.autoencoder import FILE, NORM_GROUPS, SCALE
from lib_pulid.training.autoencoder import load as load_autoencoder
from lib_pulid.training.dataset import SIZE, Drawn, batches, made_once
from lib_pulid.training.layers import to_input
from lib_pulid.training.loop import Run, arguments
from lib_pulid.training.losses import diffusion_loss

if TYPE_CHECKING:
    from lib_pulid.training.flux import FluxBase

TEXT_WIDTHS = (24, 40)  # of the two text encoders, which diffusers tells apart by it; the UNet reads both side by side
TEXT_LAYERS = 3
TOKENS = 77
TIME_WIDTH = 256  # of each of the six size embeddings
PROMPT_DROPOUT = 0.1
ID_WEIGHT, SCENE_WEIGHT = {"sdxl": 0.3, "flux": 0.6}, 4.0
FILES = {"sdxl": "base", "flux": "base-flux"}


def build_unet() -> Any:
    """Builds diffusers' UNet in SDXL's layout at width 64: 70 cross-attentions, heads of 64."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        block_out_channels=(64, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 1, 1),  # diffusers' name for the number of heads
        cross_attention_dim=sum(TEXT_WIDTHS),
        norm_num_groups=NORM_GROUPS,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * TIME_WIDTH,
        sample_size=SIZE // 8,
    )


def build_text_encoders() -> tuple[Any, Any]:
    """Builds two CLIP text models instead of CLIP-L and OpenCLIP-bigG."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes: dict[str, Any] = {"num_hidden_layers": TEXT_LAYERS, "num_attention_heads": 1}
    sizes |= {"max_position_embeddings": TOKENS, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    one, two = (dict[str, Any](hidden_size=width, projection_dim=width) for width in TEXT_WIDTHS)
    first = CLIPTextModel(CLIPTextConfig(**sizes, **one, intermediate_size=4 * TEXT_WIDTHS[0], hidden_act="quick_gelu"))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(**sizes, **two, intermediate_size=4 * TEXT_WIDTHS[1], hidden_act="gelu", pad_token_id=0)
    )
    for model in (first, second):
        nn.init.normal_(_embedding(model).weight, std=0.5)
    return first, second


def _embedding(model: Any) -> nn.Embedding:
    return model.get_input_embeddings()


class TextEncoders(nn.Module):
    """Prompts -> what SDXL's UNet reads of them."""

    def __init__(self) -> None:
        super().__init__()
        from open_clip.tokenizer import SimpleTokenizer

        self.first, self.second = build_text_encoders()
        self.tokenizer = SimpleTokenizer()

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenizes prompts, [B, 77] for each encoder; they differ in the padding."""
        ids = torch.full((len(prompts), TOKENS), 49407)
        other = torch.zeros((len(prompts), TOKENS), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            words = [49406, *self.tokenizer.encode(prompt)[: TOKENS - 2], 49407]
            ids[row, : len(words)] = other[row, : len(words)] = torch.tensor(words)
        return ids, other

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encodes tokens: context [B, 77, 64] of the second to last layers, and pooled text [B, 40].

        An empty prompt gives zeros, as SDXL's negative prompt does where it is empty (diffusers'
        `force_zeros_for_empty_prompt`, and the WebUIs).
        """
        device = _embedding(self.first).weight.device
        ids, other = (t.to(device) for t in self.tokenize(prompts))
        one = self.first(ids, output_hidden_states=True)
        two = self.second(other, output_hidden_states=True)
        context = torch.cat((one.hidden_states[-2], two.hidden_states[-2]), dim=-1)
        says = torch.tensor([float(bool(prompt)) for prompt in prompts], device=device)[:, None]
        return context * says[:, :, None], two.text_embeds * says


class Base(nn.Module):
    """SDXL: the UNet and its text encoders."""

    schedule = schedule.sdxl()

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text = build_unet(), TextEncoders()

    @property
    def denoiser(self) -> nn.Module:
        """What identities go into."""
        return self.unet

    def blocks(self) -> Iterator[nn.Module]:
        """Returns the parts that are worth compiling one by one, since many are alike."""
        return (m for m in self.unet.modules() if type(m).__name__ == "BasicTransformerBlock")

    def predict(self, noisy: Tensor, t: Tensor, context: Tensor, pooled: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Predicts v [B, 4, h, w] of noisy latents at steps t [B]; sizes: [B, 6], SDXL's size conditions, unused."""
        if sizes is None:
            sizes = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=noisy.device).expand(len(noisy), 6)
        return self.unet(noisy, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes.float()}).sample


def sample_prompt(people: Sequence[world.Person], scene: world.Scene, rng: np.random.Generator) -> str:
    """Samples a prompt for a training image: with or without the people's looks, without some attributes, or empty."""
    if rng.random() < PROMPT_DROPOUT:
        return ""
    keep = set(world.SCENE_ATTRIBUTES)
    if rng.random() < 0.3:
        keep = {name for name in keep if rng.random() < 0.6}
    return world.describe(scene, people if rng.random() < 0.5 else None, keep)


@torch.no_grad()
def latents_of(folder: Path, data: Drawn) -> np.ndarray:
    """Encodes latents, float16 [N, 4, 16, 16], once, and keeps them beside the images; scaled for the UNet."""

    def write(path: Path) -> None:
        from tqdm import tqdm

        vae, images = load_autoencoder(folder / FILE), data.images()
        out = np.empty((len(images), 4, SIZE // 8, SIZE // 8), np.float16)
        for i in tqdm(range(0, len(images), 32), desc="encoding", mininterval=10):
            out[i : i + 32] = (vae.encode(to_input(images[i : i + 32])).latent_dist.mean * SCALE).numpy()
        np.save(path, out)

    return np.load(made_once(folder / f"latents-{data.seed}-{data.people}.npy", write))


def build(family: str, folder: Path) -> Base | FluxBase:
    """Builds an untrained base; FLUX's uses the text encoders that were trained with SDXL's."""
    if family == "sdxl":
        return Base()
    from safetensors.torch import load_file

    from lib_pulid.training.flux import FluxBase

    state = load_file(folder / "base.safetensors")
    text = TextEncoders()
    text.load_state_dict({k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")})
    return FluxBase(text.eval().requires_grad_(False))


def load(family: str, folder: Path, path: Path) -> Base | FluxBase:
    """Loads a trained base, with frozen weights."""
    from safetensors.torch import load_file

    base = build(family, folder)
    base.load_state_dict(load_file(path))
    return base.eval().requires_grad_(False)


def save(family: str, folder: Path, base: nn.Module) -> None:
    """Writes a base as training reads it: all weights, whole or not at all."""
    from safetensors.torch import save as to_bytes

    state = {name: tensor.contiguous().cpu() for name, tensor in base.state_dict().items()}
    disk.write(folder / f"{FILES[family]}.safetensors", to_bytes(state), replace=True)


def train(args: argparse.Namespace) -> Base | FluxBase:
    """Trains or resumes training; returns the base with averaged weights."""
    torch.manual_seed(1)
    data = Drawn(args.folder, args.people)
    latents = latents_of(args.folder, data)
    base, batch, device = build(args.family, args.folder).to(args.device), args.batch, args.device
    name = FILES[args.family]
    if args.begin:
        from safetensors.torch import load_file

        base.load_state_dict(load_file(args.begin))
        base.text.requires_grad_(False)  # FLUX reads the same
        name += "-further"
    run = Run(args.folder / name, base.train(), args.steps, rate=args.rate, minutes=args.minutes)
    stream = batches(len(latents), batch, seed=5, start=run.step)
    people = sampled_faces.PeopleInWords(data, sampled_faces.load(args.folder, device)) if args.id_batch else None
    before = load(args.family, args.folder, args.scene).to(device) if args.scene else None
    if args.compile:
        for block in (block for model in (base, before) if model is not None for block in model.blocks()):
            block.compile(dynamic=False)  # its parameters keep their names

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([6, step])
        chosen = next(stream)
        clean = torch.from_numpy(latents[chosen]).to(device).float()
        prompts = [sample_prompt(*data.example(i), rng) for i in chosen]
        t = torch.from_numpy(rng.permutation(batch) * 1000 // batch + rng.integers(0, 1000 // batch, batch)).to(device)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(step)).to(device)
        sizes = torch.from_numpy(rng.integers(0, 2 * SIZE, (batch, 6))).to(device)
        context, pooled = base.text(prompts)
        v = base.predict(base.schedule.noisy(clean, noise, t), t, context, pooled, sizes)
        loss = diffusion_loss(v, base.schedule.target(clean, noise, t))
        if people is None:
            return loss, {}
        found = {"diffusion": loss, **people.losses(base, args.id_batch, step, before)}
        weights = {"diffusion": 1.0, "id": ID_WEIGHT[args.family], "scene": SCENE_WEIGHT}
        weighted = torch.stack([weight * found[name] for name, weight in weights.items() if name in found])
        return weighted.sum(), {name: value.item() for name, value in found.items()}

    run.train(loss_of)
    return run.finish()  # type: ignore[return-value]


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, steps=10000, batch=32, rate=1e-3)
    parser.add_argument("--family", choices=FILES, default="sdxl")
    parser.add_argument("--begin", type=Path, help="a trained base, whose denoiser to train further")
    parser.add_argument("--id-batch", type=int, default=0, help="images with an ID loss; 0: none")
    parser.add_argument("--scene", type=Path, help="with --id-batch: a base whose images are to stay outside the head")
    parser.add_argument("--compile", action="store_true", help="compile the blocks; takes two minutes, needs g++")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    save(args.family, args.folder, train(args))


if __name__ == "__main__":
    main()
