"""The tensorrt_rtx backend: plans of TensorRT for RTX, for GeForce and RTX cards (docs/tensorrt.md).

A plan holds no machine code: the library compiles its kernels when an execution context is made. They are kept in a
file, so that later starts read them. We never ran a plan, for want of such a GPU.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.bundles.manifest import GraphSpec
from engine.bundles.tensorrt import TensorrtGraph, TensorrtStages
from engine.files import whole_file

_ENDS = 1 << 20  # bytes of a plan's beginning and end that name its kernels


def cache_folder() -> Path | None:
    """Where programs keep what they can make again: $GREEDY_CACHE, else greedy-stream in $XDG_CACHE_HOME or ~/.cache.

    None if there is no such place, or if GREEDY_CACHE is empty.
    """
    if (own := os.environ.get("GREEDY_CACHE")) is not None:
        return Path(own) if own else None
    home = os.environ.get("HOME")
    for folder in (os.environ.get("XDG_CACHE_HOME"), home and f"{home}/.cache"):
        if folder and folder.startswith("/"):
            return Path(folder) / "greedy-stream"
    return None


class KernelCache:
    """The kernels of one plan. A file that is damaged, or of another GPU or version, is ignored and written anew."""

    def __init__(self, trt: Any, plan: bytes) -> None:
        self.trt, folder = trt, cache_folder()
        ends = hashlib.sha256(plan[:_ENDS] + plan[-_ENDS:]).hexdigest()  # plans are gigabytes
        self.file = folder and folder / "tensorrt_rtx" / f"{ends[:32]}-{len(plan)}.kernels"
        self._content = b""

    def new_context(self, engine: Any) -> Any:
        """An execution context; compiles what the file lacks, and keeps it."""
        config = engine.create_runtime_config()
        # The engine records its own CUDA graphs, and static shapes leave nothing to compile later.
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED
        cache = config.create_runtime_cache()
        if self.file is not None and self.file.is_file():
            stored = b"" if self.file.is_symlink() else self.file.read_bytes()
            if stored and cache.deserialize(stored):
                self._content = stored
            else:
                self._say("got kernels of another GPU or version, or damaged ones, so they are compiled again")
        config.set_runtime_cache(cache)
        context = engine.create_execution_context(config)
        self._cache = cache
        return context

    def save(self) -> None:
        """Write the file if there is something new. A place that cannot be written is no error, and is said."""
        if self.file is None:
            return
        made = bytes(self._cache.serialize())
        if made and made != self._content:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.parent.chmod(0o700)  # kernels are code
                if self.file.is_symlink():
                    self.file.unlink()
                with whole_file(self.file, private=True) as part:
                    part.write_bytes(made)
            except OSError as error:
                self._say(f"got {error.strerror}, expected a place to keep compiled kernels")
                self.file = None  # said once
            self._content = made

    def _say(self, what: str) -> None:
        print(f"note: {self.file}: {what}", file=sys.stderr)


class TensorrtRtxStages(TensorrtStages):
    """Stages of a bundle's tensorrt_rtx backend."""

    name = "tensorrt_rtx"

    def open_graph(self, name: str, file: Path, spec: GraphSpec) -> TensorrtGraph:
        def new_context(engine: Any, plan: bytes) -> Any:
            kernels = self._not_run.setdefault(name, KernelCache(self.trt, plan))
            context = kernels.new_context(engine)
            kernels.save()
            return context

        weights = self.weights.of(name, spec)
        return TensorrtGraph(name, file, spec, weights, self.runtime, self.device, self.trt, new_context)

    @cached_property
    def _not_run(self) -> dict[str, KernelCache]:
        """Kernels of the graphs that were opened but have not run yet: a first run may compile more."""
        return {}

    def run_graph(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = super().run_graph(name, inputs)
        if name in self._not_run:
            self._not_run.pop(name).save()
        return made
