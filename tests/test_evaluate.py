"""The command `evaluate`: measures on vectors with known angles, people of a folder, a trial with known images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import cos, pi, radians
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lib_pulid import cli
from lib_pulid.errors import ImageError, MissingWeightsError, NoFaceError, PulidError, SettingError, WrongWeightsError
from lib_pulid.evaluate import command, measures, options, report, results
from lib_pulid.evaluate.clip import clip_input, open_clip_model
from lib_pulid.evaluate.judges import OWN, by_recogniser, open_judges
from lib_pulid.evaluate.plot import draw_plot
from lib_pulid.evaluate.subjects import Prompt, Subject, drawn_people, read_folder, read_prompts
from lib_pulid.evaluate.trial import (
    Method,
    Panel,
    count_images,
    read_sitters,
    run_trial,
    traits_on_photos,
)
from lib_pulid.faces import CROP_LANDMARKS, CROP_SIZE, Detection, FaceModels
from lib_pulid.files import catalog
from lib_pulid.hosts.diffusers import denoiser_of
from lib_pulid.hosts.diffusers_checkpoint import merge_table, write_tokenizer
from lib_pulid.judge import Reading
from lib_pulid.photos import Encoders, IdentityCache
from lib_pulid.sites import find_sites
from lib_pulid.standalone import Workshop, fixed_readers
from tests.face_standins import write_arcface
from tests.small_models import methods as small
from tests.small_models.bases import small_parts

# ---------------------------------------------------------------- measures


def at(degrees: float, length: float = 1.0) -> np.ndarray:
    """An embedding at an angle; two of them are as far apart as their angles."""
    vector = np.zeros(512, np.float32)
    vector[:2] = length * np.cos(radians(degrees)), length * np.sin(radians(degrees))
    return vector


@pytest.mark.parametrize(
    ("image", "value"),
    [(0, 1.0), (40, -1.0), (20, 0.0), (10, 0.5), (-20, 1.0), (90, -1.0)],
    ids=["the reference", "the target", "midway", "nearer the reference", "beyond it", "beyond the target"],
)
def test_copy_paste(image, value):
    """Reference at 0 degrees, target at 40."""
    assert measures.copy_paste(at(image), at(40), at(0)) == pytest.approx(value, abs=1e-3)


def face_points(degrees: float = 0, nose: float = 0, scale: float = 1) -> np.ndarray:
    """Eyes 40 pixels apart, the nose so far beside their middle, turned clockwise as on a screen: [5, 2]."""
    points = np.array([[-20, 0], [20, 0], [nose, 25], [-14, 45], [14, 45]], np.float32) * scale
    a = radians(degrees)
    return points @ np.array([[cos(a), np.sin(a)], [-np.sin(a), cos(a)]], np.float32) + (300, 200)


@pytest.mark.parametrize(
    ("points", "roll", "turn"),
    [
        (face_points(), 0, 0), (face_points(12), 12, 0), (face_points(-30), -30, 0),
        (face_points(nose=10), 0, 0.25), (face_points(nose=-20), 0, -0.5), (face_points(100, nose=10), 100, 0.25),
        (face_points(-12, nose=-10, scale=3), -12, -0.25),
    ],
    ids=["straight", "clockwise", "the other way", "to the right", "to the left", "both", "larger"],
)  # fmt: skip
def test_pose_of_five_points(points, roll, turn):
    """The middle of the eyes is where they are: only the nose's offset along their line is a turn."""
    assert measures.pose(points) == {"roll": pytest.approx(roll, abs=1e-3), "turn": pytest.approx(turn, abs=1e-5)}


@pytest.mark.parametrize(
    ("images", "value"),
    [((-10, 0, 10), 1.0), ((-1, 4, 9), 0.5), ((3, 3, 3), 0.0), ((10, 0, -10), -1.0), ((1, -2, 1), 0.0)],
    ids=["copied", "half of it, and something else", "always the same", "mirrored", "unrelated"],
)
def test_slope(images, value):
    """References at -10, 0 and 10."""
    assert measures.slope(list(zip(images, (-10, 0, 10)))) == pytest.approx(value)


def test_what_cannot_be_measured():
    """A target that is the reference, no embedding, no two eyes; a slope of two pairs, or of equal references."""
    assert measures.copy_paste(at(10), at(40), at(40)) is None
    assert measures.cosine(at(10), np.zeros(512)) == 0
    assert measures.pose(np.full((5, 2), 7, np.float32)) == {}
    assert measures.slope([(1, 1), (2, 2)]) is measures.slope([(1, 5), (2, 5), (3, 5)]) is None


