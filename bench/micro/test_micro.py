"""pytest-benchmark timings of single operations, layers, stages and whole chunks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.flops import steady_index
from bench.models import PROMPT, torch_parts
from engine.config import PRESETS
from engine.layers import Block, rms_norm
from engine.noise import PhiloxNoise
from engine.rope import apply_rope, rope_tables
from engine.schedule import Schedule, make_solver
from engine.stream import Pipeline
from kernels.ring_attention import ring_attention

TOKENS, HEADS, HEAD_DIM = 64, 4, 32


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _inference(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run


@pytest.mark.parametrize("slots", [3, 21])
def test_ring_attention(benchmark, slots: int) -> None:
    q, k = _random(1, TOKENS, HEADS, HEAD_DIM), _random(1, slots * TOKENS, HEADS, HEAD_DIM)
    benchmark(_inference(lambda: ring_attention(q, k, k, slots * TOKENS)))


def test_rms_norm(benchmark) -> None:
    x = _random(1, TOKENS, HEADS * HEAD_DIM)
    benchmark(_inference(lambda: rms_norm(x)))


def test_apply_rope(benchmark) -> None:
    x, (cos, sin) = _random(1, TOKENS, HEADS, HEAD_DIM), rope_tables([5], 8, 8, HEAD_DIM)
    benchmark(_inference(lambda: apply_rope(x, cos, sin)))


def test_rope_tables_of_a_new_position(benchmark) -> None:
    positions = iter(range(10**9))
    benchmark(lambda: rope_tables([next(positions)], 8, 8, HEAD_DIM))


def test_noise_of_a_chunk(benchmark) -> None:
    source, chunks = PhiloxNoise(0), iter(range(10**9))
    benchmark(lambda: source.draw(next(chunks), 4, (1, 8, 1, 8, 8)))


@pytest.mark.parametrize("name", ["renoise", "euler"])
def test_solver_step(benchmark, name: str) -> None:
    schedule = Schedule(PRESETS["greedy"])
    solver, x = make_solver(name, schedule), _random(1, 16, 1, 8, 8)
    (t, t_next), *_ = schedule.steps(1)
    benchmark(_inference(lambda: solver.step(x, x, t, t_next, x)))


def test_block(benchmark) -> None:
    dim = HEADS * HEAD_DIM
    torch.manual_seed(0)
    block = Block(dim, HEADS, 4 * dim, 1e-6, True).eval().requires_grad_(False)
    x, modulation, text = _random(1, TOKENS, dim), _random(1, 1, 6, dim), _random(1, 12, HEADS, HEAD_DIM)
    cos, sin = rope_tables([5], 8, 8, HEAD_DIM)
    benchmark(
        _inference(lambda: block(x, modulation, text, text, cos, sin, lambda q, k, v: ring_attention(q, k, v, TOKENS)))
    )


def test_vae_steady(benchmark, greedy: Pipeline) -> None:
    vae = torch_parts(greedy).vae
    assert vae is not None
    latent = _random(1, 16, 1, greedy.height // greedy.spatial, greedy.width // greedy.spatial)
    with torch.inference_mode():
        cache = vae.first(latent)[1]
    benchmark(_inference(lambda: vae.steady(latent, cache)))


@pytest.mark.parametrize("family", ["greedy", "causal"])
def test_steady_chunk(benchmark, family: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(family)
    with pipeline.stream(PROMPT) as stream:
        for _ in range(steady_index(pipeline.preset)):
            stream.next_chunk()
        benchmark(stream.next_chunk)


def test_open_a_stream(benchmark, greedy: Pipeline) -> None:
    benchmark(lambda: greedy.stream(PROMPT).close())
