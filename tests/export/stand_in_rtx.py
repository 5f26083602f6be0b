"""A stand-in for the package `tensorrt_rtx`: NOT the library, which cannot run a plan without an RTX GPU.

It is tests/support/stand_in_tensorrt.py and what TensorRT for RTX has beside. Every name is asked of the real package.
A context "compiles" one kernel, which a runtime cache keeps.
"""

import enum
import types
from typing import Any

import stand_in_tensorrt as base

compiled: list[str] = []  # plans whose kernels were compiled


class IBuilderConfig(base.IBuilderConfig):
    def __init__(self) -> None:
        super().__init__()
        self._gpus: list[Any] = []

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._gpus)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self._gpus = [None] * count

    def set_compute_capability(self, gpu: Any, index: int) -> bool:
        self._gpus[index] = gpu
        return True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "num_compute_capabilities":  # the base knows TensorRT 11's names alone
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class Builder(base.Builder):
    def create_builder_config(self) -> Any:
        return IBuilderConfig()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        return None if None in config._gpus or not config._gpus else super().build_serialized_network(network, config)


class IRuntimeCache:
    def __init__(self) -> None:
        self.__content = b""

    def serialize(self) -> Any:
        return base.IHostMemory(self.__content)

    def deserialize(self, content: bytes) -> bool:
        if not content.startswith(b"kernels"):
            return False
        self.__content = content
        return True

    def _hold(self, plan: str) -> bool:
        """Whether the kernels of a plan are new here."""
        new = f" {plan}".encode() not in self.__content
        self.__content += (b"" if self.__content else b"kernels") + (f" {plan}".encode() if new else b"")
        return new


class IRuntimeConfig:
    cuda_graph_strategy: Any = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class ICudaEngine(base.ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, config: IRuntimeConfig) -> Any:
        assert config.cuda_graph_strategy is not None
        plan = str(len(self._model.graph.node))
        if config._cache._hold(plan):
            compiled.append(plan)
        return base.IExecutionContext(self)


class Runtime(base.Runtime):
    def deserialize_cuda_engine(self, content: bytes) -> Any:
        opened = super().deserialize_cuda_engine(content)
        return opened and ICudaEngine(opened._model)


def module(real: types.ModuleType) -> types.ModuleType:
    """The module to put into sys.modules as `tensorrt_rtx`; `real` is the package itself, whose names are asked."""
    made = types.ModuleType("tensorrt_rtx", __doc__)
    made.__version__ = real.__version__
    made.ComputeCapability, made.CudaGraphStrategy = real.ComputeCapability, real.CudaGraphStrategy
    for name, value in {**vars(base), **globals()}.items():
        if name in base.NAMES or getattr(value, "__module__", "") == __name__:
            theirs = getattr(real, name, None)
            checked = theirs and isinstance(value, type) and not issubclass(value, enum.Enum)
            for attribute in vars(value) if checked else ():
                assert attribute.startswith("_") or hasattr(theirs, attribute), (name, attribute)
            setattr(made, name, value)
    for name, members in base.RTX_MEMBERS.items():
        assert all(hasattr(getattr(real, name), member) for member in members), name
    return made
