"""How kernels use Triton: a stand-in where it is not installed, one way to launch, and a count of compiled variants.

Kernels take `triton` and `tl` from here and are started by `launch`. The same call then runs on a GPU, runs in
Triton's interpreter (TRITON_INTERPRET=1), or only compiles (`compiling`), always with the real launch's specialisation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton: modules still import, and the references run
    triton = SimpleNamespace(jit=lambda function=None, **_: function if function else lambda f: f)
    tl = SimpleNamespace(constexpr=object)

HAVE_TRITON = not isinstance(triton, SimpleNamespace)

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a block may have, by compute capability
compile_target = 90  # for which `compiling` compiles meta tensors; kernels/compile.py changes it

_kernels: set[Any] = set()  # every kernel launched so far, for compilations()
_compiled: list[Any] | None = None  # inside compiling(): the compiled kernels, in order
_observer: Callable[[Any, tuple[Any, ...]], None] | None = None  # inside observed(): gets what would be launched


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on `grid` (up to three numbers); options are constexprs, num_warps and num_stages."""
    options.setdefault("enable_fp_fusion", True)  # Triton's default until 3.9, but not later
    if _observer is not None:
        _observer(kernel, args)
        return
    _kernels.add(kernel)
    if _compiled is not None:
        _compiled.append(kernel.warmup(*args, grid=grid, **options))
        return
    triton.set_allocator(_scratch)  # the allocator is per thread; descriptors made on the device live in this memory
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def descriptor(tensor: torch.Tensor, block: list[int]) -> Any:
    """A kernel's argument whose `load` fetches blocks of a tensor by TMA, with zeros beyond the tensor's ends.

    The host writes it at the launch, so a program need not. Its `base` is the tensor.
    """
    return TensorDescriptor.from_tensor(tensor, block)


def compilations() -> int:
    """Kernel variants that this process compiled or fetched from disk; constant once all are warm."""
    caches = (cache for kernel in _kernels for cache in getattr(kernel, "device_caches", {}).values())
    return sum(len(cache[0]) for cache in caches)


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Inside, launches of any thread only compile; yields the list that they fill with compiled kernels."""
    global _compiled
    before, _compiled = _compiled, []
    try:
        yield _compiled
    finally:
        _compiled = before


@contextmanager
def observed(observer: Callable[[Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Inside, launches of any thread run and compile nothing: observer(kernel, its arguments) is called instead."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def warm(*calls: Callable[[], Any]) -> int:
    """Compile what these calls launch without running it; returns the number of new variants.

    A variant depends on dtypes, widths and head counts only, not on token counts, valid_rows or start_row.
    """
    before = compilations()
    with compiling():
        for call in calls:
            call()
    return compilations() - before


def multiprocessors(device: torch.device) -> int:
    """The device's multiprocessors; for the meta device an H100's 132, for the interpreter a few."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 8


def shared_kb(device: torch.device) -> int:
    """Shared memory that a block may have; for the meta device the compile target's, for the interpreter plenty."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return SHARED_KB.get(10 * major + minor, min(SHARED_KB.values()))
    return SHARED_KB[compile_target if device.type == "meta" else 90]


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)
