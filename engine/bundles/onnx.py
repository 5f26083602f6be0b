"""The onnx backend: the graphs of a bundle in ONNX Runtime sessions.

The engine's RingCache memory is bound as input and as output of the same call, so a step copies no cache.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.bundles.external_data import check_external_data
from engine.bundles.manifest import GraphSpec
from engine.bundles.stages import DTYPES, GraphStages, NotHere, check_inputs

_ORT_TYPES = {"float32": "float", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64"}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}
_RAW = {torch.bfloat16: (torch.uint16, 16), torch.float8_e4m3fn: (torch.uint8, 17)}  # TensorProto.DataType
_ONNX_FLOAT8E4M3FN = 17  # TensorProto.FLOAT8E4M3FN
_CPU = torch.device("cpu")


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "onnx backend: got no package onnxruntime, expected pip install 'greedy-stream[onnx]'"
        ) from None
    return onnxruntime


def _value(ort: Any, tensor: Tensor) -> Any:
    if tensor.dtype == torch.float8_e4m3fn:  # numpy has no such type: pass bytes and their ONNX type
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint8).numpy(), _ONNX_FLOAT8E4M3FN)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


class OnnxGraph:
    """One session. It checks inputs against the manifest; an output is a new tensor or the input that it replaces."""

    def __init__(self, name: str, file: Path, spec: GraphSpec, weights: Mapping[str, Tensor], threads: int) -> None:
        ort = _runtime()
        if any(tensor.dtype == "bfloat16" for tensor in (*spec.inputs, *spec.outputs)):
            raise NotHere(f"onnx: {name}: got bfloat16, expected float32 or float16: "
                          "ONNX Runtime has no bfloat16 kernels for processors")  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Every session has its own threads. Without this they would spin while another session or process works.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # ONNX Runtime's fusions of quantised products handle only integers and break graphs with FP8 Q/DQ.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        # Processors without VNNI would add up pairs of int8 products in 16 bits, which overflow.
        options.add_session_config_entry("session.x64quantprecision", "1")
        content = file.read_bytes()
        check_external_data(file, content, weights)
        outside = [_ort_value(ort, value) for value in weights.values()]
        if outside:
            options.add_external_initializers(list(weights), outside)
        try:
            self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ValueError(f"{file}: got a graph that does not load, expected ONNX ({str(error)[:200]})") from None
        self._kept = outside  # the session reads this memory
        self.name, self.spec = name, spec
        # Bound memory has the manifest's shapes. With a wrong manifest the runtime could read or write past it.
        for specs, found in ((spec.inputs, self.session.get_inputs()), (spec.outputs, self.session.get_outputs())):
            told = {t.name: (t.shape, f"tensor({_ORT_TYPES[t.dtype]})") for t in specs}
            real = {t.name: (list(t.shape), t.type) for t in found}
            for key in sorted(told.keys() | real.keys()):
                if told.get(key) != real.get(key):
                    raise ValueError(f"{file}: {key}: got {told.get(key)} in the manifest, expected {real.get(key)}")

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the session; an output with an alias overwrites that input."""
        check_inputs(self.name, self.spec.inputs, inputs, _CPU)
        binding = self.session.io_binding()
        kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
        for name, tensor in kept.items():
            binding.bind_input(name, "cpu", 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        outputs: dict[str, Tensor] = {}
        for spec in self.spec.outputs:
            alias = self.spec.aliases.get(spec.name)
            tensor = inputs[alias] if alias else torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
            outputs[spec.name] = tensor
            binding.bind_output(spec.name, "cpu", 0, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        self.session.run_with_iobinding(binding)
        return outputs


def _ort_value(ort: Any, tensor: Tensor) -> Any:
    """An OrtValue on the tensor's own memory. Types that numpy lacks are named by their ONNX number."""
    if tensor.dtype not in _RAW:
        return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    raw, number = _RAW[tensor.dtype]
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(raw).numpy(), number)


class OnnxStages(GraphStages):
    """Stages of a bundle's onnx backend."""

    name = "onnx"
    packs = True

    def open_graph(self, name: str, file: Path, spec: GraphSpec) -> OnnxGraph:
        return OnnxGraph(name, file, spec, self.weights.of(name, spec), self.threads)
