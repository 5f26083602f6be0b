"""Triton as the kernels see it: a stand-in where it is not installed, one way to launch, and what was compiled.

Kernels are written `@triton.jit` with both names from here, and started by `launch`, so that the same call runs on a
GPU, in Triton's interpreter (TRITON_INTERPRET=1), or only compiles (`compiling`), with the specialisation of the
real launch site each time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # processors only: modules still import, and the references run
    triton = SimpleNamespace(jit=lambda function=None, **_: function if function else lambda f: f)
    tl = SimpleNamespace(constexpr=object)

HAVE_TRITON = not isinstance(triton, SimpleNamespace)

_kernels: set[Any] = set()  # every kernel launched so far: what compilations() counts
_compiled: list[Any] | None = None  # while compiling: what was compiled, in order


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on `grid` (up to three numbers); options are constexprs and num_warps, num_stages."""
    options["enable_fp_fusion"] = True  # as Triton did by itself until 3.9, and later does not
    _kernels.add(kernel)
    if _compiled is not None:
        _compiled.append(kernel.warmup(*args, grid=grid, **options))
        return
    triton.set_allocator(_scratch)  # by thread; descriptors made on the device live there
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def compilations() -> int:
    """Kernel variants compiled (or fetched from disk) for launches of this process; constant once all are warm."""
    caches = (cache for kernel in _kernels for cache in getattr(kernel, "device_caches", {}).values())
    return sum(len(cache[0]) for cache in caches)


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Launches, of any thread, only compile meanwhile; yields the list that they fill with compiled kernels."""
    global _compiled
    before, _compiled = _compiled, []
    try:
        yield _compiled
    finally:
        _compiled = before


def warm(*calls: Callable[[], Any]) -> int:
    """Compile what these calls launch and run none of it; returns how many variants were not there before.

    A variant depends on dtypes, widths and head counts alone: token counts, valid rows and slots need no other.
    """
    before = compilations()
    with compiling():
        for call in calls:
            call()
    return compilations() - before


def multiprocessors(device: torch.device) -> int:
    """How many run side by side; of the meta device as of an H100, of the interpreter a few."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 8


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)
