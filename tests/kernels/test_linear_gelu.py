"""A linear layer with GELU: the tanh form on every device, to within twice what two steps in the same dtype lose."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_good, error

from kernels.linear_gelu import linear_gelu, linear_gelu_reference


def inputs(device, dtype, shape=(2, 37, 96), columns=160):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(columns, shape[-1]) / shape[-1] ** 0.5, torch.randn(columns)
    return [t.to(device, dtype) for t in (x, weight, bias)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(device, dtype):
    tensors = inputs(device, dtype)
    x, weight, bias = (t.double() for t in tensors)
    inner = x @ weight.T + bias
    truth = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    plain, found = linear_gelu_reference(*tensors), linear_gelu(*tensors)
    assert error(plain, truth) <= 4 * torch.finfo(dtype).eps * float(truth.abs().max())
    assert found.shape == (2, 37, 160)
    # cuBLASLt's tanh may be an approximation of its own.
    assert_as_good(found, plain, truth, floor=1e-3 if found.is_cuda else 1e-6)
    if dtype == torch.float32:
        exact = F.gelu(inner)
        assert (found - truth).abs().mean() < (found - exact).abs().mean() / 2


def test_gradients_go_through(device):
    x, weight, bias = inputs(device, torch.float32)
    x.requires_grad_()
    (found,) = torch.autograd.grad(linear_gelu(x, weight, bias).sum(), x)
    (expected,) = torch.autograd.grad(linear_gelu_reference(x, weight, bias).sum(), x)
    assert torch.equal(found, expected)


def test_bad_input(device):
    x, weight, bias = inputs(device, torch.float32)
    for call in (
        lambda: linear_gelu(x, weight, bias[1:]),
        lambda: linear_gelu(x[..., 1:], weight, bias),
        lambda: linear_gelu(x[0, 0], weight, bias),
        lambda: linear_gelu(x, weight.bfloat16(), bias),
    ):
        with pytest.raises(ValueError, match=r"^linear_gelu: got .*expected"):
            call()


@pytest.mark.parametrize(("dtype", "library"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_float32_keeps_to_the_reference_on_a_gpu(monkeypatch, dtype, library):
    """The library's epilogue rounds float32 factors to TF32. The tensors are fake: no GPU is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels import linear_gelu as module

    asked = []
    monkeypatch.setattr(module, "linear_gelu_library", lambda x, weight, bias: asked.append(dtype))
    with FakeTensorMode():
        x, weight, bias = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((2, 16), (32, 16), (32,)))
        module.linear_gelu(x, weight, bias)
    assert bool(asked) is library
