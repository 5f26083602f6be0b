"""A stand-in for the package `tensorrt` with its published names: NOT TensorRT, and no proof that TensorRT works.

It refuses every name that the API lacks. Its "plans" are the ONNX files. Its "engines" run them in ONNX Runtime
(through the function bodies of TRT_* operators) on the bound addresses. So it exercises our builder and runtime code:
names, marshalling, binding, aliases, refitting.
"""

import ctypes
import enum
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto

API = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_api.json").read_text())
NAMES: dict[str, dict[str, Any]] = API["names"]
MAGIC = b"stand-in plan\n"
# What TensorRT for RTX has beside; tests/export/stand_in_rtx.py asks that package for each name.
RTX_MEMBERS = {"IBuilderConfig": {"num_compute_capabilities", "set_compute_capability"}}
_TYPES = {
    TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "FP8", TensorProto.INT64: "INT64", TensorProto.INT32: "INT32",
}  # fmt: skip
_RAW = {TensorProto.FLOAT: "f4", TensorProto.FLOAT16: "f2", TensorProto.INT64: "i8", TensorProto.FLOAT8E4M3FN: "u1"}


class _Published:
    """Base class that allows only public attributes of the published API."""

    def __init_subclass__(cls) -> None:
        known = set(NAMES[cls.__name__]["members"]) | RTX_MEMBERS.get(cls.__name__, set())
        unknown = {name for name in vars(cls) if not name.startswith("_")} - known
        assert not unknown, (cls.__name__, unknown)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in NAMES[type(self).__name__]["members"]:
            raise AttributeError(f"tensorrt.{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, value)


def _enumeration(name: str) -> Any:
    return enum.IntEnum(name, NAMES[name]["members"], start=0)


BuilderFlag, DataType, TensorIOMode = (_enumeration(n) for n in ("BuilderFlag", "DataType", "TensorIOMode"))
PreviewFeature, HardwareCompatibilityLevel = (
    _enumeration(name) for name in ("PreviewFeature", "HardwareCompatibilityLevel")
)
NetworkDefinitionCreationFlag = _enumeration("NetworkDefinitionCreationFlag")


class ILogger:
    pass


class IHostMemory(_Published):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content


class INetworkDefinition(_Published):
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self._model: ModelProto | None = None
        self._outside: dict[str, bytes] = {}


class IBuilderConfig(_Published):
    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._previews: set[Any] = set()

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        (self._previews.add if enable else self._previews.discard)(feature)


class ParserError(_Published):
    def node_operator(self) -> str:
        return "Unheard"

    def desc(self) -> str:
        return "no importer"


def _plugin_of(node: onnx.NodeProto) -> str | None:
    """Name of the registered plugin that a node calls; None for other nodes."""
    asked = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    name = f"{asked.get('plugin_namespace', b'').decode()}::{node.op_type}"
    return name if name in PLUGINS and asked.get("aot") == 1 else None


class OnnxParser(_Published):
    """Refuses unknown operators (not of ONNX, TensorRT or a plugin) and external initializers that were not loaded."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self.num_errors = network, 0

    def load_model_proto(self, model: bytes, path: str | None = None) -> bool:
        self._network._model = onnx.load_from_string(model)
        return True

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        self._network._outside[name] = ctypes.string_at(data, size)
        return True

    def parse_model_proto(self) -> bool:
        model = self._network._model
        assert model is not None
        external = {t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
        odd = [node for node in model.graph.node if node.domain not in ("", "trt") and _plugin_of(node) is None]
        self.num_errors = int(bool(odd) or external != self._network._outside.keys())
        return not self.num_errors

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class Builder(_Published):
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        """Build a plan of a strongly typed network; None for others. Includes the weights unless STRIP_PLAN is set."""
        if not network.flags >> NetworkDefinitionCreationFlag.STRONGLY_TYPED & 1 or BuilderFlag.TF32 in config._flags:
            return None
        model = ModelProto()
        model.CopyFrom(network._model)
        if BuilderFlag.STRIP_PLAN not in config._flags:
            _fill(model, network._outside)
        return IHostMemory(MAGIC + model.SerializeToString())


def _fill(model: ModelProto, values: dict[str, bytes]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = values[tensor.name]


class Weights(_Published):
    def __init__(self, dtype: Any, data: int, count: int) -> None:
        self.dtype, self.size = dtype, count
        width = {"FLOAT": 4, "INT64": 8, "HALF": 2, "BF16": 2, "FP8": 1}[dtype.name]
        self._content = ctypes.string_at(data, count * width)


class IExecutionContext(_Published):
    def __init__(self, engine: "ICudaEngine") -> None:
        self._engine = engine
        self._addresses: dict[str, int] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine._tensors and address % 4 == 0

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        if self._addresses.keys() != engine._tensors.keys():
            return False
        for output, given in engine._aliases.items():
            assert self._addresses[output] == self._addresses[given], output

        binding, results = engine._session().io_binding(), {}
        for name, value in engine._tensors.items():
            kind, shape = value.type.tensor_type.elem_type, engine.get_tensor_shape(name)
            raw = np.dtype(_RAW[kind])
            size = int(np.prod(shape)) * raw.itemsize
            memory = np.frombuffer((ctypes.c_char * size).from_address(self._addresses[name]), raw).reshape(shape)
            if engine.get_tensor_mode(name) == TensorIOMode.INPUT:
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy_with_onnx_type(memory, kind))
            else:
                results[name] = memory, np.empty(shape, raw)
                made = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(results[name][1], kind)
                binding.bind_ortvalue_output(name, made)
        engine._session().run_with_iobinding(binding)
        for memory, made in results.values():
            memory[...] = made
        return True


class ICudaEngine(_Published):
    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._tensors = {value.name: value for value in (*model.graph.input, *model.graph.output)}
        self.num_io_tensors = len(self._tensors)
        writers = ("TRT_KVCacheUpdate", "write_keys_fp8", "write_values_fp8")
        updates = [node for node in model.graph.node if node.op_type in writers]
        self._aliases = {node.output[0]: node.input[0] for node in updates}
        self._opened: ort.InferenceSession | None = None

    def _session(self) -> ort.InferenceSession:
        if self._opened is None:
            options = ort.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            self._opened = ort.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        return self._opened

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        inputs = {value.name for value in self._model.graph.input}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim.dim_value for dim in self._tensors[name].type.tensor_type.shape.dim)

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[_TYPES[self._tensors[name].type.tensor_type.elem_type]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._aliases.get(name)

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class Refitter(_Published):
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self._engine = engine
        self._given: dict[str, bytes] = {}

    def get_missing_weights(self) -> list[str]:
        tensors = self._engine._model.graph.initializer
        return [t.name for t in tensors if t.data_location == TensorProto.EXTERNAL and t.name not in self._given]

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        tensor = next(t for t in self._engine._model.graph.initializer if t.name == name)
        self._given[name] = weights._content
        return weights.size == int(np.prod(tensor.dims)) and weights.dtype.name == _TYPES[tensor.data_type]

    def refit_cuda_engine(self) -> bool:
        missing = self.get_missing_weights()
        _fill(self._engine._model, self._given)
        return not missing


class Runtime(_Published):
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> ICudaEngine | None:
        if not content.startswith(MAGIC):
            return None
        return ICudaEngine(onnx.load_from_string(content[len(MAGIC) :]))


# Below is tensorrt.plugin, after NVIDIA/TensorRT (python/packaging/bindings_wheel/tensorrt/plugin).
PLUGIN_NAMES = {"register", "aot_impl", "from_shape_expr", "cdiv", "TensorDesc", "KernelLaunchParams", "SymIntExprs"}
PLUGINS: dict[str, dict[str, Any]] = {}


class ShapeExpr:
    def __init__(self, value: int) -> None:
        self.value = value

    def constant_value(self) -> int:
        return self.value

    def __mul__(self, other: "int | ShapeExpr") -> "ShapeExpr":
        return ShapeExpr(self.value * (other.value if isinstance(other, ShapeExpr) else other))

    __rmul__ = None  # as in the real class


class TensorDesc:
    def __init__(self, shape: tuple[Any, ...], dtype: Any) -> None:
        self.shape_expr = [x if isinstance(x, ShapeExpr) else ShapeExpr(x) for x in shape]
        self.dtype, self.alias = dtype, None

    def like(self) -> "TensorDesc":
        return TensorDesc(tuple(self.shape_expr), self.dtype)

    def aliased(self) -> "TensorDesc":
        made = self.like()
        made.alias = self
        return made


def from_shape_expr(shape: tuple[Any, ...], dtype: Any) -> TensorDesc:
    return TensorDesc(shape, dtype)


def cdiv(numerator: ShapeExpr, denominator: int) -> ShapeExpr:
    return ShapeExpr(-(-numerator.value // denominator))


class KernelLaunchParams(_Published):
    pass


class SymIntExprs:
    @classmethod
    def from_tuple(cls, values: list[Any]) -> list[Any]:
        return list(values)


def register(name: str) -> Any:
    """Register a plugin. Its annotations tell tensors from numbers, and give the number of outputs."""

    def decorate(describe: Any) -> Any:
        kinds = dict(describe.__annotations__)
        results = kinds.pop("return").__args__
        assert name not in PLUGINS
        assert set(kinds.values()) <= {TensorDesc, int}
        assert set(results) == {TensorDesc}
        PLUGINS[name] = {
            "describe": describe,
            "inputs": list(kinds.values()).count(TensorDesc),
            "outputs": len(results),
        }
        return describe

    return decorate


def aot_impl(name: str) -> Any:
    def decorate(implement: Any) -> Any:
        PLUGINS[name]["implement"] = implement
        return implement

    return decorate


def plugin_module() -> types.ModuleType:
    """The module to put into sys.modules as `tensorrt.plugin`."""
    made = types.ModuleType("tensorrt.plugin", __doc__)
    for name in PLUGIN_NAMES:
        setattr(made, name, globals()[name])
    return made


def module() -> types.ModuleType:
    """The module to put into sys.modules as `tensorrt`. It has only published names."""
    made = types.ModuleType("tensorrt", __doc__)
    made.float32, made.int32 = DataType.FLOAT, DataType.INT32
    made.plugin = plugin_module()
    made.__version__ = API["tensorrt"]
    for name, value in globals().items():
        if name in NAMES:
            setattr(made, name, value)
    return made
