"""Full-size streams on random weights made on the device: the gate first, then speed."""

import copy
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.commands import stream
from bench.commands.backends import first_frame_ms
from bench.gpu.kernel_profile import kernels_of_a_chunk
from bench.gpu.lines import Lines
from bench.instruments import ceilings, gates, memory, models
from bench.instruments.flops import chunk_cost, steady_index, total
from bench.instruments.meter import metered_chunks
from bench.instruments.spread import summary
from engine.config import Runtime
from engine.loader import make_stages
from engine.model.cache import FP8
from engine.stream import Pipeline

CAUSAL = ("self-forcing", "longlive", "diagonal")  # one transformer's presets; the first has the gate


def base_of(lines: Lines, preset: str) -> Pipeline:
    """Random weights in plain PyTorch, for which attention matters."""
    shape = "tiny" if lines.smoke else "wan2.1-1.3b"
    runtime = Runtime(device=lines.device, precision="bf16", eager=True)
    return models.random_pipeline(shape, preset, runtime, attention_gain=gates.ATTENTION_GAIN)


def fast(base: Pipeline, precision: str) -> Pipeline:
    """The same weights through kernels and, on a GPU, CUDA graphs; not warm."""
    parts = models.torch_parts(base)
    wanted = Runtime(device=str(base.device), precision="bf16" if precision == "bf16" else "fp8",
                     fp8_attention=precision == "fp8-attention")  # fmt: skip
    # fuse() changes a VAE, and another variant starts from the base's
    stages = make_stages(parts.models, copy.deepcopy(parts.vae), parts.text_encoder, base.device, wanted)
    return replace(base, stages=stages, kv_dtype=FP8 if wanted.fp8_attention else None)


def gated(lines: Lines, pipeline: Pipeline, truth: list[Tensor], name: str, precision: str) -> bool:
    """Whether the flows are right; also written down."""
    gate = gates.gate(pipeline, truth, precision)
    detail = f"worst error {gate.worst:.1e} of {len(gate.errors)} chunks, limit {gate.limit:.1e}"
    lines.check(f"flows of {name}", gate.passed, detail)
    lines.add("row", table="flow errors", variant=name, errors=gate.errors)
    return gate.passed


def streamed(lines: Lines, pipeline: Pipeline, name: str, chunks: int, right: bool, parts: bool = True,
             profiled: bool = False) -> None:  # fmt: skip
    """First frame, `chunks` chunks as a user streams them, and where a chunk's time goes: its parts, its kernels."""
    begun = time.perf_counter()
    pipeline.warm()
    warm = time.perf_counter() - begun
    first = first_frame_ms(pipeline, 2 if lines.smoke else 5)
    begin = steady_index(pipeline.preset)
    memory.reset_peak(pipeline.device)
    run = stream.plain_run(pipeline, models.PROMPT, begin + (4 if lines.smoke else chunks), 0)
    ms = summary([1e3 * seconds for seconds in run.chunks[begin:]])
    frames = pipeline.preset.chunk * pipeline.temporal
    fps = 1e3 * frames / ms["mean"]
    lines.add(
        "speed", variant=name, fps=fps, ms_p50=ms["p50"], ms_p99=ms["p99"], frames_per_chunk=frames,
        chunks=len(run.chunks), first_frame_ms=first, warm_s=warm, peak_mb=memory.peak_mb(pipeline.device),
        passed=right,
    )  # fmt: skip
    print(f"{name}: {fps:.1f} fps, {ms['p50']:.1f} ms a chunk, first frame {first:.0f} ms", flush=True)
    if parts:
        _parts(lines, name, pipeline, begin, ms["p50"])
    if profiled:
        lines.attempt(f"profile of {name}", partial(_profiled, lines, name, pipeline))


