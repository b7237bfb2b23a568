"""Writes the files with which further training begins, from the shipped weights.

    python -m lib_pulid.miniature.unpack --folder .training

The folder is then as after the trainings in docs/training.md up to the adapter's, with weights of 16 bits and
without the wide recognizer, which is not shipped.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib_pulid import miniature
from lib_pulid.files.state_dict import read_state_dict
from lib_pulid.training import base
from lib_pulid.training.autoencoder import FILE
from lib_pulid.training.export import save_half
from lib_pulid.training.readers import KINDS, Reader

JUDGES = ("judge.onnx", "scene_judge.onnx")


def write(folder: Path) -> None:
    """Writes all that `training.base` and `training.adapter` read, but the drawn images."""
    from lib_pulid.hosts.diffusers_checkpoint import load_sdxl

    made = folder / "miniature"
    made.mkdir(parents=True, exist_ok=True)
    for path in (*miniature.encoder_files(), *(miniature.FOLDER / name for name in JUDGES)):
        shutil.copy(path, made / path.name)
    save_half(made / "recogniser.safetensors", recogniser(made / "recogniser.onnx").state_dict())

    pipeline = load_sdxl(miniature.checkpoint("sdxl"), torch.float32)
    vae = pipeline.vae.state_dict().items()  # its attention is of zeros, see `checkpoint`, and not trained
    save_half(folder / FILE, {name: tensor for name, tensor in vae if ".attentions." not in name})
    sdxl = base.Base()
    sdxl.unet.load_state_dict(pipeline.unet.state_dict())
    sdxl.text.first.load_state_dict(pipeline.text_encoder.state_dict())
    sdxl.text.second.load_state_dict(pipeline.text_encoder_2.state_dict())
    base.save("sdxl", folder, sdxl)
    flux = base.build("flux", folder)
    flux.denoiser.load_state_dict(read_state_dict(miniature.checkpoint("flux")))
    base.save("flux", folder, flux)


def recogniser(path: Path) -> Reader:
    """Builds the recognizer from its ONNX file, in which each convolution has taken in the batch norm behind it."""
    reader = Reader(KINDS["recogniser"]).eval()
    weights = _weights(path)
    with torch.no_grad():
        bias = torch.empty(0)
        for layer in reader.modules():
            if isinstance(layer, nn.Conv2d):
                weight, bias = next(weights)
                layer.weight.copy_(weight)
            elif isinstance(layer, nn.BatchNorm2d):
                _set_norm(layer, torch.zeros_like(bias), torch.ones_like(bias) - layer.eps)
                layer.bias.copy_(bias)
        for parameter, value in zip(reader.embedding[0].parameters(), next(weights)):
            parameter.copy_(value)
        _set_norm(reader.embedding[1], *next(weights))
    return reader


def _set_norm(norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _weights(path: Path) -> Iterator[list[Tensor]]:
    """Yields the last two tensors of each layer: weight and bias, or a norm's mean and variance."""
    import onnx

    graph = onnx.load(path).graph
    known = {one.name: onnx.numpy_helper.to_array(one).astype(np.float32) for one in graph.initializer}
    known |= {node.output[0]: known[node.input[0]] for node in graph.node if node.op_type == "Cast"}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "BatchNormalization"):
            yield [torch.from_numpy(known[name]) for name in node.input[-2:]]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".training"))
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
