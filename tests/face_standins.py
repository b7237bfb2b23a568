"""Small files in the real formats, with weights set by hand, so that the real insightface and facexlib run in tests.

They see saturated magenta squares as faces: `draw_face` draws one. SCRFD measures a square's center and size, at its
640 x 640 input, between about 45 and 400 pixels a side. RetinaFace sees the square's "nose", whose color says how
large the face is; it works at full size and whatever the face's size. So a test can draw a face that one of them, both,
or none of them finds.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_pulid.face_models import load_face_models
from lib_pulid.faces import FaceModels

SMALLEST, LARGEST_RATIO, STEPS = 32.0, 16.0, 64  # nose colors: 64 steps from 32 to 512 pixels of face
NOSE_BLUE_OFFSET = 20
# Landmarks relative to center and side: eyes, nose, corners of the mouth.
FACE_POINTS = np.array([[-0.2, -0.15], [0.2, -0.15], [0.0, 0.06], [-0.16, 0.25], [0.16, 0.25]])


def blank(width: int, height: int, shade: int = 128) -> np.ndarray:
    """A gray image with a gradient, uint8 RGB [H, W, 3], in which neither detector finds anything."""
    ramp = np.linspace(shade - 30, shade + 30, width).astype(np.uint8)
    return np.repeat(np.tile(ramp, (height, 1))[:, :, None], 3, axis=2)


def draw_face(
    image: np.ndarray, centre: tuple[int, int], side: int, nose: bool = True, square: bool = True, shade: int = 0
) -> None:
    """Draw a face into an image, uint8 RGB [H, W, 3]; `shade`, 0..8, is what tells persons apart.

    Without a nose RetinaFace does not see it, without a square SCRFD does not.
    """
    x, y = centre
    if square:
        x0, y0 = x - side // 2, y - side // 2
        image[y0 : y0 + side, x0 : x0 + side] = (255, shade, 255)
        image[y0 : y0 + side // 4, x0 : x0 + side // 2, 1] = 8 - shade
    if nose:
        step = round(STEPS * np.log(side / SMALLEST) / np.log(LARGEST_RATIO))
        image[y - 5 : y + 5, x - 5 : x + 5] = (128 + step, 0, 255)


def photo(*faces: tuple[int, int], shade: int = 3) -> np.ndarray:
    """A photo of people. faces: center x and side of each."""
    image = blank(640, 480)
    for x, side in faces:
        draw_face(image, (x, 240), side, shade=shade)
    return image


def packed(image: np.ndarray) -> str:
    """As the page sends it."""
    from lib_pulid.webui.pictures import encode

    return encode(image)


class Remembering:
    """A face model that answers at once when it is asked the same again: the networks take most of the tests' time."""

    def __init__(self, model: Any) -> None:
        self._model, self._seen = model, {}

    def __getattr__(self, name: str) -> Any:
        if name not in ("detect", "embed", "embed_crop", "labels"):
            return getattr(self._model, name)

        def answer(*args: Any) -> Any:
            key = pickle.dumps((name, args))
            if key not in self._seen:
                self._seen[key] = getattr(self._model, name)(*args)
            return copy.copy(self._seen[key])

        return answer


def remembering_models(files: Mapping[str, Path], device: str = "cpu") -> FaceModels:
    """`load_face_models`, once for the same files."""
    return _remembering(tuple(files.items()), device)


@functools.cache
def _remembering(files: tuple[tuple[str, Path], ...], device: str) -> FaceModels:
    models = load_face_models(dict(files), device)
    parts = {name: Remembering(getattr(models, name)) for name in ("detector", "recogniser", "landmarker", "parser")}
    return dataclasses.replace(models, **parts)


def write_face_files(folder: Path, seed: int = 0) -> dict[str, Path]:
    """By role; all four, under the real names, in the layout FaceAnalysis(name="antelopev2", root=folder) wants."""
    folder = Path(folder)
    onnx_folder = folder / "models" / "antelopev2"
    onnx_folder.mkdir(parents=True, exist_ok=True)
    files = {
        "detector": onnx_folder / "scrfd_10g_bnkps.onnx",
        "recogniser": onnx_folder / "glintr100.onnx",
        "landmarker": folder / "detection_Resnet50_Final.pth",
        "parser": folder / "parsing_bisenet.pth",
    }
    write_scrfd(files["detector"])
    write_arcface(files["recogniser"], seed)
    write_retinaface(files["landmarker"])
    write_bisenet(files["parser"], seed)
    return files


