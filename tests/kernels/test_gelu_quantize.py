"""Quantisers of rows, with and without GELU, against float64 and against the rounding bound of e4m3."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_good

from kernels import table
from kernels.gelu_quantize import gelu, gelu_quantize
from kernels.quantize import quantize_per_channel, quantize_per_token

OPS = {
    quantize_per_token: lambda x: x,
    quantize_per_channel: lambda x: x,
    gelu_quantize: lambda x: F.gelu(x, approximate="tanh"),
}


def dequantised(pair):
    quantized, scale = pair
    assert quantized.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == (quantized.shape[0], 1)
    return quantized.double() * scale.double()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [37, 96, 128, 1536])
def test_against_float64(device, op, dtype, size):
    torch.manual_seed(0)
    x = (torch.randn(9, size) * torch.logspace(-3, 2, 9)[:, None]).to(device, dtype)
    truth = OPS[op](x.double())
    with table.use("reference"):
        plain = op(x)
    quantized, scale = op(x)
    assert_as_good(dequantised((quantized, scale)), dequantised(plain), truth)
    if dtype == torch.float32:  # nothing is rounded before the last step: only ties may fall elsewhere
        assert (quantized.float() != plain[0].float()).float().mean() < 0.001
    # Half a unit of three bits, or half of the smallest subnormal: a property of e4m3, whoever converts.
    bound = (truth.abs() * 2.0**-4).maximum(scale.double() * 2.0**-10)
    assert ((dequantised((quantized, scale)) - truth).abs() <= bound * (1 + 1e-3)).all()
    assert quantized.float().abs().amax(1).eq(448).all()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_zeros_and_nan_stay(device, op):
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).to(device)
    expected, _ = op(x)
    x[1] = 0
    x[2, 5] = x[2, 150] = float("nan")
    quantized, scale = op(x)
    assert torch.equal(quantized[0].float(), expected[0].float())
    assert not quantized[1].float().any()
    assert scale[1] > 0
    assert quantized[2].float().isnan()[[5, 150]].all()


def test_leading_dimensions_become_rows(device):
    x = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(0)).to(device)
    quantized, scale = gelu_quantize(x)
    assert quantized.shape == (24, 64)
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    again, scale_again = gelu_quantize(strided)
    assert torch.equal(quantized.float(), again.float())
    assert torch.equal(scale, scale_again)


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    expected = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    assert (gelu(x) - expected).abs().max() < 1e-14


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_bad_input(device, op):
    for x in (torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match=rf"^{op.__name__}: got .*expected"):
            op(x.to(device))
