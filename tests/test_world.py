"""The drawn world: same numbers, same image; prompts, labels and landmarks say what is in it."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from lib_pulid.training import world
from lib_pulid.training.people import NUMBERS
from lib_pulid.training.scenes import STYLE
from lib_pulid.training.world import ATTRIBUTES, SCENE_ATTRIBUTES, Placement, Scene

FACE_PARTS = {1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13}
HEAD_PARTS = FACE_PARTS | {17}


def samples(count, persons=1, seed=0):
    """Pairs of persons and a scene."""
    rng = np.random.default_rng(seed)
    return [
        ([world.sample_person(rng) for _ in range(persons)], world.sample_scene(rng, persons)) for _ in range(count)
    ]


def heads(persons, scene):
    """Where heads, hair and necks are, with a margin of 3 pixels: bool [128, 128]."""
    classes = world.labels(persons, scene)
    return cv2.dilate(np.uint8((classes != 0) & (classes != 16)), np.ones((7, 7))) > 0


def near(classes, point, radius=2):
    """Classes [h, w] within a radius of a point."""
    x, y = np.floor(point).astype(int)
    return set(classes[y - radius : y + radius + 1, x - radius : x + radius + 1].ravel().tolist())


@pytest.mark.parametrize("style", STYLE)
def test_same_numbers_same_image(style):
    first, second = samples(2, seed=5), samples(2, seed=5)
    assert first == second
    for (persons, scene), (same_persons, same_scene) in zip(first, second):
        image = world.draw(persons, replace(scene, style=style))
        assert np.array_equal(image, world.draw(same_persons, replace(same_scene, style=style)))


@pytest.mark.parametrize("size", [64, 128, 200])
@pytest.mark.parametrize("persons", [1, 2, 3])
def test_shapes_and_types(size, persons):
    people, scene = samples(1, persons)[0]
    image, classes = world.draw(people, scene, size), world.labels(people, scene, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert np.ptp(image) > 100
    assert classes.shape == (size, size)
    assert classes.dtype == np.uint8
    assert {0, 1, 10, 14, 16, 17} <= set(np.unique(classes).tolist()) <= HEAD_PARTS | {0, 14, 16}
    for person, placement in zip(people, scene.placements):
        assert world.landmarks(person, placement, size).shape == (5, 2)
        assert world.landmarks(person, placement, size).dtype == np.float32
        np.testing.assert_allclose(
            world.landmarks(person, placement, size), size * world.landmarks(person, placement, 1), rtol=1e-5
        )


def test_vector_holds_all_of_a_person():
    rng = np.random.default_rng(1)
    vectors = np.stack([world.sample_person(rng).vector() for _ in range(300)])
    assert vectors.dtype == np.float32
    assert vectors.shape[1] == len(NUMBERS) + sum(map(len, ATTRIBUTES.values()))
    assert vectors.min() >= 0
    assert vectors.max() <= 1
    assert (vectors.max(0) - vectors.min(0) > 0.9).all()
    assert len(np.unique(vectors, axis=0)) == 300


def test_every_value_of_every_attribute_occurs():
    rng = np.random.default_rng(2)
    people = [world.sample_person(rng).attributes() for _ in range(300)]
    scenes = [world.scene_attributes(world.sample_scene(rng)) for _ in range(300)]
    for table, drawn in ((ATTRIBUTES, people), (SCENE_ATTRIBUTES, scenes)):
        for name, values in table.items():
            assert {attributes[name] for attributes in drawn} == set(range(len(values))), name


# Prompts


def test_prompt_of_one():
    scene = Scene(
        (Placement(0.3, 0.45, 0.5, expression="smiling", clothes="striped shirt", clothes_color="red"),), "dots",
        "green", "white", "evening", "pencil",
    )  # fmt: skip
    assert world.describe(scene) == (
        "a wide shot of a smiling person in a red striped shirt, on the left, "
        "in front of green and white dots, warm evening light, pencil drawing"
    )
    assert world.describe(scene, keep=()) == "a person"
    assert world.describe(scene, keep={"clothes_color", "style"}) == "a person in red clothes, pencil drawing"
    person = world.sample_person(np.random.default_rng(0))
    looks = {"skin": "fair", "hair_color": "red", "hair_style": "short", "eye_color": "blue"}
    person = replace(person, **looks, glasses="round", beard="full beard", freckles="none")
    assert world.describe(scene, [person], ("expression", "clothes")) == (
        "a smiling person with fair skin, short red hair, blue eyes, round glasses and a full beard in a striped shirt"
    )
    bald = replace(person, hair_style="balding", glasses="none", beard="none")
    assert world.describe(scene, [bald], ()) == "a balding person with fair skin, red hair and blue eyes"


def test_prompt_of_two():
    left = Placement(0.25, 0.45, 0.4, expression="sad", clothes="overalls", clothes_color="orange")
    right = Placement(0.75, 0.45, 0.4, expression="neutral", clothes="suit", clothes_color="orange")
    assert world.describe(Scene((left, right))) == (
        "two people, on the left a sad person in orange overalls, on the right a calm person in an orange suit, "
        "in front of a plain blue wall, even light, flat illustration"
    )


@pytest.mark.parametrize("persons", [1, 2, 3])
def test_vocabulary_has_all_words(persons):
    rng = np.random.default_rng(3)
    words = set()
    for people, scene in samples(100, persons):
        keep = [name for name in SCENE_ATTRIBUTES if rng.uniform() < 0.5]
        for prompt in (world.describe(scene, people), world.describe(scene), world.describe(scene, people, keep)):
            words |= set(prompt.replace(",", "").split())
    assert words <= world.vocabulary()
    assert all(word == word.lower() for word in words)


# Places


def test_landmarks_are_on_the_features():
    for (person,), scene in samples(40):
        placement = scene.placements[0]
        points, box = world.landmarks(person, placement), world.face_box(person, placement)
        assert (points > box[:2]).all()
        assert (points < box[2:]).all()
        assert (box >= 0).all()
        assert (box <= 128).all()
        classes = world.labels([person], scene)
        left, right, nose, *mouth = points
        assert left[0] < right[0]
        assert 4 in near(classes, left)
        assert 5 in near(classes, right)
        assert 10 in near(classes, nose)
        for corner in mouth:
            assert near(classes, corner, 3) & {11, 12, 13}


def test_landmarks_are_those_of_a_real_face():
    """Aligned to ArcFace's template of five points, upright faces come within a few of its 112 pixels."""
    template = np.array([[38.29, 51.70], [73.53, 51.50], [56.03, 71.74], [41.55, 92.37], [70.73, 92.20]])
    rng = np.random.default_rng(4)
    for _ in range(50):
        points = world.landmarks(world.sample_person(rng), Placement()).astype(float)
        rows = np.array([row for x, y in points for row in ((x, -y, 1, 0), (y, x, 0, 1))])
        fit = rows @ np.linalg.lstsq(rows, template.ravel(), rcond=None)[0]
        assert np.abs(fit - template.ravel()).max() < 6


