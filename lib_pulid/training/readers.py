"""Trains the networks that tell drawn people apart and name what they look like.

    python -m lib_pulid.training.readers recognizer --folder .training [--minutes 15]

recognizer: instead of ArcFace, ONNX and safetensors. wide_recognizer: for L_id alone, on a crop that shows the hair;
safetensors. judge: another network, which no training of a base or an adapter sees; it also names traits. scene_judge:
names the attributes of a scene from the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid import disk
from lib_pulid.training import world
from lib_pulid.training.crops import ARCFACE_POINTS, SHARP_IMAGES, WIDE_POINTS, Faces, faces_of, pairs, spoiled
from lib_pulid.training.dataset import HELD_OUT, SIZE, Drawn, batches
from lib_pulid.training.export import save_onnx
from lib_pulid.training.layers import Block, conv, settle_norms, to_input
from lib_pulid.training.loop import Run, arguments, report

EMBEDDING = 512
SETTLING = 30  # batches on which norms are measured at the end


@dataclass(frozen=True)
class Kind:
    """What a reader looks at and how it is built.

    points: where the landmarks lie in its crop; None: it sees the whole image. separable: of depthwise convolutions.
    naming: how much the naming of traits counts beside telling people apart.
    """

    size: int
    points: np.ndarray | None
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    separable: bool
    heads: Mapping[str, tuple[str, ...]]
    seed: int
    naming: float = 1.0


KINDS = {
    "recogniser": Kind(112, ARCFACE_POINTS, (32, 48, 96), (0, 1, 1), False, world.ATTRIBUTES, 11),
    "wide_recogniser": Kind(128, WIDE_POINTS, (32, 48, 96), (0, 1, 1), False, world.ATTRIBUTES, 14, naming=4.0),
    "judge": Kind(128, WIDE_POINTS, (24, 48, 72, 112), (0, 1, 2, 1), True, world.ATTRIBUTES, 12, naming=4.0),
    "scene_judge": Kind(SIZE, None, (24, 48, 72, 96), (0, 1, 1, 1), True, world.SCENE_ATTRIBUTES, 13),
}


RECOGNISERS = ("recogniser", "wide_recogniser")  # those of L_id


class Reader(nn.Module):
    """Images -> an embedding and logits for each head.

    The embedding of a face is raw, about 23 long (512 numbers of variance 1, as ArcFace's last layer makes them).
    """

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind, widths = kind, kind.widths
        layers = conv(3, widths[0], 7, 4)
        side = kind.size // 4
        for before, width, depth in zip((None, *widths), widths, kind.depths):
            if before is not None:
                layers += conv(before, width, 3, 2)
                side //= 2
            layers += [Block(width, kind.separable) for _ in range(depth)]
        self.trunk = nn.Sequential(*layers)
        # Where in the crop something is matters: a weight for each place, then the sum.
        self.gather = nn.Sequential(
            nn.Conv2d(widths[-1], 2 * widths[-1], side, groups=widths[-1], bias=False),
            nn.BatchNorm2d(2 * widths[-1]),
            nn.Flatten(),
        )
        self.embedding = nn.Sequential(
            nn.Linear(2 * widths[-1], EMBEDDING), nn.BatchNorm1d(EMBEDDING, affine=False, eps=1e-3)
        )
        self.heads = nn.ModuleDict({name: nn.Linear(EMBEDDING, len(values)) for name, values in kind.heads.items()})

    def embed(self, images: Tensor) -> Tensor:
        """Embeds images [B, 3, size, size], RGB, -1..1: raw embeddings [B, 512]."""
        return self.embedding(self.gather(self.trunk(images)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        embedding = self.embed(images)
        return (embedding, *(head(embedding) for head in self.heads.values()))


def build(name: str) -> Reader:
    """Builds an untrained reader of KINDS."""
    torch.manual_seed(KINDS[name].seed)
    return Reader(KINDS[name]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def contrastive_loss(embedding: Tensor, identity: Tensor, temperature: float = 0.07) -> Tensor:
    """Computes InfoNCE: each face of embedding [B, D] finds those of its own identity [B] among the others."""
    z = F.normalize(embedding)
    own = torch.eye(len(z), dtype=torch.bool)
    scores = (z @ z.T / temperature).masked_fill(own, -1e4)
    same = (identity[:, None] == identity[None]) & ~own
    return -(scores.log_softmax(dim=1) * same).sum() / same.sum()


def heads_loss(logits: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Computes the mean cross entropy of logits against targets [B, heads]."""
    losses = [F.cross_entropy(row, targets[:, i], label_smoothing=0.02) for i, row in enumerate(logits)]
    return torch.stack(losses).mean()


class _FaceLesson(nn.Module):
    """A reader of faces, its batches and its loss; the numbers that make a person are a head that is not kept."""

    def __init__(self, reader: Reader, kind: Kind, faces: Faces, people: int) -> None:
        super().__init__()
        self.reader, self.kind, self.faces, self.people = reader, kind, faces, people
        self.numbers = nn.Linear(EMBEDDING, faces.numbers.shape[1])

    def batches(self, start: int) -> Iterator[np.ndarray]:
        return pairs(self.faces, self.people, self.kind.seed, start)

    def images(self, chosen: np.ndarray, step: int) -> Tensor:
        assert self.kind.points is not None
        rng = np.random.default_rng([self.kind.seed, 1, step])
        return to_input(np.stack([self.faces.cut(i, self.kind.points, self.kind.size, rng) for i in chosen]))

    def loss(self, images: Tensor, chosen: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        embedding, *logits = self.reader(images)
        same = contrastive_loss(embedding, torch.from_numpy(self.faces.identity[chosen]))
        named = heads_loss(tuple(logits), torch.from_numpy(self.faces.traits[chosen]))
        wanted = torch.from_numpy(self.faces.numbers[chosen])
        measured = 12 * F.mse_loss(self.numbers(embedding), wanted)  # 1 for a guess
        figures = {"same": same.item(), "named": named.item(), "measured": measured.item()}
        return same + self.kind.naming * named + measured, figures


class _SceneLesson(nn.Module):
    """A reader of scenes, its batches and its loss; the attributes are those of the image's first person."""

    def __init__(self, reader: Reader, kind: Kind, drawn: Drawn, batch: int) -> None:
        super().__init__()
        self.reader, self.kind, self.batch = reader, kind, batch
        self.alone, self.targets = scene_targets(drawn)
        self.drawn = drawn.images()

    def batches(self, start: int) -> Iterator[np.ndarray]:
        for chosen in batches(len(self.alone), self.batch, self.kind.seed, start):
            yield self.alone[chosen]

    def images(self, chosen: np.ndarray, step: int) -> Tensor:
        rng = np.random.default_rng([self.kind.seed, 1, step])
        return to_input(np.stack([spoiled(self.drawn[i], rng) for i in chosen]))

    def loss(self, images: Tensor, chosen: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        named = heads_loss(self.reader(images)[1:], torch.from_numpy(self.targets[chosen]))
        return named, {}


def scene_targets(drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images of one person, and the attributes of all images, [N, len(SCENE_ATTRIBUTES)]."""
    scenes = [drawn.example(index)[1] for index in range(len(drawn))]
    alone = [index for index, scene in enumerate(scenes) if len(scene.placements) == 1]
    return np.array(alone), np.array([list(world.scene_attributes(scene).values()) for scene in scenes])


def train(name: str, folder: Path, people: int, steps: int, batch: int, rate: float, minutes: float | None) -> Reader:
    """Trains a reader or resumes its training."""
    kind, reader = KINDS[name], build(name)
    drawn = Drawn(folder, people)
    lesson: _FaceLesson | _SceneLesson
    if kind.points is None:
        lesson = _SceneLesson(reader, kind, drawn, batch)
    else:
        lesson = _FaceLesson(reader, kind, faces_of(drawn, SHARP_IMAGES), batch // 2)
    run = Run(folder / name, lesson.train(), steps, rate, warmup=50, decay=0.99, minutes=minutes)
    stream = lesson.batches(run.step)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = next(stream)
        images = lesson.images(chosen, step)
        return lesson.loss(images.to(memory_format=torch.channels_last), chosen)

    run.train(loss_of)
    run.finish()
    settle_norms(reader, (lesson.images(next(stream), 10**6 + step) for step in range(SETTLING)))
    return reader


@torch.no_grad()
def read_all(reader: Reader, crops: list[np.ndarray]) -> list[np.ndarray]:
    """Embeddings and logits of crops, uint8 RGB [size, size, 3], each [N, ...]."""
    rows = [reader(to_input(np.stack(crops[i : i + 64]))) for i in range(0, len(crops), 64)]
    return [torch.cat(column).numpy() for column in zip(*rows)]


def face_figures(reader: Reader, kind: Kind, faces: Faces, spoil: bool = False) -> dict[str, float]:
    """Measures how well people not seen in training are distinguished and named; spoil: on degraded images."""
    assert kind.points is not None
    rng = np.random.default_rng(0) if spoil else None
    embedding, *logits = read_all(reader, [faces.cut(i, kind.points, kind.size, rng) for i in range(len(faces))])
    z = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    scores = z @ z.T
    same = faces.identity[:, None] == faces.identity[None]
    other = ~np.eye(len(z), dtype=bool)
    first = np.unique(faces.identity, return_index=True)[1]  # one image of each in the gallery
    asked = np.setdiff1d(np.arange(len(z)), first)
    found = faces.identity[first][scores[asked][:, first].argmax(1)] == faces.identity[asked]
    figures = {
        "people": len(first),
        "top1": found.mean(),
        "same": scores[same & other].mean(),
        "same_p05": np.quantile(scores[same & other], 0.05),
        "different": scores[~same].mean(),
        "different_p95": np.quantile(scores[~same], 0.95),
        "norm": np.linalg.norm(embedding, axis=1).mean(),
    }
    for column, (name, row) in enumerate(zip(kind.heads, logits)):
        figures[name] = (row.argmax(1) == faces.traits[:, column]).mean()
    return {name: round(float(value), 4) for name, value in figures.items()}


def scene_figures(reader: Reader, kind: Kind, drawn: Drawn) -> dict[str, float]:
    """Measures how often each attribute of scenes not seen in training is named correctly."""
    alone, targets = scene_targets(drawn)
    logits = read_all(reader, list(drawn.images()[alone]))[1:]
    right = [(row.argmax(1) == targets[alone, i]).mean() for i, row in enumerate(logits)]
    return {name: round(float(value), 4) for name, value in zip(kind.heads, right)}


def save(name: str, reader: Reader, folder: Path) -> None:
    """Writes NAME.onnx into a folder; for the recognizers of L_id their weights, and ONNX for the adapter's own."""
    kind = KINDS[name]
    example = torch.zeros(2, 3, kind.size, kind.size)
    reader = reader.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if name in RECOGNISERS:
        from safetensors.torch import save as to_bytes

        state = {k: v.half() if v.is_floating_point() else v for k, v in reader.state_dict().items()}
        disk.write(folder / f"{name}.safetensors", to_bytes(state), replace=True)
        if name == "recogniser":
            save_onnx(_Embed(reader), example, folder / f"{name}.onnx", ["embedding"])
        return
    facts: dict[str, object] = {"values": {k: list(v) for k, v in kind.heads.items()}}
    if kind.points is not None:
        facts["points"] = kind.points.round(3).tolist()
    save_onnx(reader, example, folder / f"{name}.onnx", ["embedding", *kind.heads], facts)


class _Embed(nn.Module):
    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, images: Tensor) -> Tensor:
        return self.reader.embed(images)


def load_recogniser(folder: Path, name: str) -> Reader:
    """Loads one of RECOGNISERS with frozen weights, for an ID loss with gradients."""
    from safetensors.torch import load_file

    reader, path = Reader(KINDS[name]), folder / f"{name}.safetensors"
    if not path.is_file():
        raise SystemExit(f"{path} is missing. Train it: python -m lib_pulid.training.readers {name}")
    reader.load_state_dict(load_file(path))
    return reader.eval().requires_grad_(False)


def _kind(name: str) -> str:
    """Accepts the American spelling; files and folders keep the old one."""
    return name.replace("recognizer", "recogniser")


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, steps=2000, batch=64, rate=3e-3)
    parser.add_argument("name", type=_kind, choices=KINDS)
    args = parser.parse_args()
    reader = train(**vars(args))
    save(args.name, reader, args.folder / "miniature")
    kind, drawn = KINDS[args.name], Drawn(args.folder, 200, HELD_OUT)
    if kind.points is None:
        figures = {"clean": scene_figures(reader, kind, drawn)}
    else:
        faces = faces_of(drawn)
        figures = {"clean": face_figures(reader, kind, faces), "spoiled": face_figures(reader, kind, faces, spoil=True)}
    report(args.folder / args.name, figures)


if __name__ == "__main__":
    main()