def test_change_leaves_the_head_out():
    before = np.full((4, 4, 3), 100, np.uint8)
    after = before.copy()
    after[0] = 151  # a quarter of the image by 51 of 255
    after[3] = 255
    head = np.zeros((4, 4), bool)
    head[3] = True
    assert measures.change(after, before, head) == pytest.approx(0.2 / 3)
    assert measures.change(before, after, head) == pytest.approx(0.2 / 3)  # and no byte wraps around
    assert measures.change(after, before, np.ones((4, 4), bool)) is None


def test_kept_counts_what_can_be_seen():
    assert measures.kept({"style": "pencil", "light": "dim"}, {"style": "pencil", "skin": "tan"}) == {"style": True}
    assert measures.kept({"style": "pencil"}, {"style": "flat"}) == {"style": False}


def test_change_at_a_likeness():
    curve = [(0.1, 0.0), (0.5, 0.02), (0.7, 0.06), (0.6, 0.1)]
    assert measures.change_at(0.6, curve) == pytest.approx(0.04)  # where it is reached first
    assert measures.change_at(0.3, curve) == pytest.approx(0.01)
    assert measures.change_at(0.8, curve) is None
    assert measures.change_at(0.5, [(0.1, 0.0), (None, 0.01), (0.9, 0.04)]) == pytest.approx(0.02)


# ---------------------------------------------------------------- people


def photo(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


PROMPTS = [Prompt("one"), Prompt("two"), Prompt("three")]


def test_people_of_a_folder(tmp_path):
    """A person is a photo or a subfolder; in it 2 comes before 10, and the first is the reference."""
    for shade, name in enumerate(("anna/2.jpg.png", "anna/10.png", "anna/1.webp", "ben.png", "Carla/x.bmp")):
        photo(tmp_path / name, 40 * shade)
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / ".hidden.png").write_text("no photo")
    people = read_folder(tmp_path, PROMPTS, each=2)
    assert [person.name for person in people] == ["anna", "ben", "Carla"]
    assert [round(int(t[4, 4, 0]), -1) for t in (people[0].reference, *people[0].targets)] == [80, 0, 40]
    assert people[1].targets == ()
    texts = [[prompt.text for prompt in person.prompts] for person in people]
    assert texts == [["one", "two"], ["three", "one"], ["two", "three"]]
    assert len(read_folder(tmp_path, PROMPTS, each=9)[0].prompts) == 3


@pytest.mark.parametrize(("names", "words"), [
    ([], "has no photos"), (["anna/"], "anna has no photos"),
    (["ben.png", "Ben/1.png"], "the same name for two people"),
    (["ben.png", "ben.webp"], "the same name for two people"),
])  # fmt: skip
def test_a_folder_that_cannot_be_used(tmp_path, names, words):
    for name in names:
        (tmp_path / name).mkdir() if name.endswith("/") else photo(tmp_path / name)
    with pytest.raises(SettingError, match=words):
        read_folder(tmp_path, PROMPTS, each=1)
    photo(tmp_path / "a file.png")
    for path in (tmp_path / "missing", tmp_path / "a file.png"):
        with pytest.raises(SettingError, match="has to be a folder"):
            read_folder(path, PROMPTS, each=1)


def test_all_unreadable_photos_are_named(tmp_path):
    photo(tmp_path / "ben.png")
    for name in ("anna/1.jpg", "carla.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image at all")
    with pytest.raises(ImageError, match=r"(?s)anna.1\.jpg.*carla\.png"):
        read_folder(tmp_path, PROMPTS, each=1)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# ours\na sailor\n\n  a baker \na sailor\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["a sailor", "a baker"]
    path.write_text("# nothing\n")
    with pytest.raises(SettingError, match="has no prompts"):
        read_prompts(path)
    for wrong in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(SettingError, match="has to be a UTF-8 text file"):
            read_prompts(wrong)
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(SettingError, match="UTF-8"):
        read_prompts(path)


def test_our_own_prompts():
    assert 15 < len(read_prompts()) < 40


