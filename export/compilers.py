"""What makes a bundle's graphs: one class per backend, all with the same members, and their registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from engine.bundles.aoti import target_of
from engine.bundles.manifest import TensorSpec
from engine.bundles.tensorrt import require_tensorrt
from export.aoti import compile_program, constants_of, source_of
from export.onnx_graph import to_onnx
from export.program import Program
from export.tensorrt import BuildOptions, build_plan
from export.tensorrt_onnx import spell_for_tensorrt


class Compiler(ABC):
    """Makes one file of one traced graph."""

    backend: str
    target: str
    suffix: str
    in_place = False  # whether graphs write their caches in place

    @property
    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the packages that the result depends on."""

    @abstractmethod
    def write(self, program: Program, file: Path) -> dict[str, Tensor]:
        """Compile into `file`. Returns the constants that stay outside, by the names that the file uses."""

    def signature(self, program: Program) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Inputs and outputs of the graph that `write` makes."""
        return program.inputs, program.outputs

    def source(self, program: Program) -> str | None:
        """sha256 of everything that decides the result; None where compiling again is quick enough."""
        return None

    def adopt(self, program: Program, file: Path) -> dict[str, Tensor]:
        """Like `write`, for a file that was already made from a program with the same source."""
        raise NotImplementedError


class OnnxCompiler(Compiler):
    """ONNX for any machine."""

    backend = "onnx"
    target = "cpu"
    suffix = "onnx"

    @property
    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript")}

    def write(self, program: Program, file: Path) -> dict[str, Tensor]:
        # The exporter also takes a traced program, and then does not trace again.
        made = to_onnx(replace(program.graph, module=cast(nn.Module, program.traced)))
        file.write_bytes(made.model.SerializeToString())
        return {name: _tensor(value) for name, value in made.weights.items()}


@dataclass
class AotiCompiler(Compiler):
    """Machine code for this machine's processors or its GPU."""

    device: torch.device

    backend = "aoti"
    suffix = "so"
    in_place = True

    def __post_init__(self) -> None:
        self.target = target_of(self.device)

    @property
    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def write(self, program: Program, file: Path) -> dict[str, Tensor]:
        compile_program(program, self.device, file)
        return self.adopt(program, file)

    def source(self, program: Program) -> str:
        return source_of(program, self.device)

    def adopt(self, program: Program, file: Path) -> dict[str, Tensor]:
        return constants_of(program, self.device, file)


class TensorrtCompiler(Compiler):
    """Plans of TensorRT for this machine's GPU; the pipeline may be on a processor."""

    backend = "tensorrt"
    suffix = "plan"

    def __init__(self, options: BuildOptions | None = None) -> None:
        self.trt = require_tensorrt()
        self.target = target_of(torch.device("cuda"))
        self.options = options or BuildOptions()

    @property
    def versions(self) -> dict[str, str]:
        return {"tensorrt": self.trt.__version__, "torch": torch.__version__}

    def write(self, program: Program, file: Path) -> dict[str, Tensor]:
        spell = partial(spell_for_tensorrt, attention=self.options.attention)
        made = to_onnx(replace(program.graph, module=cast(nn.Module, program.traced)), spell)
        weights = {name: _tensor(value) for name, value in made.weights.items()}
        file.write_bytes(build_plan(made.model.SerializeToString(), weights, self.options))
        return weights if self.options.strip else {}

    def signature(self, program: Program) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """FP8 caches are e4m3, V transposed as engine.model.cache has it."""
        caches = {name for pair in program.graph.aliases.items() for name in pair}
        if self.options.attention != "plugin_fp8" or not caches:
            return program.inputs, program.outputs
        heads = next(spec.shape[2] for spec in program.inputs if spec.name.startswith("text_k"))

        def stored(spec: TensorSpec) -> TensorSpec:
            if spec.name not in caches:
                return spec
            batch, rows, dim = spec.shape
            transposed = [batch, heads, dim // heads, (rows + 15) // 16 * 16]
            shape = transposed if spec.name.startswith("v_") else spec.shape
            return spec.model_copy(update={"dtype": "float8_e4m3fn", "shape": shape})

        return [stored(spec) for spec in program.inputs], [stored(spec) for spec in program.outputs]


# Rows as engine.bundles.registry.BACKENDS has them.
COMPILERS: dict[str, Callable[[torch.device, BuildOptions | None], Compiler]] = {
    "onnx": lambda device, plans: OnnxCompiler(),
    "aoti": lambda device, plans: AotiCompiler(device),
    "tensorrt": lambda device, plans: TensorrtCompiler(plans),
}


def compiler_of(backend: str, device: torch.device, plans: BuildOptions | None = None) -> Compiler:
    """The compiler of a backend for the device that the pipeline is on."""
    if backend not in COMPILERS:
        raise ValueError(f"export: got backend {backend!r}, expected one of {', '.join(COMPILERS)}")
    return COMPILERS[backend](device, plans)


def _tensor(value: np.ndarray) -> Tensor:
    """A numpy array as a tensor. torch does not know bfloat16 and FP8 of ml_dtypes, so their bytes are viewed."""
    foreign = {ml_dtypes.bfloat16: torch.bfloat16, ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn}
    dtype = foreign.get(value.dtype.type)
    value = np.ascontiguousarray(value)
    return torch.from_numpy(value) if dtype is None else torch.from_numpy(value.view(np.uint8)).view(dtype)
