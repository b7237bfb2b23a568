"""Trains the miniature's PuLID files: IDFormer and the layers of 70 (FLUX: 20) sites, beside the frozen base.

    python -m lib_pulid.training.adapter --folder .training --losses diffusion            the base of the ablation
    python -m lib_pulid.training.adapter --folder .training --losses diffusion,id
    python -m lib_pulid.training.adapter --folder .training --losses diffusion,id,alignment
    python -m lib_pulid.training.adapter --folder .training --losses diffusion,id,traits,scene    the last two not in it
    python -m lib_pulid.training.adapter --folder .training --family flux --begin PULID_FILE_FOR_SDXL

Each step shows one photo of a person to the encoders and asks for another image of the same person, whose prompt says
nothing of the looks and only half of the scene. Identity and alignment losses come in after the first third, or at once
where the adapter begins with a trained one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_pulid.encoders import SCALES
from lib_pulid.sites import Sites, find_sites
from lib_pulid.training import losses, world
from lib_pulid.training.base import FILES, Base, latents_of
from lib_pulid.training.base import load as load_base
from lib_pulid.training.crops import Faces, faces_of
from lib_pulid.training.dataset import SIZE, Drawn
from lib_pulid.training.export import save_half
from lib_pulid.training.flux import FluxBase
from lib_pulid.training.injection import FluxAdapter, RowIdentities, SDXLAdapter, id_former, inject_rows
from lib_pulid.training.loop import Run, arguments
from lib_pulid.training.photos import Photos, photos_of
from lib_pulid.training.sampled_faces import SampledFaces, expected_face
from lib_pulid.weights import load_adapter

ID_DROPOUT = 0.1
ID_WEIGHT = 1.0
SEMANTIC_WEIGHT, LAYOUT_WEIGHT = 10.0, 2.0  # of losses relative to the activations' power, see docs/training.md
SCENE_WEIGHT = {"sdxl": 300.0, "flux": 15.0}
TRAITS_WEIGHT = 8.0
LOSSES = ("diffusion", "id", "alignment", "scene", "traits")


@dataclass(frozen=True)
class Trainer:
    """All that a step works with."""

    base: Base | FluxBase
    adapter: SDXLAdapter | FluxAdapter
    photos: Photos
    data: Drawn
    latents: np.ndarray
    reader: SampledFaces
    losses: Sequence[str]

    @property
    def device(self) -> torch.device:
        """That of all networks; data is drawn and kept on the CPU."""
        return next(self.adapter.parameters()).device

    @cached_property
    def sites(self) -> Sites:
        return find_sites(self.base.denoiser)

    @cached_property
    def _faces(self) -> Faces:
        return faces_of(self.data)

    @cached_property
    def weights(self) -> list[Any]:
        return self.adapter.weights()

    # ------------------------------------------------------------ the standard branch

    def diffusion(self, step: int, batch: int, rng: np.random.Generator) -> Tensor:
        """Computes L_diff on other images of the people in the photos; at every sixth step of two in each."""
        pair = step % 6 == 5
        index, rows_of_people = self._draw(batch, pair, rng)
        clean = torch.from_numpy(self.latents[index]).float().to(self.device)
        prompts = [self._prompt(i, rng) for i in index]
        t = torch.from_numpy(rng.triangular(0, 1000, 1000, batch).astype(np.int64))  # who it is shows in much noise
        t, noise = t.to(self.device), self._noise(batch, step)
        with torch.no_grad():
            text = self.base.text(prompts)
        rows = [self._identities(who, rng, half if pair else None) for half, who in enumerate(rows_of_people)]
        with inject_rows(self.sites, self.weights, rows):
            v = self.base.predict(self.base.schedule.noisy(clean, noise, t), t, *text)
        return losses.diffusion_loss(v, self.base.schedule.target(clean, noise, t))

    def _draw(self, batch: int, pair: bool, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
        """Images [B], and for each person in them the rows of `photos` [B]; the photos themselves are left out.
        Where there are fewer images than B, some are drawn more than once."""
        pool = self._pools[int(pair)]
        chosen = rng.choice(pool, batch, replace=len(pool) < batch)
        rows = [[self.photos.row_of(number, rng) for number in self.data.numbers(index)] for index in chosen]
        return chosen, list(np.array(rows).T)

    @cached_property
    def _pools(self) -> tuple[list[int], list[int]]:
        """Returns images of one person and of two, of all of whom there are photos."""
        photos, people = set(self.photos.image.tolist()), set(self.photos.person.tolist())
        pools: tuple[list[int], list[int]] = ([], [])
        for index in range(len(self.data)):
            numbers = self.data.numbers(index)
            if index not in photos and people.issuperset(numbers):
                pools[len(numbers) - 1].append(index)
        return pools

    def _prompt(self, index: int, rng: np.random.Generator) -> str:
        if rng.random() < 0.1:
            return ""
        return world.describe(self.data.example(int(index))[1], None, _some(rng))

    def _identities(self, who: np.ndarray, rng: np.random.Generator, half: int | None = None) -> RowIdentities:
        tokens = self.photos.tokens(who, self.adapter.encoder, rng)
        dropped = torch.from_numpy(rng.random(len(who)) < ID_DROPOUT).to(self.device)
        tokens = torch.where(dropped[:, None, None], self.nobody(), tokens)
        return RowIdentities(tokens, None if half is None else _half(half).to(self.device), num_zero=20)

    def nobody(self) -> Tensor:
        """Computes the uncond identity, [1, N, D]: the encoder run on zeros."""
        width = self.photos.hidden.shape[-1]
        zeros = [torch.zeros(1, 2, width, device=self.device)] * SCALES
        return self.adapter.encoder(torch.zeros(1, 1280, device=self.device), zeros)

    def _noise(self, batch: int, seed: int) -> Tensor:
        """Draws noise for latents, the same numbers on all devices."""
        noise = torch.randn((batch, *self.latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
        return noise.to(self.device)

    # ------------------------------------------------------------ the contrastive, few-step branch

    def lightning(self, step: int, batch: int, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        """Computes L_align and L_id from pure noise under a new prompt, with and without the identity. count: of people
        in each image, 1 or 2."""
        who = rng.choice(len(self.photos), (count, batch), replace=False)
        scenes = [world.sample_scene(rng, count) for _ in range(batch)]
        said = [_some(rng) for _ in scenes]
        noise = self._noise(batch, 10**6 + step)
        with torch.no_grad():
            text = self.base.text([world.describe(scene, None, keep) for scene, keep in zip(scenes, said)])
        rows = [
            RowIdentities(
                self.photos.tokens(people, self.adapter.encoder, rng),
                _half(half).to(self.device) if count == 2 else None,
            )
            for half, people in enumerate(who)
        ]
        found: dict[str, Tensor] = {}
        if "alignment" in self.losses:
            found |= self._alignment(noise, text, rows, rng)
        if "id" in self.losses:
            people = self.photos.person[who]
            predict = partial(self._predict, text, rows)
            wanted = self.reader.read_people(self._faces, people.flatten(), rng)
            plain = partial(self.base.predict, context=text[0], pooled=text[1]) if "scene" in self.losses else None
            expected = [
                expected_face(self.data.person(one), *asked, half)
                for half, row in enumerate(people)
                for one, asked in zip(row, zip(scenes, said))
            ]
            seen = self.reader.losses(predict, noise, self.base.schedule, wanted, plain, expected)
            found |= {name: loss for name, loss in seen.items() if name in self.losses}
        return found

    def _alignment(self, noise: Tensor, text: tuple, rows: list, rng: np.random.Generator) -> dict[str, Tensor]:
        """Computes the pair of losses at one step of a sampling without the identity."""
        with torch.no_grad():
            t = torch.full((len(noise),), int(rng.integers(200, 1000)), device=self.device)
            plain = partial(self.base.predict, context=text[0], pooled=text[1])
            clean = losses.sample_few_steps(plain, noise, self.base.schedule)
            noisy = self.base.schedule.noisy(clean, noise, t)
            with losses.listen(self.base.denoiser) as without:
                self.base.predict(noisy, t, *text)
        with losses.listen(self.base.denoiser) as seen:
            self._predict(text, rows, noisy, t)
        semantic, layout = losses.alignment_losses(seen, without)
        return {"semantic": semantic, "layout": layout}

    def _predict(self, text: tuple, rows: list, x: Tensor, t: Tensor) -> Tensor:
        with inject_rows(self.sites, self.weights, rows):
            return self.base.predict(x, t, *text)


def _half(half: int) -> Tensor:
    mask = torch.zeros(SIZE // 8, SIZE // 8)
    mask[:, : SIZE // 16] = 1
    return mask if half == 0 else 1 - mask


def _some(rng: np.random.Generator) -> set[str]:
    return {name for name in world.SCENE_ATTRIBUTES if rng.random() < 0.5}


def fresh_adapter(base: Base | FluxBase, vit_width: int, seed: int) -> SDXLAdapter | FluxAdapter:
    """Builds an untrained adapter; on SDXL its keys start as the text's own, and its values at .3 of them."""
    found = find_sites(base.denoiser)
    widths, encoder = [site.width for site in found.sites], id_former(vit_width=vit_width, seed=seed)
    if found.family == "flux":
        return FluxAdapter(encoder, widths)
    adapter, text = SDXLAdapter(encoder, widths), dict(base.denoiser.named_parameters())
    for site, weights in zip(found.sites, adapter.weights()):
        weights.to_k.data.copy_(text[f"{site.name}.to_k.weight"].data)
        weights.to_v.data.copy_(0.3 * text[f"{site.name}.to_v.weight"].data)
    return adapter


