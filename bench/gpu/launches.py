"""Launches and bytes of a chunk on a GPU, counted from shapes: the fast path runs on meta tensors.

An operation of PyTorch that computes or copies is one launch (a view is none), and so is a Triton kernel. A convolution
with a bias is two: cuDNN adds the bias in a pass of its own. Bytes are those of a launch's inputs and outputs, as
tensors; of a ring that a kernel only writes to, the rows written. What a library moves inside a call is not
counted, nor what the GPU's own caches save.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.model import layers
from kernels.launch import observed
from kernels.linear_gelu import linear_gelu_library
from kernels.table import use

# Kernels that only write rows of the rings they are given: names of the arguments, and what they are as large as.
RINGS = {"_qk_norm_rope_write": ("K", "V"), "_write_v_transposed": ("V",)}
# Operations that PyTorch defines by others, and that a GPU runs as one; the rest of them is looked into.
_WHOLE = {"linear", "conv2d", "conv3d", "scaled_dot_product_attention", "rms_norm", "layer_norm", "upsample_nearest2d"}
_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
}


@dataclass
class Counts:
    """launches and bytes by operation."""

    launches: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, tensors: Iterable[Any], launches: int = 1) -> None:
        moved = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        self.launches[name] = self.launches.get(name, 0) + launches
        self.bytes[name] = self.bytes.get(name, 0.0) + moved

    @property
    def total(self) -> tuple[int, float]:
        """All launches, all bytes."""
        return sum(self.launches.values()), sum(self.bytes.values())


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in _WHOLE:
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        convolves = name in ("conv2d", "conv3d")
        if convolves:  # cuDNN keeps the layout of channels-last inputs, also where the meta device does not
            layout = torch.channels_last_3d if result.ndim == 5 else torch.channels_last
            result = result.contiguous(memory_format=layout)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors) and not func.is_view and name not in _NO_LAUNCH:
            self.counts.add(name, tensors)
            if convolves and len(args) > 2 and args[2] is not None:
                self.counts.add("convolution's bias", (result, result, args[2]))
        return result


@contextmanager
def counted() -> Iterator[Counts]:
    """Inside, tensors on the meta device go through the kernels' wrappers; yields what is launched."""
    counts = Counts()

    def launched(kernel: Any, args: tuple[Any, ...]) -> None:
        names = dict(zip(kernel.arg_names, args, strict=False))
        # Descriptors stand for their tensors; two of one tensor fetch different parts of it.
        described = {id(value.base): value.base for value in names.values() if hasattr(value, "base")}
        written = [names.pop(ring) for ring in RINGS.get(kernel.__name__, ())]
        for ring in ("K_LOCAL", "V_LOCAL"):  # which take a part of the same rows
            names.pop(ring, None)
        # As many rows as the chunk has: a third of the product for each of K and V.
        rows = [names["QKV"].new_empty(names["QKV"].numel() // 3, dtype=ring.dtype) for ring in written]
        counts.add(kernel.__name__, (*names.values(), *described.values(), *rows))

    # The library's epilogue needs a GPU; on the meta device it has a shape as well.
    epilogue = mock.patch.object(layers, "linear_gelu", linear_gelu_library)
    with torch.device("meta"), torch.inference_mode(), use("triton"), observed(launched), epilogue, _Operations(counts):
        yield counts


def count(call: Callable[[], Any]) -> Counts:
    """What one call launches."""
    with counted() as counts:
        call()
    return counts
