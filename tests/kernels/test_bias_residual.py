"""h + bias + residual against float64."""

import pytest
import torch
from closeness import assert_as_good

from kernels.bias_residual import bias_residual, bias_residual_reference

DTYPES = [torch.float32, torch.bfloat16]


def inputs(device, dtype, channels, images=3, height=5, width=7):
    torch.manual_seed(0)
    h, residual = (
        torch.randn(images, channels, height, width).to(device, dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )
    return h, torch.randn(channels).to(device, dtype), residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [96, 384, 37, 8192])
@pytest.mark.parametrize("with_residual", [False, True])
def test_against_float64(device, dtype, channels, with_residual):
    h, bias, residual = inputs(device, dtype, channels)
    args = (h, bias, residual) if with_residual else (h, bias)
    found, exact = bias_residual(*args), bias_residual_reference(*(t.double() for t in args))
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_as_good(found, bias_residual_reference(*args), exact)


def test_bad_input(device):
    h, bias, residual = inputs(device, torch.float32, 32)
    for call in (
        lambda: bias_residual(h[0], bias),
        lambda: bias_residual(h, bias[1:]),
        lambda: bias_residual(h, bias.bfloat16()),
        lambda: bias_residual(h, bias, residual[:1]),
        lambda: bias_residual(h, bias, residual.bfloat16()),
        lambda: bias_residual(h[:0], bias),
        lambda: bias_residual(h.contiguous(), bias),
        lambda: bias_residual(h, bias, residual.contiguous()),
    ):
        with pytest.raises(ValueError, match=r"^bias_residual: got .*expected"):
            call()
