"""RMSNorm with a weight against float64, and bit for bit against the engine's formula."""

import pytest
import torch
from closeness import assert_as_good

from engine.model.layers import rms_unit
from kernels import table
from kernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 96), (2, 5, 128), (1, 7, 1536)])
def test_against_float64_and_the_engine(device, dtype, shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).to(device, dtype)
    weight = (1 + torch.randn(shape[-1]) / 4).to(device, dtype)
    plain = rms_norm_reference(x, weight, 1e-6)
    assert_as_good(rms_norm(x, weight), plain, rms_norm_reference(x.double(), weight.double(), 1e-6))
    expected = rms_unit(x) * weight
    with table.use("reference"):
        assert torch.equal(rms_norm(x, weight), expected)
    if dtype == torch.bfloat16:  # the order of a sum may move its last bit, and with it a rounding
        assert (rms_norm(x, weight) != expected).float().mean() < 0.01


def test_bad_input(device):
    x = torch.zeros(3, 32, device=device)
    for weight in (x[0, 1:], x[:, 0], x[0].double()):
        with pytest.raises(ValueError, match=r"^rms_norm: got .*expected"):
            rms_norm(x, weight)
