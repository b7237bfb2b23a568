"""Trains the detector of drawn faces: boxes and five points, in SCRFD's output layout.

    python -m lib_pulid.training.detector --folder .training [--minutes 10]

Photos show no drawn face: images that installed packages have for their own tests are negative examples.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.training import world
from lib_pulid.training.crops import SHARP, SHARP_IMAGES, Faces, faces_of, spoiled
from lib_pulid.training.dataset import HELD_OUT, SIZE, TRAIN, Drawn
from lib_pulid.training.export import save_onnx
from lib_pulid.training.layers import Block, conv, settle_norms
from lib_pulid.training.loop import Run, arguments, report

INPUT = 192
STRIDES = (8, 16, 32)
ANCHORS = ((16.0, 32.0), (64.0, 128.0), (256.0, 512.0))  # sizes of faces that each stride's two anchors stand for
TESTED_PHOTOS = ("astronaut", "Tom_Hanks")  # beginnings of names; never trained on
# Taken off the scores' logits, for a threshold of 0.5 as insightface has it: of drawn faces none was below 0.89, of
# photographs none above 0.77.
STRICTER = 1.5
MEAN, STD = 127.5, 128.0  # insightface's SCRFD


class Detector(nn.Module):
    """Images [B, 3, 192, 192], RGB -> per stride scores [B, A], boxes [B, A, 4], points [B, A, 10], in strides.

    A: cells x 2 anchors. Boxes are distances from the cell's corner to the left, top, right, bottom.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 96), neck: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, widths[0], 7, 4))
        self.stages = nn.ModuleList(
            nn.Sequential(*conv(before, after, 3, 2), Block(after, separable=True))
            for before, after in zip(widths, widths[1:])
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, neck, 1) for width in widths[1:])
        self.smooth = nn.ModuleList(Block(neck, separable=True) for _ in STRIDES)
        self.heads = nn.ModuleList(nn.Conv2d(neck, 2 * 15, 1) for _ in STRIDES)
        for head in self.heads:
            bias = nn.init.zeros_(head.get_parameter("bias")).view(2, 15)
            nn.init.constant_(bias[:, 0], -4.0)  # faces are rare
            nn.init.constant_(bias[:, 1:5], 0.5)  # half a face to each side

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        x, maps = self.stem(images), []
        for stage, lateral in zip(self.stages, self.lateral):
            x = stage(x)
            maps.append(lateral(x))
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], scale_factor=2.0, mode="nearest")
        rows = []
        for x, smooth, head, stride, anchors in zip(maps, self.smooth, self.heads, STRIDES, ANCHORS):
            y = head(smooth(x)).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 2, 15)
            size = torch.tensor(anchors).view(1, 1, 2, 1) / stride
            scores, rest = y[..., 0].flatten(1), (y[..., 1:] * size).flatten(1, 2)
            rows.append((scores, rest[..., :4], rest[..., 4:]))
        return rows


