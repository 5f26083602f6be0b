"""Limits of tests: time, which only a hang reaches (a shorter one would fail on a busy machine), and memory."""

import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HANG = 3600  # seconds
# First lines of a script that uses modules without torch. The package itself would import it, which takes ten times as
# long as the rest.
BARE = f"""
import sys, types
sys.modules["engine"] = types.ModuleType("engine")
sys.modules["engine"].__path__ = [{str(Path(__file__).parents[2] / "engine")!r}]
"""


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations make, at their peak."""

    def __init__(self, module, before=()):
        """before: tensors that are there already"""
        super().__init__()
        self.live = self.peak = 0
        self._seen = {t.untyped_storage()._cdata: 0 for t in (*module.parameters(), *module.buffers(), *before)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._drop, storage._cdata)
        return out

    def _drop(self, key):
        self.live -= self._seen.pop(key)
