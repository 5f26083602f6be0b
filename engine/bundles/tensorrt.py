"""The tensorrt backend: the graphs of a bundle as plans of TensorRT 11, on an NVIDIA GPU.

This file is written against TensorRT 11, but we have never run a plan: we had no machine for it. Tests check every name
against the published API, and against TensorRT for RTX itself, and drive this file with a stand-in. As with aoti, such
a bundle is code.
"""

import functools
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bundles.aoti import target_of
from engine.bundles.manifest import BackendSpec, GraphSpec, Manifest
from engine.bundles.stages import DTYPES, GraphStages, NotHere, check_inputs

MAJORS = {"tensorrt": 11, "tensorrt_rtx": 1}  # package -> the version that this is written against
UNREAD = "unread_"  # outputs of these names lead the builder to a better plan; they share memory that is never read
REPLAYS = 8  # CUDA graphs kept per plan, for streams and prompts that take turns
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn", "INT64": "int64"}


def require_tensorrt(package: str = "tensorrt") -> Any:
    """A package of MAJORS in that version. NotHere if it is missing or has another version."""
    expected = f"version {MAJORS[package]}"
    try:
        trt = importlib.import_module(package)
    except ImportError as error:  # also a library that the package needs
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = f"no package {package}" if missing else str(error).splitlines()[0]
        raise NotHere(f"{package}: got {why}, expected {expected}") from None
    if int(trt.__version__.split(".")[0]) != MAJORS[package]:
        raise NotHere(f"{package}: got version {trt.__version__}, expected {MAJORS[package]}")
    return trt


_HARMLESS = "Int64 binding"  # our row numbers and token ids are bound as int64
_SERIOUS = ("INTERNAL_ERROR", "ERROR", "WARNING")


@functools.cache
def logger_of(trt: Any) -> Any:
    """One logger per process, which writes warnings and errors to stderr: the library keeps the first it is given."""

    class Log(trt.ILogger):
        def log(self, severity: Any, message: str) -> None:
            if severity.name in _SERIOUS and _HARMLESS not in message:
                print(f"{trt.__name__}: {severity.name.lower()}: {message.strip()}", file=sys.stderr)

    return Log()


def gpu_target(package: str, device: torch.device) -> str:
    """The target of a GPU alone, such as cuda-sm89. NotHere without one."""
    try:
        return target_of(device)
    except NotHere:
        raise NotHere(f"{package}: got no GPU, expected one that its plans are for") from None


def serves(target: str, here: str) -> bool:
    """Whether plans for a target of one or several GPUs, such as cuda-sm89_sm120, run on the one of `here`."""
    kind, _, gpus = target.partition("-")
    return here.partition("-")[0] == kind and here.partition("-")[2] in gpus.split("_")


def type_of(trt: Any, dtype: str) -> Any:
    """TensorRT's type for a dtype of the manifest."""
    return getattr(trt.DataType, next(theirs for theirs, ours in _TYPES.items() if ours == dtype))


def _stream(device: torch.device) -> int:
    """Handle of torch's current stream."""
    return torch.cuda.current_stream(device).cuda_stream


