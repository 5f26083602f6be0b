"""What kernels written in Gluon for Hopper (sm_90) share: its names, stand-ins where Triton lacks them, and a check.

Gluon is Triton's lower level: layouts, barriers, copies, asynchronous products and who does what are explicit.
"""

from types import SimpleNamespace

import torch

from kernels import launch

OLDEST = 3, 6  # Triton; with no earlier one were these kernels compiled

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )

    # Triton 3.9 has the first names, 3.6 the second ones.
    copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
    constant = gl.constexpr
    HAVE_GLUON = tuple(map(int, launch.triton.__version__.split(".")[:2])) >= OLDEST
except ImportError:  # no Triton, or one before Gluon: modules still import, and other kernels run
    gluon = SimpleNamespace(jit=lambda made=None, **_: made or (lambda f: f), constexpr_function=lambda f: f)
    gl, HAVE_GLUON = SimpleNamespace(constexpr=object), False
    fence_async_shared = mbarrier = tma = copy_in = copy_out = None
    warpgroup_mma = warpgroup_mma_init = warpgroup_mma_wait = None

    def constant(value):
        return value


__all__ = [
    "constant", "copy_in", "copy_out", "fence_async_shared", "gl", "gluon", "mbarrier", "runs_on", "tma",
    "warpgroup_mma", "warpgroup_mma_init", "warpgroup_mma_wait",
]  # fmt: skip


def runs_on(device: torch.device) -> bool:
    """Whether the device has Hopper's instructions; of the meta device, whether it stands for one that has."""
    if not HAVE_GLUON or device.type == "cpu":
        return False
    return launch.compile_target == 90 if device.type == "meta" else torch.cuda.get_device_capability(device) == (9, 0)
