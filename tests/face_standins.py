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
from pathlib import Path
from typing import Any

import numpy as np

from lib_pulid.face_models import FaceFiles, load_face_models
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


@functools.cache
def remembering_models(files: FaceFiles, device: str = "cpu") -> FaceModels:
    """`load_face_models`, once for the same files."""
    models = load_face_models(files, device)
    parts = {name: Remembering(getattr(models, name)) for name in ("detector", "recogniser", "landmarker", "parser")}
    return dataclasses.replace(models, **parts)


def write_face_files(folder: Path, seed: int = 0) -> FaceFiles:
    """All four files, under the real names, in the layout FaceAnalysis(name="antelopev2", root=folder) wants."""
    folder = Path(folder)
    onnx_folder = folder / "models" / "antelopev2"
    onnx_folder.mkdir(parents=True, exist_ok=True)
    files = FaceFiles(
        detector=onnx_folder / "scrfd_10g_bnkps.onnx",
        recogniser=onnx_folder / "glintr100.onnx",
        landmarker=folder / "detection_Resnet50_Final.pth",
        parser=folder / "parsing_bisenet.pth",
    )
    write_scrfd(files.detector)
    write_arcface(files.recogniser, seed)
    write_retinaface(files.landmarker)
    write_bisenet(files.parser, seed)
    return files


def write_scrfd(path: Path, landmarks: bool = True, size: int | None = None) -> None:
    """SCRFD's interface (three strides, two anchors, scores, boxes, landmarks); of fixed input where a size is given.

    At each stride s a window of 8 x 8 cells of s pixels looks for a square that fills it and stands alone in the 16 x
    16 cells around. Mass and first moments of those give its side and center.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = _OnnxGraph()
    # RGB, (x - 127.5) / 128 -> R - 2 G + B: 4 for magenta, 2 for red and blue, 0 for gray; less 3, within 0..1.
    graph.constant("colour", np.array([1, -2, 1], np.float32).reshape(1, 3, 1, 1))
    graph.node("Conv", ["input.1", "colour"], "response")
    graph.constant("bias", np.float32(-3.0))
    graph.node("Add", ["response", "bias"], "biased")
    graph.constant("zero", np.float32(0))
    graph.constant("one", np.float32(1))
    graph.node("Clip", ["biased", "zero", "one"], "mask")
    outputs = [[], [], []]
    for stride in (8, 16, 32):
        for group, name in zip(outputs, _scrfd_stride(graph, stride), strict=False):
            group.append(name)
    names = outputs[0] + outputs[1] + (outputs[2] if landmarks else [])
    widths = {0: 1, 1: 4, 2: 10}
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, widths[i // 3]]) for i, name in enumerate(names)
    ]
    side: int | str = size or "?"
    source = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, side, side])
    _save(onnx, graph, "scrfd", source, infos, path)


def _scrfd_stride(graph: _OnnxGraph, stride: int) -> tuple[str, str, str]:
    """One stride's outputs: scores [N, 1], distances [N, 4] and landmarks [N, 10] in cells, N = 2 x cells."""
    p = f"s{stride}."
    graph.node("AveragePool", ["mask"], p + "cells", kernel_shape=[stride, stride], strides=[stride, stride])
    graph.constant(p + "w8", np.full((1, 1, 8, 8), 1 / 64, np.float32))
    # Cell i is centred at i + 0.5; the window is i - 8 .. i + 7, so that it is centred at i, where the anchor is.
    offset = np.arange(-8, 8, dtype=np.float32) + 0.5
    moments = np.stack([np.ones((16, 16)), np.tile(offset, (16, 1)), np.tile(offset[:, None], (1, 16))])
    graph.constant(p + "w16", moments[:, None].astype(np.float32))
    graph.node("Conv", [p + "cells", p + "w8"], p + "inside", pads=[4, 4, 3, 3])
    graph.node("Conv", [p + "cells", p + "w16"], p + "sums", pads=[8, 8, 7, 7])
    graph.constant(p + "split", np.array([1, 1, 1], np.int64))
    graph.node("Split", [p + "sums", p + "split"], [p + "mass", p + "mx", p + "my"], axis=1)
    graph.constant(p + "eps", np.float32(1e-3))
    graph.node("Max", [p + "mass", p + "eps"], p + "safe")
    graph.node("Sqrt", [p + "safe"], p + "side")
    graph.node("Div", [p + "mx", p + "safe"], p + "cx")
    graph.node("Div", [p + "my", p + "safe"], p + "cy")
    graph.node("Concat", [p + "cx", p + "cy", p + "side"], p + "geometry", axis=1)  # [1, 3, h, w]
    _scrfd_score(graph, p)
    boxes = np.array([[-1, 0, 0.5], [0, -1, 0.5], [1, 0, 0.5], [0, 1, 0.5]], np.float32)
    points = np.array([row for dx, dy in FACE_POINTS for row in ([1, 0, dx], [0, 1, dy])], np.float32)
    graph.constant(p + "wbox", boxes[:, :, None, None])
    graph.constant(p + "wkps", points[:, :, None, None])
    graph.node("Conv", [p + "geometry", p + "wbox"], p + "box")
    graph.node("Conv", [p + "geometry", p + "wkps"], p + "kps")
    # The second anchor of each cell never fires.
    graph.constant(p + "minus", np.float32(-1))
    graph.node("Mul", [p + "safe", p + "minus"], p + "silent")
    names = []
    for kind, parts, width in (("score", "score silent", 1), ("box", "box box", 4), ("kps", "kps kps", 10)):
        graph.node("Concat", [p + part for part in parts.split()], p + kind + "2", axis=1)
        graph.node("Transpose", [p + kind + "2"], p + kind + "t", perm=[0, 2, 3, 1])
        graph.constant(p + kind + "shape", np.array([-1, width], np.int64))
        graph.node("Reshape", [p + kind + "t", p + kind + "shape"], p + kind + "out")
        names.append(p + kind + "out")
    return names[0], names[1], names[2]