def test_drawn_people_are_the_same_each_time():
    seen = []

    def has_face(image: np.ndarray) -> bool:
        seen.append(image)
        return len(seen) != 1  # the first drawing is drawn again

    people = drawn_people(2, 2, has_face, size=64)
    assert np.array_equal(people[0].reference, seen[1])
    assert [len(person.targets) for person in people] == [2, 2]
    assert people[0].traits["skin"] == drawn_people(3, 1, lambda image: True, size=64)[0].traits["skin"]
    for prompt in people[0].prompts:
        colors = [word for word in prompt.wanted["clothes_color"].split() if word in prompt.text]
        assert colors
        assert ("second_color" in prompt.wanted) == ("plain" not in prompt.text)
    with pytest.raises(NoFaceError, match="found no face"):
        drawn_people(1, 1, lambda image: False, size=64)


# ---------------------------------------------------------------- a trial of known images

SIZE, HEAD = 64, (slice(24, 40), slice(24, 40))


def picture(person: int | None, background: int = 100, style: int = 0) -> np.ndarray:
    """An image whose middle is a face, at an angle of so many degrees; None: there is nobody."""
    image = np.full((SIZE, SIZE, 3), background, np.uint8)
    if person is not None:
        image[HEAD] = (person, 200, style)
    return image


class Seer:
    """Detector, recognizer, parser and judge of such images."""

    name = "seer"

    def detect(self, image_bgr: np.ndarray) -> list[Detection]:
        x, y = HEAD[1].start, HEAD[0].start
        landmarks = (CROP_LANDMARKS * (16 / CROP_SIZE) + (x, y)).astype(np.float32)
        found = Detection(np.array([x, y, x + 16, y + 16], np.float32), landmarks, 0.9)
        return [found] if image_bgr[32, 32, 1] == 200 else []

    def embed(self, image_bgr: np.ndarray, detection: Detection) -> np.ndarray:
        return at(float(image_bgr[32, 32, 2]) / 2, length=20)  # the adapter's own: everybody is more alike

    def labels(self, aligned_rgb: np.ndarray) -> np.ndarray:
        return np.ones((CROP_SIZE, CROP_SIZE), np.int64)  # the crop is the head

    def read(self, image: np.ndarray, face: Detection | None = None) -> Reading:
        named = {"glasses": "round" if image[32, 32, 0] < 50 else "none"}
        return Reading(at(float(image[32, 32, 0])), named if face else {"style": str(image[32, 32, 2])})


@dataclass(frozen=True)
class File:
    """Stands for an adapter: its path, and how far from the person it paints at weight 1, in degrees."""

    path: Path
    miss: int = 0


def paint(injections, prompt: str, seed: int) -> np.ndarray:
    """Somebody at 90 degrees, or the person, nearer with the weight; the seed and the weight move the background."""
    if prompt == "nobody":
        return picture(None, 100 + 20 * seed)
    if not injections:
        return picture(90, 100 + 20 * seed, style=1)
    ((person, weight, miss),) = injections
    near = round(weight * person + (1 - weight) * 90) + miss
    return picture(near, 100 + 20 * seed + round(10 * weight), style=1 if weight < 1 else 2)


@dataclass(frozen=True)
class Studio:
    """Stands for a Workshop."""

    draw: Callable[..., np.ndarray]
    read: Callable[[Any, np.ndarray], Any]
    inject: Callable[..., Any]
    adapter: Any = None

    def paint(self, injections, prompt: str, seed: int):
        return Image.fromarray(self.draw(injections, prompt, seed)), len(injections)

    def identity(self, photos):
        return self.read(self.adapter, *photos)

    def compiled(self, identity, weight: float, **settings):
        return self.inject(self.adapter, identity, weight, settings)


PULID = Method("pulid", File(Path("a.bin")))
STUDIO = Studio(
    paint,
    read=lambda adapter, photo: int(photo[32, 32, 0]),
    inject=lambda adapter, identity, weight, settings: (identity, weight, adapter.miss),
)


@pytest.fixture(scope="module")
def panel() -> Panel:
    seer = Seer()
    return Panel(FaceModels(seer, seer, None, seer), (seer, by_recogniser(OWN, seer)), scene=seer)


def subject(name: str = "anna", person: int = 0, *prompts: str) -> Subject:
    asked = tuple(Prompt(prompt, {"style": "1"}) for prompt in prompts or ("a sailor",))
    return Subject(name, picture(person), (picture(person + 40),), asked)


