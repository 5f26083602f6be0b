"""A linear layer and GELU (tanh form): on a GPU one product of cuBLASLt, whose epilogue applies bias and GELU.

This saves GELU's own pass over the feed-forward's inner activation: 56 MB at 1560 x 8960 in bf16. The activation is
then computed before anything is rounded. PyTorch's private call computes the exact form (erf) on a processor, so the
reference runs there. Both implementations are the library's, so the operation is not in the table.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import autocasts, described, needs_gradient


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> gelu(x W^T + b) [..., N], rounded in between."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_gelu_library(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Like linear_gelu_reference, but rounded once; on a GPU only."""
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True)
    return out.unflatten(0, x.shape[:-1])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b): x [..., M, K], weight [N, K], bias [N] of one dtype -> [..., M, N].

    Raises ValueError where shapes or dtypes do not fit.
    """
    if autocasts(x):
        return linear_gelu_reference(x, weight, bias)
    fits = x.ndim > 1 and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and bias.shape == weight.shape[:1]
    if not fits or not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"linear_gelu: got {described(x=x, weight=weight, bias=bias)}, expected x [..., M, K], "
                         "weight [N, K], bias [N], one dtype")  # fmt: skip
    # In float32 the library's epilogue would round its factors to TF32.
    fused = x.device.type == "cuda" and x.dtype != torch.float32 and not needs_gradient(x, weight, bias)
    return (linear_gelu_library if fused else linear_gelu_reference)(x, weight, bias)