class _Scrfd(nn.Module):
    """Nine outputs: scores [N, 1], distances [N, 4] and landmarks [N, 10] in cells, of each stride, N = 2 x cells.

    At each stride s a window of 8 x 8 cells of s pixels looks for a square that fills it and stands alone in the 16 x
    16 cells around. Mass and first moments of those give its side and center.
    """

    def __init__(self, landmarks: bool) -> None:
        super().__init__()
        self.outputs = 9 if landmarks else 6
        # Cell i is centered at i + 0.5; the window is i - 8 .. i + 7, so that it is centered at i, where the anchor is.
        offset = torch.arange(-8.0, 8) + 0.5
        self.moments = torch.stack([torch.ones(16, 16), offset.repeat(16, 1), offset[:, None].repeat(1, 16)])[:, None]

    def forward(self, image: Tensor) -> list[Tensor]:
        # RGB, (x - 127.5) / 128 -> R - 2 G + B: 4 for magenta, 2 for red and blue, 0 for gray; less 3, within 0..1.
        mask = (image[:, :1] - 2 * image[:, 1:2] + image[:, 2:] - 3).clamp(0, 1)
        rows = [self._stride(F.avg_pool2d(mask, stride)) for stride in (8, 16, 32)]
        return [part for kind in zip(*rows) for part in kind][: self.outputs]

    def _stride(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside = F.avg_pool2d(F.pad(cells, (4, 3, 4, 3)), 8, 1)
        mass, x, y = F.conv2d(F.pad(cells, (8, 7, 8, 7)), self.moments).split(1, 1)
        safe = mass.clamp_min(1e-3)
        x, y, side = x / safe, y / safe, safe.sqrt()
        # Less by the share of the ring around that is magenta, too, and by the distance of the mass's center, which
        # keeps the corners of a large square from passing for small squares.
        score = (1.3 * (inside - (mass - 64 * inside) / 192) - 0.15 * (x.abs() + y.abs())).clamp(0, 1)
        box = torch.cat((side / 2 - x, side / 2 - y, side / 2 + x, side / 2 + y), 1)
        points = torch.cat([part for dx, dy in FACE_POINTS for part in (x + dx * side, y + dy * side)], 1)
        # The second anchor of each cell never fires.
        both = [torch.cat(pair, 1) for pair in ((score, -safe), (box, box), (points, points))]
        return tuple(part.permute(0, 2, 3, 1).reshape(-1, width) for part, width in zip(both, (1, 4, 10)))


def write_scrfd(path: Path, landmarks: bool = True, size: int | None = None) -> None:
    """SCRFD's interface; of fixed input where a size is given."""
    free = None if size else {"input.1": {2: "height", 3: "width"}}
    _export(_Scrfd(landmarks), torch.zeros(1, 3, size or 640, size or 640), path, free)


def write_arcface(path: Path, seed: int = 0, size: int = 512) -> None:
    """ArcFace's interface, 112 x 112 -> [1, size]: 14 x 14 means, through a fixed random projection."""
    linear = nn.Linear(3 * 14 * 14, size, bias=False)
    linear.weight.data = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(seed)) / 14
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), linear)
    _export(network, torch.zeros(1, 3, 112, 112), path, {"input.1": {0: "batch"}, "embedding": {0: "batch"}})


def _export(network: nn.Module, example: Tensor, path: Path, free: dict | None) -> None:
    """free: names of the axes without a fixed length."""
    names = ["embedding"] if free and "embedding" in free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (example,), str(path), input_names=["input.1"], output_names=names, dynamic_axes=free,
            opset_version=13, dynamo=False,
        )  # fmt: skip


def write_retinaface(path: Path) -> None:
    """facexlib's RetinaFace-ResNet50, all zero save for one path from the nose's color to the heads of stride 8.

    Channel j of the path carries relu(u - t_j), u = B - R - 2 G - 20: 107 - step on a nose, below 0 elsewhere in a face
    and on gray. Log side is linear in u (boxes); the side itself is piecewise linear in the channels (landmarks).
    """
    state = _zero_state("retinaface")
    knots = np.arange(0.0, 108.0, 4.0)
    count = len(knots)
    conv, bias = torch.zeros(64, 3, 7, 7), torch.zeros(64)
    mean = np.array([104.0, 117.0, 123.0])  # BGR, which facexlib subtracts
    weights = np.array([1.0, -2.0, -1.0])
    conv[:count, :, 3, 3] = torch.tensor(weights, dtype=torch.float32)
    bias[:count] = torch.tensor(weights @ mean - NOSE_BLUE_OFFSET - knots, dtype=torch.float32)
    state["body.conv1.weight"], state["body.bn1.bias"] = conv, bias
    for i in (1, 2, 3, 4):
        state[f"body.layer{i}.0.downsample.0.weight"] = _carry(state[f"body.layer{i}.0.downsample.0.weight"], count)
    # Boxes and classes of this stride only: what goes up from the others would add to it.
    for name in ("fpn.output1.0", "fpn.merge1.0", "ssh1.conv3X3.0"):
        state[name + ".weight"] = _carry(state[name + ".weight"], count)
    _retinaface_heads(state, knots)
    torch.save({f"module.{key}": value for key, value in state.items()}, path)


