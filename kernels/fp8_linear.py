"""A linear layer on e4m3 operands: activations scaled per token, weights per output channel.

The library (`torch._scaled_mm`, row-wise) computes the product where it has one. Else the kernel in this file does. It
is for products whose tiles fill the chip badly: 1560 x 1536 is 156 tiles of 128 x 128, which take 132 multiprocessors
two rounds, the second nearly empty. The kernel does the whole rounds of tiles first. It splits the remaining tiles
along K so that they fill one short round, and a second kernel adds these parts in a fixed order. On an H100 the
library's own tiles are faster still (docs/kernels.md).

Hopper's FP8 multipliers sum with about 14 bits. For K = 8960 that gives an error of 3.1e-3 of the result, beside 2.6e-2
from the rounding of each operand. Sums in float32 would take a quarter longer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.checks import described
from kernels.cuda_library import fp8_linear_cuda
from kernels.launch import launch, multiprocessors, tl, triton
from kernels.table import Variant, implementation, register


@dataclass(frozen=True)
class Tiles:
    """Rows, columns and depth of a tile, loads in flight, warps."""

    m: int = 128
    n: int = 128
    k: int = 128
    stages: int = 4
    warps: int = 8


def fp8_linear_reference(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x [M, K], x_scale [M, 1], weight [N, K], weight_scale [N, 1], bias [N] -> [M, N]; float32 inside."""
    out = (x.float() @ weight.float().T) * x_scale * weight_scale.T
    return (out if bias is None else out + bias).to(out_dtype)


