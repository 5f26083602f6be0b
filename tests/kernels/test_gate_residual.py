"""x + gate * y against float64, and bit for bit against the published formula."""

import pytest
import torch
from closeness import assert_as_good

from bench.operations.others import gate
from kernels import table
from kernels.gate_residual import gate_residual, gate_residual_reference


def inputs(device, dtype, batch=2, frames=2, tokens=5, dim=96):
    torch.manual_seed(0)
    x, y = torch.randn(2, batch, frames * tokens, dim)
    by = torch.randn(batch, frames, 6, 1, dim)
    return x.to(device, dtype), y.to(device, dtype), by.to(device, dtype)[:, :, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [96, 128, 1536])
def test_against_float64(device, dtype, dim):
    tensors = inputs(device, dtype, dim=dim)
    truth = gate_residual_reference(*(t.double() for t in tensors))
    assert_as_good(gate_residual(*tensors), gate_residual_reference(*tensors), truth)


def test_rounds_as_the_published_formula(device):
    x, y, by = inputs(device, torch.bfloat16, tokens=37, frames=1)
    expected = x + gate(y, by)
    assert torch.equal(gate_residual(x, y, by), expected)
    with table.use("reference"):
        assert torch.equal(gate_residual(x, y, by), expected)


def test_one_gate_for_all_and_any_layout(device):
    x, y, by = inputs(device, torch.bfloat16)
    expected = x + gate(y, by[:1])
    assert torch.equal(gate_residual(x, y, by[:1]), expected)
    strided = y.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gate_residual(x, strided, by[:1]), expected)


def test_bad_input(device):
    x, y, by = inputs(device, torch.float32)
    for call in (
        lambda: gate_residual(x, y[:, 1:], by),
        lambda: gate_residual(x[:, :-1], y[:, :-1], by),
        lambda: gate_residual(x, y, by[:, :, 0]),
        lambda: gate_residual(x, y.bfloat16(), by),
        lambda: gate_residual(x[:1], y[:1], by),
    ):
        with pytest.raises(ValueError, match=r"^gate_residual: got .*expected"):
            call()
