"""Computes L_id (arXiv 2404.16022, section 3.4): images are sampled in a few steps, with gradients, and recognizers
compare the faces in them with those that were wanted. There are two: the adapter's own, and one whose wider crop shows
the hair.

An adapter is trained with it on people in photos. A base model is trained with it on people described in words, so that
it learns to draw a face exactly, which the diffusion loss alone teaches slowly. Beside it, and not in the paper, stand
a loss on the traits that the wider recognizer names, and one that keeps the scene: outside the head, the image has to
be that of another denoiser (a base: as it was before; an adapter: the base without the identity), from the first of the
few steps to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_pulid.faces import Detection, Detector, Parser
from lib_pulid.head import head_mask
from lib_pulid.judge import similarity
from lib_pulid.training import losses, world
from lib_pulid.training.autoencoder import FILE, SCALE
from lib_pulid.training.autoencoder import load as load_autoencoder
from lib_pulid.training.crops import Faces, faces_of
from lib_pulid.training.dataset import SIZE, Drawn
from lib_pulid.training.layers import to_input
from lib_pulid.training.readers import RECOGNISERS, Reader, load_recogniser
from lib_pulid.training.schedule import Schedule

STEPS = 4

Predict = Callable[[Tensor, Tensor], Tensor]  # (noisy latents [B, C, h, w], steps t [B]) -> v


@dataclass(frozen=True)
class Wanted:
    """The people asked for, as they are seen in another image of each: P in B images, side by side in each, first all
    that stand on the left.

    Args:
        embeddings: [P, R, 512], by each of the recognizers. heads: `head.head_mask`, bool [P, H, W]. landmarks: of the
            faces, [P, 5, 2] in pixels.
    """

    embeddings: Tensor
    heads: np.ndarray
    landmarks: np.ndarray

    def head_on(self, row: int, landmarks: np.ndarray, height: int, width: int) -> np.ndarray:
        """Moves a person's head onto a face with other landmarks [5, 2]: bool [height, width]."""
        import cv2

        moved = similarity(self.landmarks[row], landmarks)
        return cv2.warpAffine(self.heads[row].astype(np.uint8), moved, (width, height), flags=cv2.INTER_NEAREST) > 0


@dataclass(frozen=True)
class SampledFaces:
    """What reads the sampled images.

    Args:
        vae: the autoencoder. recognisers: differentiable, with the crops that they take. parser: tells heads from the
            scene.
    """

    vae: Any
    recognisers: Sequence[Reader]
    detector: Detector
    parser: Parser

    @property
    def device(self) -> torch.device:
        """Where images are decoded and read; faces are found on the CPU."""
        return next(self.vae.parameters()).device

    def losses(
        self,
        predict: Predict,
        noise: Tensor,
        schedule: Schedule,
        wanted: Wanted,
        scene: Predict | None = None,
        expected: Sequence[Detection | None] = (),
    ) -> dict[str, Tensor]:
        """Computes "id", the mean of 1 - cosine over the people of whom a face is found, and "traits", how far the
        traits that the last recognizer names are from those wanted; 0 without a face. Of two people in an image, each
        is looked for in their half.

        With `scene`, also "scene": it samples from the same noise, and the loss is the mean squared difference between
        the clean latents that both expect, at all steps; outside the heads in both images, and outside the head that
        the person should have, so that it may grow to it.

        Args:
            noise, wanted: on `device`. expected: where the face should be in the person's share of the image, [P]; it
                stands for one that is not found, of which a base that draws poorly would learn nothing.
        """

        def shares(x: Tensor) -> Tensor:  # [B, C, h, w] -> [P, C, h, w * B / P]
            return torch.cat(x.chunk(len(wanted.embeddings) // len(noise), -1))

        estimates = _estimates(predict, noise, schedule)
        images = shares(self._decode(estimates[-1]))
        faces = self._find(images, expected)
        seen = [row for row, face in enumerate(faces) if face is not None]
        found = dict.fromkeys(("id", "traits"), torch.zeros((), device=self.device))
        if seen:
            landmarks = torch.from_numpy(np.stack([faces[row].landmarks for row in seen])).float().to(self.device)
            embeddings, asked = self.embed(images[seen], landmarks), wanted.embeddings[seen]
            found["id"] = losses.id_loss(embeddings, asked)
            found["traits"] = losses.traits_loss(self.traits(embeddings), self.traits(asked))
        if scene is not None:
            with torch.no_grad():
                before = _estimates(scene, noise, schedule)
                plain = shares(self._decode(before[-1]))
            heads = self._heads(images, faces) | self._heads(plain, self._find(plain, expected))
            for row in seen:
                heads[row] |= wanted.head_on(row, faces[row].landmarks, *heads.shape[1:])
            shown = torch.from_numpy(heads[:, None]).float().to(self.device)
            outside = 1 - F.avg_pool2d(shown, images.shape[-2] // noise.shape[-2])
            kept = [losses.diffusion_loss(shares(a) * outside, shares(b) * outside) for a, b in zip(estimates, before)]
            found["scene"] = torch.stack(kept).mean()
        return found

    def embed(self, images: Tensor, landmarks: Tensor) -> Tensor:
        """Embeds the faces of images [B, 3, H, W] in -1..1 with landmarks [B, 5, 2] in pixels, by each of the R
        recognizers: [B, R, 512]."""
        found = []
        for one in self.recognisers:
            points = torch.from_numpy(one.kind.points).to(images.device)
            found.append(one.embed(losses.align_faces(images, landmarks, points, one.kind.size)))
        return torch.stack(found, 1)

    def traits(self, embeddings: Tensor) -> list[Tensor]:
        """Computes logits [B, values] of each trait from embeddings [B, R, 512], by the last recognizer's heads."""
        return [head(embeddings[:, -1]) for head in self.recognisers[-1].heads.values()]

    @torch.no_grad()
    def read_people(self, faces: Faces, who: np.ndarray, rng: np.random.Generator) -> Wanted:
        """Reads a drawn face of each of the people `who` [B]."""
        rows = [int(rng.choice(np.flatnonzero(faces.identity == number))) for number in who]
        images, landmarks = faces.images[faces.image[rows]], faces.landmarks[rows]
        embeddings = self.embed(to_input(images).to(self.device), torch.from_numpy(landmarks).float().to(self.device))
        heads = [head_mask(image, points, self.parser) for image, points in zip(images, landmarks)]
        return Wanted(embeddings, np.stack(heads), landmarks)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / SCALE).sample.clamp(-1, 1)

    def _find(self, images: Tensor, expected: Sequence[Detection | None]) -> list[Any]:
        """Finds the largest face of each image, [B, 3, H, W] in -1..1, or else returns the expected one, or None."""
        return [self._largest(image) or other for image, other in zip_longest(_pixels(images), expected)]

    def _heads(self, images: Tensor, faces: Sequence[Detection | None]) -> np.ndarray:
        """Finds the heads that belong to faces in images, [B, 3, H, W] in -1..1: bool [B, H, W]."""
        return np.stack(
            [
                np.zeros(image.shape[:2], bool) if face is None else head_mask(image, face.landmarks, self.parser)
                for image, face in zip(_pixels(images), faces, strict=True)
            ]
        )

    def _largest(self, image: np.ndarray) -> Any:
        """Finds the largest face of an image, uint8 RGB [H, W, 3], or None."""
        found = self.detector.detect(np.ascontiguousarray(image[:, :, ::-1]))
        return max(found, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])), default=None)


