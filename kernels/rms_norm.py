"""RMSNorm with a weight over the full width, for cross-attention's queries: one pass instead of five.

The result is rounded to the working dtype before and after the weight, as published; float32 inside.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import autocasts, described, needs_gradient, power_of_two, warps_for
from kernels.launch import launch, tl, triton
from kernels.table import Variant, implementation, register


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., dim], weight [dim] -> the same shape."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@triton.jit
def _rms_norm(X, WEIGHT, OUT, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: X [rows, DIM]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    x = tl.load(X + row * DIM + at, mask=inside, other=0.0)
    weight = tl.load(WEIGHT + at, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / DIM + eps)).to(x.dtype).to(tl.float32)
    tl.store(OUT + row * DIM + at, (normed * weight).to(x.dtype), mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like rms_norm_reference, rounding included."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dim = x.shape[-1]
    block = power_of_two(dim)
    launch(_rms_norm, (x.numel() // dim,), x.contiguous(), weight, out, eps, dim, block, num_warps=warps_for(block))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * weight over the last dimension: x [..., dim], weight [dim] -> x's shape and dtype.

    Raises ValueError where shapes or dtypes do not fit.
    """
    if autocasts(x):
        return rms_norm_reference(x, weight, eps)
    if not x.numel() or weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"rms_norm: got {described(x=x, weight=weight)}, expected x [..., dim] and weight [dim], "
                         "one dtype")  # fmt: skip
    return implementation("rms_norm", x.device, fits=not needs_gradient(x, weight))(x, weight, eps)


def _variants() -> Iterator[Variant]:
    make = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    yield Variant("1536", partial(rms_norm_triton, make(1, 1560, 1536), make(1536), 1e-6))


register("rms_norm", reference=rms_norm_reference, triton=rms_norm_triton, variants=_variants)
