"""Bundles of these tests share their ONNX graphs, with each other and with later runs; graphs for TensorRT."""

from collections.abc import Iterator
from functools import cache, partial

import pytest
from spelled import PROMPT, Made, stage

from engine.stream import Pipeline
from export.calibrate import calibrate
from export.eight_bits import Recipe, quantize
from export.graphs import Graph
from export.onnx_graph import OnnxGraph, to_onnx
from export.tensorrt.spelling import spell_for_tensorrt


@pytest.fixture(scope="session", autouse=True)
def _exports_remembered() -> Iterator[None]:
    from bundles import exports_remembered

    with exports_remembered():
        yield


@pytest.fixture(scope="module")
def fp8(pipeline: Pipeline) -> Pipeline:
    return quantize(pipeline, Recipe("tensor"), calibrate(pipeline, [PROMPT], chunks=4))


@pytest.fixture(scope="module")
def made(pipeline: Pipeline, fp8: Pipeline) -> Made:
    """(stage, precision, attention) -> the stage and its graph for TensorRT; each exported once."""

    @cache
    def make(name: str, precision: str, attention: str = "native") -> tuple[Graph, OnnxGraph]:
        graph = stage(fp8 if precision == "fp8" else pipeline, name)
        return graph, to_onnx(graph, partial(spell_for_tensorrt, attention=attention))

    return make
