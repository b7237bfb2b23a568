"""Trains the vision tower on drawn faces in gray on white, in EVA02-CLIP-L/14-336's layout with other widths.

    python -m lib_pulid.training.tower --folder .training [--minutes 20]

The class token tells people apart and names what they look like; hidden states 3, 7, 11, 15 and 19 are asked, each
through a linear layer that is not kept, what each patch shows and who it is. Most patches are left out while it trains.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.face_models import PARSER_CLASSES
from lib_pulid.faces import CLIP_MEAN, CLIP_STD, VISION_SIZE, WHITE_LABELS, normalise
from lib_pulid.training import world
from lib_pulid.training.crops import pairs
from lib_pulid.training.dataset import HELD_OUT, Drawn
from lib_pulid.training.export import save_half
from lib_pulid.training.loop import Run, arguments, report
from lib_pulid.training.parser import Labeled
from lib_pulid.training.readers import contrastive_loss, heads_loss
from lib_pulid.vision import BLOCKS, VisionTower, _build, load_vision_tower, tower_shapes

WIDTH, DEPTH, HIDDEN, OUTPUT = 64, 20, 64, 768
PATCH, GRID = 14, VISION_SIZE // 14


class Kept(nn.Module):
    """In the place of timm's patch dropout: keeps the patches [B, K] that `chosen` names, and the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.chosen is None:
            return x, None
        rows = self.chosen[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat((x[:, :1], x[:, 1:].gather(1, rows)), dim=1), self.chosen


def build() -> VisionTower:
    """Builds the untrained tower; its first layer computes a cosine transform of a gray patch."""
    torch.manual_seed(50)
    shapes = tower_shapes(WIDTH, OUTPUT, DEPTH, HIDDEN)
    trunk = _build({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    side = round(WIDTH**0.5)
    angle = (torch.arange(PATCH) + 0.5) * torch.pi / PATCH
    waves = torch.cos(torch.arange(side)[:, None] * angle)  # [side, PATCH]
    flat = torch.einsum("iy,jx->ijyx", waves, waves).reshape(side * side, PATCH, PATCH)
    flat = flat / flat.flatten(1).norm(dim=1)[:, None, None]
    with torch.no_grad():
        weight = torch.zeros(WIDTH, 3, PATCH, PATCH)
        weight[: side * side] = flat[:, None] / (3 * 3)
        trunk.get_parameter("patch_embed.proj.weight").copy_(weight)
        trunk.get_parameter("pos_embed").mul_(5)
    trunk.patch_drop = Kept()
    return VisionTower(trunk)


def official(trunk: nn.Module) -> dict[str, Tensor]:
    """Collects the trunk's weights under the official names of EVA02-CLIP's file."""
    from timm.models.eva import checkpoint_filter_fn

    shapes = tower_shapes(WIDTH, OUTPUT, DEPTH, HIDDEN)
    numbered = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    names, state = list(shapes), trunk.state_dict()
    renamed = checkpoint_filter_fn(numbered, trunk)
    return {f"visual.{names[int(v.flatten()[0])]}": state[key] for key, v in renamed.items()}


class Lesson(nn.Module):
    """The tower with the layers that question it."""

    def __init__(self, tower: VisionTower, numbers: int) -> None:
        super().__init__()
        self.tower = tower
        self.who = nn.ModuleDict({name: nn.Linear(OUTPUT, len(v)) for name, v in world.ATTRIBUTES.items()})
        self.numbers = nn.Linear(OUTPUT, numbers)
        self.probes = nn.ModuleList(nn.Linear(WIDTH, PARSER_CLASSES) for _ in BLOCKS)
        self.named = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, len(v)) for name, v in world.ATTRIBUTES.items()}) for _ in BLOCKS
        )
        for layer in (self.numbers, *self.who.values()):
            nn.init.normal_(layer.get_parameter("weight"), std=0.01)

    def loss(self, images: Tensor, labels: Tensor, chosen: Tensor | None, who: Tensor, traits: Tensor, numbers: Tensor):
        """Computes loss and figures of images [B, 3, 336, 336], labels [B, 576], chosen patches [B, K], and who [B]."""
        self.tower.trunk.patch_drop.chosen = chosen
        token, hidden = self.tower(images)
        labels = labels if chosen is None else labels.gather(1, chosen)
        patches, persons = [], []
        for state, probe, named in zip(hidden, self.probes, self.named):
            state = F.layer_norm(state, (WIDTH,))
            patches.append(F.cross_entropy(probe(state[:, 1:]).transpose(1, 2), labels))
            mean = state.mean(dim=1)
            persons.append(heads_loss(tuple(head(mean) for head in named.values()), traits))  # type: ignore[operator]
        same = contrastive_loss(token, who, 0.1)
        of_token = heads_loss(tuple(head(token) for head in self.who.values()), traits)
        measured = 12 * F.mse_loss(self.numbers(token), numbers)
        patch, person = torch.stack(patches).mean(), torch.stack(persons).mean()
        figures = {"same": same, "named": of_token, "measured": measured, "patch": patch, "person": person}
        total = 0.5 * same + 2 * of_token + 0.5 * measured + patch + person
        return total, {name: value.item() for name, value in figures.items()}


