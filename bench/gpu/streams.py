"""Full-size streams on random weights made on the device: the gate first, then speed."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench.commands import stream
from bench.commands.backends import first_frame_ms
from bench.gpu.lines import Lines
from bench.instruments import ceilings, gates, memory, models
from bench.instruments.flops import chunk_cost, steady_index, total
from bench.instruments.meter import metered_chunks
from bench.instruments.spread import summary
from engine.config import Runtime
from engine.loader import make_stages
from engine.model.cache import FP8
from engine.stream import Pipeline


def opened(lines: Lines, preset: str, precision: str, eager: bool = False) -> tuple[Pipeline, gates.Gate | None]:
    """The pipeline, and its gate; plain PyTorch, which the gate compares with, has none."""
    shape = "tiny" if lines.smoke else "wan2.1-1.3b"
    runtime = Runtime(device=lines.device, precision="bf16", eager=True)
    base = models.random_pipeline(shape, preset, runtime, attention_gain=gates.ATTENTION_GAIN)
    if eager:
        return base, None
    truth = gates.flows(gates.exact(base))
    parts = models.torch_parts(base)
    wanted = Runtime(device=lines.device, precision="bf16" if precision == "bf16" else "fp8",
                     fp8_attention=precision == "fp8-attention")  # fmt: skip
    stages = make_stages(parts.models, parts.vae, parts.text_encoder, base.device, wanted)
    pipeline = replace(base, stages=stages, kv_dtype=FP8 if wanted.fp8_attention else None)
    return pipeline, gates.gate(pipeline, truth, precision)


def streamed(lines: Lines, preset: str, precision: str, chunks: int, eager: bool = False) -> None:
    """Gate, first frame, `chunks` chunks as a user streams them, and the parts of a chunk."""
    begun = time.perf_counter()
    pipeline, gate = opened(lines, preset, precision, eager)
    name = f"{preset} {'eager' if eager else precision}"
    if gate is not None:
        detail = f"worst error {gate.worst:.1e} of {len(gate.errors)} chunks, limit {gate.limit:.1e}"
        lines.check(f"flows of {name}", gate.passed, detail)
        lines.add("row", table="flow errors", variant=name, errors=gate.errors)
    made = time.perf_counter() - begun
    pipeline.warm()
    warm = time.perf_counter() - begun - made
    first = first_frame_ms(pipeline, 2 if lines.smoke else 5)
    begin = steady_index(pipeline.preset)
    memory.reset_peak(pipeline.device)
    run = stream.plain_run(pipeline, models.PROMPT, begin + (4 if lines.smoke else chunks), 0)
    ms = summary([1e3 * seconds for seconds in run.chunks[begin:]])
    frames = pipeline.preset.chunk * pipeline.temporal
    row: dict[str, Any] = {
        "variant": name, "fps": 1e3 * frames / ms["mean"], "ms_p50": ms["p50"], "ms_p99": ms["p99"],
        "frames_per_chunk": frames, "chunks": len(run.chunks), "first_frame_ms": first, "made_s": made, "warm_s": warm,
        "peak_mb": memory.peak_mb(pipeline.device), "passed": gate is None or gate.passed,
    }  # fmt: skip
    lines.add("speed", **row)
    print(f"{name}: {row['fps']:.1f} fps, {ms['p50']:.1f} ms a chunk, first frame {first:.0f} ms", flush=True)
    if not eager:
        _parts(lines, name, pipeline, begin, ms["p50"])


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


def fp8(lines: Lines) -> None:
    """Both FP8 variants, one after the other; one that fails does not cost the other."""
    failed = []
    for precision in ("fp8", "fp8-attention"):
        try:
            streamed(lines, "greedy", precision, 40)
        except Exception as error:  # whatever it is, the next one is worth its minute
            lines.check(f"greedy {precision}", False, f"{type(error).__name__}: {str(error).splitlines()[0]}")
            failed.append(precision)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"got failures in {', '.join(failed)}, expected none")


def baselines(lines: Lines) -> None:
    """What the fast path is compared with, and the causal preset beside it."""
    streamed(lines, "greedy", "bf16", 10, eager=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    streamed(lines, "self-forcing", "bf16", 10)


@torch.inference_mode()
def endurance(lines: Lines, chunks: int = 200) -> None:
    """Does a long stream slow down, grow or lose its numbers?"""
    pipeline, _ = opened(lines, "greedy", "fp8")
    begin, count = steady_index(pipeline.preset), 12 if lines.smoke else chunks
    seconds, sizes, held = [], [], []
    with pipeline.stream(models.PROMPT, seed=0) as made:
        for _ in range(begin + count):
            start = time.perf_counter()
            frames = made.next_chunk()
            seconds.append(time.perf_counter() - start)
            sizes.append(float(frames.std()))
            held.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    quarter = count // 4
    early, late = np.median(seconds[begin : begin + quarter]), np.median(seconds[-quarter:])
    grown = (held[-1] - held[begin + quarter]) / 2**20
    slower, limit = float(late / early), 2.0 if lines.smoke else 1.05
    lines.check("a long stream does not slow down", slower <= limit, f"{slower:.3f} of its early time per chunk")
    lines.check("a long stream does not grow", grown <= 1, f"{grown:.2f} MB over {count} chunks")
    alive = min(sizes[begin:]) > 0
    lines.check("a long stream has a picture", alive, f"standard deviation {min(sizes):.1f} to {max(sizes):.1f}")


def greedy(lines: Lines) -> None:
    streamed(lines, "greedy", "bf16", 40)
