"""Bundles of the tiny pipelines and single exported graphs, built once for all processes and for later runs."""

import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import torch
from artefacts import ROOT, artefact, key_of, newest, sources
from torch import Tensor
from torch.export import ExportedProgram

from engine.bundles.aoti import target_of
from engine.stream import Pipeline
from export.aoti import compile_program, source_of
from export.program import Program
from export.write import write_bundle

PROMPT = "a red circle moving right"
CPU = torch.device("cpu")
LARGEST = 32 << 20  # bytes of weights; larger exports are not kept
# A compiled graph depends on these files, and on the hash from the export.
COMPILING = [ROOT / name for name in ("export/aoti.py", "export/program.py", "engine/bundles/aoti.py")]
PACKAGES = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
)


@cache
def _tools() -> str:
    versions = [version(name) for name in PACKAGES]
    return key_of(platform.python_version(), torch.backends.cpu.get_cpu_capability(), versions, files=COMPILING)


@cache
def _code() -> str:
    """Hash of everything but the pipeline that decides a bundle."""
    code = [file for file in sources("engine", "export", "kernels") if file.suffix == ".py"]
    return key_of(files=[*code, ROOT / "tests/support/tiny.py", Path(__file__)])


def bundle(kind: str, pipeline: Pipeline, tokenizer: Path, backends: Sequence[str] = ("onnx",)) -> Path:
    """Export a pipeline of tiny.write_pipeline. kind names pipeline and backends. Callers must not change the folder.

    Any change to the sources makes a new bundle, but recompiles only graphs whose own hash changed.
    """
    kind = f"{kind}-{_tools()}"

    def make(folder: Path) -> None:
        older = newest(kind)
        folder.mkdir()
        with exports_remembered():
            assert list(write_bundle(pipeline, folder / "bundle", tokenizer, PROMPT, backends=backends,
                                     reuse=older and older / "bundle"))  # fmt: skip

    return artefact(kind, key_of(pipeline.preset, backends, _code()), make) / "bundle"


def aoti_bundle(pipeline: Pipeline, tokenizer: Path) -> Path:
    return bundle("aoti-bundle", pipeline, tokenizer, ("aoti", "onnx"))


def compile_once(program: Program, file: Path) -> None:
    """Like export.aoti.compile_program for this machine's CPU, but compiles each program only once."""

    def make(folder: Path) -> None:
        folder.mkdir()
        compile_program(program, CPU, folder / "graph.so")

    key = key_of(source_of(program, CPU), target_of(CPU), _tools())
    shutil.copyfile(artefact(f"aoti-{program.graph.name}", key, make) / "graph.so", file)


@contextmanager
def exports_remembered() -> Iterator[None]:
    """Within the block torch.onnx.export reuses its stored result for an equal traced program.

    Equal programs have the same operations, shapes, names, weights and translation of our own operators. Later changes
    to the model (export/onnx_graph.py, export/tensorrt/spelling.py) run each time.
    """
    plain = torch.onnx.export
    if getattr(plain, "remembers", False):  # already active: nested locks would deadlock
        yield
        return

    def export(module: Any, inputs: tuple[Tensor, ...], **options: Any) -> Any:
        if not isinstance(module, ExportedProgram) or _size(module) > LARGEST:
            return plain(module, inputs, **options)

        def make(folder: Path) -> None:
            folder.mkdir()
            onnx.save(ir.to_proto(plain(module, inputs, **options).model), folder / "model.onnx")

        names = options["input_names"], options["output_names"], options["opset_version"]
        stored = artefact(f"onnx-{_short(names)}", _key_of_export(module, inputs, names), make)
        model = ir.from_proto(onnx.load(stored / "model.onnx"))
        for name, value in model.graph.initializers.items():  # copy: torch needs writable values, a file's are not
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), dtype=value.const_value.dtype, name=name)
        return SimpleNamespace(model=model)

    export.remembers = True
    with mock.patch.object(torch.onnx, "export", export):
        yield


def _size(traced: ExportedProgram) -> int:
    return sum(x.nbytes for x in (*traced.state_dict.values(), *traced.constants.values()) if isinstance(x, Tensor))


def _short(names: tuple[Any, ...]) -> str:
    """A short name for all graphs with the same inputs and outputs; these belong to one function of Stages."""
    return key_of(names)[:8]


def _key_of_export(traced: ExportedProgram, inputs: tuple[Tensor, ...], names: tuple[Any, ...]) -> str:
    program = Program(None, traced, [], [])  # type: ignore[arg-type]  # the code below reads only the trace
    shapes = [(x.dtype, x.shape, x.stride()) for x in inputs]
    constants = [(name, key_of(_bytes(x))) for name, x in program.constants.items()]
    translated = key_of(files=[ROOT / "export/onnx_graph.py"])
    return key_of(str(traced.graph_signature), program.text, names, shapes, constants, translated, _tools())


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
