"""A linear layer on int8 operands: activations scaled per token, weights per output channel.

The library (`torch._int_mm`) multiplies exactly into int32, on processors and on NVIDIA GPUs. Scales, bias and the last
rounding are PyTorch's operations. There is no kernel of ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import described

INT8_MIN, INT8_MAX = -128, 127  # only a given scale can lead to -128
SMALLEST = 1e-12  # lower bound for max|x| of a row, so that the scale of zeros is not zero
MOST_DEPTH = (2**31 - 1) // (-INT8_MIN * INT8_MAX)  # longest sum that surely fits int32
LEAST_ROWS = 17  # cuBLASLt's limits: more than 16 rows, and multiples of 8 on the other two sides
UNIT = 8


def quantize_int8(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] -> int8 [M, K], float32 scale [M, 1] with x about int8 * scale; rounded to nearest even.

    By default a row's scale is max|x| / 127, and NaN where the row has a NaN. A given scale [] or [M, 1] clamps x.
    """
    rows = x.flatten(0, -2).float()
    if scale is None:
        scale = rows.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST).div_(INT8_MAX)
        return rows.div(scale).round_().to(torch.int8), scale
    scale = scale.float().expand(len(rows), 1)
    return rows.div(scale).round_().clamp_(INT8_MIN, INT8_MAX).to(torch.int8), scale


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed, both int8 -> int32 [M, N], exact. Odd sizes are padded with zeros."""
    (rows, depth), columns = x.shape, len(weight)
    short, deep, wide = max(0, LEAST_ROWS - rows), -depth % UNIT, -columns % UNIT
    if short or deep:
        x = F.pad(x, (0, deep, 0, short))
    if deep or wide:
        weight = F.pad(weight, (0, deep, 0, wide))
    return torch._int_mm(x, weight.T)[:rows, :columns]


def int8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """(x * x_scale) (weight * weight_scale)^T + bias, in float32 after the exact integer product.

    x [M, K] and weight [N, K] int8; x_scale [M, 1] and weight_scale [N, 1] float32; bias [N] -> [M, N] in out_dtype.
    Raises ValueError where shapes or dtypes do not fit, or where K is so large that int32 could overflow.
    """
    fits = (
        x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1] <= MOST_DEPTH
        and x.dtype == weight.dtype == torch.int8
        and x_scale.shape == (x.shape[0], 1) and weight_scale.shape == (weight.shape[0], 1)
        and x_scale.dtype == weight_scale.dtype == torch.float32
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_floating_point()))
    )  # fmt: skip
    if not fits:
        got = described(x=x, x_scale=x_scale, weight=weight, weight_scale=weight_scale, bias=bias)
        raise ValueError(f"int8_linear: got {got}, expected int8 x [M, K], weight [N, K], float32 scales [M, 1], "
                         f"[N, 1], bias [N], K at most {MOST_DEPTH}")  # fmt: skip
    out = int8_product(x, weight).float().mul_(x_scale).mul_(weight_scale.T)
    return (out if bias is None else out.add_(bias)).to(out_dtype)
