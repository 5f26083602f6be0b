"""A traced graph: the input of every compiler. Each graph is traced once."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from engine.bundles.manifest import TensorSpec
from export.graphs import Graph
from export.onnx_graph import OnnxGraph, exported


@dataclass(frozen=True)
class Program:
    """A graph as torch.export's program, with its signature."""

    graph: Graph
    traced: ExportedProgram
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """All tensors that it reads but its inputs, by their names in the module."""
        every, used = {**self.traced.state_dict, **self.traced.constants}, {n.name for n in self._nodes()}
        specs = self.traced.graph_signature.input_specs
        return {spec.target: every[spec.target] for spec in specs if spec.target in every and spec.arg.name in used}

    @cached_property
    def onnx(self) -> OnnxGraph:
        """The program in ONNX, our operators not spelled yet: backends share it. The exporter does not trace again."""
        return exported(replace(self.graph, module=cast(nn.Module, self.traced)))

    @property
    def text(self) -> str:
        """Every operation. Modules that differ only in weights, or in parts that are not read, have the same text."""
        lines = [f"{node.format_node()} {node.meta.get('val')}" for node in self._nodes()]
        return "\n".join([*lines, *(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in self.constants.items())])

    def _nodes(self) -> list[Node]:
        return [node for node in self.traced.graph.nodes if node.users or node.op != "placeholder"]


def trace(graph: Graph) -> Program:
    """Trace a graph; nothing is computed. Strides become part of the program, so inputs are made contiguous."""
    graph = replace(graph, inputs={name: value.contiguous() for name, value in graph.inputs.items()})
    with torch.no_grad():
        traced = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()), strict=False)
    values = {node.name: node.meta["val"] for node in traced.graph.nodes if "val" in node.meta}
    results = zip(graph.outputs, traced.graph_signature.user_outputs, strict=True)
    return Program(
        graph, traced,
        inputs=[_spec(name, value) for name, value in graph.inputs.items()],
        outputs=[_spec(name, values[node]) for name, node in results],
    )  # fmt: skip


def _spec(name: str, value: Tensor) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorSpec.model_validate({"name": name, "shape": list(value.shape), "dtype": dtype})
