"""One step of the flow-matching samplers: to the clean latent and back to the next noise level, in one pass.

Without noise it is Euler's step x + (sigma' - sigma) flow, which gives the clean latent at sigma' = 0. With noise it
adds fresh noise to the clean latent, up to sigma'. Arithmetic is float64 on every device. A latent is small (100k
numbers at 832x480), so the step is one short launch either way, and the result does not depend on the device.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import described, needs_gradient
from kernels.launch import launch, tl, triton
from kernels.table import Variant, implementation, register

Level = float | Tensor  # a sigma: a number, or a float32 scalar on the device that a CUDA graph reads at replay
_BLOCK = 1024


def solver_step_reference(x: Tensor, flow: Tensor, sigma: Level, sigma_next: Level, noise: Tensor | None) -> Tensor:
    """x, flow, noise of one shape -> the next x; the clean latent is rounded to x's dtype before it is noised."""
    if noise is None:
        return (x.double() + (_double(sigma_next) - _double(sigma)) * flow.double()).to(x.dtype)
    clean = (x.double() - _double(sigma) * flow.double()).to(x.dtype)
    level = torch.as_tensor(sigma_next, dtype=torch.float32, device=x.device)
    return ((1 - level) * clean.float() + level * noise.float()).to(x.dtype)


def _double(level: Level) -> Level:
    return level.double() if isinstance(level, Tensor) else level


@triton.jit
def _number(level, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        level = tl.load(level)
    return tl.full([], level, tl.float32)


@triton.jit(do_not_specialize=["sigma", "sigma_next", "size"])
def _solver_step(
    X, FLOW, NOISE, OUT, sigma, sigma_next, size,
    SIGMA_ON_DEVICE: tl.constexpr, NEXT_ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, flow, noise [size]; noise is None for Euler's step."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    now, level = _number(sigma, SIGMA_ON_DEVICE), _number(sigma_next, NEXT_ON_DEVICE)
    x = tl.load(X + at, mask=inside, other=0.0)
    flow = tl.load(FLOW + at, mask=inside, other=0.0).to(tl.float64)
    wide = x.to(tl.float64)
    if NOISE is None:
        out = (wide + (level.to(tl.float64) - now.to(tl.float64)) * flow).to(tl.float32)
    else:
        noise = tl.load(NOISE + at, mask=inside, other=0.0).to(tl.float32)
        clean = (wide - now.to(tl.float64) * flow).to(tl.float32).to(x.dtype).to(tl.float32)
        out = (1.0 - level) * clean + level * noise
    tl.store(OUT + at, out.to(x.dtype), mask=inside)


def solver_step_triton(x: Tensor, flow: Tensor, sigma: Level, sigma_next: Level, noise: Tensor | None) -> Tensor:
    """Like solver_step_reference; levels passed as Python floats are rounded to float32."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _solver_step, (-(-x.numel() // _BLOCK),),
        x.contiguous(), flow.contiguous(), None if noise is None else noise.contiguous(), out, sigma, sigma_next,
        x.numel(), isinstance(sigma, Tensor), isinstance(sigma_next, Tensor), _BLOCK,
    )  # fmt: skip
    return out


def solver_step(x: Tensor, flow: Tensor, sigma: Level, sigma_next: Level, noise: Tensor | None = None) -> Tensor:
    """From x at noise level sigma to sigma_next: Euler's step, or with noise the clean latent plus fresh noise.

    x, flow (noise - x) and noise of one shape; levels are numbers in [0, 1] or float32 scalars on the device.
    Returns the next x, in x's dtype. Raises ValueError where shapes do not fit.
    """
    if x.shape != flow.shape or (noise is not None and noise.shape != x.shape):
        raise ValueError(f"solver_step: got {described(x=x, flow=flow, noise=noise)}, expected one shape")
    for level in (sigma, sigma_next):
        if isinstance(level, Tensor) and level.numel() != 1:
            raise ValueError(f"solver_step: got {described(sigma=level)}, expected a scalar")
    fits = not needs_gradient(x, flow)
    return implementation("solver_step", x.device, fits=fits)(x, flow, sigma, sigma_next, noise)


def _variants() -> Iterator[Variant]:
    make = partial(torch.empty, device="meta")
    x, level = make(1, 16, 1, 60, 104), make(())
    yield Variant("euler", partial(solver_step_triton, x, x.bfloat16(), level, level, None))
    yield Variant("renoise", partial(solver_step_triton, x, x.bfloat16(), level, level, x))


register("solver_step", reference=solver_step_reference, triton=solver_step_triton, variants=_variants)