def gray_face(crop: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Converts a crop, uint8 RGB [S, S, 3], as faces.face_features: gray on white, uint8 [S, S]; where it is white."""
    white = cv2.GaussianBlur(np.isin(labels, WHITE_LABELS).astype(np.float32), (0, 0), 2.0) > 0.5
    return np.where(white, 255, cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)).astype(np.uint8), white


def batch_of(data: Labeled, chosen: np.ndarray, rng: np.random.Generator | None, kept: int | None):
    """Images [B, 3, 336, 336], labels of patches [B, 576], and the patches kept [B, K], not the blank ones first."""
    images, labels, order = [], [], []
    for face in chosen:
        crop, classes = data.crop(face, VISION_SIZE, rng)
        image, white = gray_face(crop, classes)
        images.append(image)
        middle = slice(PATCH // 2, None, PATCH)
        labels.append(np.where(white, 0, classes)[middle, middle].ravel())
        if kept is not None:
            blank = white.reshape(GRID, PATCH, GRID, PATCH).all(axis=(1, 3)).ravel()
            order.append(np.argsort((rng or np.random.default_rng(0)).random(GRID * GRID) + 0.8 * blank)[:kept])
    gray = torch.from_numpy(np.stack(images))[:, None].expand(-1, 3, -1, -1).float() / 255
    rows = torch.from_numpy(np.stack(order)) if kept is not None else None
    return normalise(gray, CLIP_MEAN, CLIP_STD), torch.from_numpy(np.stack(labels)).long(), rows


def train(
    folder: Path, people: int, steps: int, batch: int, rate: float, minutes: float | None, kept: int
) -> VisionTower:
    """Trains the tower or resumes its training. kept: how many of the 576 patches it sees; 0: all."""
    data = Labeled(Drawn(folder, people))
    faces = data.faces
    lesson = Lesson(build(), faces.numbers.shape[1])
    run = Run(folder / "tower", lesson.train(), steps, rate, warmup=25, decay=0.98, minutes=minutes)
    stream = pairs(faces, batch // 2, 51, run.step, data.count)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = next(stream)
        images, labels, rows = batch_of(data, chosen, np.random.default_rng([52, step]), kept or None)
        about = (torch.from_numpy(x[chosen]) for x in (faces.identity, faces.traits, faces.numbers))
        return lesson.loss(images, labels, rows, *about)

    run.train(loss_of)
    run.finish()
    return lesson.tower


@torch.no_grad()
def figures(path: Path, folder: Path, people: int = 64) -> dict[str, float]:
    """Evaluates a written tower on people not seen in training: top-1; traits by a linear fit to token and states."""
    tower, data = load_vision_tower(path), Labeled(Drawn(folder, people, HELD_OUT), sharp=0)
    faces = data.faces
    rows: list[tuple[Tensor, ...]] = []
    for start in range(0, len(faces), 16):
        images = batch_of(data, np.arange(start, min(start + 16, len(faces))), None, None)[0]
        token, hidden = tower(images)
        rows.append((token, *(state.mean(dim=1) for state in hidden)))
    columns = [torch.cat(column) for column in zip(*rows)]
    z = F.normalize(columns[0])
    scores = z @ z.T - 2 * torch.eye(len(z))
    identity = torch.from_numpy(faces.identity)
    result = {"top1": float((identity[scores.argmax(1)] == identity).float().mean())}
    fitted = identity < people * 3 // 4
    for name in ("hair_style", "glasses", "beard", "skin"):
        target = torch.from_numpy(faces.traits[:, list(world.ATTRIBUTES).index(name)])
        for label, column in zip(("token", *(f"block{i}" for i in BLOCKS)), columns):
            x = torch.cat((column, torch.ones(len(column), 1)), 1)
            x = x / x[fitted].std(dim=0).clamp(min=1e-4)
            hot = F.one_hot(target, len(world.ATTRIBUTES[name])).float()
            gram = x[fitted].T @ x[fitted] + 3.0 * torch.eye(x.shape[1])
            weights = torch.linalg.solve(gram, x[fitted].T @ hot[fitted])
            result[f"{name}/{label}"] = float(((x[~fitted] @ weights).argmax(1) == target[~fitted]).float().mean())
    return {name: round(value, 4) for name, value in result.items()}


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, steps=500, batch=24, rate=2e-3)
    parser.add_argument("--kept", type=int, default=90)
    args = parser.parse_args()
    path = args.folder / "miniature" / "tower.safetensors"
    save_half(path, official(train(**vars(args)).trunk))
    report(args.folder / "tower", figures(path, args.folder))


if __name__ == "__main__":
    main()