def total(found: dict[str, Tensor], family: str) -> Tensor:
    """Computes L_diff + L_align + L_id and the losses on traits and scene, weighted."""
    weights = {"diffusion": 1.0, "id": ID_WEIGHT, "scene": SCENE_WEIGHT[family], "traits": TRAITS_WEIGHT}
    weights |= {"semantic": SEMANTIC_WEIGHT, "layout": LAYOUT_WEIGHT}
    return torch.stack([weights[name] * loss for name, loss in found.items()]).sum()


# ---------------------------------------------------------------- the run


def load_trainer(
    folder: Path,
    family: str,
    people: int,
    photos: tuple[int, int],
    wanted: Sequence[str],
    seed: int,
    device: str = "cpu",
) -> Trainer:
    """Loads everything that training needs from the files of the earlier steps; photos, of so many people and so many
    of each, are read on the CPU."""
    from lib_pulid.face_models import ArcFaceRecogniser
    from lib_pulid.faces import FaceModels
    from lib_pulid.training import sampled_faces
    from lib_pulid.vision import load_vision_tower

    base = load_base(family, folder, folder / f"{FILES[family]}.safetensors").to(device)
    made, reader = folder / "miniature", sampled_faces.load(folder, device)
    data = Drawn(folder, people)
    models = FaceModels(
        detector=reader.detector,
        recogniser=ArcFaceRecogniser(made / "recogniser.onnx"),
        landmarker=None,
        parser=reader.parser,
    )
    tower = load_vision_tower(next(made.glob("tower.*")))
    adapter = fresh_adapter(base, tower.trunk.embed_dim, seed).to(device)  # type: ignore[arg-type]

    seen = photos_of(folder, data, models, tower, *photos)
    return Trainer(base, adapter, seen, data, latents_of(folder, data), reader, wanted)


