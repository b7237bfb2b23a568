"""The networks that read drawn faces: their shapes, their files, and how the product's own code runs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lib_pulid.errors import WrongWeightsError
from lib_pulid.face_models import ArcFaceRecogniser, InsightFaceDetector, OnnxParser
from lib_pulid.faces import CROP_SIZE, Detection
from lib_pulid.judge import Judge, cut, similarity
from lib_pulid.training import detector, layers, parser, readers, tower, world
from lib_pulid.training.crops import ARCFACE_POINTS, faces_of, pairs, spoiled
from lib_pulid.training.dataset import Drawn
from lib_pulid.training.export import save_half, save_onnx
from lib_pulid.vision import BLOCKS, load_vision_tower


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Drawn:
    """Three people, twelve images."""
    return Drawn(tmp_path_factory.mktemp("drawn"), 3)


@pytest.fixture(scope="module")
def faces(drawn):
    return faces_of(drawn, sharp=2)


def settled(module: torch.nn.Module, size: int) -> torch.nn.Module:
    """With norms that have seen something, so that a wrong fold of them shows."""
    torch.manual_seed(0)
    layers.settle_norms(module, [torch.randn(4, 3, size, size)])
    return module


def test_every_face_is_listed(drawn, faces):
    """A second person's face too, with the identity that the data set gives it."""
    assert set(faces.image) == set(range(len(drawn)))
    for row in range(len(faces)):
        people, scene = drawn.example(faces.image[row])
        shown = [
            world.landmarks(person, place)
            for person, place in zip(people, scene.placements)
            if person == drawn.person(faces.identity[row])
        ]
        assert any(np.array_equal(faces.landmarks[row], points) for points in shown)
    assert len(faces) == sum(len(drawn.example(index)[0]) for index in range(len(drawn)))


def test_crops_are_insightfaces(faces):
    """The crop that the recognizer is trained on is the one that insightface makes."""
    from insightface.utils.face_align import norm_crop

    image, landmarks = faces.images[0], faces.landmarks[0]
    wanted = norm_crop(np.ascontiguousarray(image), landmarks)
    assert np.abs(cut(image, landmarks, ARCFACE_POINTS, 112).astype(int) - wanted).mean() < 0.1
    moved = np.hstack([landmarks, np.ones((5, 1))]) @ similarity(landmarks, ARCFACE_POINTS).T
    assert np.abs(moved - ARCFACE_POINTS).max() < 15


