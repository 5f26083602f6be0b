"""Bundles of the tiny pipelines, and single exported graphs: made once for all processes and for later runs."""

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
LARGEST = 32 << 20  # bytes of weights; a larger export is not kept
# What a compiled graph depends on beside the hash that the export gives it.
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
    """Everything that decides a bundle, beside the pipeline."""
    code = [file for file in sources("engine", "export", "kernels") if file.suffix == ".py"]
    return key_of(files=[*code, ROOT / "tests/support/tiny.py", Path(__file__)])


def bundle(kind: str, pipeline: Pipeline, tokenizer: Path, backends: Sequence[str] = ("onnx",)) -> Path:
    """A pipeline of tiny.write_pipeline, exported. kind names pipeline and backends. Not to be changed.

    Any change to the sources gives a new bundle. Graphs whose own hash did not change are not compiled again.
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
    """As export.aoti.compile_program on this machine's processor."""

    def make(folder: Path) -> None:
        folder.mkdir()
        compile_program(program, CPU, folder / "graph.so")

    key = key_of(source_of(program, CPU), target_of(CPU), _tools())
    shutil.copyfile(artefact(f"aoti-{program.graph.name}", key, make) / "graph.so", file)


@contextmanager
def exports_remembered() -> Iterator[None]:
    """Meanwhile torch.onnx.export takes from here what it has once made of the same traced program.

    The same: operations, shapes, names, weights, and how our own operators are translated. What becomes of the model
    afterwards (export/onnx_graph.py, export/tensorrt_onnx.py) is done each time.
    """
    plain = torch.onnx.export
    if getattr(plain, "remembers", False):  # already: one lock inside the other would never open
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
        for name, value in model.graph.initializers.items():  # those of a file cannot be written, as torch expects
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), dtype=value.const_value.dtype, name=name)
        return SimpleNamespace(model=model)

    export.remembers = True
    with mock.patch.object(torch.onnx, "export", export):
        yield


def _size(traced: ExportedProgram) -> int:
    return sum(x.nbytes for x in (*traced.state_dict.values(), *traced.constants.values()) if isinstance(x, Tensor))


def _short(names: tuple[Any, ...]) -> str:
    """A name for graphs that have the same inputs and outputs, which are of one stage."""
    return key_of(names)[:8]


def _key_of_export(traced: ExportedProgram, inputs: tuple[Tensor, ...], names: tuple[Any, ...]) -> str:
    program = Program(None, traced, [], [])  # type: ignore[arg-type]  # what follows reads the trace alone
    shapes = [(x.dtype, x.shape, x.stride()) for x in inputs]
    constants = [(name, key_of(_bytes(x))) for name, x in program.constants.items()]
    translated = key_of(files=[ROOT / "export/onnx_graph.py"])
    return key_of(str(traced.graph_signature), program.text, names, shapes, constants, translated, _tools())


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