def _parts(lines: Lines, name: str, pipeline: Pipeline, begin: int, ms: float) -> None:
    """Where a chunk's time goes, and the share of the measured ceiling that its arithmetic reaches."""
    times, _, _ = metered_chunks(pipeline, models.PROMPT, begin + (4 if lines.smoke else 12), 0)
    timed = times[begin:]
    parts = {part: 1e3 * float(np.mean([t.parts.get(part, 0.0) for t in timed])) for part in stream.PARTS}
    parts = {part: value for part, value in parts.items() if value}
    rows = pipeline.tokenizer.rows if pipeline.tokenizer else 0
    cost = total(chunk_cost(pipeline, rows, models.vae_config(pipeline), begin))
    limits = ceilings.measure(pipeline.device, pipeline.dtype)
    lines.add(
        "row", table="parts of a chunk", variant=name, parts_ms=parts,
        metered_ms=1e3 * float(np.mean([t.total for t in timed])), plain_ms=ms, tflop=cost.flops / 1e12,
        mfu=limits.mfu(cost, ms / 1e3), ceiling_tflops=limits.flops / 1e12, ceiling_gbs=limits.bytes / 1e9,
    )  # fmt: skip


def _profiled(lines: Lines, name: str, pipeline: Pipeline) -> None:
    """Kernel by kernel, also printed."""
    found = kernels_of_a_chunk(pipeline)
    lines.add("row", table="kernels of a chunk", variant=name, **found)
    for row in found["kernels"]:
        print(f"{row['ms']:8.3f} ms {row['launches']:7.1f} x {row['kernel']}", flush=True)
    print(f"{name}: busy {found['busy_ms']:.1f} of {found['span_ms']:.1f} ms; sum {found['sum_ms']:.1f} ms", flush=True)


def greedy(lines: Lines) -> None:
    """All precisions on the same weights; one that fails does not cost the others."""
    base = base_of(lines, "greedy")
    truth = gates.flows(gates.exact(base))

    def variant(precision: str) -> None:
        name, pipeline = f"greedy {precision}", fast(base, precision)
        right = gated(lines, pipeline, truth, name, precision)
        streamed(lines, pipeline, name, 40, right, profiled=precision != "fp8")

    for precision in gates.LIMITS:
        lines.attempt(f"greedy {precision}", partial(variant, precision))


def causal(lines: Lines) -> None:
    """The causal presets on the same weights.

    The gate compares with plain PyTorch in bf16: float32 over 21 latent frames may take longer than the step.
    """
    base = base_of(lines, CAUSAL[0])
    truth = gates.flows(base)

    def variant(preset: str) -> None:
        name, pipeline = f"{preset} bf16", models.with_preset(fast(base, "bf16"), preset)
        right = preset != CAUSAL[0] or gated(lines, pipeline, truth, name, "bf16")
        streamed(lines, pipeline, name, 10, right, parts=False)

    for preset in CAUSAL:
        lines.attempt(preset, partial(variant, preset))


def eager(lines: Lines) -> None:
    """What the fast path is compared with."""
    streamed(lines, base_of(lines, "greedy"), "greedy eager", 10, True, parts=False)


@torch.inference_mode()
def endurance(lines: Lines, chunks: int = 200, seconds: float = 22) -> None:
    """Does a long stream slow down, grow or lose its picture? It ends after `chunks`, earlier on a slow device."""
    pipeline = fast(base_of(lines, "greedy"), "fp8")
    pipeline.warm()
    begin, most = steady_index(pipeline.preset), 12 if lines.smoke else chunks
    took: list[float] = []
    sizes: list[float] = []
    held: list[int] = []
    started = time.perf_counter()
    with pipeline.stream(models.PROMPT, seed=0) as made:
        while len(took) < begin + most and (len(took) < begin + 12 or time.perf_counter() - started < seconds):
            start = time.perf_counter()
            frames = made.next_chunk()
            took.append(time.perf_counter() - start)
            sizes.append(float(frames.std()))
            held.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    count = len(took) - begin
    quarter = count // 4
    slower = float(np.median(took[-quarter:]) / np.median(took[begin : begin + quarter]))
    # The least of each stretch: what a chunk holds for a moment does not count.
    grown = (min(held[-quarter:]) - min(held[begin : begin + quarter])) / 2**20
    limit = float("inf") if lines.smoke else 1.05  # a processor may have other work
    lines.add("row", table="long stream", chunks=count, slower=slower, grown_mb=grown)
    lines.check(
        "a long stream does not slow down", slower <= limit, f"{slower:.3f} of its early time over {count} chunks"
    )
    lines.check("a long stream does not grow", grown <= 1, f"{grown:.2f} MB over {count} chunks")
    picture = f"standard deviation {min(sizes):.1f} to {max(sizes):.1f}"
    lines.check("a long stream has a picture", min(sizes[begin:]) > 0, picture)
