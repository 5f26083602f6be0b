"""LayerNorm with modulation or weights, plain and quantised, against float64 and against the published formulas."""

import pytest
import torch
from closeness import assert_as_good

import kernels.gate_residual
import kernels.norm_modulate
from bench.operations.others import modulate
from kernels import launch, table
from kernels.gate_residual import Residual, gate_residual
from kernels.norm_modulate import (
    layer_norm_affine,
    layer_norm_affine_quantize,
    layer_norm_affine_reference,
    norm_modulate,
    norm_modulate_quantize,
    norm_modulate_reference,
)

DTYPES = [torch.float32, torch.bfloat16]


def inputs(device, dtype, batch=2, frames=2, tokens=5, dim=96):
    """x, and shift and scale as a block has them: two of six slices."""
    torch.manual_seed(0)
    x = torch.randn(batch, frames * tokens, dim) * 2 + 0.5
    modulation = torch.randn(batch, frames, 6, 1, dim) / 2
    x, modulation = x.to(device, dtype), modulation.to(device, dtype)
    return x, modulation[:, :, 3], modulation[:, :, 4]


def double(*tensors):
    return [t.double() for t in tensors]


def dequantised(pair):
    quantized, scale = pair
    assert quantized.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == (quantized.shape[0], 1)
    return quantized.double() * scale.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [96, 128, 1536])
def test_modulate(device, dtype, dim):
    tensors = inputs(device, dtype, dim=dim)
    truth = norm_modulate_reference(*double(*tensors))
    assert_as_good(norm_modulate(*tensors), norm_modulate_reference(*tensors), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_affine(device, dtype):
    x, shift, scale = inputs(device, dtype, tokens=37, frames=1, batch=1)
    weight, bias = scale[0, 0, 0], shift[0, 0, 0]
    truth = layer_norm_affine_reference(*double(x, weight, bias))
    assert_as_good(layer_norm_affine(x, weight, bias), layer_norm_affine_reference(x, weight, bias), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised(device, dtype):
    x, shift, scale = inputs(device, dtype, tokens=5)
    x[0, 1] *= 1000
    truth = norm_modulate_reference(*double(x, shift, scale)).flatten(0, 1)
    with table.use("reference"):
        plain = norm_modulate_quantize(x, shift, scale)
    assert_as_good(dequantised(norm_modulate_quantize(x, shift, scale)), dequantised(plain), truth)

    weight, bias = scale[0, 0, 0], shift[0, 0, 0]
    truth = layer_norm_affine_reference(*double(x, weight, bias)).flatten(0, 1)
    with table.use("reference"):
        plain = layer_norm_affine_quantize(x, weight, bias)
    assert_as_good(dequantised(layer_norm_affine_quantize(x, weight, bias)), dequantised(plain), truth)


def test_one_modulation_for_all_and_any_layout(device):
    x, shift, scale = inputs(device, torch.float32, batch=3)
    one = norm_modulate(x, shift[:1], scale[:1])
    assert torch.equal(one, norm_modulate(x, shift[:1].expand_as(shift), scale[:1].expand_as(scale)))
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)  # as a patch embedding leaves it
    assert torch.equal(norm_modulate(strided, shift[:1], scale[:1]), one)


def test_a_bad_token_stays_alone(device):
    x, shift, scale = inputs(device, torch.bfloat16)
    expected = norm_modulate(x, shift, scale)
    x[0, 3] = float("nan")
    found = norm_modulate(x, shift, scale)
    assert found[0, 3].isnan().all()
    quantized, _ = norm_modulate_quantize(x, shift, scale)
    assert quantized[3].float().isnan().all()
    found[0, 3] = expected[0, 3]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_published_formula(device, dtype):
    x, shift, scale = inputs(device, dtype)
    norm = torch.nn.LayerNorm(x.shape[2], 1e-6, elementwise_affine=False)
    affine = torch.nn.LayerNorm(x.shape[2], 1e-6, device=device, dtype=dtype)
    with table.use("reference"):
        assert torch.equal(norm_modulate(x, shift, scale), modulate(norm(x), shift, scale))
        assert torch.equal(layer_norm_affine(x, affine.weight, affine.bias), affine(x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("op", [norm_modulate, norm_modulate_quantize, layer_norm_affine, layer_norm_affine_quantize])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_up_on_the_way(device, dtype, op, gated):
    """Bit for bit what the sum and the norm give one after the other; the sum is then there."""
    x, shift, scale = inputs(device, dtype, dim=128)
    y, gate = x.flip(1), shift.flip(3) if gated else None
    args = (scale[0, 0, 0], shift[0, 0, 0]) if op in (layer_norm_affine, layer_norm_affine_quantize) else (shift, scale)
    total = x + y if gate is None else gate_residual(x, y, gate)
    expected = op(total, *args)
    pending = Residual(x, y, gate)
    assert len(pending) == len(x)
    found = op(pending, *args)
    both = ((found, expected),) if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
    assert all(torch.equal(a.float(), b.float()) for a, b in both)
    assert pending.added
    assert torch.equal(pending.total(), total)
    again = op(pending, *args)  # from the sum
    assert torch.equal(*(r.float() if isinstance(r, torch.Tensor) else r[0].float() for r in (again, expected)))


def test_one_kernel_adds_and_norms(device, monkeypatch):
    """The sum costs no launch of its own."""
    x, shift, scale = inputs(device, torch.bfloat16)
    launched = []
    real = launch.launch

    def count(kernel, *args, **options):
        launched.append(kernel)
        real(kernel, *args, **options)

    for module in (kernels.norm_modulate, kernels.gate_residual):
        monkeypatch.setattr(module, "launch", count)
    norm_modulate(Residual(x, x, shift), shift, scale)
    assert len(launched) == 1


def test_a_residual_with_gradients_takes_the_reference(device):
    x, shift, scale = inputs(device, torch.float32)
    y = x.flip(1).requires_grad_()
    norm_modulate(Residual(x, y, shift), shift, scale).sum().backward()
    assert y.grad is not None


def test_bad_input(device):
    x, shift, scale = inputs(device, torch.float32)
    for call in (
        lambda: norm_modulate(x[0], shift, scale),
        lambda: norm_modulate(x[:, 1:], shift, scale),
        lambda: norm_modulate(x[..., :-1], shift, scale),
        lambda: norm_modulate(x, shift.bfloat16(), scale),
        lambda: norm_modulate(x, shift[:, :1], scale),
        lambda: norm_modulate_quantize(x, shift.expand(2, 2, 6, -1), scale.expand(2, 2, 6, -1)),
        lambda: layer_norm_affine(x, shift, scale),
        lambda: norm_modulate(Residual(x, x[:, 1:]), shift, scale),
        lambda: norm_modulate(Residual(x, x.bfloat16()), shift, scale),
        lambda: norm_modulate(Residual(x, x, shift[:, :, 0]), shift, scale),
        lambda: layer_norm_affine(x[:, :0], scale[0, 0, 0], shift[0, 0, 0]),
        lambda: norm_modulate(x[:, :0], shift, scale),
        lambda: layer_norm_affine_quantize(x, scale[0, 0, 0], shift[0, 0, 0].double()),
    ):
        with pytest.raises(ValueError, match=r"^\w+: got .*expected"):
            call()
