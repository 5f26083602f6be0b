"""Graphs in TensorRT's spelling, and ONNX Runtime to run them in."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.bundles.onnx import _ort_value
from engine.stream import Pipeline
from export import compilers
from export.graphs import Graph, stage_graphs
from export.onnx_graph import OnnxGraph

PROMPT = "a red circle moving right on a gray background"
Made = Callable[..., tuple[Graph, OnnxGraph]]


def stage(pipeline: Pipeline, name: str) -> Graph:
    return next(graph for graph in stage_graphs(pipeline) if graph.name == name)


def inputs_of(graph: Graph, seed: int, slot: int = 0, valid: int = 1) -> dict[str, Tensor]:
    """Random ones; the chunk goes to `slot` of the ring, `valid` chunks are then valid."""
    torch.manual_seed(seed)
    made = {n: torch.randn_like(x) if x.is_floating_point() else x.clone() for n, x in graph.inputs.items()}
    rows = graph.inputs["rope_cos"].shape[0]
    if "t" in made:
        made["t"] = torch.tensor([937.5])
    return made | {"start_row": torch.tensor([slot * rows]), "valid_rows": torch.tensor([valid * rows])}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.flatten().double() - expected.flatten().double()).norm() / expected.double().norm())


def by_heads(cache: Tensor, shape: list[int]) -> Tensor:
    """A cache [1, rows, dim] as the graph has it, [1, heads, rows, d]; others reshaped."""
    if cache.ndim == 3 and len(shape) == 4 and shape[1] > 1:
        return cache.reshape(1, shape[2], shape[1], shape[3]).transpose(1, 2).contiguous()
    return cache.reshape(shape)


def stored(cache: Tensor, heads: int = 2) -> Tensor:
    """A cache [1, rows, dim] in the bytes that a plan keeps in that memory: by heads."""
    return cache.unflatten(2, (heads, -1)).transpose(1, 2).reshape(cache.shape)


def shown(cache: Tensor, heads: int = 2) -> Tensor:
    """The inverse of `stored`."""
    return by_rows(cache.reshape(1, heads, cache.shape[1], -1))


def by_rows(cache: Tensor) -> Tensor:
    """A cache [1, heads, rows, d] as the engine has it, [1, rows, dim]."""
    return cache.transpose(1, 2).flatten(2) if cache.ndim == 4 else cache


def run_onnx(made: OnnxGraph, inputs: dict[str, Tensor], outputs: list[str]) -> list[Tensor]:
    """In ONNX Runtime, which knows none of the TRT_ operators and takes their bodies. Caches [1, rows, dim]."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    kept = [_ort_value(ort, compilers._tensor(value)) for value in made.weights.values()]
    options.add_external_initializers(list(made.weights), kept)
    session = ort.InferenceSession(made.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    given = {name: by_heads(value, shapes[name]).numpy() for name, value in inputs.items()}
    made_of = dict(zip(outputs, session.run(outputs, given), strict=True))
    caches = {name for name in outputs if name.removeprefix("local_")[:2] in ("k_", "v_")}
    return [by_rows(torch.from_numpy(x)) if name in caches else torch.from_numpy(x) for name, x in made_of.items()]
