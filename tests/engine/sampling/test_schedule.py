"""Timesteps and solvers against the published numbers and diffusers' schedulers."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from engine.config import Preset
from engine.presets import PRESETS
from engine.sampling.schedule import Schedule
from engine.sampling.solvers import make_solver


def schedule(**fields):
    return Schedule(Preset("causal", window=4, **fields))


def timesteps(steps):
    return [t for t, _ in steps]


def test_warped_steps_at_shift_5():
    steps = schedule(steps=((1000, 750, 500, 250),)).steps(0)
    assert timesteps(steps) == pytest.approx([1000, 937.5, 833.3333129882812, 625], abs=1e-9)
    assert [t for _, t in steps] == [*timesteps(steps)[1:], None]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_grid_is_the_shifted_line(shift):
    made = schedule(shift=shift)
    s = 1 - torch.arange(1000, dtype=torch.float64) / 1000
    expected = shift * s / (1 + (shift - 1) * s)
    assert (made.sigmas.double() - expected).abs().max() < 1e-6
    assert torch.equal(made.timesteps, made.sigmas * 1000)


def test_literal_steps_take_the_nearest_sigma_of_the_grid():
    made = schedule(steps=((1000, 933, 733, 357),), warped=False)
    assert timesteps(made.steps(0)) == [1000, 933, 733, 357]
    assert made.sigma(933) == pytest.approx(0.933063, abs=1e-6)
    assert made.sigma(733) == pytest.approx(0.732616, abs=1e-6)
    assert made.sigma(0) == pytest.approx(0.00498008, abs=1e-7)  # t = 0 has no grid point of its own
    assert made.sigma(None) == 0
    assert made.sigma(1000) == 1


def test_chunks_have_their_own_steps_and_the_last_list_is_for_the_rest():
    made = schedule(steps=((1000, 500, 250), (1000, 250), (1000,)))
    assert [len(made.steps(chunk)) for chunk in (0, 1, 2, 3, 1000)] == [3, 2, 1, 1, 1]


@pytest.mark.parametrize(("stop", "left"), [(0, [4, 2]), (1, [1, 1]), (3, [3, 2]), (9, [4, 2])])
def test_stop_after(stop, left):
    made = schedule(steps=((1000, 750, 500, 250), (1000, 500)), stop_after=stop)
    assert [len(made.steps(chunk)) for chunk in (0, 1)] == left
    for chunk in (0, 1):
        assert made.steps(chunk)[-1][1] is None  # the last step left ends at the clean latent


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    preset = PRESETS[name]
    made = Schedule(preset)
    make_solver(preset.solver, made)
    for chunk in range(4):
        steps = timesteps(made.steps(chunk))
        assert steps[0] == 1000
        assert steps == sorted(steps, reverse=True)


def test_published_step_lists():
    counts = {name: [len(Schedule(p).steps(chunk)) for chunk in (0, 1, 2, 9)] for name, p in PRESETS.items()}
    four = [4, 4, 4, 4]
    assert counts == {
        "greedy": four, "self-forcing": four, "self-forcing-framewise": four, "longlive": four,
        "causvid": [3, 3, 3, 3], "ffe-1step": [4, 1, 1, 1], "ffe-2step": [4, 2, 2, 2], "diagonal": [4, 3, 2, 2],
        "causal-forcing": four, "krea-realtime": four,
    }  # fmt: skip
    assert timesteps(Schedule(PRESETS["diagonal"]).steps(5)) == pytest.approx([1000, 357.142857], abs=1e-4)
    assert timesteps(Schedule(PRESETS["krea-realtime"]).steps(3)) == [1000, 937, 833, 625]
    assert timesteps(Schedule(PRESETS["ffe-2step"]).steps(1)) == pytest.approx([1000, 833.33331], abs=1e-4)


def test_x0_is_computed_in_float64():
    torch.manual_seed(0)
    x, flow = torch.randn(2, 1000).bfloat16() * 100, torch.randn(2, 1000).bfloat16() * 100
    made = schedule(steps=((750,),))
    expected = (x.double() - made.sigma(937.5) * flow.double()).bfloat16()
    assert torch.equal(make_solver("renoise", made).step(x, flow, 937.5, None, None), expected)


def test_renoise():
    torch.manual_seed(0)
    made = schedule(steps=((1000, 750, 500),))
    x, flow, fresh = torch.randn(3, 1, 2, 1, 4, 4)
    (t, t_next), *_, (t_last, end) = made.steps(0)
    solver = make_solver("renoise", made)
    x0 = x.double() - made.sigma(t) * flow.double()
    expected = (1 - 0.9375) * x0 + 0.9375 * fresh.double()
    assert (solver.step(x, flow, t, t_next, fresh) - expected).abs().max() < 1e-6
    last = x.double() - made.sigma(t_last) * flow.double()
    assert (solver.step(x, flow, t_last, end, None) - last).abs().max() < 1e-6


def run(name, made, flow_of, x):
    solver = make_solver(name, made)
    for t, t_next in made.steps(0):
        x = solver.step(x, flow_of(x, t), t, t_next, None)
    return x


def flow_of(x, t):
    """A field that bends: a solver of the wrong order ends elsewhere."""
    return torch.sin(3 * x) + t / 1000 * x.flip(-1)


STEPS = [(1000,), (1000, 500), (1000, 750, 500, 250), tuple(range(1000, 0, -50))]


@pytest.mark.parametrize("steps", STEPS, ids=len)
def test_euler_equals_diffusers(steps):
    torch.manual_seed(0)
    made = schedule(steps=(steps,), solver="euler")
    reference = FlowMatchEulerDiscreteScheduler(shift=1.0)
    reference.set_timesteps(sigmas=[made.sigma(t) for t, _ in made.steps(0)])
    x = torch.randn(1, 2, 1, 4, 4)
    expected = x.clone()
    for t in reference.timesteps:
        expected = reference.step(flow_of(expected, float(t)), t, expected, return_dict=False)[0]
    assert (run("euler", made, flow_of, x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("steps", STEPS, ids=len)
def test_unipc_equals_diffusers(steps):
    torch.manual_seed(0)
    made = schedule(steps=(steps,), solver="unipc")
    reference = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    reference.set_timesteps(len(steps))
    used = [min(made.sigma(t), 1 - 1e-6) for t, _ in made.steps(0)]
    reference.sigmas = torch.tensor([*used, 0.0], dtype=torch.float64)
    reference.timesteps = torch.tensor([t for t, _ in made.steps(0)], dtype=torch.float64)
    x = torch.randn(1, 2, 1, 4, 4, dtype=torch.float64)
    expected = x.clone()
    for t in reference.timesteps:
        expected = reference.step(flow_of(expected, float(t)), t, expected, return_dict=False)[0]
    got = run("unipc", made, flow_of, x)
    assert got.isfinite().all()
    assert (got - expected).abs().max() < 1e-6
    if len(steps) > 2:  # two steps are of order 1, where both agree
        assert (got - run("euler", made, flow_of, x)).abs().max() > 1e-3


def test_unipc_starts_over_with_every_chunk():
    made = schedule(solver="unipc")
    x = torch.randn(1, 2, 1, 4, 4)
    assert torch.equal(run("unipc", made, flow_of, x), run("unipc", made, flow_of, x))


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"solver: got 'heun', expected"):
        make_solver("heun", schedule())
