"""Runs the trial: generates images of each person with each method, weight, prompt and seed, and judges them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from lib_pulid.errors import NoFaceError
from lib_pulid.evaluate.clip import Clip
from lib_pulid.evaluate.judges import FaceJudge
from lib_pulid.evaluate.measures import change, copy_paste, cosine, kept, mean, pose
from lib_pulid.evaluate.subjects import Prompt, Subject
from lib_pulid.faces import Detection, FaceModels, order_faces
from lib_pulid.head import head_mask
from lib_pulid.images import resize_long_edge
from lib_pulid.injection import Injection
from lib_pulid.judge import Judge, Reading
from lib_pulid.standalone import Workshop
from lib_pulid.weights import Adapter

WITHOUT = "without"


@dataclass(frozen=True, eq=False)
class Method:
    """A PuLID file with settings. Files with the same name are trainings of one method."""

    name: str
    adapter: Adapter
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Look:
    """What was read from an image. face: the largest of `faces` (a number), or None. clip: [D]; None without CLIP."""

    image: np.ndarray
    faces: int
    face: Detection | None
    readings: Mapping[str, Reading]
    scene: Mapping[str, str]
    clip: Any


@dataclass(frozen=True, eq=False)
class Panel:
    """The judges of images. judges: the first is the main one. scene: reads what a drawn image shows."""

    models: FaceModels
    judges: tuple[FaceJudge, ...]
    scene: Judge | None = None
    clip: Clip | None = None

    def faces(self, image: np.ndarray) -> list[Detection]:
        """Detects the faces of an image, uint8 RGB [H, W, 3], the largest first."""
        found = self.models.detector.detect(np.ascontiguousarray(image[:, :, ::-1]))
        return order_faces(found, "largest", image.shape[:2]) if found else []

    def look(self, image: np.ndarray) -> Look:
        """Reads an image, uint8 RGB [H, W, 3]."""
        image = resize_long_edge(image)
        faces = self.faces(image)
        return Look(
            image=image,
            faces=len(faces),
            face=faces[0] if faces else None,
            readings={judge.name: judge.read(image, faces[0]) for judge in self.judges} if faces else {},
            scene=self.scene.read(image).named if self.scene else {},
            clip=self.clip.image(image) if self.clip else None,
        )

    def head(self, look: Look) -> np.ndarray:
        """Finds the head with hair, neck and a small margin: bool [H, W]; all False without a face."""
        if look.face is None:
            return np.zeros(look.image.shape[:2], bool)
        assert self.models.parser is not None, "PuLID has one"
        return head_mask(look.image, look.face.landmarks, self.models.parser)


@dataclass(frozen=True)
class Row:
    """One image's figures; None: not measured.

    Args:
        file: of the adapter, "" for images without.
        likeness, copy_paste: by judge. kept: of the prompt's attributes. traits: of the person's.
        pose: of the face, (in the image, in the reference) for each of `measures.pose`; empty without a face.
        change: outside the head, against the image without the identity. other_seed: what another seed changes there.
    """

    person: str
    method: str
    file: str
    weight: float
    prompt: str
    seed: int
    faces: int
    likeness: dict[str, float]
    copy_paste: dict[str, float | None]
    pose: dict[str, tuple[float, float]]
    change: float | None
    other_seed: float | None
    clip_t: float | None
    clip_i: float | None
    kept: dict[str, bool]
    traits: dict[str, bool]


@dataclass(frozen=True, eq=False)
class Sitter:
    """A subject, and what was read from their photos."""

    subject: Subject
    reference: Look
    targets: tuple[Look, ...]
    traits: Mapping[str, str]


def read_sitters(subjects: Sequence[Subject], panel: Panel) -> list[Sitter]:
    """Reads all photos before generating anything.

    Raises:
        NoFaceError: the message names all photos without a face.
    """
    sitters, blank = [], []
    for subject in subjects:
        looks = [panel.look(photo) for photo in (subject.reference, *subject.targets)]
        blank += [f"{subject.name}, photo {i + 1}" for i, look in enumerate(looks) if look.face is None]
        traits = {name: subject.traits.get(name, value) for name, value in _named(looks[0]).items()}
        sitters.append(Sitter(subject, looks[0], tuple(looks[1:]), traits))
    if blank:
        raise NoFaceError(
            f"No face was found in {'; '.join(blank)}. Use photos with an upright, uncovered, large face."
        )
    return sitters


def count_images(sitters: Sequence[Sitter], methods: Sequence[Method], weights: Sequence[float], seeds: int) -> int:
    """Returns the number of rows of `run_trial`."""
    prompts = sum(len(sitter.subject.prompts) for sitter in sitters)
    return prompts * seeds * (1 + len(methods) * sum(weight != 0 for weight in weights))


def run_trial(
    workshop: Workshop,
    panel: Panel,
    methods: Sequence[Method],
    sitters: Sequence[Sitter],
    weights: Sequence[float],
    seeds: int,
    **settings: Any,
) -> Iterator[tuple[Row, np.ndarray]]:
    """Generates and judges all images. Weight 0 is the image without, generated once for all methods.

    settings: of `Workshop.paint`. Yields each row, and its image, uint8 RGB [H, W, 3].
    """

    def look(injections: Sequence[Injection], prompt: str, seed: int) -> Look:
        image, _ = workshop.paint(injections, prompt, seed=seed, **settings)
        return panel.look(np.asarray(image.convert("RGB")))

    @cache
    def without(prompt: str, seed: int) -> tuple[Look, np.ndarray]:
        """Generates an image without an identity; and finds its head."""
        plain = look([], prompt, seed)
        return plain, panel.head(plain)

    def shot(
        sitter: Sitter, method: Method | None, weight: float, prompt: Prompt, seed: int, injections: Any
    ) -> tuple[Row, np.ndarray]:
        before, head = without(prompt.text, seed)
        other, other_head = without(prompt.text, (seed + 1) % max(seeds, 2))
        after = look(injections, prompt.text, seed) if injections else before
        row = Row(
            person=sitter.subject.name,
            method=method.name if method else WITHOUT,
            file=method.adapter.path.name if method else "",
            weight=weight,
            prompt=prompt.text,
            seed=seed,
            change=change(after.image, before.image, head | panel.head(after) if injections else head),
            other_seed=change(before.image, other.image, head | other_head),
            # Times 100, as in papers.
            clip_t=100 * cosine(after.clip, panel.clip.text(prompt.text)) if panel.clip else None,
            clip_i=cosine(after.clip, before.clip) if panel.clip else None,
            kept=kept(prompt.wanted, after.scene),
            **_person_figures(sitter, after),
        )
        return row, after.image

    for sitter in sitters:
        cases = [(prompt, seed) for prompt in sitter.subject.prompts for seed in range(seeds)]
        for prompt, seed in cases:
            yield shot(sitter, None, 0.0, prompt, seed, [])
        for method in methods:
            own = replace(workshop, adapter=method.adapter)
            identity = own.identity([sitter.subject.reference])
            for weight in filter(None, weights):
                injections = [own.compiled(identity, weight=weight, **method.settings)]
                for prompt, seed in cases:
                    yield shot(sitter, method, weight, prompt, seed, injections)


def _person_figures(sitter: Sitter, look: Look) -> dict[str, Any]:
    """Measures how much an image shows the person; likeness is 0 without a face."""
    likeness, copied = {}, {}
    for name, wanted in sitter.reference.readings.items():
        seen = look.readings.get(name)
        likeness[name] = wanted.likeness(seen) if seen else 0.0
        photos = [target.readings[name].embedding for target in sitter.targets]
        scores = [copy_paste(seen.embedding, photo, wanted.embedding) for photo in photos] if seen else []
        copied[name] = mean(scores)
    named = _named(look)
    traits = {name: named.get(name) == value for name, value in sitter.traits.items()}
    tilt, wanted_tilt = ({} if one.face is None else pose(one.face.landmarks) for one in (look, sitter.reference))
    poses = {name: (tilt[name], wanted_tilt[name]) for name in tilt if name in wanted_tilt}
    return {"faces": look.faces, "likeness": likeness, "copy_paste": copied, "traits": traits, "pose": poses}


def traits_on_photos(sitters: Sequence[Sitter]) -> dict[str, float]:
    """Measures how often the judge reads each trait correctly in other photos of the people: an upper bound.

    For people with one photo, in that photo.
    """
    read: dict[str, list[float]] = {}
    for sitter in sitters:
        for photo in sitter.targets or (sitter.reference,):
            for name, right in kept(sitter.traits, _named(photo)).items():
                read.setdefault(name, []).append(float(right))
    return {name: float(np.mean(values)) for name, values in read.items()}


def _named(look: Look) -> Mapping[str, str]:
    """Returns the traits by the first judge that names any."""
    return next((reading.named for reading in look.readings.values() if reading.named), {})


def judge_range(sitters: Sequence[Sitter], judge: str) -> tuple[float | None, float | None]:
    """Computes a judge's mean cosines for two photos of one person, and for photos of different people."""
    faces = [sitter.reference.readings[judge] for sitter in sitters]
    same = [face.likeness(t.readings[judge]) for face, sitter in zip(faces, sitters) for t in sitter.targets]
    return mean(same), mean([a.likeness(b) for i, a in enumerate(faces) for b in faces[:i]])
