"""Trains the parser of drawn faces: BiSeNet's labels of the aligned 512 x 512 crop.

    python -m lib_pulid.training.parser --folder .training [--minutes 8]

The file takes and gives what an ONNX export of BiSeNet would; inside it works on 128 x 128.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.face_models import PARSER_CLASSES, PARSER_MEAN, PARSER_STD
from lib_pulid.faces import CROP_BORDER_BGR, CROP_LANDMARKS, CROP_SIZE, WHITE_LABELS, normalise
from lib_pulid.judge import similarity
from lib_pulid.training import world
from lib_pulid.training.crops import SHARP, SHARP_IMAGES, Faces, faces_of, spoiled
from lib_pulid.training.dataset import HELD_OUT, SIZE, Drawn, made_once
from lib_pulid.training.export import save_onnx
from lib_pulid.training.layers import Block, conv, settle_norms
from lib_pulid.training.loop import Run, arguments, report

INNER = 128
LABELED = 2000  # images whose labels are drawn


class ParserNet(nn.Module):
    """Crops [B, 3, 512, 512], ImageNet mean and std -> scores [B, 19, 512, 512]."""

    def __init__(self, widths: tuple[int, ...] = (24, 40, 56, 72), neck: int = 40) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, widths[0], 5, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(*conv(before, after, 3, 2), Block(after, separable=True))
            for before, after in zip(widths, widths[1:])
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, neck, 1) for width in widths)
        self.smooth = nn.ModuleList(Block(neck, separable=True) for _ in widths[1:])
        self.head = nn.Sequential(nn.Conv2d(neck, 4 * PARSER_CLASSES, 1), nn.PixelShuffle(2))

    def inner(self, x: Tensor) -> Tensor:
        """Computes scores [B, 19, 128, 128] of [B, 3, 128, 128]."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        y = self.lateral[-1](maps[-1])
        for x, lateral, smooth in zip(maps[-2::-1], list(self.lateral)[-2::-1], self.smooth):
            y = smooth(lateral(x) + F.interpolate(y, scale_factor=2.0, mode="nearest"))
        return self.head(y)

    def forward(self, crops: Tensor) -> Tensor:
        return F.interpolate(
            self.inner(F.avg_pool2d(crops, CROP_SIZE // INNER)), scale_factor=float(CROP_SIZE // INNER), mode="bilinear"
        )


class Labeled:
    """Aligned crops of drawn faces with their labels, for the parser and the vision tower."""

    def __init__(self, drawn: Drawn, count: int = LABELED, sharp: int = SHARP_IMAGES) -> None:
        self.faces: Faces = faces_of(drawn, sharp)
        self.labels = _labels(drawn, min(count, len(drawn)))
        self.count = int(np.searchsorted(self.faces.image, len(self.labels)))  # faces in labeled images

    def crop(self, face: int, size: int, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
        """Cuts a crop, uint8 RGB [size, size, 3], and its labels, uint8 [size, size]; rng: inexact and degraded."""
        faces, index = self.faces, self.faces.image[face]
        points, image = faces.landmarks[face], faces.images[index]
        scale = 1.0
        if rng is not None:
            gap = np.linalg.norm(points[1] - points[0])
            points = points + rng.normal(0, 0.035 * gap, (5, 2))
            if index < len(faces.sharp) and rng.random() < 0.5:
                image, scale = faces.sharp[index], SHARP / SIZE
            image = spoiled(image, rng)
        wanted = CROP_LANDMARKS * (size / CROP_SIZE)
        matrix = similarity(points * scale, wanted)
        border = CROP_BORDER_BGR[::-1]
        crop = cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_CONSTANT, borderValue=border)
        matrix = similarity(points, wanted)
        return crop, cv2.warpAffine(self.labels[index], matrix, (size, size), flags=cv2.INTER_NEAREST)


def _labels(drawn: Drawn, count: int) -> np.ndarray:
    def write(path: Path) -> None:
        np.save(path, np.stack([world.labels(*drawn.example(index)) for index in range(count)]))

    name = f"labels-{drawn.seed}-{drawn.people}-{count}.npy"
    return np.load(made_once(drawn.folder / name, write), mmap_mode="r")


def to_input(crops: np.ndarray) -> Tensor:
    """Converts uint8 RGB [B, H, W, 3] to float32 [B, 3, H, W], ImageNet mean and std."""
    return normalise(torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255, PARSER_MEAN, PARSER_STD)


def train(folder: Path, people: int, steps: int, batch: int, rate: float, minutes: float | None) -> ParserNet:
    """Trains the parser or resumes its training."""
    torch.manual_seed(40)
    net = ParserNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = Labeled(Drawn(folder, people))
    run = Run(folder / "parser", net.train(), steps, rate, warmup=25, decay=0.97, minutes=minutes)

    def pick(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([41, step])
        crops, labels = zip(*(data.crop(i, INNER, rng) for i in rng.integers(0, data.count, batch)))
        return to_input(np.stack(crops)).to(memory_format=torch.channels_last), torch.from_numpy(np.stack(labels))  # type: ignore[call-overload]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        crops, labels = pick(step)
        return F.cross_entropy(net.inner(crops), labels.long()), {}

    run.train(loss_of)
    run.finish()
    settle_norms(net, (pick(10**6 + i)[0] for i in range(20)), net.inner)
    return net


def figures(path: Path, folder: Path, people: int = 64) -> dict[str, float]:
    """Measures accuracy, and overlap of the visible part (face and hair), on people not seen in training."""
    from lib_pulid.face_models import OnnxParser

    parser, data = OnnxParser(path), Labeled(Drawn(folder, people, HELD_OUT), sharp=0)
    right, overlaps = [], []
    for face in range(0, len(data.faces), 5):
        crop, labels = data.crop(face, CROP_SIZE, None)
        found = parser.labels(crop)
        right.append((found == labels).mean())
        kept = [~np.isin(x, WHITE_LABELS) for x in (found, labels)]
        overlaps.append(float((kept[0] & kept[1]).sum()) / float((kept[0] | kept[1]).sum()))
    return {"right": round(float(np.mean(right)), 4), "overlap": round(float(np.mean(overlaps)), 4)}


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, steps=400, batch=16, rate=4e-3)
    args = parser.parse_args()
    net = train(**vars(args)).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    path = args.folder / "miniature" / "parser.onnx"
    save_onnx(net, torch.zeros(1, 3, CROP_SIZE, CROP_SIZE), path, ["scores"])
    report(args.folder / "parser", figures(path, args.folder))


if __name__ == "__main__":
    main()
