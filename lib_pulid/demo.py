"""Runs the demo: contact sheets of people, with the miniature or the real weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from lib_pulid import miniature
from lib_pulid.contact_sheet import Section, Tile, contact_sheet
from lib_pulid.errors import SettingError
from lib_pulid.face_models import InsightFaceDetector
from lib_pulid.faces import LARGEST, Detection, Face, FaceChoice
from lib_pulid.files.catalog import FAMILIES
from lib_pulid.identity import Identity
from lib_pulid.images import ImageSource, load_image
from lib_pulid.injection import Injection
from lib_pulid.judge import Judge
from lib_pulid.photos import IdentityCache
from lib_pulid.sites import find_sites
from lib_pulid.standalone import Workshop, keeping, open_workshop, real_model
from lib_pulid.training.world import Placement, Scene, describe

SEED = 5

# With real weights
WEIGHTS = {"sdxl": (0.4, 0.8, 1.2), "flux": (0.5, 1.0, 1.5)}
PROMPT = "portrait, color, cinematic, in a garden, soft light, detailed face"

# In miniature
STRENGTHS = (0.4, 0.8, 1.0, 1.2)
PEOPLE = (0, 1, 2, 3)  # numbers of the people shown
STRIPES = Placement(y=0.45, scale=0.74, expression="smiling", clothes="striped shirt", clothes_color="red")
HOODIE = Placement(y=0.45, scale=0.74, expression="surprised", clothes="hoodie", clothes_color="green")
ONE = Scene((STRIPES,), "dots", "yellow")
OTHER = Scene((HOODIE,), "hills", "teal", style="pencil")
TWO = Scene((replace(STRIPES, x=0.25, scale=0.4), replace(HOODIE, x=0.75, scale=0.4)), "rays", "orange")


def run_demo(photo: Path | None, out: Path, models_dir: Path, device: str) -> None:
    """Writes a contact sheet for each available family.

    Uses real weights if all are there; otherwise the miniature shows drawn people, or the one in `photo`.
    """
    out.mkdir(parents=True, exist_ok=True)
    real = {family: model for family in FAMILIES if (model := real_model(family, models_dir))}
    for family in real if photo and real else FAMILIES:
        model = real.get(family) or _named(family)
        print(f"\n{family.upper()}: loading {model} ...", flush=True)
        # A demo runs all steps each time, so nothing is cached.
        workshop = replace(open_workshop(model, models_dir, device=device), cache=IdentityCache())
        workshop.base.pipeline.set_progress_bar_config(disable=True)
        path = out / f"demo_{family}.png"
        (_photographs if family in real else _drawings)(workshop, photo).save(path)
        print(f"  wrote      {path}")
        if family not in real:
            _suggest(model, photo, out)


def _suggest(model: str, photo: Path | None, out: Path) -> None:
    """Prints a command to try next."""
    face = photo or out / "person.png"
    if not photo:
        Image.fromarray(miniature.portrait(PEOPLE[0])).save(face)
    print(f'  try        python -m lib_pulid generate --model {model} --face {face} --prompt "{describe(OTHER)}"')


def _named(family: str) -> str:
    return next(name for name, one in miniature.MODELS.items() if one == family)


def _identity(workshop: Workshop, photo: ImageSource, choice: FaceChoice = LARGEST) -> Identity:
    def tell(name: str, face: Face) -> None:
        x0, y0, x1, y1 = face.detection.box.round().astype(int)
        print(f"  face       {name}: found at ({x0}, {y0}), {x1 - x0} x {y1 - y0} pixels")
        for note in face.notes:
            print(f"             {note}")

    return workshop.identity([photo], choice, on_face=tell)


def _changed(before: Image.Image, after: Image.Image) -> tuple[Image.Image, float]:
    """Returns the difference, black on white, and the fraction of pixels that differ by more than a tenth."""
    change = np.abs(np.asarray(after, np.int16) - np.asarray(before, np.int16)).max(axis=2)
    return Image.fromarray((255 - change).astype(np.uint8)), float((change > 25).mean())


# ---------------------------------------------------------------- with real weights


def sample_photo() -> Path:
    """Returns the group photo in insightface's package."""
    spec = find_spec("insightface")
    if spec is None or spec.origin is None:
        raise SettingError("insightface, which has the sample photo, is not installed. Give a photo with --face.")
    return Path(spec.origin).parent / "data" / "images" / "t1.jpg"


def _photographs(workshop: Workshop, photo: Path | None) -> Image.Image:
    photo = photo or sample_photo()
    identity = _identity(workshop, photo)
    settings, weights = {"seed": SEED}, WEIGHTS[workshop.base.family]
    count = len(find_sites(workshop.base.denoiser).sites)
    plain, _ = workshop.paint([], PROMPT, **settings)
    images = []
    for weight in weights:
        injection = workshop.compiled(identity, weight=weight)
        image, used = workshop.paint([injection], PROMPT, **settings)
        images.append(image)
        kept = f"{injection.nbytes / 1e6:.1f} MB kept for sampling"
        print(f"  painted    weight {weight}: injected at {used} of {count} sites, {kept}", flush=True)
    aligned = identity.thumbnail if identity.thumbnail is not None else np.zeros((96, 96, 3), np.uint8)
    tiles = [Tile(Image.fromarray(load_image(photo, photo.name))), Tile(Image.fromarray(aligned)), Tile(plain)]
    tiles += [*map(Tile, images), Tile(_changed(plain, images[1])[0])]
    columns = ["reference", "aligned face", "without", *(f"weight {w}" for w in weights), f"changed at {weights[1]}"]
    return contact_sheet("PuLID", workshop.label, [Section(PROMPT, columns, [tiles])])


