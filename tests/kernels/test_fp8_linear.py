"""The FP8 linear layer against float64, and against PyTorch's own row-wise scaled product."""

import pytest
import torch
from closeness import assert_as_good

from kernels import table
from kernels.fp8_linear import Tiles, fp8_linear, fp8_linear_reference, fp8_linear_tiles
from kernels.quantize import quantize_per_channel, quantize_per_token

SMALL = Tiles(32, 32, 32, 2, 4)


def inputs(device, rows, columns, depth, bias=True):
    torch.manual_seed(0)
    x = torch.randn(rows, depth) * torch.logspace(-1, 1, rows)[:, None]
    weight = torch.randn(columns, depth) / depth**0.5
    with table.use("reference"):
        operands = *quantize_per_token(x), *quantize_per_channel(weight)
    operands = tuple(t.to(device) for t in operands)
    return operands, torch.randn(columns).bfloat16().to(device) if bias else None


def truth_of(x, x_scale, weight, weight_scale, bias):
    out = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).T
    return out if bias is None else out + bias.double()


# (tiles, programs a round): 4 tiles with 3, the last one in 3 parts of K; 12 with 10, 2 in 3 parts (not evenly); 4 with
# 4, none left over; 4 with 100, all in as many parts as K has steps; 2 with 7, both in 3 parts of a long K.
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "programs"),
    [(37, 48, 160, 3), (100, 96, 112, 10), (64, 64, 64, 4), (37, 48, 48, 100), (33, 16, 2064, 7)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_tiles_against_float64(device, rows, columns, depth, programs, bias):
    operands, bias = inputs(device, rows, columns, depth, bias)
    plain = fp8_linear_reference(*operands, bias, torch.bfloat16)
    found = fp8_linear_tiles(*operands, bias, torch.bfloat16, SMALL, programs)
    assert found.dtype == torch.bfloat16
    # The multipliers may keep as few as 13 bits of each product.
    assert_as_good(found, plain, truth_of(*operands, bias), floor=2.0**-11 if device.type == "cuda" else 1e-6)
    again = fp8_linear_tiles(*operands, bias, torch.bfloat16, SMALL, programs)
    assert torch.equal(found, again)


def test_chosen_and_reference_against_pytorch(device):
    operands, bias = inputs(device, 37, 48, 160)
    x, x_scale, weight, weight_scale = operands
    library = torch._scaled_mm(x, weight.T, x_scale, weight_scale.T, bias, out_dtype=torch.bfloat16)
    truth = truth_of(*operands, bias)
    for setting in ("reference", "triton"):
        with table.use(setting):
            assert_as_good(fp8_linear(*operands, bias), library, truth, floor=2.0**-11 if x.is_cuda else 1e-6)


def test_nan_of_a_row_stays_in_it(device):
    (x, x_scale, weight, weight_scale), bias = inputs(device, 37, 48, 160)
    expected = fp8_linear(x, x_scale, weight, weight_scale, bias)
    x_scale[3] = float("nan")
    found = fp8_linear(x, x_scale, weight, weight_scale, bias)
    assert found[3].isnan().all()
    found[3] = expected[3]
    assert torch.equal(found, expected)


def test_bad_input(device):
    (x, x_scale, weight, weight_scale), bias = inputs(device, 37, 48, 160)
    for call in (
        lambda: fp8_linear(x.float(), x_scale, weight, weight_scale),
        lambda: fp8_linear(x[:, :144].contiguous(), x_scale, weight, weight_scale),
        lambda: fp8_linear(x[:, :150].contiguous(), x_scale, weight[:, :150].contiguous(), weight_scale),
        lambda: fp8_linear(x, x_scale[1:], weight, weight_scale),
        lambda: fp8_linear(x, x_scale, weight, weight_scale.double()),
        lambda: fp8_linear(x, x_scale, weight, weight_scale, bias.float()),
        lambda: fp8_linear(x, x_scale, weight[:47], weight_scale[:47]),
        lambda: fp8_linear(x[:, :144], x_scale, weight[:, :144], weight_scale),
    ):
        with pytest.raises(ValueError, match=r"^fp8_linear: got .*expected"):
            call()


@pytest.mark.parametrize(("refused", "chosen"), [(0, "library"), (1, "exact"), (2, "tiles")])
def test_a_library_without_the_product_gives_way(monkeypatch, refused, chosen):
    """Row-wise products are missing with fast accumulation, or at all, on some GPUs."""
    from kernels import fp8_linear as module

    asked = []

    def scaled_mm(*_, fast):
        asked.append(fast)
        if len(asked) <= refused:
            raise RuntimeError("rowwise scaling is only supported on ...")

    monkeypatch.setattr(module, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(module, "fp8_linear_tiles", lambda *_: None)
    x, weight = torch.empty(1, 8960), torch.empty(1536, 8960)
    product = module.first_that_runs(x, None, weight, None, None, torch.bfloat16)
    assert {"library": module.fp8_linear_library, "tiles": module.fp8_linear_tiles}.get(chosen, product) is product
    assert asked == [True, False][: min(refused + 1, 2)]
    if chosen == "exact":
        assert product.keywords == {"fast": False}
