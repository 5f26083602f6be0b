"""The backends of bundles. To add one, write its GraphStages here, a row below, and a compiler in export/."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True)
class Backend:
    """One way to run a bundle's graphs.

    module, stages  module and name of its subclass of GraphStages; imported when a bundle of this backend is opened
    extra           extra of this package that installs its requirements; empty if there are none
    writes          how its graphs write caches: "aliases" replace an input by an output, "mutates" overwrites the
                    input, "either" allows both
    made_with       packages whose version a bundle must name
    """

    module: str
    stages: str
    extra: str
    writes: Literal["aliases", "mutates", "either"]
    made_with: tuple[str, ...] = ()

    def load(self) -> Any:
        """The subclass of GraphStages."""
        return getattr(import_module(self.module), self.stages)


BACKENDS: dict[str, Backend] = {
    "onnx": Backend("engine.bundles.onnx", "OnnxStages", extra="onnx", writes="aliases"),
    "aoti": Backend("engine.bundles.aoti", "AotiStages", extra="", writes="mutates", made_with=("torch",)),
    "tensorrt": Backend("engine.bundles.tensorrt", "TensorrtStages", extra="tensorrt", writes="either"),
    "tensorrt_rtx": Backend("engine.bundles.tensorrt_rtx", "TensorrtRtxStages", extra="rtx", writes="either"),
}
