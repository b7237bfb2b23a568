"""The miniature as it is shipped: who is in its images, by a judge that no training of the adapter saw."""

from __future__ import annotations

import itertools
import lzma
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib_pulid import injection, miniature
from lib_pulid.attention import PROJECTIONS
from lib_pulid.blend import blend
from lib_pulid.errors import MissingWeightsError, NoFaceError, WrongWeightsError
from lib_pulid.evaluate.measures import pose, slope
from lib_pulid.evaluate.subjects import drawn_people
from lib_pulid.identity import Identity
from lib_pulid.injection import Injection, compile_injection
from lib_pulid.likeness import INSIGHTFACE, MINIATURE, Recognizer
from lib_pulid.standalone import Workshop, open_workshop
from lib_pulid.stores.folder import ModelsFolder, Settings
from lib_pulid.stores.identities import Identities
from lib_pulid.training import checkpoint, world
from tests.small_models.shops import miniature_shop

PEOPLE = (10, 11, 12)
SEED, STEPS = 5, 6
DEFAULTS = {"weight": 1.0, "projection": "ortho_v2", "num_zero": 20, "start": 0.0, "end": 1.0, "start_step": 0}
STANDING = world.Placement(y=0.45, scale=0.74, expression="smiling", clothes="striped shirt", clothes_color="red")
SCENE = world.Scene((STANDING,), "dots", "green")
TWO = replace(SCENE, placements=tuple(replace(STANDING, x=x, scale=0.4) for x in (0.25, 0.75)))


@pytest.fixture(scope="module", autouse=True)
def shop(tmp_path_factory) -> Workshop:
    return miniature_shop("miniature", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def judge():
    return miniature.judge()


@pytest.fixture(scope="module")
def likeness(shop, judge):
    """Of the face at a place, counted from the left, to somebody's portrait; 0 without a face."""
    detector = shop.encoders().faces.detector

    def read(image: np.ndarray, place: int) -> Any:
        found = sorted(detector.detect(bgr(image)), key=lambda face: face.box[0])
        return judge.read(image, found[place].landmarks) if place < len(found) else None

    wanted = {number: read(miniature.portrait(number), 0) for number in PEOPLE}

    def _likeness(image: np.ndarray, number: int, place: int = 0) -> float:
        seen = read(image, place)
        return 0.0 if seen is None else seen.likeness(wanted[number])

    return _likeness


@pytest.fixture(scope="module")
def identities(shop) -> dict[int, Identity]:
    judge = shop.judges[0]
    return {number: shop.identity([miniature.portrait(number)], judge=judge) for number in PEOPLE}


@pytest.fixture(scope="module")
def paint(shop):
    kept: dict[Any, tuple[np.ndarray, Identity | None]] = {}

    def _paint(identity: Identity | None = None, **settings: Any) -> np.ndarray:
        """SCENE with an identity; made once for the same object and settings."""
        key = (id(identity), *(DEFAULTS | settings).values()) if identity else None
        if key not in kept:
            given = [compiled(shop, identity, **(DEFAULTS | settings))] if identity else []
            kept[key] = image_of(shop, given), identity  # which keeps its number, too
        return kept[key][0]

    return _paint


def compiled(shop: Workshop, identity: Identity, **settings: Any) -> Injection:
    return compile_injection(shop.adapter, identity, **settings)


def image_of(shop: Workshop, injections: Sequence[Injection], scene: world.Scene = SCENE) -> np.ndarray:
    return np.asarray(shop.paint(injections, world.describe(scene), seed=SEED, steps=STEPS)[0])


def bgr(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, :, ::-1])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other).mean())


# ---------------------------------------------------------------- who is in the image


