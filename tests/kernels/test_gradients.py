"""Where a gradient is asked for, the reference runs: a kernel would cut it off without a word."""

import pytest
import torch

from kernels.gate_residual import gate_residual
from kernels.norm_modulate import layer_norm_affine, norm_modulate
from kernels.qk_norm_rope_write import qk_norm_rope_write
from kernels.rms_norm import rms_norm
from kernels.solver_step import solver_step
from kernels.vae_norm_silu import vae_norm_silu


def write(x):
    k, v = (torch.zeros(1, 4, 1, 32, device=x.device) for _ in range(2))
    weight, table = x.new_ones(32), x.new_ones(4, 16)
    q = qk_norm_rope_write(x.repeat(1, 1, 3), weight, weight, table, table, k, v, 0)
    return q + k + v


OPS = {
    "norm_modulate": lambda x: norm_modulate(x, x[None, :, :1], x[None, :, 1:2]),
    "layer_norm_affine": lambda x: layer_norm_affine(x, x[0, 0], x[0, 1]),
    "gate_residual": lambda x: gate_residual(x, x, x[None, :, :1]),
    "rms_norm": lambda x: rms_norm(x, x[0, 0]),
    "solver_step": lambda x: solver_step(x, x, 0.5, 0.25),
    "qk_norm_rope_write": write,
    "vae_norm_silu": lambda x: vae_norm_silu(x.mT[..., None, None], x[0, 0], None)[0],
}


@pytest.mark.parametrize("name", OPS)
def test_gradient(device, name):
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)).to(device)
    weights = torch.randn(32, generator=torch.Generator().manual_seed(1)).to(device)

    def loss(x):
        out = OPS[name](x)
        return (out * (weights if out.shape[-1] == 32 else weights.view(1, 32, 1, 1, 1))).sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    step = torch.zeros_like(x)
    step[0, 0, 3] = 1e-2
    with torch.no_grad():
        change = (loss(x + step) - loss(x - step)) / 2e-2
    assert float(gradient[0, 0, 3]) == pytest.approx(float(change), rel=0.02, abs=0.02)
