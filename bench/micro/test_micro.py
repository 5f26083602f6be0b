"""pytest-benchmark timings of single operations, layers, the VAE and whole chunks, on random weights."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.instruments.flops import steady_index
from bench.instruments.models import PROMPT, random_pipeline, torch_parts
from engine.config import Runtime
from engine.model.layers import Block
from engine.model.rope import apply_rope, rope_tables
from engine.presets import PRESETS
from engine.sampling.noise import PhiloxNoise
from engine.sampling.schedule import Schedule
from engine.sampling.solvers import make_solver
from engine.stream import Pipeline
from kernels.ring_attention import ring_attention
from kernels.rms_norm import rms_norm

TOKENS, HEADS, HEAD_DIM = 64, 4, 32


@lru_cache
def _pipeline(preset: str) -> Pipeline:
    return random_pipeline("tiny", preset, Runtime(device="cpu"))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _inference(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run


def _attention(slots: int) -> Callable[[], Any]:
    q, k = _random(1, TOKENS, HEADS, HEAD_DIM), _random(1, slots * TOKENS, HEADS, HEAD_DIM)
    return _inference(lambda: ring_attention(q, k, k, slots * TOKENS))


def test_ring_attention_over_3_slots(benchmark) -> None:
    benchmark(_attention(3))


def test_ring_attention_over_21_slots(benchmark) -> None:
    benchmark(_attention(21))


def test_rms_norm(benchmark) -> None:
    x, weight = _random(1, TOKENS, HEADS * HEAD_DIM), _random(HEADS * HEAD_DIM)
    benchmark(_inference(lambda: rms_norm(x, weight)))


def test_apply_rope(benchmark) -> None:
    x, (cos, sin) = _random(1, TOKENS, HEADS, HEAD_DIM), rope_tables([5], 8, 8, HEAD_DIM)
    benchmark(_inference(lambda: apply_rope(x, cos, sin)))


def test_rope_tables_of_a_new_position(benchmark) -> None:
    positions = iter(range(10**9))
    benchmark(lambda: rope_tables([next(positions)], 8, 8, HEAD_DIM))


def test_noise_of_a_chunk(benchmark) -> None:
    source, chunks = PhiloxNoise(0), iter(range(10**9))
    benchmark(lambda: source.draw(next(chunks), 4, (1, 8, 1, 8, 8)))


def test_renoise_step(benchmark) -> None:
    schedule, x = Schedule(PRESETS["self-forcing"]), _random(1, 16, 1, 8, 8)
    solver, (t, t_next) = make_solver("renoise", schedule), schedule.steps(1)[0]
    benchmark(_inference(lambda: solver.step(x, x, t, t_next, x)))


def test_unipc_chunk(benchmark) -> None:
    schedule, x = Schedule(PRESETS["greedy"]), _random(1, 16, 1, 8, 8)

    def chunk() -> None:
        solver = make_solver("unipc", schedule)
        for t, t_next in schedule.steps(1):
            solver.step(x, x, t, t_next, None)

    benchmark(_inference(chunk))


def test_block(benchmark) -> None:
    dim = HEADS * HEAD_DIM
    torch.manual_seed(0)
    block = Block(dim, HEADS, 4 * dim, 1e-6, True).eval().requires_grad_(False)
    block.attn1.fuse()
    x, modulation, text = _random(1, TOKENS, dim), _random(1, 1, 6, dim), _random(1, 12, HEADS, HEAD_DIM)
    cos, sin = rope_tables([5], 8, 8, HEAD_DIM)
    attend = lambda layer, q, k, v: ring_attention(q, k, v, TOKENS)  # noqa: E731
    benchmark(_inference(lambda: block(x, modulation, text, text, cos, sin, attend, 0)))


def test_vae_steady(benchmark) -> None:
    pipeline = _pipeline("greedy")
    vae = torch_parts(pipeline).vae
    assert vae is not None
    latent = _random(1, 16, 1, pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial)
    with torch.inference_mode():
        cache = vae.first(latent)[1]
    benchmark(_inference(lambda: vae.steady(latent, cache)))


def _steady_chunk(benchmark: Any, preset: str) -> None:
    pipeline = _pipeline(preset)
    with pipeline.stream(PROMPT) as stream:
        for _ in range(steady_index(pipeline.preset)):
            stream.next_chunk()
        benchmark(stream.next_chunk)


def test_steady_greedy_chunk(benchmark) -> None:
    _steady_chunk(benchmark, "greedy")


def test_steady_framewise_chunk(benchmark) -> None:
    _steady_chunk(benchmark, "self-forcing-framewise")


def test_open_a_stream(benchmark) -> None:
    benchmark(lambda: _pipeline("greedy").stream(PROMPT).close())
