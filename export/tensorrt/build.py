"""Program -> a plan of TensorRT 11, or of TensorRT for RTX, which builds without a GPU (docs/tensorrt.md).

Networks are strongly typed: the graph's own types and its Q/DQ nodes decide. Shapes are static, so no profile is
described. Weights go to the parser from memory, because graphs here only name them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bundles.tensorrt import logger_of, require_tensorrt
from engine.files import whole_file
from engine.options import option
from export.tensorrt.plugins import register_plugins

# GPUs that plans of TensorRT for RTX are built for, by generation. One plan serves a whole row. One plan for all would
# copy caches on the newer ones, because the kernels of the older ones need copies.
AMPERE, ADA_ON = (80, 86), (89, 120, 121)
ATTENTIONS = ("native", "native_fp8", "plugin", "plugin_fp8")


@dataclass(frozen=True)
class BuildOptions:
    """How plans are built; also the command-line options of `python -m export`, but for `level`."""

    attention: str = option(
        "native", "TensorRT's own, its own on e4m3 operands, our kernel compiled into the plan, or ours on e4m3 caches",
        choices=ATTENTIONS,
    )  # fmt: skip
    level: int = option(3, "0 to 5: how long TensorRT searches for kernels")
    strip: bool = option(False, "leave weights out of the plans; the loader adds those of weights.safetensors")
    timing_cache: Path | None = option(
        None, "measured kernels: read if the file exists, written afterwards", metavar="FILE"
    )
    gpu: tuple[int, ...] = option(
        (), "tensorrt_rtx: compute capability to build for, such as 89; may be repeated; default: all that the "
        "precision runs on", metavar="89",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 <= self.level <= 5:
            raise ValueError(f"tensorrt: got level {self.level}, expected 0 to 5")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"tensorrt: got attention {self.attention!r}, expected one of {', '.join(ATTENTIONS)}")
        known = (*AMPERE, *ADA_ON)
        for gpu in self.gpu:
            if gpu not in known or self.gpu.count(gpu) > 1:
                got = "twice" if gpu in known else "which TensorRT for RTX does not know"
                raise ValueError(f"--gpu: got {gpu} {got}, expected each once of {', '.join(map(str, known))}")

    def generations(self, fp8: bool) -> list[tuple[int, ...]]:
        """The named GPUs by generation, or all: GPUs of one row share plans. ValueError for FP8 on a GPU without it."""
        if fp8 and (old := [gpu for gpu in self.gpu if gpu in AMPERE]):
            raise ValueError(f"--gpu: got {old[0]} with FP8, expected one of {', '.join(map(str, ADA_ON))}")
        rows = [ADA_ON] if fp8 else [ADA_ON, AMPERE]
        return [row for all_of in rows if (row := tuple(g for g in all_of if not self.gpu or g in self.gpu))]


def build_plan(
    model: bytes, weights: dict[str, Tensor], options: BuildOptions, package: str = "tensorrt",
    gpus: Sequence[int] = (),
) -> bytes:  # fmt: skip
    """Serialised plan from ONNX bytes and its outside weights, contiguous on the CPU.

    package is tensorrt, whose plan is for the current GPU, or tensorrt_rtx, whose plan is for `gpus`. Raises NotHere
    without the package or, for tensorrt, a GPU; ValueError with the parser's words where it refuses the graph.
    """
    trt = require_tensorrt(package)
    if options.attention.startswith("plugin"):
        major, minor = torch.cuda.get_device_capability()
        register_plugins(10 * major + minor)
    builder = trt.Builder(logger_of(trt))
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if package == "tensorrt":
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    network = builder.create_network(flags)
    _parse(trt, network, model, weights)

    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    if package == "tensorrt":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    else:
        config.num_compute_capabilities = len(gpus)
        for number, gpu in enumerate(gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{gpu}"), number)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if options.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    _read_timings(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"{package}: got a network without a plan, expected one (see TensorRT's messages above)")
    _write_timings(config, options.timing_cache)
    return bytes(plan)


def _parse(trt: Any, network: Any, model: bytes, weights: dict[str, Tensor]) -> None:
    """Parse the graph into the network. The weights are not copied: they must live until the plan is built."""
    parser = trt.OnnxParser(network, logger_of(trt))
    good = parser.load_model_proto(model)
    for name, tensor in weights.items():
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            got = f"{tensor.device.type} {tensor.stride()}"
            raise ValueError(f"tensorrt: {name}: got {got}, expected it contiguous on cpu")
        good = good and parser.load_initializer(name, tensor.data_ptr(), tensor.nbytes)
    if not (good and parser.parse_model_proto()):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        first = f"{errors[0].node_operator()}: {errors[0].desc()}" if errors else "no reason given"
        raise ValueError(f"tensorrt: got a graph that the parser refuses, expected one it reads ({first})")


def _read_timings(config: Any, file: Path | None) -> None:
    """Set the timing cache of a file. A file of something else is refused, because it would be overwritten."""
    if file is None:
        return
    known = file.read_bytes() if file.is_file() else b""
    timings, none = config.create_timing_cache(known), bytes(config.create_timing_cache(b"").serialize())
    # The library takes what it cannot read for an empty cache.
    foreign = timings is None or (known not in (b"", none) and bytes(timings.serialize()) == none)
    if foreign or not config.set_timing_cache(timings, False):
        raise ValueError(f"{file}: got no timing cache of this TensorRT and GPU, expected one, or no file")


def _write_timings(config: Any, file: Path | None) -> None:
    if file is not None:
        with whole_file(file) as part:
            part.write_bytes(bytes(config.get_timing_cache().serialize()))