# ---------------------------------------------------------------- in miniature


@dataclass(frozen=True)
class _Show:
    """Generates with the miniature, and asks the judge."""

    workshop: Workshop
    detector: InsightFaceDetector
    judge: Judge

    def faces(self, image: np.ndarray) -> list[Detection]:
        """Detects the faces of an image, uint8 RGB [H, W, 3], from left to right."""
        found = self.detector.detect(np.ascontiguousarray(image[:, :, ::-1]))
        return sorted(found, key=lambda face: face.box[0])

    def likeness(self, image: np.ndarray, reference: np.ndarray, of: int = 0, half: int | None = None) -> float | None:
        """Compares the first face, from the left, with the reference's face number `of`; None without one.

        half: of the image, in which the face has to be; 0 is the left one.
        """
        for face in self.faces(image):
            if half is None or half == int(face.box[[0, 2]].mean() > image.shape[1] / 2):
                wanted = self.judge.read(reference, self.faces(reference)[of].landmarks)
                return self.judge.read(image, face.landmarks).likeness(wanted)
        return None

    def tile(self, image: Image.Image, reference: np.ndarray, of: int = 0) -> Tile:
        """Makes a tile of an image of one person, with the judge's likeness."""
        level = self.likeness(np.asarray(image), reference, of=of)
        return Tile(image, "no face found" if level is None else f"likeness {level:.2f}", level)

    def paint(self, *asked: tuple[Sequence[Injection], Scene]) -> list[Image.Image]:
        """Generates images with the scenes' prompts, at once."""
        people, scenes = zip(*asked)
        return self.workshop.paint_batch(people, [*map(describe, scenes)], [SEED] * len(asked))[0]

    @cached_property
    def plain(self) -> Image.Image:
        """The scene ONE without an identity."""
        return self.paint(([], ONE))[0]


def _drawings(workshop: Workshop, photo: Path | None) -> Image.Image:
    workshop = keeping(workshop)  # for all people
    show = _Show(workshop, workshop.encoders().faces.detector, miniature.judge())  # type: ignore[arg-type, union-attr]
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))  # small models are slower on more
    sources: list[ImageSource] = [photo] if photo else [miniature.portrait(n) for n in PEOPLE]
    try:
        rows = [_row(show, source) for source in sources]
        together = _together(show)
    finally:
        torch.set_num_threads(threads)
    columns = ["reference", "without", *(f"weight {weight}" for weight in STRENGTHS), "another scene", "changed at 1.0"]
    sections = [
        Section("One person in each row", columns, rows, f"“{describe(ONE)}”; then “{describe(OTHER)}”"),
        together,
    ]
    text = f"{workshop.label}: people not seen in training. Bars: likeness to the reference, by an independent judge."
    return contact_sheet("The person stays, the rest follows the prompt", text, sections)


def _row(show: _Show, source: ImageSource) -> list[Tile]:
    identity, reference = _identity(show.workshop, source), load_image(source)
    plain = show.plain
    injections = [show.workshop.compiled(identity, weight=weight) for weight in STRENGTHS]
    whole = injections[STRENGTHS.index(1.0)]
    *images, other = show.paint(*(([injection], ONE) for injection in injections), ([whole], OTHER))
    difference, fraction = _changed(plain, images[STRENGTHS.index(1.0)])
    tiles = [Tile(Image.fromarray(reference)), show.tile(plain, reference)]
    tiles += [show.tile(image, reference) for image in (*images, other)]
    print("  painted    " + ", ".join(tile.caption for tile in tiles[1:]), flush=True)
    return [*tiles, Tile(difference, f"{fraction:.0%} of the pixels")]


def _together(show: _Show) -> Section:
    """Shows two people in one image, each in a half, and one face of a group."""
    left, right = (miniature.portrait(n) for n in PEOPLE[:2])
    group, order = miniature.group(PEOPLE[1:4]), FaceChoice("left-to-right", 2)
    chosen = show.workshop.compiled(_identity(show.workshop, group, order), weight=1.0)
    both, neither, alone = show.paint((_two(show, left, right), TWO), ([], TWO), ([chosen], ONE))
    levels = [show.likeness(np.asarray(both), reference, half=half) for half, reference in enumerate((left, right))]
    said = " · ".join("no face" if level is None else f"{level:.2f}" for level in levels)
    print(f"  painted    two people in halves: {said}; one of a group", flush=True)
    return Section(
        "Two people, each in a half of the image; and one face of a group",
        ["left", "right", "both", "without", "the rightmost is used", "weight 1.0"],
        [[
            Tile(Image.fromarray(left)), Tile(Image.fromarray(right)),
            Tile(both, f"likeness {said}", min(level or 0.0 for level in levels)), Tile(neither),
            Tile(_marked(group, show.faces(group)[order.index])), show.tile(alone, group, of=order.index),
        ]],
        f"“{describe(TWO)}”",
    )  # fmt: skip


def _two(show: _Show, left: np.ndarray, right: np.ndarray) -> list[Injection]:
    half = torch.zeros(64, 64)
    half[:, :32] = 1
    people = [(_identity(show.workshop, left), half), (_identity(show.workshop, right), 1 - half)]
    return [show.workshop.compiled(one, weight=1.0, mask=mask) for one, mask in people]


def _marked(image: np.ndarray, face: Detection) -> Image.Image:
    marked = Image.fromarray(image)
    ImageDraw.Draw(marked).rectangle(tuple(face.box.tolist()), outline="#3f7f63", width=max(2, marked.width // 128))
    return marked
