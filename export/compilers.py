"""What makes a bundle's graphs: one class per backend, all with the same members, and their registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from engine.bundles.aoti import target_of
from engine.bundles.manifest import TensorSpec
from engine.bundles.stages import NotHere
from engine.bundles.tensorrt import gpu_target, require_tensorrt
from export.aoti import compile_program, constants_of, source_of
from export.onnx_graph import spelled
from export.program import Program
from export.tensorrt.build import ADA_ON, BuildOptions, build_plan
from export.tensorrt.spelling import spell_for_tensorrt


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
        made = spelled(program.onnx)
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
    gpus: tuple[int, ...] = ()  # that the plans are for, where the package builds for others than this machine's
    grouped = False  # spelling of attention: HeadCaches

    def __init__(self, options: BuildOptions | None = None) -> None:
        self.options = options or BuildOptions()
        self.trt = require_tensorrt(self.backend)
        if self.options.gpu:
            got = ", ".join(map(str, self.options.gpu))
            raise ValueError(f"--gpu: got {got} for tensorrt, expected none: it builds for this machine's GPU")
        self.target = gpu_target(self.backend, torch.device("cuda"))

    @property
    def versions(self) -> dict[str, str]:
        return {self.backend: self.trt.__version__, "torch": torch.__version__}

    def write(self, program: Program, file: Path) -> dict[str, Tensor]:
        spell = partial(spell_for_tensorrt, attention=self.options.attention, grouped=self.grouped)
        made = spelled(program.onnx, spell)
        weights = {name: _tensor(value) for name, value in made.weights.items()}
        model = made.model.SerializeToString()
        file.write_bytes(build_plan(model, weights, self.options, self.backend, self.gpus))
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


class TensorrtRtxCompiler(TensorrtCompiler):
    """Plans of TensorRT for RTX, for named GPUs of one generation; this machine needs none."""

    backend = "tensorrt_rtx"

    def __init__(self, options: BuildOptions, gpus: tuple[int, ...]) -> None:
        if options.attention.startswith("plugin"):
            raise ValueError(f"tensorrt_rtx: got attention {options.attention}, expected native or native_fp8: "
                             "it takes no plugins of this kind")  # fmt: skip
        if options.strip and not torch.cuda.is_available():
            raise NotHere("tensorrt_rtx: got --strip without a GPU, expected one: it makes such plans on a GPU only")
        self.options, self.gpus = options, gpus
        self.trt = require_tensorrt(self.backend)
        self.target = "cuda-" + "_".join(f"sm{gpu}" for gpu in gpus)
        self.grouped = set(gpus) <= set(ADA_ON)


# Rows as engine.bundles.registry.BACKENDS has them. `fp8`: whether graphs have FP8 products.
COMPILERS: dict[str, Callable[[torch.device, BuildOptions, bool], list[Compiler]]] = {
    "onnx": lambda device, plans, fp8: [OnnxCompiler()],
    "aoti": lambda device, plans, fp8: [AotiCompiler(device)],
    "tensorrt": lambda device, plans, fp8: [TensorrtCompiler(plans)],
    "tensorrt_rtx": lambda device, plans, fp8: [TensorrtRtxCompiler(plans, row) for row in plans.generations(fp8)],
}


def compilers_of(
    backend: str, device: torch.device, plans: BuildOptions | None = None, fp8: bool = False
) -> list[Compiler]:
    """The compilers of a backend, one for each target, for the device that the pipeline is on."""
    if backend not in COMPILERS:
        raise ValueError(f"export: got backend {backend!r}, expected one of {', '.join(COMPILERS)}")
    return COMPILERS[backend](device, plans or BuildOptions(), fp8)


def _tensor(value: np.ndarray) -> Tensor:
    """A numpy array as a tensor. torch does not know bfloat16 and FP8 of ml_dtypes, so their bytes are viewed."""
    foreign = {ml_dtypes.bfloat16: torch.bfloat16, ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn}
    dtype = foreign.get(value.dtype.type)
    value = np.ascontiguousarray(value)
    return torch.from_numpy(value) if dtype is None else torch.from_numpy(value.view(np.uint8)).view(dtype)
