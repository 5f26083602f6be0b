"""Bundles of the tiny pipelines, and single exported graphs: made once for all processes and for later runs."""

import pickle
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import torch
from artefacts import ROOT, artefact, key_of, newest, sources
from torch import Tensor

from engine.bundles.aoti import target_of
from engine.stream import Pipeline
from export.aoti import compile_program, source_of
from export.graphs import Graph
from export.onnx_graph import OnnxGraph
from export.program import Program
from export.write import write_bundle

PROMPT = "a red circle moving right"
CPU = torch.device("cpu")
# What a compiled graph depends on beside the hash that the export gives it.
COMPILING = [ROOT / name for name in ("export/aoti.py", "export/program.py", "engine/bundles/aoti.py")]
PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "diffusers", "transformers", "safetensors", "numpy")


@cache
def _tools() -> str:
    versions = [version(name) for name in PACKAGES]
    return key_of(platform.python_version(), torch.backends.cpu.get_cpu_capability(), versions, files=COMPILING)


@cache
def _code() -> str:
    """Everything that decides a bundle, beside the pipeline."""
    return key_of(files=[*sources("engine", "export", "kernels", "tests/support")])


def bundle(kind: str, pipeline: Pipeline, tokenizer: Path, backends: Sequence[str] = ("onnx",)) -> Path:
    """A pipeline of tiny.write_pipeline, exported. kind names pipeline and backends. Not to be changed.

    Any change to the sources gives a new bundle. Graphs whose own hash did not change are not compiled again.
    """
    kind = f"{kind}-{_tools()}"

    def make(folder: Path) -> None:
        with exports_remembered():
            lines = write_bundle(pipeline, folder, tokenizer, PROMPT, backends=backends, reuse=newest(kind))
            assert list(lines)

    return artefact(kind, key_of(pipeline.preset, backends, _code()), make)


def aoti_bundle(pipeline: Pipeline, tokenizer: Path) -> Path:
    return bundle("aoti-bundle", pipeline, tokenizer, ("aoti", "onnx"))


def compile_once(program: Program, file: Path) -> None:
    """As export.aoti.compile_program on this machine's processor."""

    def make(folder: Path) -> None:
        folder.mkdir()
        compile_program(program, CPU, folder / "graph.so")

    key = key_of(source_of(program, CPU), target_of(CPU), _tools())
    shutil.copyfile(artefact(f"aoti-{program.graph.name}", key, make) / "graph.so", file)


@contextmanager
def exports_remembered() -> Iterator[None]:
    """Bundles that are written meanwhile take their ONNX graphs from here where the same program was exported before.

    The same: operations, shapes, weights and names, spelled alike by the same code.
    """
    from export import compilers

    plain = compilers.to_onnx
    if getattr(plain, "remembers", False):  # already: one lock inside the other would never open
        yield
        return

    def to_onnx(graph: Graph, *spell: Any) -> OnnxGraph:
        def make(folder: Path) -> None:
            made = plain(graph, *spell)
            folder.mkdir()
            (folder / "graph").write_bytes(pickle.dumps((made.model.SerializeToString(), made.weights)))

        stored = artefact(f"onnx-{graph.name}", _key_of_export(graph, spell), make) / "graph"
        model, weights = pickle.loads(stored.read_bytes())
        return OnnxGraph(onnx.ModelProto.FromString(model), weights)

    to_onnx.remembers = True
    with mock.patch.object(compilers, "to_onnx", to_onnx):
        yield


def _key_of_export(graph: Graph, spell: Sequence[Callable]) -> str:
    program = Program(graph, graph.module, [], [])  # its module is traced
    inputs = {name: (x.dtype, x.shape, x.stride()) for name, x in graph.inputs.items()}
    constants = [(name, key_of(_bytes(x))) for name, x in program.constants.items()]
    spelled = [(part.func.__name__, part.keywords) for part in spell]
    told = graph.name, graph.outputs, graph.aliases, graph.mutates, str(program.traced.graph_signature), program.text
    return key_of(*told, inputs, constants, spelled, _tools(), _code())


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