def test_likeness_rises_with_the_weight(paint, identities, likeness):
    seen = np.array([[likeness(paint(identities[n], weight=w), n) for w in (0.0, 0.5, 1.0)] for n in PEOPLE])
    assert (seen[:, 2] > seen[:, 0]).all(), seen
    assert seen[:, 1].mean() - seen[:, 0].mean() > 0.2, seen
    assert seen[:, 2].mean() - seen[:, 0].mean() > 0.2, seen


def test_nobody_elses_image_is_as_like_the_person(paint, identities, likeness):
    seen = np.array([[likeness(paint(identities[n]), other) for other in PEOPLE] for n in PEOPLE])
    assert (seen.argmax(0) == np.arange(len(PEOPLE))).all(), seen


def test_it_is_that_person_and_not_another(paint, identities, likeness):
    seen = np.array([[likeness(paint(identities[n]), other) for other in PEOPLE] for n in PEOPLE])
    assert (seen.argmax(1) == np.arange(len(PEOPLE))).all(), seen


def test_the_judge_knows_drawn_people(shop, judge):
    """On two drawings each of 40 people not seen in training: it names their traits, and the thresholds that users
    are told separate one person from another."""
    detector = shop.encoders().faces.detector
    people = drawn_people(40, 1, lambda image: bool(detector.detect(bgr(image))))
    pairs = [(someone.reference, someone.targets[0]) for someone in people]
    read = [[judge.read(image, detector.detect(bgr(image))[0].landmarks) for image in pair] for pair in pairs]
    for trait in ("skin", "hair_color", "hair_style", "glasses", "beard"):
        right = [one.named[trait] == someone.traits[trait] for someone, pair in zip(people, read) for one in pair]
        assert np.mean(right) >= 0.95, (trait, np.mean(right))
    cosines = np.array([[first.likeness(second) for _, second in read] for first, _ in read])
    strangers = ~np.eye(len(people), dtype=bool)
    assert (cosines.diagonal() >= MINIATURE.same).mean() >= 0.97
    assert (cosines[strangers] < MINIATURE.close).mean() >= 0.97


def test_the_likeness_that_users_are_told(shop, paint, identities, likeness):
    """As `generate --likeness` prints it; and by the adapter's own recognizer, as in a WebUI without another one."""
    told: dict[float, list[float]] = {0.0: [], 1.0: []}
    for number, weight in itertools.product(PEOPLE, told):
        words = shop.likeness(Image.fromarray(paint(identities[number], weight=weight)), identities[number])
        assert words.endswith(", by the miniature's judge")
        told[weight].append(float(words.split()[0]))
        assert told[weight][-1] == pytest.approx(likeness(paint(identities[number], weight=weight), number), abs=0.006)
        assert MINIATURE.verdict(told[weight][-1]) in words
    assert (np.array(told[1.0]) > told[0.0]).all(), told
    assert shop.scale is MINIATURE is not INSIGHTFACE
    own = Recognizer(shop.recognizer, "own", True, lambda: shop.encoders().faces.recogniser)
    flattering = replace(shop, judges=[own])
    own_told = [
        flattering.likeness(Image.fromarray(paint(identities[number], weight=weight)), identities[number])
        for weight in told
        for number in PEOPLE
    ]
    assert all("which overestimates" in words for words in own_told)
    before, after = np.array([float(words.split()[0]) for words in own_told]).reshape(2, -1)
    assert after.mean() > before.mean(), (before, after)


def test_two_people_in_two_regions(shop, identities, judge):
    """Faces of half the size are not always found; those that are found are like the person of their half."""
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    pairs, detector = [*itertools.permutations(PEOPLE, 2)], shop.encoders().faces.detector
    people = [[compiled(shop, identities[n], mask=mask) for n, mask in zip(pair, (left, 1 - left))] for pair in pairs]
    images, _ = shop.paint_batch(people, [world.describe(TWO)] * len(pairs), [SEED + 1] * len(pairs), steps=STEPS)
    wanted = {n: judge.read(p := miniature.portrait(n), detector.detect(bgr(p))[0].landmarks) for n in PEOPLE}
    seen: tuple[list[Any], list[Any]] = [], []
    for pair, image in zip(pairs, map(np.asarray, images)):
        for face in detector.detect(bgr(image)):
            half = int(face.box[[0, 2]].mean() > image.shape[1] / 2)
            alike = [judge.read(image, face.landmarks).likeness(wanted[n]) for n in pair]
            seen[half].append((alike[half], alike[1 - half]))
    assert sum(map(len, seen)) > len(pairs), seen
    for own, other in (np.mean(half, 0) for half in seen):
        assert own > other + 0.2, seen