class _Scrfd(nn.Module):
    """The nine outputs that insightface reads, of one image: three of scores [A, 1], boxes [A, 4], points [A, 10]."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        scores, boxes, points = zip(*self.detector(image))
        first = [(row - STRICTER).sigmoid().reshape(-1, 1) for row in scores]
        return (*first, *(row[0] for row in boxes), *(row[0] for row in points))


@dataclass(frozen=True, eq=False)
class Sample:
    """One training image, uint8 RGB [INPUT, INPUT, 3], its boxes [F, 4], points [F, 5, 2], and which are whole [F]."""

    image: np.ndarray
    boxes: np.ndarray
    points: np.ndarray
    whole: np.ndarray


def photos(tested: bool = False) -> list[np.ndarray]:
    """Photographs that scikit-image and insightface carry, uint8 RGB; none where they are not installed."""
    found = []
    for package, folder in (("skimage", "data"), ("insightface", "data/images")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += sorted((Path(spec.origin).parent / folder).glob("*.[jp][pn]g"))
    chosen = [path for path in found if path.name.startswith(TESTED_PHOTOS) == tested]
    images = [cv2.imread(str(path)) for path in chosen]
    return [np.ascontiguousarray(image[:, :, ::-1]) for image in images if image is not None]


def place(image: np.ndarray, boxes: np.ndarray, points: np.ndarray, rng: np.random.Generator | None) -> Sample:
    """Brings an image with its faces to the network's size; rng: smaller and beside, or a part of it, at random."""
    scale, shift = INPUT / max(image.shape[:2]), np.zeros(2)
    way = rng.random() if rng is not None else 1.0
    if rng is not None and way < 0.12 and len(boxes):  # near one face
        box = boxes[rng.integers(len(boxes))]
        side = max(box[2:] - box[:2]) * rng.uniform(1.15, 2.2)
        scale = INPUT / side
        shift = INPUT / 2 - scale * (box[:2] + box[2:]) / 2 + rng.uniform(-0.08, 0.08, 2) * INPUT
    elif rng is not None and way < 0.25:
        smaller = rng.uniform(0.4, 1.0)
        scale, shift = scale * smaller, rng.uniform(0, 1 - smaller, 2) * INPUT
    matrix = np.hstack([scale * np.eye(2), shift[:, None]])
    border = (0, 0, 0) if rng is None or rng.random() < 0.5 else rng.integers(0, 256, 3).tolist()
    # Pixels' centers, not corners, meet, as in cv2.resize.
    matrix[:, 2] += (scale - 1) / 2
    mode = cv2.INTER_LINEAR
    out = cv2.warpAffine(image, matrix, (INPUT, INPUT), flags=mode, borderMode=cv2.BORDER_CONSTANT, borderValue=border)
    boxes = boxes * scale + np.tile(shift, 2)
    inside = boxes.clip(0, INPUT)
    areas = [(b[:, 2:] - b[:, :2]).prod(axis=1) for b in (inside, boxes)]
    seen = areas[0] / areas[1].clip(1e-6)
    kept = seen > 0.05
    return Sample(out, boxes[kept], (points * scale + shift)[kept], seen[kept] > 0.7)


def targets(sample: Sample) -> list[np.ndarray]:
    """Makes each anchor's targets, per stride [cells * 2, 15]: 1 face, 0 none, -1 either; box and points in strides.

    Where it may say either, it has to know box and points all the same.
    """
    rows = []
    for stride, anchors in zip(STRIDES, ANCHORS):
        side = INPUT // stride
        cells = np.stack(list(np.mgrid[:side, :side][::-1]), -1).reshape(-1, 1, 2) * float(stride)
        out = np.zeros((side * side, 2, 15), np.float32)
        for box, points, whole in zip(sample.boxes, sample.points, sample.whole):
            size = np.sqrt((box[2:] - box[:2]).prod())
            away = np.linalg.norm(cells - (box[:2] + box[2:]) / 2, axis=-1) / size  # [cells, 1]
            ratio = abs(np.log2(size / np.array(anchors)))[None]  # octaves from the anchor's size
            near = (away < max(0.22, 0.6 * stride / size)) & (ratio <= 0.5) & whole
            unsure = (away < 0.5) & (ratio < 0.8) & ~near & (out[..., 0] == 0)
            values = (
                np.concatenate([cells - box[:2], box[2:] - cells], -1),
                points.reshape(1, 1, 10) - np.tile(cells, 5),
            )
            answer = np.concatenate(values, -1) / stride
            for where, score in ((unsure, -1.0), (near, 1.0)):
                row = np.concatenate([np.full_like(cells[..., :1], score), answer], -1)
                out = np.where(where[..., None], row, out)
        rows.append(out.reshape(-1, 15).astype(np.float32))
    return rows


