"""Rows to e4m3 with one scale per row: activations per token, weights per output channel.

A row x is stored as q = x / scale with scale = max|x| / 448, so that x is about q * scale. A row of zeros gets a tiny
scale and stays zeros; a NaN stays a NaN.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import described, head_and_tail, warps_for
from kernels.launch import launch, tl, triton
from kernels.table import Variant, implementation, register

E4M3_MAX = 448.0
_SMALLEST = 1e-12  # lower bound for max|x| of a row, so that the scale of zeros is not zero


def quantize_rows_reference(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """x [..., K] -> e4m3 [rows, K], float32 scale [rows, 1]; in PyTorch."""
    if gelu:
        x = F.gelu(x, approximate="tanh")
    rows = x.flatten(0, -2).float()
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(_SMALLEST) / E4M3_MAX
    # The conversion does not saturate: it gives NaN above 464.
    return (rows / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


@triton.jit
def row_scale(peak):
    """max|x| of a row -> its scale."""
    return tl.maximum(peak, 1e-12) / 448.0


@triton.jit
def to_e4m3(y, scale):
    """y / scale, clamped to e4m3's range, NaN kept."""
    return tl.clamp(y / scale, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu_tanh(x):
    # 0.5 (1 + tanh u) = sigmoid(2 u): one exponential, and nothing from libdevice
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _load(X, at, SIZE: tl.constexpr, GELU: tl.constexpr):
    y = tl.load(X + at, mask=at < SIZE, other=0.0).to(tl.float32)
    if GELU:
        y = _gelu_tanh(y)
    return y


@triton.jit
def _quantize_rows(
    X, OUT, SCALE,
    SIZE: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """One program per row of X [rows, SIZE]; the row stays in registers between its maximum and its conversion."""
    row = tl.program_id(0).to(tl.int64)
    X += row * SIZE
    OUT += row * SIZE
    first = tl.arange(0, HEAD)
    y = _load(X, first, SIZE, GELU)
    peak = tl.max(tl.abs(y), 0)
    if TAIL > 0:
        rest = HEAD + tl.arange(0, TAIL)
        z = _load(X, rest, SIZE, GELU)
        peak = tl.maximum(peak, tl.max(tl.abs(z), 0))
    scale = row_scale(peak)
    tl.store(SCALE + row, scale)
    tl.store(OUT + first, to_e4m3(y, scale).to(tl.float8e4nv))
    if TAIL > 0:
        tl.store(OUT + rest, to_e4m3(z, scale).to(tl.float8e4nv), mask=rest < SIZE)


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised results for x [..., K]: e4m3 [rows, K] and float32 scale [rows, 1]."""
    out = torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=torch.float8_e4m3fn, device=x.device)
    return out, torch.empty(out.shape[0], 1, dtype=torch.float32, device=x.device)


def quantize_rows_triton(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Like quantize_rows_reference, but rounded once."""
    out, scale = empty_rows(x)
    rows, size = out.shape
    head, tail = head_and_tail(size)
    launch(_quantize_rows, (rows,), x.contiguous(), out, scale, size, head, tail, gelu, num_warps=warps_for(head))
    return out, scale


def quantize_rows(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Check x, then run operation `name`."""
    if x.ndim < 2 or not x.is_floating_point() or not x.numel():
        raise ValueError(f"{name}: got {described(x=x)}, expected floating point [..., M, K], not empty")
    return implementation(name, x.device)(x)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations x [..., K] -> e4m3 [M, K], float32 scale [M, 1] with x about e4m3 * scale."""
    return quantize_rows("quantize_per_token", x)


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A linear's weight [N, K] -> e4m3 [N, K], float32 scale [N, 1] with weight about e4m3 * scale."""
    return quantize_rows("quantize_per_channel", weight)


def _variants() -> Iterator[Variant]:
    for size in (1536, 8960):
        x = torch.empty(1560, size, dtype=torch.bfloat16, device="meta")
        yield Variant(str(size), partial(quantize_rows_triton, x))


register("quantize_per_token", reference=quantize_rows_reference, triton=quantize_rows_triton, variants=_variants)
register("quantize_per_channel", reference=quantize_rows_reference, triton=quantize_rows_triton)
