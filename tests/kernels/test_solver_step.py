"""One solver step against float64, and bit for bit against the engine's solvers."""

import pytest
import torch
from closeness import assert_as_good

from engine.config import Preset
from engine.sampling.schedule import Schedule
from engine.sampling.solvers import Euler, Renoise
from kernels import table
from kernels.solver_step import solver_step

# Noise levels are float32 numbers; the first pair's difference is not.
LEVELS = [(0.9375, 0.10000000149011612), (1.0, 0.5), (0.8333333134651184, 0.0)]


def inputs(device, dtype, flow_dtype):
    torch.manual_seed(0)
    x, flow, noise = torch.randn(3, 2, 4, 1, 9, 37)
    return x.to(device, dtype), flow.to(device, flow_dtype), noise.to(device, dtype)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("flow_dtype", [torch.float32, torch.bfloat16])
def test_against_float64(device, levels, flow_dtype):
    x, flow, noise = inputs(device, torch.float32, flow_dtype)
    sigma, following = levels
    scalars = [torch.tensor(level, device=device) for level in levels]
    clean = x.double() - sigma * flow.double()
    for fresh, truth in (
        (None, x.double() + (following - sigma) * flow.double()),
        (noise, (1 - following) * clean + following * noise.double()),
    ):
        with table.use("reference"):
            plain = solver_step(x, flow, *scalars, fresh)
        assert_as_good(plain, truth.float(), truth)
        found = solver_step(x, flow, sigma, following, fresh)
        assert_as_good(found, plain, truth)
        assert torch.equal(solver_step(x, flow, *scalars, fresh), found)
        if fresh is None:  # float64 up to one rounding
            assert (found != plain).float().mean() < 0.001


def test_narrow_latents(device):
    x, flow, noise = inputs(device, torch.bfloat16, torch.bfloat16)
    for fresh in (None, noise):
        with table.use("reference"):
            expected = solver_step(x, flow, 0.75, 0.25, fresh)
        found = solver_step(x, flow, 0.75, 0.25, fresh)
        assert found.dtype == torch.bfloat16
        assert (found != expected).float().mean() < 0.001  # float32 sums may be one multiply-add


def test_solvers_of_the_engine_take_this_step(device):
    """Bit for bit what they were defined as, on every step of a schedule, with the reference."""
    schedule = Schedule(Preset(family="greedy"))
    for dtype in (torch.float32, torch.bfloat16):
        x, flow, noise = inputs(device, dtype, dtype)
        for t, t_next in schedule.steps(0):
            sigma, following = schedule.sigma(t), schedule.sigma(t_next)
            euler = (x.double() + (following - sigma) * flow.double()).to(dtype)
            renoise = (x.double() - sigma * flow.double()).to(dtype)
            if t_next is not None:
                level = torch.tensor(following, device=device)
                renoise = ((1 - level) * renoise.float() + level * noise.float()).to(dtype)
            with table.use("reference"):
                assert torch.equal(Euler(schedule).step(x, flow, t, t_next, None), euler)
                assert torch.equal(Renoise(schedule).step(x, flow, t, t_next, noise), renoise)


def test_bad_input(device):
    x, flow, noise = inputs(device, torch.float32, torch.float32)
    for call in (
        lambda: solver_step(x, flow[:1], 0.5, 0.25),
        lambda: solver_step(x, flow, 0.5, 0.25, noise[..., 1:]),
        lambda: solver_step(x, flow, torch.zeros(2, device=device), 0.25),
    ):
        with pytest.raises(ValueError, match=r"^solver_step: got .*expected"):
            call()