def begin_from(adapter: SDXLAdapter | FluxAdapter, path: Path) -> bool:
    """Copies a PuLID file's encoder into an adapter, and its sites if they are of the same family; says whether."""
    begun = load_adapter(path)
    adapter.encoder.load_state_dict(begun.encoder.state_dict())
    own = adapter.weights()
    if type(own[0]) is type(begun.sites[0]):
        for site, given in zip(own, begun.sites, strict=True):
            for name, weight in vars(site).items():
                weight.data.copy_(getattr(given, name))
        return True
    return False


def train(args: argparse.Namespace) -> Trainer:
    """Trains an adapter or resumes its training."""
    wanted = args.losses.split(",")
    if unknown := set(wanted) - set(LOSSES):
        raise SystemExit(f"unknown losses: {', '.join(sorted(unknown))}; there are {', '.join(LOSSES)}")
    if {"scene", "traits"} & set(wanted) and "id" not in wanted:
        raise SystemExit('the losses "scene" and "traits" need the images of "id"; name it, too')
    torch.manual_seed(args.seed)
    photos = args.photos, args.photos_each
    trainer = load_trainer(args.folder, args.family, args.people, photos, wanted, args.seed, args.device)
    has_sites = args.begin is not None and begin_from(trainer.adapter, args.begin)
    first = 0 if has_sites else args.steps // 3 + 1  # step with the losses of a sampled image
    run = Run(
        args.folder / f"adapter-{_name(args)}", trainer.adapter.train(), args.steps, args.rate, minutes=args.minutes
    )

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([7, args.seed, step])
        found = {"diffusion": trainer.diffusion(step, args.batch, rng)}
        if len(wanted) > 1 and step >= first and step % args.lightning_every == 0:
            found |= trainer.lightning(step, args.lightning_batch, rng, people_at(step, args.pairs_every))
        return total(found, args.family), {key: value.item() for key, value in found.items()}

    run.train(loss_of)
    run.finish()
    return trainer


def people_at(step: int, pairs_every: int) -> int:
    """Returns how many people are in each sampled image of a step: two at every so many steps (0: never), or one."""
    return 2 if pairs_every and step % pairs_every == pairs_every - 1 else 1


def _name(args: argparse.Namespace) -> str:
    parts = [args.losses.replace(",", "-"), str(args.seed)]
    return "-".join(parts if args.family == "sdxl" else [args.family, *parts])


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, steps=3000, batch=24, rate=1e-3)
    parser.add_argument("--family", choices=FILES, default="sdxl")
    parser.add_argument("--losses", default="diffusion,id,alignment", help="some of " + ", ".join(LOSSES))
    parser.add_argument("--photos", type=int, default=1500, help="number of people with a photo")
    parser.add_argument("--photos-each", type=int, default=1, help="photos of each of them, at most")
    parser.add_argument("--begin", type=Path, help="a PuLID file of the miniature; of the other family: its encoder")
    parser.add_argument("--lightning-batch", type=int, default=6)
    parser.add_argument("--lightning-every", type=int, default=2, help="steps")
    parser.add_argument("--pairs-every", type=int, default=0, help="steps with two people in an image; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    save_half(args.folder / f"pulid-{_name(args)}.safetensors", train(args).adapter.state())


if __name__ == "__main__":
    main()
