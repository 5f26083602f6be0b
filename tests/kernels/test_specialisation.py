"""One compilation a kernel, whatever the chunk: Triton specialises on numbers that are 1 or that 16 divides, and on
aligned addresses, so that a row, a token count or a scalar's place could stop a stream for a second.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG

from kernels.launch import HAVE_TRITON

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")]

CODE = """
import json, torch
from functools import partial
from kernels import compile, table
from kernels.causal_convolution import causal_convolution
from kernels.fp8_linear import Tiles, fp8_linear_tiles
from kernels.gate_residual import gate_residual
from kernels.gelu_quantize import gelu_quantize
from kernels.interleave_phases import interleave_phases
from kernels.launch import warm
from kernels.norm_modulate import norm_modulate, norm_modulate_quantize
from kernels.qk_norm_rope_write import qk_norm_rope_write, qk_norm_rope_write_fp8
from kernels.rms_norm import rms_norm
from kernels.solver_step import solver_step
from kernels.vae_norm_silu import vae_norm_silu

compile.use_stub_driver()
scalars, rows, scales = torch.ones(40), torch.ones(40, dtype=torch.int32), torch.ones(40)
E4M3, make = torch.float8_e4m3fn, partial(torch.zeros, dtype=torch.bfloat16)

def calls(n, frames, at):
    x, modulation, qkv = make(1, frames * n, 64), make(1, frames, 6, 1, 64), make(1, n, 192)
    by, tables = modulation[:, :, 1], torch.zeros(2, n, 16)
    k, v = torch.zeros(2, 1, 2000, 2, 32, dtype=torch.bfloat16)
    k8, v8 = torch.zeros(1, 2000, 2, 32).to(E4M3), torch.zeros(1, 2, 32, 2000).to(E4M3)
    latent, row, some = torch.zeros(1, 4, 1, 3, n), rows[at : at + 1], scales[at : at + 6].split(2)
    image, cache = (make(1, t, n, 3, 32).permute(0, 4, 1, 2, 3) for t in (1, 2))
    weights = make(64), make(64)
    images, phases = (make(t, h, n + 1, c).permute(0, 3, 1, 2) for t, h, c in ((3, frames, 32), (frames, 3, 128)))
    linear = torch.zeros(n, 64).to(E4M3), torch.ones(n, 1), torch.zeros(64, 64).to(E4M3), torch.ones(64, 1)
    return {
        "norm_modulate": lambda: norm_modulate(x, by, by),
        "norm_modulate_quantize": lambda: norm_modulate_quantize(x, by, by),
        "gate_residual": lambda: gate_residual(x, x, by),
        "gelu_quantize": lambda: gelu_quantize(x),
        "rms_norm": lambda: rms_norm(x, weights[0]),
        "qk_norm_rope_write": lambda: qk_norm_rope_write(qkv, *weights, *tables, k, v, row),
        "a row of the host": lambda: qk_norm_rope_write(qkv, *weights, *tables, k, v, at),
        "qk_norm_rope_write_fp8": lambda: qk_norm_rope_write_fp8(qkv, *weights, *tables, k8, v8, *some, row),
        "solver_step": lambda: solver_step(latent, latent, scalars[at], scalars[at + 1], latent),
        "fp8_linear": lambda: fp8_linear_tiles(*linear, None, torch.bfloat16, Tiles(64, 64, 64), 1000),
        "vae_norm_silu": lambda: vae_norm_silu(image, weights[0][:32], cache, cache),
        "causal_convolution": lambda: causal_convolution(images, make(48, 32, 3, 3, 3)),
        "few outputs": lambda: causal_convolution(images, make(3, 32, 3, 3, 3), weights[0][:3]),
        "interleave_phases": lambda: interleave_phases(phases, weights[0][:32]),
    }

with table.use("triton"):
    found = [{name: warm(call) for name, call in calls(*case).items()}
             for case in [(48, 1, 0), (37, 3, 1), (1, 16, 2), (16, 1, 16), (1560, 1, 7)]]
print(json.dumps(found))
"""


def test_no_chunk_asks_for_another_compilation():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True,
        check=False, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, *later = json.loads(done.stdout.splitlines()[-1])
    assert all(count >= 1 for count in first.values())
    assert all(not any(counts.values()) for counts in later), later