def loss(rows: list[tuple[Tensor, Tensor, Tensor]], wanted: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Computes focal loss of scores, and distances of boxes and points in face sizes. wanted: per stride [B, A, 15]."""
    total = {"found": torch.zeros(()), "box": torch.zeros(()), "points": torch.zeros(())}
    count = sum(int((target[..., 0] == 1).sum()) for target in wanted) + 1
    placed = sum(int((target[..., 0] != 0).sum()) for target in wanted) + 1
    for (scores, boxes, points), target in zip(rows, wanted):
        known, face = target[..., 0] >= 0, target[..., 0] == 1
        hard = (scores.sigmoid() - target[..., 0]).abs().detach() ** 2
        weight = torch.where(face, 3 * hard, hard) * known
        entropy = F.binary_cross_entropy_with_logits(scores, target[..., 0].clamp(min=0), reduction="none")
        total["found"] = total["found"] + (weight * entropy).sum() / count
        near = target[..., 0] != 0
        box = target[near][:, 1:5]
        size = ((box[:, 0] + box[:, 2]) * (box[:, 1] + box[:, 3])).clamp(min=1e-6).sqrt()[:, None]
        total["box"] = total["box"] + ((boxes[near] - box) / size).abs().sum() / (4 * placed)
        total["points"] = total["points"] + ((points[near] - target[near][:, 5:]) / size).abs().sum() / (10 * placed)
    return total["found"] + 4 * total["box"] + 12 * total["points"], {name: v.item() for name, v in total.items()}


class Lesson:
    """Samples of drawn people, alone and together, and of none at all."""

    def __init__(self, folder: Path, people: int, seed: int = TRAIN, extra: int = 250) -> None:
        self.faces: Faces = faces_of(Drawn(folder, people, seed), SHARP_IMAGES)
        self.of_image = np.searchsorted(self.faces.image, np.arange(len(self.faces.images) + 1))
        self.photos = photos()
        rng = np.random.default_rng([seed, 3])
        self.groups = [_group(rng) for _ in range(extra)]
        self.empty = [_empty(rng) for _ in range(extra)]

    def sample(self, rng: np.random.Generator) -> Sample:
        """Samples one image of a random kind."""
        kind = rng.random()
        none = np.zeros((0, 4), np.float32), np.zeros((0, 5, 2), np.float32)
        if kind < 0.64:
            sharp = rng.random() < 0.2
            index = int(rng.integers(len(self.faces.sharp if sharp else self.faces.images)))
            rows = slice(self.of_image[index], self.of_image[index + 1])
            image, boxes, points = self.faces.images[index], self.faces.boxes[rows], self.faces.landmarks[rows]
            if sharp:
                image, boxes, points = self.faces.sharp[index], boxes * (SHARP / SIZE), points * (SHARP / SIZE)
        elif kind < 0.74:
            image, boxes, points = self.groups[rng.integers(len(self.groups))]
        elif kind < 0.86 or not self.photos:
            image, (boxes, points) = self.empty[rng.integers(len(self.empty))], none
        elif kind < 0.97:
            image, (boxes, points) = _part(self.photos[rng.integers(len(self.photos))], rng), none
        else:
            image, (boxes, points) = _noise(rng), none
        image = spoiled(np.asarray(image), rng) if rng.random() < 0.7 else np.asarray(image)
        return place(image, boxes, points, rng)

    def batch(self, size: int, step: int) -> tuple[Tensor, list[Tensor]]:
        """Images [B, 3, INPUT, INPUT] and targets per stride [B, A, 15]."""
        rng = np.random.default_rng([31, step])
        samples = [self.sample(rng) for _ in range(size)]
        wanted = [torch.from_numpy(np.stack(rows)) for rows in zip(*(targets(sample) for sample in samples))]
        return to_input(np.stack([sample.image for sample in samples])), wanted


def to_input(images: np.ndarray) -> Tensor:
    """Converts uint8 RGB [B, H, W, 3] to float32 [B, 3, H, W], as insightface's SCRFD."""
    return torch.from_numpy((images.astype(np.float32) - MEAN) / STD).permute(0, 3, 1, 2)


def _group(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scene = world.sample_scene(rng, persons=3)
    people = [world.sample_person(rng) for _ in scene.placements]
    both = list(zip(people, scene.placements))
    boxes, points = ([of(p, where) for p, where in both] for of in (world.face_box, world.landmarks))
    return world.draw(people, scene), np.stack(boxes), np.stack(points)


def _empty(rng: np.random.Generator) -> np.ndarray:
    return world.draw((), replace(world.sample_scene(rng), placements=()))


def _part(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = max(24, round(min(photo.shape[:2]) * rng.uniform(0.2, 1.0)))
    y, x = (int(rng.integers(0, length - side + 1)) for length in photo.shape[:2])
    part = photo[y : y + side, x : x + side]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    return cv2.resize(np.ascontiguousarray(part), (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _noise(rng: np.random.Generator) -> np.ndarray:
    """Makes noise or blobs of some coarseness."""
    side = int(rng.choice((2, 3, 5, 8, 16, 32, 128)))
    values = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
    return cv2.resize(values, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def train(folder: Path, people: int, steps: int, batch: int, rate: float, minutes: float | None) -> Detector:
    """Trains the detector or resumes its training."""
    torch.manual_seed(30)
    detector = Detector().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lesson = Lesson(folder, people)
    run = Run(folder / "detector", detector.train(), steps, rate, decay=0.995, minutes=minutes)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        images, wanted = lesson.batch(batch, step)
        return loss(detector(images.to(memory_format=torch.channels_last)), wanted)

    run.train(loss_of)
    run.finish()
    settle_norms(detector, (lesson.batch(batch, 10**6 + i)[0] for i in range(30)))
    return detector


def save(detector: Detector, folder: Path) -> None:
    """Writes detector.onnx."""
    names = [f"{what}_{stride}" for what in ("score", "bbox", "kps") for stride in STRIDES]
    module = _Scrfd(detector.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]
    save_onnx(module, torch.zeros(1, 3, INPUT, INPUT), folder / "detector.onnx", names)


def figures(path: Path, folder: Path, people: int = 64) -> dict[str, float]:
    """Evaluates the written detector on images not seen in training, with the product's own code."""
    from lib_pulid.face_models import InsightFaceDetector

    detector, faces = InsightFaceDetector(path), faces_of(Drawn(folder, people, HELD_OUT))
    rng = np.random.default_rng(1)
    counts: dict[str, list[float]] = {"missed": [], "more": [], "off": [], "missed_spoiled": [], "off_spoiled": []}
    for index in range(0, len(faces.images), 3):
        rows = np.flatnonzero(faces.image == index)
        for image, end in ((faces.images[index], ""), (spoiled(faces.images[index], rng), "_spoiled")):
            found = detector.detect(np.ascontiguousarray(image[:, :, ::-1]))
            for points in faces.landmarks[rows]:
                gap = np.linalg.norm(points[1] - points[0])
                off = min((abs(face.landmarks - points).mean() / gap for face in found), default=9.0)
                counts[f"missed{end}"].append(float(off > 0.3))
                if off <= 0.3:
                    counts[f"off{end}"].append(off)
            if not end:
                counts["more"].append(float(len(found) > len(rows)))
    counts["empty"] = [len(detector.detect(_empty(rng))) for _ in range(30)]
    counts["photos"] = [len(detector.detect(np.ascontiguousarray(x[:, :, ::-1]))) for x in photos(tested=True)]
    return {name: round(float(np.mean(values)), 4) for name, values in counts.items()}


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, steps=1200, batch=32, rate=3e-3)
    args = parser.parse_args()
    save(train(**vars(args)), args.folder / "miniature")
    report(args.folder / "detector", figures(args.folder / "miniature" / "detector.onnx", args.folder))


if __name__ == "__main__":
    main()