def _scrfd_score(graph: _OnnxGraph, p: str) -> None:
    """score = 1.3 (inside - share of the ring around that is magenta, too) - 0.15 (distance of the mass's center).

    The distance keeps the corners of a large square from passing for small squares.
    """
    graph.constant(p + "win", (1.3 * np.array(1 + 64 / 192)).astype(np.float32))
    graph.constant(p + "wout", np.float32(-1.3 / 192))
    graph.constant(p + "woff", np.float32(-0.15))
    graph.node("Mul", [p + "inside", p + "win"], p + "in")
    graph.node("Mul", [p + "mass", p + "wout"], p + "out")
    graph.node("Abs", [p + "cx"], p + "ax")
    graph.node("Abs", [p + "cy"], p + "ay")
    graph.node("Add", [p + "ax", p + "ay"], p + "off")
    graph.node("Mul", [p + "off", p + "woff"], p + "penalty")
    graph.node("Sum", [p + "in", p + "out", p + "penalty"], p + "sum")
    graph.node("Clip", [p + "sum", "zero", "one"], p + "score")


def write_arcface(path: Path, seed: int = 0, size: int = 512) -> None:
    """ArcFace's interface, 112 x 112 -> [1, size]: 14 x 14 means, through a fixed random projection."""
    import onnx
    from onnx import TensorProto, helper

    graph = _OnnxGraph()
    graph.node("AveragePool", ["input.1"], "means", kernel_shape=[8, 8], strides=[8, 8])
    graph.node("Flatten", ["means"], "flat")
    random = np.random.default_rng(seed)
    graph.constant("projection", random.standard_normal((3 * 14 * 14, size)).astype(np.float32) / 14)
    graph.node("MatMul", ["flat", "projection"], "embedding")
    source = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["None", 3, 112, 112])
    target = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["None", size])
    _save(onnx, graph, "arcface", source, [target], path)


class _OnnxGraph:
    """Nodes and constants as they come."""

    def __init__(self) -> None:
        self.nodes: list = []
        self.constants: list = []

    def node(self, kind: str, inputs: list[str], outputs: str | list[str], **attributes: object) -> None:
        from onnx import helper

        names = [outputs] if isinstance(outputs, str) else outputs
        # Named as PyTorch names them: insightface takes early "Sub" and "Mul" nodes for an mxnet model.
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"/{kind}_{len(self.nodes)}", **attributes))

    def constant(self, name: str, value: np.ndarray | np.generic) -> None:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), name))


def _save(onnx, graph: _OnnxGraph, name: str, source, targets: list, path: Path) -> None:  # noqa: ANN001
    body = onnx.helper.make_graph(graph.nodes, name, [source], targets, graph.constants)
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def write_retinaface(path: Path) -> None:
    """facexlib's RetinaFace-ResNet50, all zero save for one path from the nose's color to the heads of stride 8.

    Channel j of the path carries relu(u - t_j), u = B - R - 2 G - 20: 107 - step on a nose, below 0 elsewhere in a face
    and on gray. Log side is linear in u (boxes); the side itself is piecewise linear in the channels (landmarks).
    """
    import torch

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
    import torch

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


def _carry(like, count: int):  # noqa: ANN001, ANN202
    """A convolution [out, in, k, k] that passes the first `count` channels on as they are."""
    import torch

    weight = torch.zeros(like.shape)
    middle = like.shape[2] // 2
    for i in range(count):
        weight[i, i, middle, middle] = 1
    return weight


def _zero_state(kind: str) -> dict:
    """The state dict of facexlib's network: zeros, and batch norms that do nothing; small in a file."""
    import torch

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
    import torch

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
