"""Products in int8: the integers exactly, the whole against float64 and PyTorch's own quantised tensors."""

import pytest
import torch
from tiny import randomize, transformer
from torch import nn

from engine.model.quantized import FORMATS, Int8Linear, quantized
from kernels.int8_linear import MOST_DEPTH, int8_linear, int8_product, quantize_int8

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "text_dim": 24}
# rows, columns, depth: all fit cuBLASLt; one row; 16 rows, which is one too few there; odd columns; odd depth; all odd
SIZES = [(32, 48, 64), (1, 8, 16), (16, 24, 8), (20, 13, 32), (40, 16, 37), (5, 7, 3)]


def operands(rows, columns, depth):
    torch.manual_seed(rows)
    return (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((rows, depth), (columns, depth)))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_product_is_exact(sizes):
    x, weight = operands(*sizes)
    found = int8_product(x, weight)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), x.long() @ weight.long().T)


def test_the_largest_sums_fit():
    """Of the longest depth that is allowed, all factors the largest."""
    x = torch.full((1, MOST_DEPTH), -128, dtype=torch.int8)
    weight = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, MOST_DEPTH).contiguous()
    found = int8_product(x, weight)
    assert found.tolist() == [[-MOST_DEPTH * 128 * 127, MOST_DEPTH * 128 * 127]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_gpu_gets_sizes_that_its_library_takes(monkeypatch, sizes):
    """The library's own checks for CUDA, on a processor."""
    library = torch._int_mm

    def strict(x, weight):
        assert x.shape[0] > 16
        assert x.shape[1] % 8 == 0
        assert weight.shape[1] % 8 == 0
        return library(x, weight)

    monkeypatch.setattr(torch, "_int_mm", strict)
    x, weight = operands(*sizes)
    assert torch.equal(int8_product(x, weight).long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_rounded_as_pytorch_rounds(dtype):
    """PyTorch's own fake quantisation with the same scales; ties go to even; the largest of a row is 127."""
    torch.manual_seed(0)
    x = (torch.randn(9, 33) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    x[2], x[3] = 0, torch.arange(33) - 16.5
    values, scale = quantize_int8(x)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (9, 1))
    zeros = torch.zeros(9, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x.float(), scale[:, 0], zeros, 0, -127, 127)
    theirs = (theirs / scale).round()
    # the library multiplies by 1 / scale, so a tie may go the other way
    assert (values - theirs).abs().max() <= 1
    assert (values == theirs).float().mean() > 0.98
    assert values.abs().amax(1).tolist() == [127, 127, 0, *[127] * 6]
    assert ((values * scale - x.float()).abs() <= scale * 0.5001).all()
    ties, one = quantize_int8(torch.tensor([[127.0, 0.5, 1.5, -2.5]]))
    assert (one.item(), ties.tolist()) == (1, [[127, 0, 2, -2]])


def test_a_given_scale_clamps():
    values, scale = quantize_int8(torch.tensor([[1.0, -300.0], [2.0, 300.0]]), torch.tensor(2.0))
    assert values.tolist() == [[0, -128], [1, 127]]
    assert scale.tolist() == [[2], [2]]


def test_a_nan_stays_in_its_row():
    torch.manual_seed(0)
    linear, x = Int8Linear(torch.randn(5, 8), torch.randn(5)), torch.randn(1, 4, 8)
    expected = linear(x)
    x[0, 2, 3] = float("nan")
    found = linear(x)
    assert found[0, 2].isnan().all()
    found[0, 2] = expected[0, 2]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_linear_against_float64(dtype, bias):
    """On the stored numbers: the rounding of the working dtype. On the original ones: the bound of both roundings."""
    torch.manual_seed(1)
    plain = nn.Linear(96, 40, bias=bias).to(dtype)
    x = (torch.randn(2, 7, 96) * torch.logspace(-2, 2, 7)[:, None]).to(dtype)
    linear = Int8Linear(plain.weight, plain.bias)
    values, scales = linear.rounded(x)
    exact = values.double() * scales.double() @ (linear.weight.double() * linear.scale.double()).T
    offset = plain.bias.detach().double() if bias else torch.zeros(40, dtype=torch.float64)
    found = linear(x)
    assert (found.dtype, found.shape) == (dtype, (2, 7, 40))
    # the last rounding, and those of scales and bias in float32
    slack = torch.finfo(dtype).eps * (exact + offset).abs() + 2**-22 * (exact.abs() + offset.abs())
    assert ((found.flatten(0, 1).double() - exact - offset).abs() <= slack).all()
    rows, weight = x.flatten(0, 1).double(), plain.weight.detach().double()
    half, other = scales.double() / 2, linear.scale.double().T / 2
    bound = half * weight.abs().sum(1) + other * rows.abs().sum(1, keepdim=True) + 96 * half * other
    assert ((exact - rows @ weight.T).abs() <= bound * 1.001).all()


def test_tokens_and_channels_have_scales_of_their_own():
    """So a large token, or a large channel, costs the others nothing."""
    torch.manual_seed(2)
    weight, x = torch.randn(6, 32), torch.randn(1, 5, 32)
    expected = Int8Linear(weight, None)(x)
    weight[1] *= 1000
    x[0, 3] *= 1000
    found = Int8Linear(weight, None)(x)
    assert torch.equal(found[:, [0, 1, 2, 4]][..., [0, 2, 3, 4, 5]], expected[:, [0, 1, 2, 4]][..., [0, 2, 3, 4, 5]])


def test_bad_input():
    x, weight = operands(4, 8, 16)
    scale, other, bias = torch.ones(4, 1), torch.ones(8, 1), torch.ones(8)
    long = torch.zeros(1, MOST_DEPTH + 1, dtype=torch.int8)
    for given in (
        (x.float(), scale, weight, other, bias), (x, scale[1:], weight, other, bias), (x, scale, weight, other[1:]),
        (x[:, 1:], scale, weight, other), (x, scale.double(), weight, other), (x, scale, weight, other, bias[1:]),
        (long, scale[:1], long, other[:1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^int8_linear: got .*expected int8"):
            int8_linear(*given)


def model_of(dtype=torch.float32):
    model = randomize(transformer(conditioned=True, **SHAPE), 0).to(dtype)
    model.fuse()
    return model


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ffn.net.2"])
def test_writing_a_weight_is_quantising_it(precision, name):
    """In place; rows of the joint product of q, k and v stay others' rows."""
    dtype = torch.bfloat16 if precision == "fp8" else torch.float32
    model, other = quantized(model_of(dtype), precision, (), "sdd"), model_of(dtype)
    addresses = [buffer.data_ptr() for buffer in model.buffers()]
    torch.manual_seed(3)
    for leaf in ("weight", "bias"):
        path = f"blocks.1.{name}.{leaf}"
        value = torch.randn_like(other.get_parameter(path)).to(dtype)
        model.write(path, value)
        other.write(path, value)
    expected = dict(quantized(other, precision, (), "sdd").named_buffers())
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer.float(), expected[key].float()), key
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses


def test_the_joint_product_is_three():
    model = model_of()
    weights = [getattr(model.blocks[0].attn1, f"to_{part}") for part in "qkv"]
    parts = [Int8Linear(linear.weight, linear.bias) for linear in weights]
    joint = quantized(model, "int8", ("*.ffn.*",), "sdd").blocks[0].attn1.joint
    x = torch.randn(1, 20, 64)
    assert isinstance(joint, Int8Linear)
    torch.testing.assert_close(joint(x), torch.cat([part(x) for part in parts], -1), rtol=0, atol=0)
