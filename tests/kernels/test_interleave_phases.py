"""Four phases in their places, plus the bias, against float64."""

import pytest
import torch
from closeness import assert_as_good

from kernels.interleave_phases import interleave_phases, interleave_phases_reference


def inputs(device, dtype, channels, images=2, height=5, width=7):
    torch.manual_seed(0)
    y = torch.randn(images, 4 * channels, height + 1, width + 1)
    return y.to(device, dtype, memory_format=torch.channels_last), torch.randn(channels).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [96, 192, 37, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_against_float64(device, dtype, channels, with_bias):
    y, bias = inputs(device, dtype, channels)
    args = (y, bias) if with_bias else (y,)
    found, exact = interleave_phases(*args), interleave_phases_reference(*(t.double() for t in args))
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_as_good(found, interleave_phases_reference(*args), exact)


@pytest.mark.parametrize("call", [interleave_phases, interleave_phases_reference])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (30, 2)])
def test_every_output_is_the_phase_and_window_it_should_be(device, call, height, width):
    whole, _ = inputs(device, torch.float32, 3, 3, height, width)
    y = whole[1:]  # a view: its memory starts elsewhere
    found = call(y)
    for i in range(2 * height):
        for j in range(2 * width):
            phase = 2 * (i % 2) + j % 2
            assert torch.equal(found[:, :, i, j], y[:, 3 * phase : 3 * phase + 3, (i + 1) // 2, (j + 1) // 2])


def test_bad_input(device):
    y, bias = inputs(device, torch.float32, 8)
    for call in (
        lambda: interleave_phases(y[0], bias),
        lambda: interleave_phases(y[:, 1:], bias),
        lambda: interleave_phases(y[:, :, :1], bias),
        lambda: interleave_phases(y[:0], bias),
        lambda: interleave_phases(y, bias[1:]),
        lambda: interleave_phases(y, bias[:, None]),
        lambda: interleave_phases(y, bias.bfloat16()),
        lambda: interleave_phases(y.contiguous(), bias),
    ):
        with pytest.raises(ValueError, match=r"^interleave_phases: got .*expected"):
            call()
