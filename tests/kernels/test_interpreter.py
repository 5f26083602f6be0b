"""The mended interpreter against torch: what the other tests of narrow floats stand on."""

import pytest
import torch

from kernels.launch import launch, tl, triton

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run natively")
NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def convert(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, tl.load(X + at).to(Y.dtype.element_ty))


@triton.jit
def arithmetic(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(X + at, tl.where(x > y, x * y - x, -y))


@triton.jit
def reduced(X, OUT, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(X + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(OUT + tl.arange(0, M), tl.sum(x, 1))
    tl.store(OUT + M + tl.arange(0, M), tl.max(x, 1))


@triton.jit
def product(X, Y, OUT, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(OUT + at, tl.dot(tl.load(X + at), tl.load(Y + at)))


def every_value(dtype):
    """All bit patterns of a narrow float; floats around every one of them, and beyond, for float32."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    if dtype == torch.bfloat16:
        return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    near = torch.cat([torch.arange(256, dtype=torch.uint8).view(kind).float() for kind in NARROW[1:]])
    steps = torch.tensor([0.9, 0.96875, 1.0, 1.03125, 1.0625, 1.1])
    return torch.cat([(near[:, None] * steps).flatten(), torch.randn(1024) * torch.logspace(-9, 5, 1024)])


def saturated(x, dtype):
    """torch's conversion; to FP8 as the GPU does it, the largest number for what is too large."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return torch.where(x.isnan(), x, x.float().clamp(-most, most).to(x.dtype)).to(dtype)


@pytest.mark.parametrize("target", [*NARROW, torch.float32])
@pytest.mark.parametrize("source", [*NARROW, torch.float32])
def test_every_conversion(source, target):
    x = every_value(source)
    x = torch.cat([x, x[: 2 ** (len(x) - 1).bit_length() - len(x)]])
    found = torch.zeros(len(x)).to(target)
    launch(convert, (1,), x, found, len(x))
    expected = x if source == target else saturated(x.float(), target)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.float().nan_to_num(), expected.float().nan_to_num())


@pytest.mark.parametrize("dtype", NARROW)
def test_arithmetic_reductions_and_products(dtype):
    torch.manual_seed(0)
    x, y = (torch.randn(256).to(dtype) for _ in range(2))
    wide, other = x.float(), y.float()
    expected = torch.where(wide > other, saturated(wide * other, dtype).float() - wide, -other)
    found = x.clone()
    launch(arithmetic, (1,), found, y, 256)
    assert torch.equal(found.float(), saturated(expected, dtype).float())
    rows = x.view(16, 16)
    both = torch.zeros(2, 16).to(dtype)
    launch(reduced, (1,), rows, both, 16, 16)
    assert torch.equal(both[0].float(), saturated(rows.float().sum(1), dtype).float())
    assert torch.equal(both[1].float(), rows.float().amax(1))
    out = torch.zeros(16, 16)
    launch(product, (1,), rows, y.view(16, 16), out, 16)
    assert (out - rows.float() @ y.view(16, 16).float()).abs().max() < 1e-5