def _capture(enqueue: Callable[[], None]) -> Callable[[], None]:
    """Record the work that `enqueue` starts, and return a function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    return graph.replay


class TensorrtGraph:
    """One plan. It writes caches in place; passes that write them are replayed as CUDA graphs.

    Caches and text keys keep their addresses between calls, so a recording may hold them. Changing inputs, positions
    and lengths included, are copied into the recording's buffers. Graphs without caches (text, VAE) run rarely and on
    new tensors each time, so they are not recorded.
    """

    def __init__(
        self, name: str, file: Path, spec: GraphSpec, weights: dict[str, Tensor], runtime: Any, device: torch.device,
        trt: Any, new_context: Callable[[Any, bytes], Any] = lambda engine, plan: engine.create_execution_context(),
    ) -> None:  # fmt: skip
        """trt is the package of the plan; new_context makes an execution context of (engine, plan)."""
        self.name, self.spec, self.device, self.trt = name, spec, device, trt
        plan = file.read_bytes()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise NotHere(f"{file}: got a plan that does not load, expected one built by this TensorRT for this GPU")
        unread = self._check(file, engine)
        if weights:
            self._refit(file, engine, weights)
        self.engine = engine
        self.context = new_context(engine, plan)
        self._unread = torch.empty(max(unread.values(), default=0), dtype=torch.uint8, device=device)
        for output in unread:
            self._bind(output, self._unread)
        resident = {*spec.aliases.values(), *(i.name for i in spec.inputs if i.name.startswith("text_"))}
        self.resident = [i.name for i in spec.inputs if i.name in resident] if spec.aliases else []
        self._buffers: dict[str, Tensor] = {}
        self._replays: dict[tuple[int, ...], Callable[[], None]] = {}
        if spec.aliases:
            changing = [i for i in spec.inputs if i.name not in resident]
            results = [o for o in spec.outputs if o.name not in spec.aliases]
            for tensor in (*changing, *results):
                self._buffers[tensor.name] = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=device)
                self._bind(tensor.name, self._buffers[tensor.name])

    def _check(self, file: Path, engine: Any) -> dict[str, int]:
        """Compare the plan with the manifest: with a wrong one the plan could read or write past a buffer.

        Returns the bytes of each output that only the plan has.
        """
        trt = self.trt
        modes = {trt.TensorIOMode.INPUT: "input", trt.TensorIOMode.OUTPUT: "output"}
        real, unread = {}, {}
        for number in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(number)
            size, dtype = math.prod(engine.get_tensor_shape(tensor)), engine.get_tensor_dtype(tensor)
            mode = modes[engine.get_tensor_mode(tensor)]
            if mode == "output" and tensor.startswith(UNREAD):
                unread[tensor] = size * DTYPES[_TYPES[dtype.name]].itemsize
            else:
                real[tensor] = mode, dtype, size
        sides = {"input": self.spec.inputs, "output": self.spec.outputs}
        told = {
            spec.name: (mode, type_of(trt, spec.dtype), math.prod(spec.shape))  # caches have other axes
            for mode, specs in sides.items()
            for spec in specs
        }
        for tensor in sorted(told.keys() | real.keys()):
            got, expected = told.get(tensor), real.get(tensor)
            if got != expected:
                raise ValueError(f"{file}: {tensor}: got {got} in the manifest, expected {expected}")
        for output, replaced in self.spec.aliases.items():
            if (shared := engine.get_aliased_input_tensor(output)) != replaced:
                raise ValueError(f"{file}: {output}: got {replaced!r} at its address, expected {shared!r}")
        return unread

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on torch's current stream; an output with an alias overwrites that input."""
        check_inputs(self.name, self.spec.inputs, inputs, self.device)
        if not self.spec.aliases:
            return self._run_plainly(inputs)
        held = {name: inputs[name] for name in self.resident}
        for name, tensor in held.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{self.name}: {name}: got strides {tensor.stride()}, expected contiguous ones")
        for spec in self.spec.inputs:
            if spec.name in self._buffers:
                self._buffers[spec.name].copy_(inputs[spec.name])
        key = tuple(tensor.data_ptr() for tensor in held.values())
        replay = self._replays.pop(key, None)
        if replay is None:
            self._bind_all(held)
            self._enqueue()  # the first run with new addresses may allocate, so do not record it
            replay = _capture(self._enqueue)
        else:
            replay()
        self._replays[key] = replay  # the newest last
        if len(self._replays) > REPLAYS:
            del self._replays[next(iter(self._replays))]
        return {
            spec.name: held[self.spec.aliases[spec.name]]
            if spec.name in self.spec.aliases
            else self._buffers[spec.name].clone()
            for spec in self.spec.outputs
        }

    def _run_plainly(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dense = {name: tensor.contiguous() for name, tensor in inputs.items()}
        made = {o.name: torch.empty(o.shape, dtype=DTYPES[o.dtype], device=self.device) for o in self.spec.outputs}
        self._bind_all(dense | made)
        self._enqueue()
        return made

    def _bind_all(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._bind(name, tensor)
        for output, replaced in self.spec.aliases.items():
            self._bind(output, tensors[replaced])

    def _bind(self, name: str, tensor: Tensor) -> None:
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise ValueError(f"{self.name}: got an address of {name} that TensorRT refuses, expected another")

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(_stream(self.device)):
            raise RuntimeError(f"{self.name}: TensorRT did not start the plan")

    def _refit(self, file: Path, engine: Any, weights: dict[str, Tensor]) -> None:
        """Load the bundle's weights into a plan that was stored without them."""
        trt = self.trt
        refitter = trt.Refitter(engine, logger_of(trt))
        kept = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        for name in refitter.get_missing_weights():
            if name not in kept:
                raise ValueError(f"{file}: got no weight {name!r} in the manifest, expected what the plan lacks")
            tensor = kept[name]
            dtype = type_of(trt, str(tensor.dtype).removeprefix("torch."))
            if not refitter.set_named_weights(name, trt.Weights(dtype, tensor.data_ptr(), tensor.numel())):
                got = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{file}: {name}: got {got}, expected what the plan lacks")
        if not refitter.refit_cuda_engine():
            raise ValueError(f"{file}: got weights that do not complete the plan, expected those it was built with")


class TensorrtStages(GraphStages):
    """Stages of a bundle's tensorrt backend. Its target names one or several GPUs, as cuda-sm89_sm120."""

    name = "tensorrt"
    executable = True

    def __init__(
        self, folder: Path, manifest: Manifest, backend: BackendSpec, threads: int, device: torch.device,
        **options: Any,
    ) -> None:  # fmt: skip
        self.trt = require_tensorrt(self.name)
        if not serves(backend.target, here := gpu_target(self.name, device)):
            raise NotHere(f"{self.name}: got plans for {backend.target}, expected {here}, which this machine runs")
        if (made := backend.versions.get(self.name)) != self.trt.__version__:
            raise NotHere(f"{self.name}: got plans of version {made}, expected {self.trt.__version__} (export again)")
        self.runtime = self.trt.Runtime(logger_of(self.trt))
        super().__init__(folder, manifest, backend, threads, device, **options)

    def open_graph(self, name: str, file: Path, spec: GraphSpec) -> TensorrtGraph:
        return TensorrtGraph(name, file, spec, self.weights.of(name, spec), self.runtime, self.device, self.trt)
