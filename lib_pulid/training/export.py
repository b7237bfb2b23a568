"""Writes networks with 16-bit weights: ONNX files, and safetensors."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lib_pulid import disk

OPSET = 17
KEPT_WHOLE = 1024  # initializers up to so many numbers (biases, norms, shapes) stay as they are


def save_onnx(
    module: nn.Module, example: Tensor, path: Path, outputs: Sequence[str], facts: Mapping[str, object] | None = None
) -> None:
    """Writes a module of one input; its first axis is free if the example's length there is not 1.

    Args:
        facts: metadata of the file, as JSON.
    """
    import onnx

    data = io.BytesIO()
    free = {name: {0: "batch"} for name in ("input", *outputs)} if len(example) > 1 else None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch: that the exporter without further packages is the older one
        torch.onnx.export(
            module.eval(),
            (example,),
            data,  # type: ignore[arg-type]  # it takes a buffer, too
            input_names=["input"],
            output_names=list(outputs),
            dynamic_axes=free,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_model_from_string(data.getvalue())
    _halve(model)
    for name, value in (facts or {}).items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.checker.check_model(model)
    disk.write(path, model.SerializeToString(), replace=True)


def _halve(model) -> None:
    """Converts large float32 initializers to float16, each with a Cast back before its use."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) <= KEPT_WHOLE:
            continue
        name = tensor.name
        half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{name}.half")
        tensor.CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [name], f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def save_half(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes weights as a safetensors file in float16, whole or not at all. Raises: ValueError: one does not fit."""
    from safetensors.torch import save

    content = save({name: halved(name, tensor) for name, tensor in state.items()}, metadata={"format": "pt"})
    disk.write(path, content, replace=True)
    print(f"{path}: {len(state)} tensors, {path.stat().st_size / 1e6:.1f} MB")


def halved(name: str, tensor: Tensor) -> Tensor:
    """Converts a weight to float16. Raises: ValueError: it does not fit."""
    made = tensor.detach().cpu().half().contiguous()
    if not made.isfinite().all():
        raise ValueError(f"{name} does not fit 16 bits")
    return made
