"""Rotary tables against diffusers' WanRotaryPosEmbed, and against float64 where its table has ended."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from engine.model.rope import apply_rope, rope_tables


@pytest.mark.parametrize("head_dim", [128, 64, 32, 24, 16, 8])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 2, 3), (5, 4, 2), (3, 1, 7)])
def test_equals_diffusers(head_dim, frames, height, width):
    ours = rope_tables(range(frames), height, width, head_dim)
    theirs = WanRotaryPosEmbed(head_dim, (1, 1, 1), 1024)(torch.zeros(1, 1, frames, height, width))
    for table, reference in zip(ours, theirs, strict=True):
        assert table.shape == (frames * height * width, head_dim // 2)
        # Theirs holds every angle twice, once for each of a pair.
        assert (table - reference[0, :, 0, ::2]).abs().max() < 1e-6
        assert torch.equal(reference[0, :, 0, ::2], reference[0, :, 0, 1::2])


def test_frames_stand_where_they_are_said_to():
    whole = rope_tables(range(20), 2, 3, 16)
    some = rope_tables([17, 3, 3], 2, 3, 16)
    for table, part in zip(whole, some, strict=True):
        frames = table.unflatten(0, (20, 6))
        assert torch.equal(part, frames[[17, 3, 3]].flatten(0, 1))


@pytest.mark.parametrize("position", [1023, 1024, 100_000, 10_000_000])
def test_far_positions_are_float64_math(position):
    head_dim = 128
    cos, sin = rope_tables([position], 1, 1, head_dim)
    for i in range(22):  # 44 of 128 are for time
        angle = position * 10000.0 ** (-2 * i / 44)
        assert cos[0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[0, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
    assert torch.equal(cos[0, 22:], torch.ones(42))  # row 0, column 0
    assert torch.equal(sin[0, 22:], torch.zeros(42))


def test_rotation_is_a_complex_product():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 3, 16)
    cos, sin = rope_tables([4, 5], 2, 3, 16)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())[:, None]).flatten(-2)
    assert (apply_rope(x, cos, sin) - expected).abs().max() < 1e-6
    rounded = apply_rope(x.bfloat16(), cos, sin)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, apply_rope(x.bfloat16().float(), cos, sin).bfloat16())


def test_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64)

    def score(at, other):
        rotated = [apply_rope(x, *rope_tables([p], 1, 1, 64)) for x, p in ((q, at), (k, other))]
        return (rotated[0] * rotated[1]).sum().item()

    assert score(3, 1) == pytest.approx(score(100_003, 100_001), abs=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-2


@pytest.mark.parametrize("head_dim", [7, 0, -2])
def test_odd_head_dim_is_refused(head_dim):
    with pytest.raises(ValueError, match=r"got .*expected"):
        rope_tables([0], 1, 1, head_dim)


def test_tables_do_not_follow_the_default_device():
    """They are kept between calls: what one caller makes on another device would reach all later ones."""
    with torch.device("meta"):
        found = rope_tables([3, 4], 5, 7, 24)
    assert all(table.device.type == "cpu" for table in found)
    assert all(map(torch.equal, found, rope_tables([3, 4], 5, 7, 24)))