def test_spoiled_images_stay_images(faces):
    """Spoiled, with a generator's seed deciding how."""
    made = [spoiled(faces.images[0], np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert made[0].dtype == np.uint8 and made[0].shape == faces.images[0].shape
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


def test_pairs_are_of_one_person(faces):
    chosen = next(pairs(faces, 3, seed=0))
    assert len(set(chosen.tolist())) == 6
    assert np.array_equal(faces.identity[chosen[0::2]], faces.identity[chosen[1::2]])


def test_contrastive_loss_prefers_own_kind():
    identity = torch.tensor([0, 0, 1, 1])
    together = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert readers.contrastive_loss(together, identity) < 0.01
    assert readers.contrastive_loss(together, torch.tensor([0, 1, 0, 1])) > 5


def test_both_spellings_of_recognizer():
    kinds = [readers._kind(name) for name in ("recognizer", "recogniser", "judge")]
    assert kinds == ["recogniser", "recogniser", "judge"]


def test_recogniser_runs_in_insightface(tmp_path, faces):
    """ONNX in 16 bit through insightface gives what torch gives on the same crop, and the safetensors do."""
    reader = settled(readers.build("recogniser"), 112)
    readers.save("recogniser", reader, tmp_path)
    image, landmarks = faces.images[0], faces.landmarks[0]
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    found = ArcFaceRecogniser(tmp_path / "recogniser.onnx").embed(bgr, Detection(np.zeros(4), landmarks, 1.0))
    crop = layers.to_input(cut(image, landmarks, ARCFACE_POINTS, 112)[None])
    for network in (reader, readers.load_recogniser(tmp_path, "recogniser")):
        with torch.no_grad():
            wanted = network.embed(crop)[0].numpy()
        assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
    assert (tmp_path / "recogniser.onnx").stat().st_size < 1_000_000


@pytest.mark.parametrize("name", ["judge", "scene_judge"])
def test_judge_names_what_torch_names(tmp_path, faces, name):
    """One file: embedding and a value for every attribute."""
    kind, reader = readers.KINDS[name], settled(readers.build(name), 128)
    readers.save(name, reader, tmp_path)
    image, landmarks = np.ascontiguousarray(faces.images[0]), faces.landmarks[0]
    reading = Judge(tmp_path / f"{name}.onnx").read(image, None if kind.points is None else landmarks)
    seen = image if kind.points is None else cut(image, landmarks, kind.points, kind.size)
    embedding, *logits = readers.read_all(reader, [seen])
    assert np.linalg.norm(reading.embedding - embedding[0]) < 0.02 * np.linalg.norm(embedding[0])
    for (key, values), row in zip(kind.heads.items(), logits):
        assert row[0][values.index(reading.named[key])] > row[0].max() - 0.02
    assert reading.likeness(reading) == pytest.approx(1)


def test_detector_runs_in_insightface(tmp_path):
    """What SCRFD reads from the nine outputs is what the network means: box and points in pixels of the image."""
    wanted = (100.0, 60.0, 140.0, 110.0), np.array([[110, 80], [130, 80], [120, 90], [112, 100], [128, 100.0]])
    sample = detector.Sample(np.zeros(0), np.array([wanted[0]]), wanted[1][None], np.array([True]))
    targets = [torch.from_numpy(row)[None] for row in detector.targets(sample)]

    class Perfect(torch.nn.Module):
        """Gives the targets themselves."""

        def forward(self, image):
            none = 0 * image.mean()
            return [(row[..., 0] * 20 - 10 + none, row[..., 1:5] + none, row[..., 5:] + none) for row in targets]

    detector.save(Perfect(), tmp_path)
    found = InsightFaceDetector(tmp_path / "detector.onnx").detect(np.zeros((384, 384, 3), np.uint8))
    assert len(found) == 1 and found[0].score > 0.99
    assert np.allclose(found[0].box, 2 * np.array(wanted[0]), atol=1e-2)
    assert np.allclose(found[0].landmarks, 2 * wanted[1], atol=1e-2)


def test_detector_gives_what_scrfd_reads():
    """Two anchors for every cell of each stride, whose box and points are of the size that the anchor stands for."""
    torch.manual_seed(0)
    with torch.no_grad():
        rows = settled(detector.Detector(), detector.INPUT)(torch.zeros(2, 3, detector.INPUT, detector.INPUT))
    cells = [(detector.INPUT // stride) ** 2 for stride in detector.STRIDES]
    assert [tuple(part.shape for part in row) for row in rows] == [
        ((2, 2 * n), (2, 2 * n, 4), (2, 2 * n, 10)) for n in cells
    ]


def test_placed_faces_lie_where_the_image_shows_them():
    """A dot at each landmark is still there after the image was brought to the network's size."""
    for seed in range(8):
        image = np.zeros((128, 128, 3), np.uint8)
        points = np.array([[[40, 50], [80, 50], [60, 70], [45, 90], [75, 90]]], np.float32)
        for x, y in points[0].astype(int):
            image[y - 1 : y + 1, x - 1 : x + 1] = 255  # pixels around the corner (x, y)
        rng = np.random.default_rng(seed)
        sample = detector.place(image, np.array([[30, 30, 90, 100]], np.float32), points, rng)
        for x, y in sample.points[0].astype(int):
            assert sample.image[y - 2 : y + 2, x - 2 : x + 2].max() > 60


def test_parser_file_takes_the_crop(tmp_path):
    """OnnxParser gives the classes that the network gives; another ONNX file is refused."""
    network = settled(parser.ParserNet(), 128)
    network = network.eval()
    path = tmp_path / "parser.onnx"
    save_onnx(network, torch.zeros(1, 3, CROP_SIZE, CROP_SIZE), path, ["scores"])
    crop = np.random.default_rng(0).integers(0, 256, (CROP_SIZE, CROP_SIZE, 3)).astype(np.uint8)
    with torch.no_grad():
        wanted = network(parser.to_input(crop[None]))[0].argmax(0).numpy()
    found = OnnxParser(path).labels(crop)
    assert found.shape == (CROP_SIZE, CROP_SIZE) and (found == wanted).mean() > 0.97
    save_onnx(torch.nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 64, 64), path, ["scores"])
    with pytest.raises(WrongWeightsError, match="not a face parser"):
        OnnxParser(path)
    path.write_bytes(b"nothing")
    with pytest.raises(WrongWeightsError, match="Download it again"):
        OnnxParser(path)


def test_tower_file_is_evas(tmp_path):
    """The written file loads strictly as an EVA02-CLIP tower and gives the same states; patches can be left out."""
    made = tower.build().eval()
    save_half(tmp_path / "tower.safetensors", tower.official(made.trunk))
    loaded = load_vision_tower(tmp_path / "tower.safetensors")
    images = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        results = [network(images) for network in (made, loaded)]
        made.trunk.patch_drop.chosen = torch.arange(0, 576, 8)[None]
        few = made(images)[1]
    assert results[0][0].shape == (1, 768) and len(results[0][1]) == len(BLOCKS)
    for a, b in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1])):
        assert (a - b).norm() < 1e-2 * a.norm()
    assert few[0].shape == (1, 73, tower.WIDTH)


@pytest.mark.parametrize("name", ["recogniser", "scene_judge"])
def test_readers_training_runs_and_resumes(drawn, name, monkeypatch):
    """One step, and one more from the checkpoint; the norms are settled on the averaged weights."""
    monkeypatch.setattr(readers, "SHARP_IMAGES", 2)
    monkeypatch.setattr(readers, "SETTLING", 2)
    for steps in (1, 2):
        reader = readers.train(name, drawn.folder, drawn.people, steps, batch=4, rate=1e-3, minutes=None)
        assert not reader.training
    assert (drawn.folder / name / "state.pt").is_file()
