"""Causal convolutions by the kernels against float64."""

import copy

import pytest
import torch
from closeness import assert_as_good

from engine.model.vae_layers import CausalConv3d, Past, fits_cudnn_badly
from kernels.causal_convolution import (
    Tiles,
    causal_convolution,
    causal_convolution_reference,
    causal_convolution_triton,
    has_fast_kernel,
    pack,
)
from kernels.table import use

HALF = [torch.bfloat16, torch.float16]


def inputs(device, channels, outputs, frames, height=5, width=7, batch=1, dtype=torch.bfloat16):
    torch.manual_seed(0)
    x = torch.randn((frames + 2) * batch, channels, height, width)
    x = x.to(device, dtype, memory_format=torch.channels_last)
    weight = (torch.randn(outputs, channels, 3, 3, 3) / (27 * channels) ** 0.5).to(device, dtype)
    return x, weight, torch.randn(outputs).to(device, dtype)


def assert_right(found, x, weight, bias, batch=1):
    exact = causal_convolution_reference(*(t if t is None else t.double() for t in (x, weight, bias)), batch)
    assert found.dtype == x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_as_good(found, causal_convolution_reference(x, weight, bias, batch), exact)


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize(("channels", "outputs"), [(32, 33), (64, 16), (96, 3), (32, 1), (96, 96)])
def test_against_float64(device, channels, outputs, frames):
    x, weight, bias = inputs(device, channels, outputs, frames)
    assert_right(causal_convolution(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [(1, 1), (1, 64), (2, 65), (12, 98)])
@pytest.mark.parametrize("outputs", [3, 40])
def test_images_that_tiles_do_not_divide(device, dtype, size, outputs):
    x, weight, _ = inputs(device, 32, outputs, 2, *size, dtype=dtype)
    assert_right(causal_convolution(x, weight), x, weight, None)


@pytest.mark.parametrize("outputs", [3, 96])
def test_several_videos_and_a_packed_weight(device, outputs):
    x, weight, bias = inputs(device, 32, outputs, 2, batch=3)
    found = causal_convolution(x, weight, bias, 3, pack(weight))
    assert_right(found, x, weight, bias, 3)
    for b in range(3):
        alone = x[b::3].contiguous(memory_format=torch.channels_last)
        assert torch.equal(found[b::3], causal_convolution(alone, weight, bias))


@pytest.mark.parametrize(
    "tiles", [Tiles(), Tiles(columns=128, warps=8), Tiles(frames=2), Tiles(taps=3, stages=3)], ids=str
)
@pytest.mark.parametrize("outputs", [2, 96])
def test_tiles(device, tiles, outputs):
    x, weight, bias = inputs(device, 64, outputs, 4, 3, 70)
    assert_right(causal_convolution_triton(x, weight, bias, tiles=tiles), x, weight, bias)


@pytest.mark.parametrize("outputs", [3, 96])
def test_every_tap_is_where_it_belongs(device, outputs):
    """A single one in the images copies the weight, mirrored, around it; at a corner what lies outside is cut off."""
    for at in ((2, 2, 3), (1, 0, 0), (0, 4, 6), (3, 0, 6)):
        x, weight, _ = inputs(device, 32, outputs, 2)
        x.zero_()[at[0], 5, at[1], at[2]] = 1
        found = causal_convolution(x, weight)
        assert torch.equal(found, causal_convolution_reference(x, weight))
        assert found.count_nonzero() > 0


def test_what_lies_before_and_behind_the_images_is_not_read(device):
    """Around the images in memory there are NaN; a piece of a row reaches beyond both ends."""
    whole, weight, _ = inputs(device, 32, 96, 3)
    whole[0] = whole[-1] = float("nan")
    found = causal_convolution(whole[1:-1], weight)
    assert_right(found, whole[1:-1], weight, None)
    x, weight, _ = inputs(device, 32, 3, 2)
    x[:, :, :, 0] = float("nan")  # seen by the first two columns, and not by the last ones of the row before
    assert causal_convolution(x, weight)[:, :, :, 2:].isfinite().all()


def test_the_reference_takes_what_the_kernel_does_not(device):
    for channels, outputs, dtype in ((16, 8, torch.bfloat16), (32, 128, torch.bfloat16), (32, 8, torch.float32)):
        x, weight, bias = inputs(device, channels, outputs, 1, dtype=dtype)
        assert torch.equal(causal_convolution(x, weight, bias), causal_convolution_reference(x, weight, bias))


def test_a_gradient_takes_the_reference(device):
    x, weight, bias = inputs(device, 32, 8, 1)
    for tensor in (x, weight, bias):
        with torch.enable_grad():
            tensor.requires_grad_()
            assert causal_convolution(x, weight, bias).requires_grad
            tensor.requires_grad_(False)


def test_where_the_kernel_is_fast(device):
    assert has_fast_kernel(torch.device("meta"))
    with use("reference"):
        assert not has_fast_kernel(device)


@pytest.mark.parametrize(("outputs", "late"), [(3, False), (96, True)])
@torch.no_grad()
def test_the_vaes_layer_takes_it_after_the_first_frame(device, outputs, late, monkeypatch):
    torch.manual_seed(0)
    layer = CausalConv3d(32, outputs, 3).to(device, torch.bfloat16)
    layer.late_bias = late
    wide = copy.deepcopy(layer).double()
    layer.fuse()
    x, _, _ = inputs(device, 32, outputs, 2, batch=2)
    taken = []

    def spy(*args):
        taken.append(args)
        return causal_convolution(*args)

    monkeypatch.setattr("engine.model.vae_layers.causal_convolution", spy)
    for past in (Past(2, ()), Past(2, None)):  # later, and a video's first frame
        found = layer(x, past)
        with use("reference"):
            assert_as_good(found, layer(x, past), wide(x.double(), past))
    assert len(taken) == 1


def test_which_convolutions_of_the_vae_take_it():
    def weight(outputs, channels, *kernel, dtype=torch.bfloat16):
        return torch.empty(outputs, channels, *kernel, dtype=dtype, device="meta")

    wanted = [weight(96, 96, 3, 3, 3), weight(3, 96, 3, 3, 3)]
    others = [weight(192, 192, 3, 3, 3), weight(96, 192, 3, 3, 3), weight(96, 96, 3, 1, 1), weight(96, 3, 3, 3, 3)]
    others += [weight(64, 64, 3, 3, 3), weight(96, 96, 3, 3, 3, dtype=torch.float32)]
    assert all(map(fits_cudnn_badly, wanted))
    assert not any(map(fits_cudnn_badly, others))


def test_bad_input(device):
    x, weight, bias = inputs(device, 32, 8, 2)
    for call in (
        lambda: causal_convolution(x[0], weight),
        lambda: causal_convolution(x[:2], weight),
        lambda: causal_convolution(x, weight, batch=3),
        lambda: causal_convolution(x, weight, batch=0),
        lambda: causal_convolution(x[:, :16], weight),
        lambda: causal_convolution(x, weight[:, :, :1]),
        lambda: causal_convolution(x, weight[:, :, -1]),
        lambda: causal_convolution(x, weight.float()),
        lambda: causal_convolution(x, weight, bias[1:]),
        lambda: causal_convolution(x, weight, bias.float()),
        lambda: causal_convolution(x[:, :, :0], weight),
        lambda: causal_convolution(x, weight, packed=pack(weight).float()),
        lambda: causal_convolution(x, weight, packed=pack(weight)[1:]),
        lambda: causal_convolution(x.contiguous(), weight),
    ):
        with pytest.raises(ValueError, match=r"^causal_convolution: got .*expected"):
            call()