def test_several_photos_beat_one(shop, paint, likeness):
    """One is dark, tilted and a pencil drawing; the others are better."""
    poor = world.Scene((world.Placement(tilt=12.0, turn=0.9, scale=0.45),), light="dim", style="pencil")
    views = [world.Scene((world.Placement(turn=turn, expression="smiling"),), "dots") for turn in (-0.5, 0.4)]
    one, several = [], []
    for number in PEOPLE:
        photos = [miniature.portrait(number, scene) for scene in (poor, *views)]
        one.append(likeness(paint(shop.identity(photos[:1])), number))
        several.append(likeness(paint(shop.identity(photos)), number))
    assert np.mean(several) > np.mean(one), (one, several)


def test_the_face_is_chosen_out_of_a_group(shop, paint, likeness):
    from lib_pulid.faces import FaceChoice

    group = miniature.group(PEOPLE)
    image = paint(shop.identity([group], FaceChoice("left-to-right", 2)))
    seen = [likeness(image, other) for other in PEOPLE]
    assert int(np.argmax(seen)) == 2, seen


def test_a_blend_is_between_two_people(shop, identities, likeness):
    one, other = PEOPLE[:2]
    images = [
        image_of(shop, [compiled(shop, blend([("a", identities[one], share), ("b", identities[other], 4 - share)]))])
        for share in (3, 1)
    ]
    assert likeness(images[0], one) > likeness(images[1], one)
    assert likeness(images[0], other) < likeness(images[1], other)


# ---------------------------------------------------------------- settings


def test_weight_0_changes_nothing(paint, identities):
    assert np.array_equal(paint(), paint(identities[PEOPLE[0]], weight=0.0))


def test_a_shorter_time_is_less(paint, identities, likeness):
    """The later it starts, the less changes and the less the face is like the person; so with an early end."""
    number = PEOPLE[0]
    changed = {
        span: distance(paint(), paint(identities[number], start=span[0], end=span[1]))
        for span in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.75, 1.0))
    }
    assert changed[0.75, 1.0] < changed[0.5, 1.0] < changed[0.0, 1.0], changed
    assert 0 < changed[0.0, 0.5] < changed[0.0, 1.0], changed
    late, whole = (paint(identities[number], start=start, end=1.0) for start in (0.75, 0.0))
    assert likeness(late, number) < likeness(whole, number)


