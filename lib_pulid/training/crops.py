"""Faces of the drawn images, cut out and spoiled, to train the networks that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lib_pulid.judge import cut
from lib_pulid.training import world
from lib_pulid.training.dataset import Drawn, made_once

# Where eyes, nose and mouth corners come to lie: ArcFace's 112 x 112 crop (insightface, utils/face_align.py), and a
# wider one of 128 x 128 that shows all of the hair.
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
WIDE_POINTS = ((ARCFACE_POINTS - (56, 72)) * 0.795 + (64, 78)).astype(np.float32)
# Some images are drawn again at this size, for photos that are sharper than the miniature's own images.
SHARP, SHARP_IMAGES = 256, 300


@dataclass(frozen=True, eq=False)
class Faces:
    """All faces of a data set's images, those of second persons too.

    image, identity: [N]. landmarks: [N, 5, 2], boxes: [N, 4] in pixels. traits: [N, len(ATTRIBUTES)] indices.
    numbers: [N, K] in 0..1. sharp: the first images at SHARP pixels, uint8 [S, SHARP, SHARP, 3].
    """

    images: np.ndarray
    sharp: np.ndarray
    image: np.ndarray
    identity: np.ndarray
    landmarks: np.ndarray
    boxes: np.ndarray
    traits: np.ndarray
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.image)

    def cut(self, face: int, points: np.ndarray, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Cuts a face, uint8 RGB [size, size, 3], with its landmarks at `points`; rng: inexactly, and degraded."""
        image, landmarks = self.images[self.image[face]], self.landmarks[face]
        if rng is not None:
            gap = np.linalg.norm(landmarks[1] - landmarks[0])
            landmarks = landmarks + rng.normal(0, 0.035 * gap, (5, 2)) + rng.normal(0, 0.015 * gap, 2)
            if self.image[face] < len(self.sharp) and rng.random() < 0.5:
                image = self.sharp[self.image[face]]
                landmarks = landmarks * (SHARP / self.images.shape[1])
            image = spoiled(image, rng)
        return cut(image, landmarks, points, size)


def spoiled(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Degrades an image, uint8 RGB [H, W, 3], like a small diffusion model, JPEG or a poor camera."""
    size = image.shape[0]
    if rng.random() < 0.35:  # what an autoencoder loses
        small = round(size * rng.uniform(0.35, 0.9))
        image = cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.5) * size / 128)
    if rng.random() < 0.25:
        quality = int(rng.integers(25, 95))
        packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR))
    if rng.random() < 0.8:
        image = cv2.transform(image, _color_matrix(rng))
    if rng.random() < 0.5:  # fine, or in blotches
        noise = rng.standard_normal((size // 2, size // 2, 3), np.float32) * rng.uniform(1, 14)
        mode = cv2.INTER_NEAREST if rng.random() < 0.5 else cv2.INTER_LINEAR
        image = cv2.add(image, cv2.resize(noise, (size, size), interpolation=mode), dtype=cv2.CV_8U)
    return image


def _color_matrix(rng: np.random.Generator) -> np.ndarray:
    """Samples saturation, contrast, brightness and tint: [3, 4] for cv2.transform."""
    saturation, contrast = rng.uniform(0.8, 1.15), rng.uniform(0.88, 1.1)
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) / 3)
    shift = 128 * (1 - contrast) + rng.uniform(-12, 12) + rng.normal(0, 4, 3)
    return np.hstack([matrix, shift[:, None]])


def faces_of(drawn: Drawn, sharp: int = 0) -> Faces:
    """Collects the faces of a data set; sharp: how many of its images to draw at SHARP pixels as well."""
    path = drawn.folder / f"faces-{drawn.seed}-{drawn.people}.npz"
    with np.load(made_once(path, lambda part: np.savez(part, **_list_faces(drawn)))) as rows:  # type: ignore[arg-type]
        return Faces(drawn.images(), _sharp_images(drawn, sharp), **{name: rows[name] for name in rows.files})


def _list_faces(drawn: Drawn) -> dict[str, np.ndarray]:
    number = {drawn.person(identity): identity for identity in range(drawn.people)}
    rows: dict[str, list] = {name: [] for name in ("image", "identity", "landmarks", "boxes", "traits", "numbers")}
    for index in range(len(drawn)):
        people, scene = drawn.example(index)
        for person, placement in zip(people, scene.placements):
            rows["image"].append(index)
            rows["identity"].append(number[person])
            rows["landmarks"].append(world.landmarks(person, placement))
            rows["boxes"].append(world.face_box(person, placement))
            rows["traits"].append(list(person.attributes().values()))
            rows["numbers"].append(person.vector()[: -sum(len(v) for v in world.ATTRIBUTES.values())])
    return {name: np.array(values) for name, values in rows.items()}


def _sharp_images(drawn: Drawn, count: int) -> np.ndarray:
    def write(path: Path) -> None:
        images = [world.draw(*drawn.example(index), SHARP) for index in range(count)]
        np.save(path, np.array(images, np.uint8).reshape(-1, SHARP, SHARP, 3))

    name = f"sharp-{drawn.seed}-{drawn.people}-{count}.npy"
    return np.load(made_once(drawn.folder / name, write), mmap_mode="r")


def pairs(faces: Faces, people: int, seed: int, start: int = 0, among: int | None = None) -> Iterator[np.ndarray]:
    """Endless face indices [2 * people]: two faces of each of so many people, next to each other.

    start: steps that are skipped. among: only the first so many faces.
    """
    order = np.argsort(faces.identity[:among], kind="stable")
    _, first, count = np.unique(faces.identity[order], return_index=True, return_counts=True)
    first, count = first[count > 1], count[count > 1]
    step = start
    while True:
        rng = np.random.default_rng([seed, step])
        chosen = rng.choice(len(first), people, replace=False)
        yield np.concatenate([order[first[i] + rng.choice(count[i], 2, replace=False)] for i in chosen])
        step += 1
