"""GELU (tanh form) of the feed-forward's inner activation, straight to e4m3 with one scale per token.

This is the quantiser of kernels/quantize.py with GELU between load and maximum. Without quantisation GELU already is
a single pass of the library, so there is no kernel for it.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantize import quantize_rows, quantize_rows_reference, quantize_rows_triton
from kernels.table import Variant, register


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, in x's dtype."""
    return F.gelu(x, approximate="tanh")


def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> e4m3 [M, K], float32 scale [M, 1] with gelu(x) about e4m3 * scale.

    Raises ValueError where x is empty or not floating point.
    """
    return quantize_rows("gelu_quantize", x)


def _variants() -> Iterator[Variant]:
    x = torch.empty(1, 1560, 8960, dtype=torch.bfloat16, device="meta")
    yield Variant("8960", partial(quantize_rows_triton, x, gelu=True))


register(
    "gelu_quantize",
    reference=partial(quantize_rows_reference, gelu=True),
    triton=partial(quantize_rows_triton, gelu=True),
    variants=_variants,
)
