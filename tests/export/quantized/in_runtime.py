"""A stage's graph in ONNX Runtime, opened as the onnx backend opens it."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from engine.bundles.manifest import GraphSpec
from engine.bundles.onnx import OnnxGraph as Session
from export.graphs import Graph
from export.onnx_graph import OnnxGraph


def session(graph: Graph, made: OnnxGraph, folder: Path, extra: dict[str, Tensor] | None = None) -> Session:
    """Opened as the onnx backend opens it; `extra` names further tensors to return, with examples."""
    model = onnx.ModelProto()
    model.CopyFrom(made.model)
    with torch.no_grad():
        results = dict(zip(graph.outputs, graph.module(*graph.inputs.values()), strict=True)) | (extra or {})
    for name, value in (extra or {}).items():
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(value.shape)))
    file = folder / "graph.onnx"
    file.write_bytes(model.SerializeToString())

    def specs(tensors: dict[str, Tensor]) -> list[dict]:
        return [
            {"name": name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
            for name, x in tensors.items()
        ]

    spec = GraphSpec.model_validate(
        {"file": file.name, "inputs": specs(graph.inputs), "outputs": specs(results), "weights": {}, "aliases": {}}
    )
    weights = {name: to_torch(value) for name, value in made.weights.items()}
    return Session("sdd", file, spec, weights, 1)


def to_torch(value: np.ndarray) -> Tensor:
    if value.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(np.ascontiguousarray(value).view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.ascontiguousarray(value))


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def random_inputs(graph: Graph, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.randn_like(x) if x.is_floating_point() and x.ndim > 2 else x.clone()
        for name, x in graph.inputs.items()
    }


def dims(model: onnx.ModelProto, name: str) -> tuple[int, ...]:
    return tuple(next(t.dims for t in model.graph.initializer if t.name == name))