def test_a_start_step_is_a_start(paint, identities):
    """Half of the steps come before the step in the middle."""
    person = identities[PEOPLE[0]]
    by_step = paint(person, start_step=STEPS // 2)
    assert np.array_equal(by_step, paint(person, start=0.5))


def test_zero_tokens_leave_more_to_the_prompt(paint, identities):
    changed = [
        np.mean([distance(paint(), paint(identities[n], num_zero=zeros)) for n in PEOPLE[:2]]) for zeros in (0, 80)
    ]
    assert changed[1] < changed[0], changed


def test_projections_keep_what_is_added_off_the_prompts_own_answer(shop, identities, monkeypatch):
    """Along what the text attention says, channel by channel: ortho adds nothing, ortho_v2 less than none."""
    added = injection.add_cross_attention
    along: dict[str, float] = {}
    for kind in PROJECTIONS:
        parts, wholes = [], []

        def measured(q: torch.Tensor, h: torch.Tensor, *args: Any, parts=parts, wholes=wholes) -> torch.Tensor:
            out = added(q, h, *args)
            here, more = h.double(), (out - h).double()
            parts.append(((here * more).sum(1) ** 2 / (here**2).sum(1).clamp_min(1e-30)).sum().item())
            wholes.append((more**2).sum().item())
            return out

        monkeypatch.setattr(injection, "add_cross_attention", measured)
        image_of(shop, [compiled(shop, identities[PEOPLE[0]], **DEFAULTS | {"projection": kind})])
        assert len(parts) == 70 * STEPS
        along[kind] = sum(parts) / sum(wholes)
    assert along["ortho"] < 1e-9 < along["ortho_v2"] < along["none"], along


def test_each_projection_is_an_image_of_its_own(paint, identities, likeness):
    """Whose image is closest to the prompt is not tested: with these weights all are alike, see docs/training.md."""
    number, kinds = PEOPLE[0], ("none", "ortho", "ortho_v2")
    images = [paint(identities[number], projection=kind) for kind in kinds]
    assert all(distance(one, other) > 0.1 for one, other in itertools.combinations(images, 2))
    assert all(likeness(image, number) > 0.4 for image in images)


def test_a_saved_identity_is_the_photo(paint, identities, tmp_path):
    identities[PEOPLE[0]].save(tmp_path / "person.safetensors")
    saved = Identity.load(tmp_path / "person.safetensors")
    assert np.array_equal(paint(saved), paint(identities[PEOPLE[0]]))


# ---------------------------------------------------------------- input that it cannot work with


def photograph() -> Path:
    import insightface

    return Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"


@pytest.mark.parametrize(("name", "drawn"), [("roll", "tilt"), ("turn", "turn")])
def test_the_detector_sees_how_a_drawn_head_is_held(shop, name, drawn):
    """`evaluate` measures how much of a photo's pose is copied by the detector's points, so these have to follow it."""
    detector, most = shop.encoders().faces.detector, {"tilt": 12, "turn": 1}[drawn]
    pairs = []
    for number, amount in enumerate(np.linspace(-most, most, 5)):
        scene = replace(SCENE, placements=(replace(STANDING, **{drawn: float(amount)}),))
        (found,) = detector.detect(bgr(miniature.portrait(number, scene)))
        pairs.append((pose(found.landmarks)[name], float(amount)))
    assert np.corrcoef(np.array(pairs).T)[0, 1] > 0.95
    if drawn == "tilt":
        assert slope(pairs) == pytest.approx(1, abs=0.2)  # both are degrees, clockwise


@pytest.mark.parametrize("kind", ["scenery", "gray", "noise", "photograph"])
def test_an_image_without_a_drawn_face(shop, kind):
    images = {
        "scenery": world.draw([], world.Scene((), "hills", "teal"), 256),
        "gray": np.full((256, 256, 3), 128, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8),
    }
    said = r"no face was found.* The miniature knows only drawn people\. .*models download"
    with pytest.raises(NoFaceError, match=said):
        shop.identity([images.get(kind, photograph())])


def test_unknown_words_are_named():
    known = world.describe(SCENE)
    assert miniature.check_prompt(known) == []
    assert miniature.check_prompt(f"{known.upper()}!") == []
    (note,) = miniature.check_prompt("A smiling Astronaut in a red spaceship, astronaut")
    assert "does not know the words astronaut, spaceship. Example of a prompt it knows: " in note
    assert miniature.check_prompt(note.partition("knows: ")[2]) == []


def test_every_prompt_of_the_world_is_known():
    rng = np.random.default_rng(3)
    for _ in range(100):
        scene = world.sample_scene(rng, int(rng.integers(1, 4)))
        people = [world.sample_person(rng) for _ in scene.placements]
        assert miniature.check_prompt(world.describe(scene, people)) == []


@pytest.fixture
def copy(monkeypatch, tmp_path) -> Path:
    """The files at another place, to be damaged."""
    for path in miniature.FOLDER.iterdir():
        if path.suffix in (".safetensors", ".onnx", ".xz"):
            shutil.copyfile(path, tmp_path / path.name)
    for packed in tmp_path.glob("*.xz"):
        shutil.copyfile(miniature.checkpoint(packed.name.split(".")[0]), tmp_path / packed.stem)
        packed.unlink()
    monkeypatch.setattr(miniature, "FOLDER", tmp_path)
    return tmp_path


BASES = {f"{part}{family}.safetensors": name for name, family in miniature.MODELS.items() for part in ("", "pulid_")}
FILES = (*BASES, "judge.onnx", *miniature.ENCODERS)


def use(name: str, folder: Path) -> None:
    if name == "judge.onnx":
        miniature.judge()
    elif name in miniature.ENCODERS:
        miniature.encoders()
    else:
        open_workshop(BASES[name], folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing(copy, name):
    (copy / name).unlink()
    with pytest.raises(MissingWeightsError, match=rf"{name}, a part of the miniature, is missing in .*git checkout"):
        use(name, copy)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_damaged(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-5000])
    with pytest.raises(WrongWeightsError, match=name):
        use(name, copy)


def test_a_packed_file(copy, monkeypatch, tmp_path):
    """Unpacked once for its content; elsewhere if its own folder may not be written to; named if it is damaged."""
    content = (copy / "sdxl.safetensors").read_bytes()[:5000]
    (copy / "sdxl.safetensors").write_bytes(content)
    checkpoint.pack(copy / "sdxl.safetensors")
    path = miniature.checkpoint("sdxl")
    assert path.read_bytes() == content
    assert path.is_relative_to(copy)
    monkeypatch.setattr(lzma, "decompress", None)  # not a second time
    assert miniature.checkpoint("sdxl") == path
    monkeypatch.undo()
    monkeypatch.setattr(miniature, "FOLDER", copy)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    shutil.rmtree(copy / "unpacked")
    (tmp_path / "elsewhere").mkdir()
    (copy / "unpacked").write_text("a file")
    path = miniature.checkpoint("sdxl")
    assert path.read_bytes() == content
    assert path.is_relative_to(tmp_path / "elsewhere")
    (copy / "sdxl.safetensors.xz").write_bytes((copy / "sdxl.safetensors.xz").read_bytes()[:-20])
    with pytest.raises(WrongWeightsError, match=r"sdxl.safetensors.xz in .* is damaged"):
        miniature.checkpoint("sdxl")


def test_the_cache_lies_where_identities_are_saved(tmp_path, identities):
    """With the weight files in the models folder itself: a new folder `pulid` would hide what is saved beside them."""
    (tmp_path / "pulid_v1.1.safetensors").touch()
    saved = Identities(ModelsFolder(lambda: Settings(tmp_path)))
    saved.save("anna", identities[PEOPLE[0]])
    open_workshop("miniature", tmp_path).identity([miniature.portrait(PEOPLE[0])])
    assert (saved.names(), len(list(saved.folder.with_name("cache").iterdir()))) == (["anna"], 1)


def test_all_of_it_is_small():
    assert sum(path.stat().st_size for path in miniature.FOLDER.iterdir() if path.is_file()) < 30e6


def test_people_are_drawn_alike_each_time():
    assert np.array_equal(miniature.portrait(3), miniature.portrait(3))
    assert miniature.person(3) != miniature.person(4)
    assert Image.fromarray(miniature.group((1, 2))).size == (512, 512)


def test_bench_times_the_way_from_a_photo(tmp_path):
    from lib_pulid.bench import photos

    way, stages = photos(tmp_path, photo=None, device="cpu", runs=1)
    assert min(way[name] for name in ("loading", "first", "warm", "known")) > 0
    assert {"detect", "recognize", "parse", "vision", "encode"} <= stages.keys()
