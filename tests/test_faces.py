"""The real insightface, facexlib and OpenCV, on files of the real formats with weights set by hand (face_standins)."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from lib_pulid import face_models, faces
from lib_pulid.errors import NoFaceError, PulidError, SettingError, WrongWeightsError
from lib_pulid.face_models import (
    ArcFaceRecogniser,
    BiSeNetParser,
    InsightFaceDetector,
    RetinaFaceLandmarker,
    load_face_models,
    onnx_providers,
)
from lib_pulid.faces import Detection, FaceChoice, face_features, read_face, vision_input
from lib_pulid.images import resize_long_edge
from tests.face_standins import FACE_POINTS, Remembering, blank, draw_face, write_arcface, write_face_files, write_scrfd

insightface = pytest.importorskip("insightface")
pytest.importorskip("facexlib")
OFFICIAL_WHITE = [0, 16, 18, 7, 8, 9, 14, 15]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("face_models")


@pytest.fixture(scope="module")
def files(folder):
    return write_face_files(folder)


@pytest.fixture(scope="module")
def real_models(files):
    return load_face_models(files)


class EllipseParser:
    """Skin (1) in an ellipse from brows to chin, background (0) around it, whatever the crop shows."""

    def labels(self, aligned_rgb):
        y, x = np.ogrid[:512, :512]
        return (((x - 256) / 132) ** 2 + ((y - 286) / 186) ** 2 <= 1).astype(np.int64)


@pytest.fixture(scope="module")
def remembering(real_models):
    return Remembering(real_models.landmarker)


@pytest.fixture
def models(real_models, remembering):
    """For all that is not about parsing: an ellipse instead of BiSeNet, and RetinaFace that remembers."""
    return replace(real_models, landmarker=remembering, parser=EllipseParser())


def bgr(image):
    return np.ascontiguousarray(image[:, :, ::-1])


def centre(detection):
    return (detection.box[:2] + detection.box[2:]) / 2


def single():
    image = blank(320, 256)
    draw_face(image, (140, 120), 90)
    return image


def group():
    """Three people; the largest stands on the left, the smallest in the center of the image."""
    image = blank(384, 256)
    draw_face(image, (70, 90), 96)
    draw_face(image, (196, 130), 56, shade=3)
    draw_face(image, (310, 170), 76, shade=8)
    return image


GROUP_CENTRES = {"left": (70, 90), "middle": (196, 130), "right": (310, 170)}


class Official:
    """get_id_embedding's steps from photo to vision input (pulid/pipeline_v1_1.py, 1aa2fc7), by the same libraries."""

    def __init__(self, folder, files, monkeypatch):
        from facexlib.detection.retinaface import RetinaFace
        from facexlib.parsing.bisenet import BiSeNet
        from facexlib.utils import face_restoration_helper
        from insightface.app import FaceAnalysis
        from insightface.model_zoo import get_model

        def detection_model(name, half, device, **_):
            model = RetinaFace(network_name="resnet50", half=half, device=device)
            state = torch.load(files["landmarker"])
            model.load_state_dict({key[len("module.") :]: value for key, value in state.items()})
            return model.eval()

        monkeypatch.setattr(face_restoration_helper, "init_detection_model", detection_model)
        monkeypatch.setattr(face_restoration_helper, "init_parsing_model", lambda **_: None)
        self.helper = face_restoration_helper.FaceRestoreHelper(
            upscale_factor=1, face_size=512, crop_ratio=(1, 1), det_model="retinaface_resnet50", device="cpu"
        )
        self.bisenet = BiSeNet(num_class=19)
        self.bisenet.load_state_dict(torch.load(files["parser"]))
        self.bisenet.eval()
        self.app = FaceAnalysis(name="antelopev2", root=str(folder), providers=["CPUExecutionProvider"])
        self.app.prepare(ctx_id=0, det_size=(640, 640))
        self.recogniser = get_model(str(files["recogniser"]), providers=["CPUExecutionProvider"])
        self.recogniser.prepare(ctx_id=0)

    def read(self, image):
        image_bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        found = self.app.get(image_bgr)
        areas = [(f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]) for f in found]
        embedding = found[int(np.argsort(areas, kind="stable")[-1])].embedding if found else None
        self.helper.clean_all()
        self.helper.read_image(image_bgr)
        self.helper.get_face_landmarks_5(only_center_face=True)
        self.helper.align_warp_face()
        crop = self.helper.cropped_faces[0]
        if embedding is None:
            embedding = self.recogniser.get_feat(crop)[0]
        return found, embedding, crop, *self.vision(crop)

    def vision(self, crop):
        rgb = torch.from_numpy(cv2.cvtColor(crop, cv2.COLOR_BGR2RGB).transpose(2, 0, 1)).float().unsqueeze(0) / 255.0
        with torch.no_grad():
            labels = self.bisenet(tv.normalize(rgb, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))[0].argmax(1, True)
        white = sum(labels == label for label in OFFICIAL_WHITE).bool()
        grey = (0.299 * rgb[:, 0:1] + 0.587 * rgb[:, 1:2] + 0.114 * rgb[:, 2:3]).repeat(1, 3, 1, 1)
        features = torch.where(white, torch.ones_like(rgb), grey)
        small = tv.resize(features, 336, InterpolationMode.BICUBIC)
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return features, tv.normalize(small, mean, std)


