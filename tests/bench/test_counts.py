"""Launches and bytes counted from shapes: single operations by hand, and what a steady chunk may take."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench.__main__ import main
from bench.gpu.counts import steady_chunk
from bench.gpu.launches import count
from kernels.causal_convolution import causal_convolution, pack
from kernels.gate_residual import Residual
from kernels.launch import HAVE_TRITON
from kernels.norm_modulate import norm_modulate
from kernels.qk_norm_rope_write import qk_norm_rope_write

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_view_is_no_launch_and_a_copy_is_one():
    x = meta(4, 8, 6)
    assert count(lambda: x.transpose(1, 2)[1:].unflatten(2, (2, 4))).total == (0, 0)
    assert count(lambda: x.transpose(1, 2).contiguous()).total == (1, 2 * x.nbytes)
    assert count(lambda: torch.empty_like(x)).total == (0, 0)
    assert count(lambda: x + 1).launches == {"add": 1}


def test_a_convolution_adds_its_bias_in_a_pass_of_its_own():
    x, weight, bias = meta(1, 8, 5, 6), meta(16, 8, 3, 3), meta(16)
    out = 1 * 16 * 5 * 6 * 2
    assert count(lambda: F.conv2d(x, weight, padding=1)).total == (1, x.nbytes + weight.nbytes + out)
    found = count(lambda: F.conv2d(x, weight, bias, padding=1))
    assert found.launches == {"conv2d": 1, "convolution's bias": 1}
    assert found.bytes["convolution's bias"] == 2 * out + bias.nbytes


def test_kernels_count_with_what_they_read_and_write():
    x, shift = meta(1, 20, 64), meta(1, 1, 1, 64)
    assert count(lambda: norm_modulate(x, shift, shift)).total == (1, 2 * x.nbytes + 2 * shift.nbytes)
    found = count(lambda: norm_modulate(Residual(x, x, shift), shift, shift))
    assert found.total == (1, 4 * x.nbytes + 3 * shift.nbytes)  # x, y, the sum, the norm


def test_a_descriptor_counts_as_its_tensor():
    x, weight = meta(3, 5, 70, 32).permute(0, 3, 1, 2), meta(33, 32, 3, 3, 3)
    found = count(lambda: causal_convolution(x, weight, packed=pack(weight)))
    packed = 27 * 32 * 48 * 2  # read by two descriptors, each its own columns
    assert found.launches["_taps"] == 1
    assert found.bytes["_taps"] == x.nbytes + packed + 33 * 5 * 70 * 2


def test_of_a_ring_only_the_rows_that_are_written_count():
    qkv, ring, table = meta(1, 20, 3 * 64), meta(1, 1000, 2, 32), meta(20, 16, dtype=torch.float32)
    found = count(lambda: qk_norm_rope_write(qkv, meta(64), meta(64), table, table, ring, ring, 5))
    scales = 2 * table.nbytes  # arguments that are there and not read: tables stand for FP8's scales
    assert found.total == (1, qkv.nbytes + qkv.nbytes + 2 * 64 * 2 + 2 * table.nbytes + scales)
    first = [meta(1, rows, 1, 32) for rows in (1000, 40)]
    local = first[1], first[1], 5
    both = count(lambda: qk_norm_rope_write(qkv, meta(64), meta(64), table, table, first[0], first[0], 5, 1e-6, local))
    assert both.total == found.total


@pytest.mark.parametrize(("preset", "joined", "parts"), [
    ("greedy", True, {"etm": 1, "sdd+context": 1, "sdd": 3, "vae": 1}),
    ("greedy", False, {"etm": 1, "sdd_context": 1, "sdd": 4, "vae": 1}),
    ("self-forcing", True, {"dit+context": 1, "dit": 3, "vae": 3}),
    ("self-forcing", False, {"dit_context": 1, "dit": 4, "vae": 3}),
    ("diagonal", True, {"dit": 2, "vae": 3}),
])  # fmt: skip
def test_parts_of_a_chunk(preset, joined, parts):
    _, stages = steady_chunk("tiny", preset, joined=joined)
    assert {name: len(calls) for name, calls in stages.parts.items()} == parts


@pytest.mark.slow
def test_a_full_size_chunk_takes_no_more_launches_and_bytes_than_it_did():
    """The limits are what was counted when the passes were folded; before, it was 3,550 launches and 116 GB."""
    _, stages = steady_chunk("wan2.1-1.3b", "greedy")
    totals = {name: [call.total for call in calls] for name, calls in stages.parts.items()}
    launches = {name: sum(n for n, _ in found) for name, found in totals.items()}
    moved = {name: sum(b for _, b in found) / 1e9 for name, found in totals.items()}
    assert launches["vae"] <= 105  # one finds the largest value, which tells whether the frames are finite
    ours = ("convolve_hopper", "_taps", "_add_planes", "_interleave_phases")
    assert [stages.parts["vae"][0].launches[kernel] for kernel in ours] == [6, 1, 1, 3]
    assert moved["vae"] <= 26.9
    assert sum(launches.values()) <= 2599
    assert sum(moved.values()) <= 101.3


def test_the_command(capsys):
    assert main(["counts", "--shape", "tiny", "--preset", "self-forcing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["launches"] == sum(row["launches"] for row in found["rows"]) > 0
    assert all(row["gigabytes"] > 0 and row["teraflop"] > 0 for row in found["rows"])
    assert main(["counts", "--shape", "tiny", "--height", "33"]) == 2
    assert "height: got 33, expected a positive multiple of 16" in capsys.readouterr().err