def fp8_linear_library(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Like fp8_linear_reference, by cuBLASLt or CUTLASS. RuntimeError where the library has no such product."""
    return _scaled_mm(x, x_scale, weight, weight_scale, bias, out_dtype, fast=True)


def _scaled_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    *, fast: bool,
) -> Tensor:  # fmt: skip
    return torch._scaled_mm(x, weight.T, x_scale, weight_scale.T, bias, out_dtype=out_dtype, use_fast_accum=fast)


@triton.jit
def _finish(
    acc, X_SCALE, W_SCALE, BIAS, OUT, row, column, rows, N: tl.constexpr
):  # fmt: skip
    """Apply scales and bias to the tile of sums acc at row [m], column [n], and store it to OUT [rows, N]."""
    acc = acc * tl.load(X_SCALE + row, mask=row < rows, other=0.0)[:, None]
    acc = acc * tl.load(W_SCALE + column, mask=column < N, other=0.0)[None, :]
    if BIAS is not None:
        acc += tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (column < N)[None, :]
    tl.store(OUT + row.to(tl.int64)[:, None] * N + column[None, :], acc.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "whole"])
def _multiply(
    X, X_SCALE, W, W_SCALE, BIAS, OUT, PARTS, rows, whole, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Programs below `whole` do one tile each; SPLIT of the later ones share a tile, each a stretch of K.

    X [rows, K], W [N, K] e4m3; OUT [rows, N]; PARTS [programs - whole, BLOCK_M, BLOCK_N] float32.
    """
    program = tl.program_id(0)
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile, begin, end = program, 0, steps
    if program >= whole:
        stretch: tl.constexpr = (steps + SPLIT - 1) // SPLIT
        tile = whole + (program - whole) // SPLIT
        begin = (program - whole) % SPLIT * stretch
        end = tl.minimum(begin + stretch, steps)
    top, left = tile // across * BLOCK_M, tile % across * BLOCK_N
    x_rows = tl.make_tensor_descriptor(X, [rows, K], [K, 1], [BLOCK_M, BLOCK_K])
    w_rows = tl.make_tensor_descriptor(W, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        x = x_rows.load([top, step * BLOCK_K])
        w = w_rows.load([left, step * BLOCK_K])
        acc = tl.dot(x, w.T, acc)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if program < whole:
        _finish(acc, X_SCALE, W_SCALE, BIAS, OUT, top + row, left + column, rows, N)
    else:
        part = PARTS + (program - whole).to(tl.int64) * BLOCK_M * BLOCK_N
        tl.store(part + row[:, None] * BLOCK_N + column[None, :], acc)


@triton.jit(do_not_specialize=["rows", "whole"])
def _add_parts(
    PARTS, X_SCALE, W_SCALE, BIAS, OUT, rows, whole, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program (tile, stripe): adds LANES rows of a tile that SPLIT programs shared."""
    tile = tl.program_id(0)
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(1) * LANES + tl.arange(0, LANES)
    column = tl.arange(0, BLOCK_N)
    acc = tl.zeros([LANES, BLOCK_N], tl.float32)
    for part in tl.static_range(SPLIT):
        at = PARTS + (tile * SPLIT + part).to(tl.int64) * BLOCK_M * BLOCK_N
        acc += tl.load(at + row[:, None] * BLOCK_N + column[None, :])
    tile += whole
    top, left = tile // across * BLOCK_M, tile % across * BLOCK_N
    _finish(acc, X_SCALE, W_SCALE, BIAS, OUT, top + row, left + column, rows, N)


def fp8_linear_tiles(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    tiles: Tiles = Tiles(), programs: int | None = None,
) -> Tensor:  # fmt: skip
    """Like fp8_linear_reference, by the kernels here; `programs` per round, by default one per multiprocessor."""
    (rows, depth), columns = x.shape, weight.shape[0]
    programs = programs or multiprocessors(x.device)
    total = -(-rows // tiles.m) * -(-columns // tiles.n)
    whole = total // programs * programs
    rest = total - whole
    split = min(programs // rest, -(-depth // tiles.k)) if rest else 1
    if split == 1:
        whole, rest = total, 0
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    parts = torch.empty(rest * split, tiles.m, tiles.n, dtype=torch.float32, device=x.device)
    launch(
        _multiply, (whole + rest * split,), x, x_scale, weight, weight_scale, bias, out, parts, rows, whole,
        columns, depth, tiles.m, tiles.n, tiles.k, split, tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    if rest:
        lanes = min(16, tiles.m)
        launch(
            _add_parts, (rest, tiles.m // lanes), parts, x_scale, weight_scale, bias, out, rows, whole,
            columns, tiles.m, tiles.n, split, lanes, num_warps=4,
        )  # fmt: skip
    return out


Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
# (device, N, K, out_dtype) -> the first product that ran there. Some libraries have no row-wise product (on sm_120 for
# example), or none without fast accumulation.
_working: dict[tuple[torch.device, int, int, torch.dtype], Product] = {}


def _chosen(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    if x.device.type != "cuda":  # interpreter or compile gate
        return fp8_linear_tiles(x, x_scale, weight, weight_scale, bias, out_dtype)
    key = x.device, weight.shape[0], weight.shape[1], out_dtype
    if key not in _working:
        _working[key] = first_that_runs(x, x_scale, weight, weight_scale, bias, out_dtype)
    return _working[key](x, x_scale, weight, weight_scale, bias, out_dtype)


def first_that_runs(*args: Any) -> Product:
    """The library's product; with sums in float32 where it has no other; else the kernel here."""
    for product in (fp8_linear_library, partial(_scaled_mm, fast=False)):
        try:
            product(*args)
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # RuntimeErrors, too, but not about the product
            raise
        except (RuntimeError, ValueError):
            continue
        return product
    return fp8_linear_tiles


def fp8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """(x * x_scale) (weight * weight_scale)^T + bias.

    x [M, K] and weight [N, K] e4m3, contiguous, K and N multiples of 16; x_scale [M, 1] and weight_scale [N, 1]
    float32 (see kernels/quantize.py); bias [N] in out_dtype -> [M, N]. On a GPU the library returns bfloat16 only.
    Raises ValueError where shapes, dtypes or strides do not fit.
    """
    e4m3 = torch.float8_e4m3fn
    fits = (
        x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1] and x.dtype == weight.dtype == e4m3
        and x_scale.shape == (x.shape[0], 1) and weight_scale.shape == (weight.shape[0], 1)
        and x_scale.dtype == weight_scale.dtype == torch.float32
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == out_dtype))
    )  # fmt: skip
    if not fits or weight.shape[0] % 16 or weight.shape[1] % 16:
        got = described(x=x, x_scale=x_scale, weight=weight, weight_scale=weight_scale, bias=bias)
        raise ValueError(f"fp8_linear: got {got}, expected e4m3 x [M, K], weight [N, K], float32 scales [M, 1], "
                         f"[N, 1], bias [N] {out_dtype}, K and N multiples of 16")  # fmt: skip
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(f"fp8_linear: got strides {x.stride()}, {weight.stride()}, expected contiguous")
    return implementation("fp8_linear", x.device)(x, x_scale, weight, weight_scale, bias, out_dtype)


def _variants() -> Iterator[Variant]:
    make = partial(torch.empty, device="meta")
    columns, depth = 1536, 8960
    tensors = (
        make(1560, depth, dtype=torch.float8_e4m3fn), make(1560, 1),
        make(columns, depth, dtype=torch.float8_e4m3fn), make(columns, 1), make(columns, dtype=torch.bfloat16),
    )  # fmt: skip
    call = partial(fp8_linear_tiles, *tensors, torch.bfloat16)
    yield Variant(f"1560 x {columns} x {depth}", call, needs=("QGMMA", "UTMALDG"))


register("fp8_linear", reference=fp8_linear_reference, triton=_chosen, cuda=fp8_linear_cuda, variants=_variants)