@pytest.fixture
def official(folder, files, monkeypatch):
    return Official(folder, files, monkeypatch)


def large_photo():
    """Longer than 1024, so that the reduction counts; one face, off center, in noise."""
    image = np.random.default_rng(1).integers(60, 190, (240, 1100, 1), dtype=np.uint8).repeat(3, axis=2)
    draw_face(image, (500, 118), 190)
    return image


def read_as_official(official, models, image):
    """Reads a face with the official embedding and crop, to the bit; returns it and what the official code found."""
    found, embedding, crop, features, vision = official.read(resize_long_edge(image))
    face = read_face(image, models)
    np.testing.assert_array_equal(face.embedding, embedding)
    np.testing.assert_array_equal(face.aligned, crop[:, :, ::-1])
    return face, found, features, vision


def test_equal_to_the_official_flow_bit_for_bit(official, real_models):
    face, found, features, vision = read_as_official(official, real_models, large_photo())
    assert len(found) == len(face.detections) == 1
    np.testing.assert_array_equal(face.detection.box, found[0].bbox)
    np.testing.assert_array_equal(face.detection.landmarks, found[0].kps)
    assert face.detection.score == pytest.approx(found[0].det_score)
    assert face.embedding.dtype == np.float32 and face.embedding.shape == (512,)
    assert face.features.dtype == torch.float32 and face.features.shape == (1, 3, 512, 512)
    assert torch.equal(face.features, features)
    white = (features == 1).all(dim=1).float().mean()
    assert 0.02 < white < 0.98  # or the labels would not count
    assert torch.equal(vision_input(face.features), vision)
    assert face.notes == ()


def test_largest_face_equal_to_the_official_one_where_it_is_the_central_one(official, models):
    image = blank(384, 256)
    draw_face(image, (190, 130), 90)
    draw_face(image, (60, 60), 70, shade=5)
    face, found, *_ = read_as_official(official, models, image)
    assert len(found) == len(face.detections) == 2
    for ours, theirs in zip(face.detections, found):
        np.testing.assert_array_equal(ours.box, theirs.bbox)


def test_fallback_equal_to_the_official_one(official, models):
    image = blank(320, 256)
    draw_face(image, (140, 120), 90, square=False)  # SCRFD sees nothing
    face, found, *_ = read_as_official(official, models, image)
    assert not found
    assert "only RetinaFace found" in " ".join(face.notes)
    assert len(face.detections) == 1


@pytest.mark.parametrize(("choice", "who"), [
    (FaceChoice(), "left"), (FaceChoice("largest", 1), "right"), (FaceChoice("smallest"), "middle"),
    (FaceChoice("left-to-right", 0), "left"), (FaceChoice("left-to-right", 2), "right"),
    (FaceChoice("right-to-left"), "right"), (FaceChoice("top-to-bottom", 1), "middle"),
    (FaceChoice("bottom-to-top"), "right"), (FaceChoice("center"), "middle"), (FaceChoice("center", 2), "left"),
    (FaceChoice("left-to-right", 1), "middle"),
])  # fmt: skip
def test_the_same_person_in_both_detectors(models, choice, who):
    image = group()
    face = read_face(image, models, choice)
    assert np.hypot(*(centre(face.detection) - GROUP_CENTRES[who])) < 5
    assert len(face.detections) == 3 and "3 faces found" in face.notes[0]
    if choice == FaceChoice():
        assert face.notes[0] == "3 faces found; the largest was used"
    if choice == FaceChoice("left-to-right", 1):
        assert face.notes[0] == "3 faces found; number 2, counted from left to right, was used"
        assert "small" in face.notes[1]
    # Alone in the image this person gives the same crop: it was not made from another one's landmarks.
    alone = blank(384, 256)
    x0, y0, x1, y1 = face.detection.box.astype(int) + (-9, -9, 9, 9)
    alone[y0:y1, x0:x1] = image[y0:y1, x0:x1]
    expected = read_face(alone, models)
    np.testing.assert_array_equal(face.aligned[200:400, 200:310], expected.aligned[200:400, 200:310])
    cosine = face.embedding @ expected.embedding
    cosine /= np.linalg.norm(face.embedding) * np.linalg.norm(expected.embedding)
    assert cosine > 0.98
    marked = models.landmarker.detect(bgr(image))
    near = min(marked, key=lambda other: np.hypot(*(centre(other) - GROUP_CENTRES[who])))
    np.testing.assert_array_equal(face.aligned, faces.align(bgr(image), near.landmarks)[:, :, ::-1])