def trial(panel: Panel, *subjects: Subject, methods=(PULID,), weights=(0.5, 1.0), seeds=2, studio=STUDIO):
    """The rows, and a line for each method and weight."""
    sitters = read_sitters(subjects or [subject()], panel)
    rows = [row for row, _ in run_trial(studio, panel, methods, sitters, weights, seeds)]
    assert len(rows) == count_images(sitters, methods, weights, seeds)
    return rows, report.summarize(rows)


def table_of(lines) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in report.table(lines, ["seer"]).splitlines()]


@pytest.fixture(scope="module")
def one(panel):
    """Rows, and lines by weight, of one person and one method."""
    rows, lines = trial(panel, weights=(0.0, 0.5, 1.0))
    return rows, {line.weight: line for line in lines}


# The prompt's style is 1; the reference has round glasses. At weight 1 the image is the reference; at 0 and 0.5 it is
# beyond the target. The background moves by 10 levels with the weight, by 20 with the seed.
FIGURES = {
    "likeness, seer": pytest.approx([0, cos(pi / 4), 1], abs=1e-6),
    f"likeness, {OWN}": pytest.approx([cos(pi / 4), cos(pi * 22 / 180), 1], abs=1e-2),
    "copy-paste, seer": pytest.approx([-1, -1, 1], abs=1e-2), "change": pytest.approx([0, 5 / 255, 10 / 255]),
    "trait glasses": [0, 1, 1], "prompt kept": [1, 1, 0], "prompt kept / without's": [1, 1, 0],
    "change / another seed's": pytest.approx([0, 0.25, 0.5]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figures_at_weights_0_and_half_and_1(one, name):
    assert [one[1][weight].figures[name] for weight in (0, 0.5, 1)] == FIGURES[name]


def test_traits_on_two_photos(panel):
    """The reference has round glasses, ben's other photo none."""
    assert traits_on_photos(read_sitters([subject(), subject("ben", 30)], panel)) == {"glasses": 0.5}


def test_weight_0_is_the_image_without_and_painted_once(one):
    rows, _ = one
    assert [(row.method, row.weight) for row in rows if row.weight == 0] == [("without", 0), ("without", 0)]


def test_an_image_without_a_face_shows_nobody(panel):
    line = trial(panel, subject("anna", 0, "a sailor", "nobody"))[1][-1]
    assert line.figures["no face"] == 0.5
    assert line.figures["likeness, seer"] == pytest.approx(0.5)  # 1 and 0
    assert line.figures["trait glasses"] == 0.5
    assert line.figures["copy-paste, seer"] == pytest.approx(1, abs=1e-2)  # of the image that has one


class Turning(Seer):
    """Sees a nose beside the middle by so many pixels as the image's blue says."""

    def detect(self, image_bgr: np.ndarray) -> list[Detection]:
        found = super().detect(image_bgr)
        for face in found:
            face.landmarks[2, 0] += float(image_bgr[32, 32, 0])
        return found


def test_how_much_of_a_photos_turn_is_copied():
    """The images have as much of the photo's turn as the weight says; those without are all turned alike."""
    seer = Turning()
    panel = Panel(FaceModels(seer, seer, None, seer), (seer,))
    studio = Studio(
        lambda injections, prompt, seed: picture(9, style=round(sum(injections)) if injections else 1),
        read=lambda adapter, photo: int(photo[32, 32, 2]),
        inject=lambda adapter, identity, weight, settings: weight * identity,
    )
    people = [Subject(f"turned {turn}", picture(9, style=turn), (), (Prompt("x"),)) for turn in (0, 2, 4)]
    _, lines = trial(panel, *people, seeds=1, studio=studio)
    assert [line.figures["turn copied"] for line in lines] == pytest.approx([0, 0.5, 1], abs=1e-4)
    assert [line.figures["roll copied"] for line in lines] == [None] * 3  # all photos are upright
    heads, _, *cells = table_of(lines)
    assert [line[heads.index("turn copied")] for line in cells] == ["0.00", "0.50", "1.00"]
    assert cells[0][heads.index("roll copied")] == "not measured"


def test_all_photos_without_a_face_are_named_before_anything_is_painted(panel):
    blank = [Subject(name, picture(None), (picture(1),), (Prompt("x"),)) for name in ("anna", "ben")]
    with pytest.raises(NoFaceError, match="anna, photo 1; ben, photo 1"):
        read_sitters([subject("carla"), *blank], panel)


def test_with_one_seed_another_one_is_painted_to_compare(panel):
    rows, lines = trial(panel, seeds=1)
    assert rows[0].other_seed == pytest.approx(20 / 255)
    assert lines[-1].spreads["likeness, seer"] is None


def test_error_bars_are_over_the_trainings_of_a_method(panel):
    files = [Method("ours", File(Path(f"{miss}.bin"), miss)) for miss in (0, 60)]
    line = trial(panel, methods=files)[1][-1]
    assert line.images == 4
    assert line.figures["likeness, seer"] == pytest.approx(0.75)  # 1 and cos 60 degrees
    assert line.spreads["likeness, seer"] == pytest.approx(0.5 / 2**0.5)
    assert sorted(line.runs) == ["0.bin", "60.bin"]


def test_methods_are_compared_at_the_likeness_that_all_reach(panel):
    """The second reaches cos 60 degrees at most; the first has that after two thirds of the way from 0 to cos 45."""
    methods = [Method("first", File(Path("a.bin"))), Method("second", File(Path("b.bin"), 60))]
    _, lines = trial(panel, methods=methods)
    sentences = report.equal_likeness(lines, "seer")
    expected = 5 / 255 * 0.5 / cos(pi / 4)
    assert sentences[0].startswith(f"At likeness 0.500 first changes {expected:.4f} ±")
    assert "second changes 0.0392" in sentences[1]
    assert report.equal_likeness([line for line in lines if line.method != "second"], "seer") == []


# ---------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def written(panel, tmp_path_factory):
    """results.json, table.md and plot.png of two people and two methods."""
    out = tmp_path_factory.mktemp("out")
    files = []
    for name in ("a.bin", "b.bin"):
        files.append(out / name)
        files[-1].write_bytes(name.encode())
    methods = [Method("first", File(files[0])), Method("second", File(files[1], 30), {"num_zero": 8})]
    sitters = read_sitters([subject(), subject("ben", 10)], panel)
    rows = [row for row, _ in run_trial(STUDIO, panel, methods, sitters, (0.5, 1.0), 2)]
    results.write(results.collect({"seeds": 2, "out": out, "run": print}, methods, panel, sitters, rows), out, False)
    return out


def test_results_are_json_with_settings_versions_and_a_row_per_image(written):
    found = json.loads((written / "results.json").read_text(encoding="utf-8"))
    assert found["settings"] == {"seeds": 2, "out": str(written)}
    assert found["methods"][1]["settings"] == {"num_zero": 8}
    assert len(found["methods"][1]["fingerprint"]) == 16
    assert {"torch", "python", "sd-webui-pulid"} <= set(found["versions"])
    assert len(found["images"]) == 2 * 2 * (1 + 2 * 2)
    assert found["images"][-1]["likeness"]["seer"] == pytest.approx(cos(radians(30)))
    assert found["people"] == [{"name": "anna", "photos": 2}, {"name": "ben", "photos": 2}]


def test_the_table_names_who_flatters_and_what_was_not_measured(written):
    text = (written / "table.md").read_text(encoding="utf-8")
    heading, _, *lines = text.splitlines()
    assert "likeness by seer" in heading
    assert "the adapter's own recognizer (overestimates)" in heading
    assert "prompt attributes kept" in heading
    assert [line.split("|")[1].strip() for line in lines[:5]] == ["without", "first", "first", "second", "second"]
    assert "± is the standard deviation between seeds" in text
    assert "| their photos |" in text
    assert "By seer: two photos of one person 0.766" in text


def test_clip_is_not_measured_where_there_is_none(panel):
    """Without a judge of scenes the columns are there, and say so."""
    plain = Panel(panel.models, panel.judges)
    heads, _, cells, *_ = table_of(trial(plain)[1])
    assert [cells[heads.index(name)] for name in ("CLIP-T", "CLIP-I")] == ["not measured"] * 2
    assert "prompt attributes kept" not in heads


def test_the_plot_has_a_line_per_method(written):
    image = np.asarray(Image.open(written / "plot.png").convert("RGB")).reshape(-1, 3)
    for color in ((0, 114, 178), (213, 94, 0)):
        assert (np.abs(image.astype(int) - color).max(axis=1) < 8).sum() > 300
    assert not (written / "plot_clip.png").exists()


def test_a_plot_of_nothing_and_of_one_point():
    lines = [
        report.Line("without", 0, 1, {"x": x, "y": y}, {"x": None, "y": None}, {}) for x, y in ((None, 1), (0, -0.2))
    ]
    for some in ([], lines[:1], lines):
        assert draw_plot(some, "x", "y", "text", ("x", "y")).size == (1200, 800)


# ---------------------------------------------------------------- judges and CLIP


def test_another_recogniser_is_a_judge_and_the_own_one_is_refused(tmp_path):
    own, other, copy = (tmp_path / name for name in ("glintr100.onnx", "w600k_r50.onnx", "copy.onnx"))
    write_arcface(own, seed=0)
    write_arcface(other, seed=1)
    copy.write_bytes(own.read_bytes())
    (judge,) = open_judges([], own, tmp_path, "cpu")  # found where models are
    assert judge.name == "w600k_r50"
    face = Seer().detect(picture(0))[0]
    assert judge.read(picture(0), face).embedding.shape == (512,)
    with pytest.raises(SettingError, match="own recognizer, which overestimates"):
        open_judges([str(copy)], own, tmp_path, "cpu")


def test_a_judge_that_is_not_there_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_judges([], None, tmp_path, "cpu") == []
    with pytest.raises(MissingWeightsError, match="No judge at .*buffalo_l"):
        open_judges([str(tmp_path / "gone.onnx")], None, tmp_path, "cpu")
    (tmp_path / "wrong.onnx").write_bytes(b"no network")
    with pytest.raises(WrongWeightsError):
        open_judges(["~/wrong.onnx"], None, tmp_path, "cpu")
    with pytest.raises((MissingWeightsError, PulidError), match="vggface2|facenet-pytorch"):
        open_judges(["facenet"], None, tmp_path, "cpu")


# ---------------------------------------------------------------- arguments


def test_variants_and_files(tmp_path, monkeypatch):
    assert options.variant("loose:projection=ortho,num_zero=16") == ("loose", {"projection": "ortho", "num_zero": 16})
    assert options.variant("fid:preset=fidelity") == ("fid", {"projection": "ortho_v2", "num_zero": 8})
    assert options.variant("late:start=0.25") == ("late", {"start": 0.25})
    assert options.named_file("plain=x/a.bin") == ("plain", Path("x/a.bin"))
    assert options.named_file("x/a.bin") == ("a", Path("x/a.bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.named_file("plain=~/a.bin") == ("plain", tmp_path / "a.bin")
    (tmp_path / "b=c.bin").touch()
    assert options.named_file("~/b=c.bin") == ("b=c", tmp_path / "b=c.bin")
    for empty in ("", " ", "plain="):
        with pytest.raises(SettingError, match="it has to be FILE or NAME=FILE"):
            options.named_file(empty)


@pytest.mark.parametrize(("text", "words"), [
    ("loose", "has to be like"), (":num_zero=1", "has to be like"), ("a:num_zero", "has to be like"),
    ("a:num_zer=1", "did you mean num_zero"), ("a:num_zero=81", "81 is out of range; use 0 to 80"),
    ("a:num_zero=many", "'many' is not a number"), ("a:projection=up", "is not one of"),
    ("a:weight=1", "cannot be compared"),
])  # fmt: skip
def test_a_variant_that_cannot_be(text, words):
    with pytest.raises(SettingError, match=words):
        options.variant(text)


# ---------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A small CLIP with random weights in transformers' layout."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    torch.manual_seed(0)
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).save_pretrained(folder)
    write_tokenizer(folder, merge_table(), "<|endoftext|>")
    return folder


def stripes(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_transformers_clip_gives_what_its_own_forward_gives(clip_folder):
    clip = open_clip_model(str(clip_folder))
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(["a sailor"], return_tensors="pt")
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(clip_folder).eval()(pixel_values=clip_input(stripes(32, 32), 32), **tokens)
    assert measures.cosine(clip.image(stripes(32, 32)), wanted.image_embeds[0].numpy()) == pytest.approx(1, abs=1e-5)
    assert measures.cosine(clip.text("a sailor"), wanted.text_embeds[0].numpy()) == pytest.approx(1, abs=1e-5)
    assert clip.text("word " * 200).shape == (6,)


def test_open_clip_gives_what_its_own_preprocessing_gives(tmp_path):
    import open_clip

    (tmp_path / "configs").mkdir()
    sizes = {"width": 64, "layers": 1}
    config = {"embed_dim": 6, "vision_cfg": {**sizes, "image_size": 32, "patch_size": 16}}
    config["text_cfg"] = {**sizes, "heads": 1, "context_length": 77, "vocab_size": 49408}
    (tmp_path / "configs" / "small-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("small-clip")
    torch.save(model.state_dict(), tmp_path / "small.pt")
    clip = open_clip_model(f"small-clip={tmp_path / 'small.pt'}")
    image = np.kron(stripes(6, 9), np.ones((8, 8, 1), np.uint8))
    with torch.no_grad():
        wanted = model.eval().encode_image(preprocess(Image.fromarray(image))[None])[0].numpy()
        text = model.encode_text(open_clip.get_tokenizer("small-clip")(["a sailor"]))[0].numpy()
    assert measures.cosine(clip.image(image), wanted) == pytest.approx(1, abs=1e-3)
    assert measures.cosine(clip.text("a sailor"), text) == pytest.approx(1, abs=1e-5)


def test_clip_figures_of_a_trial(panel, clip_folder):
    clip = open_clip_model(str(clip_folder))
    rows, lines = trial(Panel(panel.models, panel.judges, clip=clip))
    seen = [clip.image(paint(injections, "a sailor", 1)) for injections in ([], [(0, 1.0, 0)])]
    assert rows[0].clip_i == pytest.approx(1)
    assert rows[-1].clip_i == pytest.approx(measures.cosine(*seen), abs=1e-6)
    assert rows[-1].clip_t == pytest.approx(100 * measures.cosine(seen[1], clip.text("a sailor")), abs=1e-4)
    assert "CLIP-T" in report.table(lines, ["seer"])


@pytest.mark.parametrize(("source", "error", "words"), [
    ("{tmp}/gone", MissingWeightsError, "--clip: nothing found at"), ("{tmp}/file.pt", SettingError, "ViT-L-14=FILE"),
    ("ViT-L-14={tmp}", SettingError, "ViT-L-14=FILE"), ("ViT-Q=~/file.pt", SettingError, "no architecture ViT-Q"),
    ("{tmp}", WrongWeightsError, "cannot be opened as CLIP"),
])  # fmt: skip
def test_a_clip_that_cannot_be_opened(tmp_path, monkeypatch, source, error, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file.pt").write_bytes(b"nothing")
    with pytest.raises(error, match=words):
        open_clip_model(source.format(tmp=tmp_path))


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def workshop():
    """A small SDXL with random weights, a PuLID file and a tower that fit it; faces are those of Seer."""
    base, adapter, tower = small_parts("sdxl")
    encoders = Encoders(FaceModels(Seer(), Seer(), None, Seer()), tower)
    return Workshop(base, adapter, partial(fixed_readers, lambda: encoders, "small"), IdentityCache())


@pytest.fixture
def evaluate(workshop, tmp_path, monkeypatch, capsys):
    """Runs `evaluate` on the small model; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)  # the default of --out lies there
    monkeypatch.setattr(command, "open_workshop", lambda *args: workshop)
    models = tmp_path / "models"
    for file in catalog.in_group("encoders"):
        (models / file.folder).mkdir(parents=True, exist_ok=True)
        (models / file.folder / file.name).write_bytes(file.name.encode())
    write_arcface(models / "w600k_r50.onnx", seed=1)

    def _evaluate(*rest: object) -> tuple[int, str, str]:
        given = ("--model", "m.safetensors", "--models-dir", models, "--seeds", 1, "--weights", 1, "--each", 1)
        status = cli.main(["evaluate", *map(str, (*given, "--steps", 1, "--size", 64, *rest))])
        return status, *capsys.readouterr()

    return _evaluate


def people(folder: Path) -> Path:
    for name, person in (("anna/1.png", 10), ("anna/2.png", 40), ("ben.png", 90)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(person)).save(folder / name)
    return folder


def test_the_command(evaluate, tmp_path):
    """From a folder of photos to table, JSON, plot and images, with two variants."""
    out = tmp_path / "out"
    variants = ("--variant", "kept:num_zero=8", "--variant", "plain:projection=none")
    status, said, notes = evaluate("--faces", people(tmp_path / "p"), "-o", out, *variants, "--json", "--save-images")
    assert status == 0, notes
    found = json.loads(said)
    assert [line["method"].split(", ")[-1] for line in found["summary"]] == ["without", "kept", "plain"]
    assert [judge["name"] for judge in found["judges"]] == ["w600k_r50", OWN]
    changes = [line["figures"]["change"] for line in found["summary"]]
    assert changes[0] == 0
    assert 0 < changes[1] != changes[2] > 0  # the face was injected, each time in its own way
    assert {path.name for path in out.iterdir()} == {"table.md", "results.json", "plot.png", "images"}
    assert len(list((out / "images").iterdir())) == len(found["images"]) == 6


def test_one_photo_of_one_person(evaluate, tmp_path):
    """Without two photos of anybody, the line on what the figures mean is left out."""
    (tmp_path / "p").mkdir()
    Image.fromarray(picture(10)).save(tmp_path / "p" / "ben.png")
    status, said, notes = evaluate("--faces", tmp_path / "p", "-o", tmp_path / "out")
    assert status == 0, notes
    assert "Means over" in said and "two photos of one person" not in said


def test_no_image_replaces_another(evaluate, tmp_path):
    """Prompts that begin alike, and people whose names differ in what a file name leaves out."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a portrait of a person in front of a wall in {color}\n" for color in ("red", "blue")))
    for name in ("a b.png", "a-b.png"):
        (tmp_path / "p").mkdir(exist_ok=True)
        Image.fromarray(picture(10)).save(tmp_path / "p" / name)
    given = ("--faces", tmp_path / "p", "--prompts", prompts, "--each", 2, "-o", tmp_path / "out", "--save-images")
    status, said, notes = evaluate(*given, "--json")
    assert status == 0, notes
    rows, names = json.loads(said)["images"], sorted(path.name for path in (tmp_path / "out" / "images").iterdir())
    assert len(names) == len(rows) == 8
    assert ["without" in name for name in names] == [row["method"] == "without" for row in rows]


def test_methods_compared(evaluate, workshop, tmp_path):
    """A row for each file, whatever its method; each reads photos in its own way."""
    widths = [site.width for site in find_sites(denoiser_of(workshop.base.pipeline)).sites]
    made = small.method_files(widths, only=["instantid", "face_id"])
    instantid = small.write(tmp_path / "instantid.bin", made["instantid"])
    files = [part for path in (workshop.adapter.path, instantid) for part in ("--adapter", path)]
    faces = ("--faces", people(tmp_path / "p"), "-o", tmp_path / "out")
    status, said, notes = evaluate(*files, *faces, "--json")
    assert status == 0, notes
    summary = json.loads(said)["summary"]
    assert [line["method"] for line in summary] == ["without", workshop.adapter.path.stem, "instantid"]
    changes = [line["figures"]["change"] for line in summary]
    assert changes[0] == 0 < changes[1] != changes[2] > 0
    status, _, notes = evaluate(*files, *faces, "--variant", "a:projection=none")
    assert status == 1 and "--variant a: InstantID for SDXL has no projection" in notes
    face_id = small.write(tmp_path / "face_id.bin", made["face_id"])
    status, _, notes = evaluate("--adapter", workshop.adapter.path, "--adapter", face_id, *faces)
    assert status == 1 and "Nothing here reads photos for IP-Adapter FaceID for SDXL (recogniser_buffalo)" in notes


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ((), "Give --faces"),
        (("--faces", "{tmp}/p", "--seeds", 0), "--seeds is 0"),
        (("--faces", "{tmp}/p", "--size", 100), "multiple of 16"),
        (("--faces", "{tmp}/p", "--weights", "1,x"), "numbers separated by commas"),
        (("--faces", "{tmp}/p", "--weights", "9"), "use 0 to 5"),
        (("--faces", "{tmp}/p", "--variant", "a:start_step=4"), "has no effect on SDXL"),
        (("--faces", "{tmp}/p", "-o", "{tmp}/p/ben.png"), "which is a file"),
        (("--faces", "{tmp}/p", "--judge", "{tmp}/gone.onnx"), "No judge at"),
        (("--faces", "{tmp}/blank"), "No face was found in nobody, photo 1"),
    ],
)
def test_what_the_command_refuses(evaluate, tmp_path, rest, words):
    people(tmp_path / "p")
    (tmp_path / "blank").mkdir()
    Image.fromarray(picture(None)).save(tmp_path / "blank" / "nobody.png")
    status, said, notes = evaluate(*(str(part).format(tmp=tmp_path) for part in rest))
    assert (status, said) == (1, "")
    assert words in notes
    assert not (tmp_path / "out").exists()


def test_without_a_judge_of_its_own_it_says_who_flatters(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / "models" / "w600k_r50.onnx").unlink()
    status, said, notes = evaluate("--faces", people(tmp_path / "p"), "-o", tmp_path / "out")
    assert status == 0, notes
    assert "the adapter's own recognizer, which overestimates" in notes
    assert "(overestimates)" in said