def _retinaface_heads(state: dict, knots: np.ndarray) -> None:
    """Only the first anchor of stride 8, a 16-pixel prior, fires."""
    for level in range(3):
        bias = torch.tensor([0.0, -20.0, 0.0, -20.0])
        state[f"ClassHead.{level}.conv1x1.bias"] = bias
    state["ClassHead.0.conv1x1.bias"] = torch.tensor([0.0, -5.0, 0.0, -20.0])
    score = torch.zeros(4, 256, 1, 1)
    score[1, 0] = 0.5
    state["ClassHead.0.conv1x1.weight"] = score
    # u = 107 - step; side = 32 * 16 ** (step / 64); a box's side is 16 * exp(0.2 * l).
    log_ratio = np.log(LARGEST_RATIO) / STEPS
    box, box_bias = torch.zeros(8, 256, 1, 1), torch.zeros(8)
    box[2:4, 0] = -5 * log_ratio
    box_bias[2:4] = 5 * (np.log(SMALLEST / 16) + 107 * log_ratio)
    state["BboxHead.0.conv1x1.weight"], state["BboxHead.0.conv1x1.bias"] = box, box_bias
    sides = SMALLEST * LARGEST_RATIO ** ((107 - np.append(knots, 108.0)) / STEPS)
    slopes = np.diff(np.diff(sides) / 4, prepend=0.0)
    points = FACE_POINTS.reshape(-1) / (0.1 * 16)  # the head's unit is variance 0.1 of the prior
    mark, mark_bias = torch.zeros(20, 256, 1, 1), torch.zeros(20)
    mark[:10, : len(knots), 0, 0] = torch.tensor(points[:, None] * slopes, dtype=torch.float32)
    mark_bias[:10] = torch.tensor(points * sides[0], dtype=torch.float32)
    state["LandmarkHead.0.conv1x1.weight"], state["LandmarkHead.0.conv1x1.bias"] = mark, mark_bias


def _carry(like: Tensor, count: int) -> Tensor:
    """A convolution [out, in, k, k] that passes the first `count` channels on as they are."""
    weight = torch.zeros(like.shape)
    middle = like.shape[2] // 2
    for i in range(count):
        weight[i, i, middle, middle] = 1
    return weight


def _zero_state(kind: str) -> dict:
    """The state dict of facexlib's network: zeros, and batch norms that do nothing; small in a file."""
    with torch.device("meta"):  # only names and shapes
        if kind == "retinaface":
            from facexlib.detection.retinaface import RetinaFace

            model = RetinaFace(network_name="resnet50", device="meta")
        else:
            from facexlib.parsing.bisenet import BiSeNet

            model = BiSeNet(num_class=19)
    state = {}
    for key, value in model.state_dict().items():
        is_scale = key.endswith("running_var") or (value.ndim == 1 and key.endswith(".weight"))
        filled = torch.ones(1, dtype=value.dtype) if is_scale else torch.zeros(1, dtype=value.dtype)
        state[key] = filled.expand(value.shape) if value.ndim else filled[0].clone()
    return state


def write_bisenet(path: Path, seed: int = 0) -> None:
    """facexlib's BiSeNet, all zero save for one path: 19 bands of brightness (more red than blue) become 19 labels.

    Which band becomes which label is drawn by the seed.
    """
    state = _zero_state("bisenet")
    conv, bias = torch.zeros(64, 3, 7, 7), torch.zeros(64)
    conv[0, :, 3, 3] = torch.tensor([0.6, 0.3, 0.1])
    bias[0] = 2.2  # above 0 for every color
    state["cp.resnet.conv1.weight"], state["cp.resnet.bn1.bias"] = conv, bias
    for name in ("cp.resnet.layer2.0.downsample.0", "ffm.convblk.conv", "conv_out.conv.conv"):
        state[name + ".weight"] = _carry(state[name + ".weight"], 1)
    constant = torch.zeros(256)
    constant[1] = 1
    state["conv_out.conv.bn.bias"] = constant
    # 2 t x - t t is largest for the t that is nearest to x. The attention of ffm, sigmoid(0), makes x 1.5 times itself.
    levels = torch.linspace(0.1, 7.0, 19)[torch.randperm(19, generator=torch.Generator().manual_seed(seed))]
    logits = torch.zeros(19, 256, 1, 1)
    logits[:, 0, 0, 0], logits[:, 1, 0, 0] = 2 * levels, -levels * levels
    state["conv_out.conv_out.weight"] = logits
    torch.save(state, path)
