"""UniPC's step: a kernel has the bits of the reference on a processor; tests/engine/sampling has diffusers' solver."""

import pytest
import torch

from kernels import table
from kernels.unipc_step import Past, Update, unipc_step, unipc_step_reference

FIRST, LATER = Update(0.7, -0.3), Update(0.6, -0.4, -1.9, 0.5)
SECOND, CORRECTOR = Update(0.8, -0.2, by_newest=0.5), Update(0.5, -0.45, -2.3, 0.37, 0.61)


def steps(x, flows):
    """The four kinds of step in a row, through whatever runs: every result, and every past."""
    past, found = None, []
    kinds = [(0.95, None, FIRST), (0.8, SECOND, LATER), (0.6, CORRECTOR, LATER), (0.3, CORRECTOR, None)]
    for flow, (sigma, corrector, predictor) in zip(flows, kinds, strict=True):
        x, past = unipc_step(x, flow, past, sigma, corrector, predictor)
        found += [x, past.sample, past.prediction]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 1, 30, 52), (2, 4, 3, 5, 7)])
def test_the_references_bits(device, dtype, shape):
    made = torch.Generator().manual_seed(0)
    x, *flows = (torch.randn(shape, generator=made).to(dtype) for _ in range(5))
    found = steps(x.to(device), [flow.to(device) for flow in flows])
    with table.use("reference"):  # on a GPU torch multiplies by a reciprocal where a processor divides
        expected = steps(x, flows)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float64


def test_the_last_step_gives_the_clean_latent():
    x, flow = torch.randn(2, 1, 2, 1, 3, 3)
    found, past = unipc_step_reference(x, flow, None, 0.25, None, None)
    assert torch.equal(found, (x.double() - 0.25 * flow.double()).float())
    assert torch.equal(past.prediction.float(), found)


def test_bad_input(device):
    x, wide = torch.randn(1, 2, 1, 3, 3, device=device), torch.randn(1, 2, 1, 3, 3, device=device).double()
    for call in (
        lambda: unipc_step(x, x[..., :2], None, 0.5, None, FIRST),
        lambda: unipc_step(x, x, Past(wide, wide[..., :2]), 0.5, SECOND, FIRST),
        lambda: unipc_step(x, x, Past(x, wide), 0.5, SECOND, FIRST),
    ):
        with pytest.raises(ValueError, match=r"^unipc_step: got .*expected"):
            call()
