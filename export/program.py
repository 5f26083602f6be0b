"""A traced stage, what its compiler gets: one trace a graph, whatever becomes of it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from engine.bundle import TensorSpec
from export.graphs import Graph


@dataclass(frozen=True)
class Program:
    """A stage as torch.export's program, with its signature."""

    graph: Graph
    traced: ExportedProgram
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    @property
    def constants(self) -> dict[str, Tensor]:
        """Everything it reads but its inputs."""
        return {**self.traced.state_dict, **self.traced.constants}


def trace(graph: Graph) -> Program:
    """Trace a stage; nothing is computed."""
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
