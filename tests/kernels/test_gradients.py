"""Training rolls out through these wrappers: where autograd records, the references run, on any device."""

import pytest
import torch

from kernels.ring_attention import ring_attention
from kernels.solver_step import solver_step


@pytest.mark.parametrize("recorded", [True, False])
def test_kernels_step_aside_for_autograd(device, recorded):
    q, k = (torch.randn(1, n, 2, 32, device=device, dtype=torch.bfloat16) for n in (5, 9))
    x, flow = torch.randn(2, 1, 4, 1, 3, 3, device=device)
    q.requires_grad_(recorded), flow.requires_grad_(recorded)
    attended, stepped = ring_attention(q, k, k, 7), solver_step(x, flow, 0.9, 0.5)
    assert attended.requires_grad == stepped.requires_grad == recorded
    if recorded:
        (attended.float().sum() + stepped.sum()).backward()
        assert torch.allclose(flow.grad, torch.full_like(flow, -0.4))
        assert q.grad.abs().max() > 0
    with torch.no_grad():
        assert not ring_attention(q, k, k, 7).requires_grad