def test_the_detectors_own_landmarks_where_retinaface_does_not_see_the_face(models):
    image = blank(384, 256)
    draw_face(image, (90, 90), 100, nose=False)
    draw_face(image, (300, 150), 60)
    face = read_face(image, models)
    assert np.hypot(*(centre(face.detection) - (90, 90))) < 5
    np.testing.assert_array_equal(face.aligned, faces.align(bgr(image), face.detection.landmarks)[:, :, ::-1])
    assert any("detector's landmarks" in note for note in face.notes)
    face = read_face(single(), replace(models, landmarker=None))
    np.testing.assert_array_equal(face.aligned, faces.align(bgr(single()), face.detection.landmarks)[:, :, ::-1])
    assert face.notes == ()


def test_a_neighbours_landmarks_are_not_taken():
    """RetinaFace misses the front person; the one behind overlaps enough, but is another of the detector's faces."""
    front, behind = box_detection(0, 0, 100, 100), box_detection(40, 0, 140, 100)
    seen = box_detection(38, 0, 138, 100)
    assert faces.box_overlaps(front.box, seen.box[None])[0] > faces.SAME_FACE_IOU
    assert faces._same_face(front, [front, behind], [seen]) is None
    assert faces._same_face(behind, [front, behind], [seen]) is seen
    assert faces._same_face(front, [front], [box_detection(300, 0, 400, 100)]) is None
    assert faces._same_face(front, [front], []) is None


def box_detection(*box):
    box = np.array(box, np.float32)
    return Detection(box, ((FACE_POINTS + 0.5) * 100 + box[:2]).astype(np.float32), 1.0)


def test_a_close_up_is_found_at_a_smaller_size(models):
    image = blank(320, 320)
    draw_face(image, (160, 160), 300)
    scrfd = models.detector._model
    assert len(scrfd.detect(bgr(image), input_size=(640, 640))[0]) == 0
    found = models.detector.detect(bgr(image))
    assert len(found) == 1 and np.hypot(*(centre(found[0]) - 160)) < 5
    face = read_face(image, models)
    assert face.notes == ()
    np.testing.assert_array_equal(face.embedding, models.recogniser.embed(bgr(image), found[0]))


def test_all_sizes_are_tried_before_giving_up(models, monkeypatch):
    tried = []
    real = models.detector._model.detect

    def detect(image, input_size):
        tried.append(input_size)
        return real(image, input_size=input_size)

    monkeypatch.setattr(models.detector._model, "detect", detect)
    assert models.detector.detect(bgr(blank(64, 64))) == []
    assert tried == [(size, size) for size in range(640, 255, -64)]


def test_the_choice_holds_where_only_retinaface_finds_faces(models):
    image = blank(320, 256)
    draw_face(image, (80, 120), 60, square=False)
    draw_face(image, (240, 120), 120, square=False)
    for choice, x in ((FaceChoice(), 240), (FaceChoice("left-to-right"), 80)):
        face = read_face(image, models, choice)
        assert abs(centre(face.detection)[0] - x) < 16 and len(face.detections) == 2
        np.testing.assert_array_equal(face.aligned, faces.align(bgr(image), face.detection.landmarks)[:, :, ::-1])


def test_no_face_is_an_error_that_names_the_photo(models):
    for image in (blank(160, 128), np.zeros((1, 1, 3), np.uint8), np.zeros((1, 3000, 3), np.uint8)):
        with pytest.raises(NoFaceError, match=r"holiday\.jpg: no face"):
            read_face(image, models, name="holiday.jpg")
    with pytest.raises(NoFaceError):
        read_face(blank(160, 128), replace(models, landmarker=None))


def test_wrong_choices_and_an_index_beyond_the_faces(models):
    with pytest.raises(NoFaceError, match=r"team\.jpg: .*number 4.*only 3 faces"):
        read_face(group(), models, FaceChoice("largest", 3), name="team.jpg")
    with pytest.raises(NoFaceError, match="only one face"):
        read_face(single(), models, FaceChoice("largest", 1))
    for wrong in ({"order": "prettiest"}, {"index": -1}, {"index": 1.0}, {"index": True}):
        with pytest.raises(SettingError):
            FaceChoice(**wrong)


def test_of_equally_large_faces_the_last_as_in_the_official_code():
    first, second = box_detection(0, 0, 100, 100), box_detection(200, 0, 300, 100)
    assert faces.order_faces([first, second], "largest", (100, 300))[0] is second