@pytest.mark.parametrize("persons", [2, 3])
def test_heads_do_not_overlap(persons):
    for people, scene in samples(12, persons):
        widest = replace(people[0], hair_style="afro", hair_volume=1.0, face_width=1.0)
        heads = [
            np.isin(world.labels([widest], replace(scene, placements=(placement,))), list(HEAD_PARTS))
            for placement in scene.placements
        ]
        assert sum(head.astype(int) for head in heads).max() == 1
        assert all(0.24 <= placement.scale <= 0.45 for placement in scene.placements)


# What belongs to whom


def test_scene_leaves_the_person_alone():
    """Background, clothes, light and style do not move anything of the head."""
    for (person,), scene in samples(10):
        other = world.sample_scene(np.random.default_rng(9))
        placement = replace(scene.placements[0], clothes=other.placements[0].clothes, clothes_color="green")
        other = replace(other, placements=(placement,))
        before, after = world.labels([person], scene), world.labels([person], other)
        for part in HEAD_PARTS:
            assert np.array_equal(before == part, after == part)


def test_person_leaves_the_scene_alone():
    for (person,), scene in samples(10):
        stranger = world.sample_person(np.random.default_rng(8))
        head = heads([person], scene) | heads([stranger], scene)
        images = [world.draw([who], replace(scene, style="flat")) for who in (person, stranger)]
        assert np.array_equal(images[0][~head], images[1][~head])
        assert np.abs(images[0][head].astype(int) - images[1][head]).mean() > 5


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_shows(name):
    (person,), _ = samples(1)[0]
    person = replace(person, hair_style="short", beard="none", glasses="none", hair_volume=0.3, parting=0.2)
    scene = Scene()
    little, much = (world.draw([replace(person, **{name: value})], scene).astype(int) for value in (0.0, 1.0))
    changed = np.abs(little - much).max(-1) > 24
    assert changed.sum() >= 12


@pytest.mark.parametrize("style", STYLE)
def test_every_name_shows_in_every_style(style):
    (person,), _ = samples(1)[0]
    scene = Scene((Placement(turn=0.7, tilt=6, scale=0.5, expression="laughing"),), style=style, light="dim")
    for name, values in ATTRIBUTES.items():
        images = [world.draw([replace(person, **{name: value})], scene).astype(int) for value in values]
        for first, image in enumerate(images):
            for other in images[:first]:
                assert (np.abs(image - other).max(-1) > 12).sum() >= 12, name
