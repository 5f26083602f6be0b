"""The graphs that are exported are those that a bundle must have, in lower precisions too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.bundles.contract import Shapes, check_graphs
from engine.bundles.manifest import ROW_INPUTS, VERSION, GraphSpec
from engine.stream import Pipeline
from export.calibrate import calibrate
from export.compilers import AotiCompiler, Compiler, OnnxCompiler, TensorrtCompiler
from export.eight_bits import LINEARS, Recipe, quantize
from export.graphs import stage_graphs
from export.program import trace
from export.tensorrt.build import BuildOptions

BF16: dict[str, Any] = {"precision": "bf16"}
CASES: dict[str, tuple[str, Callable[[], Compiler], dict[str, Any]]] = {  # precision, compiler, the pipeline's options
    "onnx": ("fp16", OnnxCompiler, {"precision": "fp16"}),
    "aoti": ("bf16", lambda: AotiCompiler(torch.device("cpu")), BF16),
    "causal": ("bf16", TensorrtCompiler, BF16 | {"preset": "self-forcing", "overrides": {"window": 6}}),
    "fp8": ("fp8", TensorrtCompiler, BF16),
    "int8": ("int8", OnnxCompiler, {"precision": "fp32"}),
    "fp8 caches": ("fp8", lambda: TensorrtCompiler(BuildOptions(attention="plugin_fp8")), BF16),
}


def specs_of(pipeline: Pipeline, compiler: Compiler) -> dict[str, GraphSpec]:
    specs = {}
    for graph in stage_graphs(pipeline, compiler.in_place):
        inputs, outputs = compiler.signature(trace(graph))
        specs[graph.name] = GraphSpec(
            file=graph.name, inputs=inputs, outputs=outputs, weights={}, aliases=graph.aliases, mutates=graph.mutates
        )
    return specs


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_exported_graphs_keep_the_contract(model_dir: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    for needed in ("require_tensorrt", "gpu_target"):  # nothing here compiles
        monkeypatch.setattr(f"export.compilers.{needed}", lambda *_: "cuda-sm90")
    precision, compiler, options = CASES[case]
    pipeline = engine.load(model_dir, device="cpu", **options)
    if precision in LINEARS:
        recipe = Recipe("tensor", precision=precision)
        pipeline = quantize(pipeline, recipe, calibrate(pipeline, ["a red circle"], chunks=2))
    assert pipeline.tokenizer is not None
    shapes = Shapes(
        pipeline.preset, pipeline.config, pipeline.height, pipeline.width, pipeline.spatial, pipeline.temporal,
        pipeline.tokenizer.rows, precision, ROW_INPUTS[VERSION],
    )  # fmt: skip
    check_graphs(shapes, specs_of(pipeline, compiler()), "graphs")