def test_degenerate_landmarks_are_no_crash():
    with pytest.raises(NoFaceError, match="photo"):
        faces.align(np.zeros((9, 9, 3), np.uint8), np.zeros((5, 2), np.float32), "photo")


def test_each_label_is_white_or_grey():
    crop = np.full((512, 512, 3), (255, 0, 0), np.uint8)
    labels = np.zeros((512, 512), np.int64)
    labels[:, :19] = np.arange(19)
    row = face_features(crop, labels)[0, :, 5, :19]
    assert torch.equal(row[0], row[1]) and torch.equal(row[0], row[2])
    expected = [1.0 if label in OFFICIAL_WHITE else 0.299 for label in range(19)]
    torch.testing.assert_close(row[0], torch.tensor(expected))


def test_wrong_and_truncated_files_are_named(files, tmp_path):
    def expect(load, path):
        with pytest.raises(WrongWeightsError, match=path.name):
            load(path)

    for load, right, wrong in (
        (InsightFaceDetector, files["detector"], files["recogniser"]),
        (ArcFaceRecogniser, files["recogniser"], files["detector"]),
        (RetinaFaceLandmarker, files["landmarker"], files["parser"]),
        (BiSeNetParser, files["parser"], files["landmarker"]),
    ):
        expect(load, wrong)
        for size in (0, 100, right.stat().st_size // 2):
            cut = tmp_path / f"cut{size}{right.suffix}"
            cut.write_bytes(right.read_bytes()[:size])
            expect(load, cut)
    write_arcface(tmp_path / "small.onnx", size=256)
    expect(ArcFaceRecogniser, tmp_path / "small.onnx")
    write_scrfd(tmp_path / "no_points.onnx", landmarks=False)
    expect(InsightFaceDetector, tmp_path / "no_points.onnx")


def test_a_detector_of_fixed_input_size(tmp_path, models):
    write_scrfd(tmp_path / "fixed.onnx", size=640)
    fixed = InsightFaceDetector(tmp_path / "fixed.onnx")
    np.testing.assert_array_equal(fixed.detect(bgr(single()))[0].box, models.detector.detect(bgr(single()))[0].box)
    assert fixed.detect(bgr(blank(64, 64))) == []


def test_loading_leaves_the_seed_alone(files):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_face_models(files)
    assert torch.equal(torch.rand(1), expected)


def test_while_a_host_makes_layers_without_memory(files, monkeypatch):
    """A1111 does so in a thread of its own as it starts; a photo may be looked at meanwhile."""
    original = torch.nn.Conv2d.__init__

    def without_memory(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "device": "meta"})

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", without_memory)
    for load, path in ((RetinaFaceLandmarker, files["landmarker"]), (BiSeNetParser, files["parser"])):
        with pytest.raises(PulidError, match="still loading a checkpoint. Try again"):
            load(path)


def test_providers():
    import onnxruntime

    assert onnx_providers("cpu") == ("CPUExecutionProvider",)
    assert set(onnx_providers("cuda:0")) <= set(onnxruntime.get_available_providers())
    assert onnx_providers("cuda:0")[-1] == "CPUExecutionProvider"


def test_a_file_for_a_newer_onnxruntime_says_so(files, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(files["detector"]))
    model.ir_version = 99
    onnx.save(model, str(tmp_path / "newer.onnx"))
    with pytest.raises(WrongWeightsError, match=r"newer\.onnx in .* newer onnxruntime. Update it"):
        InsightFaceDetector(tmp_path / "newer.onnx")


@pytest.mark.parametrize("raises", [False, True])
def test_onnxruntime_without_its_cuda_libraries(files, monkeypatch, raises):
    """It falls back to the CPU, or raises, and only its log says why: so each face does, and the doctor."""
    import insightface.model_zoo
    import onnxruntime

    real, both = insightface.model_zoo.get_model, ("CUDAExecutionProvider", "CPUExecutionProvider")

    def get_model(path, providers):
        if raises and "CUDAExecutionProvider" in providers:
            raise RuntimeError("CUDA_PATH is set but CUDA wasnt able to be loaded.")
        return real(path, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(insightface.model_zoo, "get_model", get_model)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(both))
    monkeypatch.setattr(face_models, "onnx_providers", lambda device: both)
    files = {role: path for role, path in files.items() if role != "landmarker"}  # the slowest, not onnxruntime's
    models = load_face_models(files)
    assert models.notes == (face_models.ON_THE_CPU,)
    assert face_models.ON_THE_CPU in read_face(single(), models).notes
    assert face_models.ON_THE_CPU in face_models.cuda_problem()
    monkeypatch.setattr(face_models, "onnx_providers", lambda device: both[1:])
    assert load_face_models(files).notes == ()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(both[1:]))
    assert face_models.cuda_problem() == ""
