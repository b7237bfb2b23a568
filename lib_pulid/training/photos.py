"""Encodes reference photos for training an adapter, once, with the product's own encoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lib_pulid.encoders import SCALES
from lib_pulid.errors import NoFaceError
from lib_pulid.faces import FaceModels, read_face
from lib_pulid.readings import face_features
from lib_pulid.training.dataset import SCENES_EACH, Drawn, made_once
from lib_pulid.vision import VisionTower

PATCHES = 96  # of the vision tower's 576 that a training step reads


@dataclass(frozen=True)
class Photos:
    """Photos of people, in which a face was found.

    Args:
        id_cond: [P, 1280]. hidden: float16 [P, 5, 577, width], a memory map.
        person: [P], number in the data set, ascending. image: [P], index of the photo in the data set.
    """

    id_cond: Tensor
    hidden: np.ndarray
    person: np.ndarray
    image: np.ndarray

    def __len__(self) -> int:
        return len(self.person)

    def row_of(self, person: int, rng: np.random.Generator) -> int:
        """Chooses one of a person's photos: its row."""
        first, end = (np.searchsorted(self.person, person, side) for side in ("left", "right"))
        return int(rng.integers(first, end))

    def tokens(self, rows: np.ndarray, encoder: nn.Module, rng: np.random.Generator) -> Tensor:
        """Computes identity tokens [B, N, D] of photos [B], with gradients, from a random part of the patches."""
        chosen = np.concatenate(([0], 1 + np.sort(rng.choice(576, PATCHES, replace=False))))
        device = next(encoder.parameters()).device
        hidden = torch.from_numpy(self.hidden[rows][:, :, chosen].astype(np.float32)).to(device)
        return encoder(self.id_cond[rows].to(device), [hidden[:, scale] for scale in range(SCALES)])


def photos_of(folder: Path, data: Drawn, models: FaceModels, tower: VisionTower, count: int, each: int) -> Photos:
    """Loads up to `each` photos of each of the first `count` people, computed on first use (.2 to .3 s each) and kept
    in `folder`."""
    facts, hidden = (folder / f"photos-{count}-{each}{end}" for end in (".npz", ".npy"))
    found = np.load(made_once(facts, lambda part: _compute(part, hidden, data, models, tower, count, each)))
    size = (len(found["person"]), *found["shape"])
    mapped = np.lib.format.open_memmap(hidden, "r")[: size[0]]
    return Photos(torch.from_numpy(found["id_cond"]), mapped, found["person"], found["image"])


def _compute(
    facts: Path, hidden: Path, data: Drawn, models: FaceModels, tower: VisionTower, count: int, each: int
) -> None:
    from tqdm import tqdm

    images = data.images()
    width = tower.trunk.embed_dim
    out = np.lib.format.open_memmap(hidden, "w+", np.float16, (count * each, SCALES, 577, width))
    conds: list[np.ndarray] = []
    people: list[int] = []
    indices: list[int] = []
    for person in tqdm(range(count), desc="photos", mininterval=10):
        alone = [i for i in range(SCENES_EACH * person, SCENES_EACH * (person + 1)) if len(data.numbers(i)) == 1]
        for index in alone[:each]:
            try:
                face = read_face(np.asarray(images[index]), models)
            except NoFaceError:
                continue
            features = face_features([face], tower)[0]
            assert features.id_cond is not None
            out[len(people)] = torch.cat(features.vit_hidden).half().numpy()
            conds.append(features.id_cond[0].numpy())
            people.append(person)
            indices.append(index)
    out.flush()
    np.savez(facts, id_cond=np.stack(conds), person=people, image=indices, shape=out.shape[1:])