def _estimates(predict: Predict, noise: Tensor, schedule: Schedule) -> list[Tensor]:
    """Samples in a few steps: the clean latents [B, C, h, w] that each of them expects; the last are the image's."""
    found = []

    def noted(x: Tensor, t: Tensor) -> Tensor:
        v = predict(x, t)
        found.append(schedule.split(x, v, t)[0])
        return v

    losses.sample_few_steps(noted, noise, schedule, STEPS, gradient_steps=STEPS)
    return found


def _pixels(images: Tensor) -> np.ndarray:
    """Turns images [B, 3, H, W] in -1..1 into uint8 RGB [B, H, W, 3]."""
    return ((images.detach() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def load(folder: Path, device: str = "cpu") -> SampledFaces:
    """Loads autoencoder, recognizers, and detector and parser (both on the CPU) from a training folder, with frozen
    weights."""
    from lib_pulid.face_models import InsightFaceDetector, OnnxParser

    made = folder / "miniature"
    vae = load_autoencoder(folder / FILE).eval().requires_grad_(False).to(device)
    recognisers = [load_recogniser(made, name).to(device) for name in RECOGNISERS]
    detector, parser = InsightFaceDetector(made / "detector.onnx"), OnnxParser(made / "parser.onnx")
    return SampledFaces(vae, recognisers, detector, parser)


def expected_face(person: world.Person, scene: world.Scene, said: Collection[str], number: int = 0) -> Detection | None:
    """Returns where a face would be drawn in its share of the image; None if the prompt, which says these attributes of
    the scene, leaves it open. number: of the person, from left to right; a prompt always says where several stand."""
    people = len(scene.placements)
    if people == 1 and not {"size", "position"} <= set(said):
        return None
    place, left = scene.placements[number], np.float32(number * SIZE // people)
    landmarks, box = world.landmarks(person, place), world.face_box(person, place)
    return Detection(box - (left, 0, left, 0), landmarks - (left, 0), 0.0)


@dataclass(frozen=True)
class PeopleInWords:
    """Asks for people of a data set by describing them."""

    data: Drawn
    reader: SampledFaces

    def losses(self, base: Any, batch: int, step: int, before: Any = None) -> dict[str, Tensor]:
        """Computes the losses of a step's images. base, and before it was trained on: `base.Base`, `flux.FluxBase`."""
        prompts, wanted, expected = self.sample(batch, np.random.default_rng([26, step]))
        text = base.text(prompts)
        noise = torch.randn(batch, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(10**7 + step))
        noise = noise.to(self.reader.device)
        scene = None if before is None else lambda x, t: before.predict(x, t, *text)
        return self.reader.losses(lambda x, t: base.predict(x, t, *text), noise, base.schedule, wanted, scene, expected)

    @cached_property
    def _faces(self) -> Faces:
        return faces_of(self.data)

    def sample(self, batch: int, rng: np.random.Generator) -> tuple[list[str], Wanted, list[Detection | None]]:
        """Samples prompts [B], half of which say all of the scene, the people in them, and where the faces are
        expected."""
        who = rng.choice(self.data.people, batch, replace=False)
        prompts, expected = [], []
        for number in who:
            kept = {name for name in world.SCENE_ATTRIBUTES if rng.random() < 0.6}
            scene, keep = world.sample_scene(rng), kept if rng.random() < 0.5 else set(world.SCENE_ATTRIBUTES)
            person = self.data.person(int(number))
            prompts.append(world.describe(scene, [person], keep))
            expected.append(expected_face(person, scene, keep))
        return prompts, self.reader.read_people(self._faces, who, rng), expected
