"""One stream: time to the first frame, time a chunk, frames a second with and without what, memory, limits."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.instruments import ceilings, check, memory, models
from bench.instruments.flops import Cost, chunk_cost, steady_index, text_cost, total
from bench.instruments.header import machine, print_header, stream_header
from bench.instruments.meter import ChunkTimes, metered_chunks
from bench.instruments.spread import quartiles, summary, table
from bench.report import saved as results
from engine.media.sinks import Sink, open_sink
from engine.stream import Pipeline

UNEXPLAINED = 0.05  # share of a chunk that the stage table may leave without a name
LABELS = ("text", "etm", "sdd_context", "sdd", "dit_context", "dit", "noise", "solver", "cache", "vae", "transfer",
          "sink", "other")  # fmt: skip


@dataclass(frozen=True)
class PlainRun:
    """One stream without a meter: seconds before the first chunk, and of every chunk with its sink."""

    opening: float
    chunks: list[float]
    frames: int
    state_bytes: int


def plain_run(pipeline: Pipeline, prompt: str, chunks: int, seed: int, sink: Sink | None = None) -> PlainRun:
    """Stream as a user does."""
    start = time.perf_counter()
    with pipeline.stream(prompt, seed=seed) as stream:
        times, frames, mark = [], 0, time.perf_counter()
        opening = mark - start
        for _ in range(chunks):
            made = stream.next_chunk()
            if sink is not None:
                write_all(sink, made)
            frames += len(made)
            now = time.perf_counter()
            times.append(now - mark)
            mark = now
        return PlainRun(opening, times, frames, memory.tensor_bytes(stream.state))


def write_all(sink: Sink, frames: np.ndarray) -> None:
    for frame in frames:
        sink.write(frame)


def chunks_for(pipeline: Pipeline, frames: int | None) -> int:
    """Chunks that give at least `frames` frames; by default enough for 20 that cost what all later ones cost."""
    if frames is None:
        return steady_index(pipeline.preset) + 20
    if frames < 1:
        raise ValueError(f"--frames: got {frames}, expected at least 1")
    made = count = 0
    while made < frames:
        made += pipeline.temporal * pipeline.preset.chunk_frames(count) - (pipeline.temporal - 1) * (count == 0)
        count += 1
    return max(count, 3)


def steady_from(pipeline: Pipeline, chunks: int) -> int:
    """First chunk that counts: where caches are full, or, in a stream too short for that, the second."""
    index = steady_index(pipeline.preset)
    return index if chunks - index >= 5 else 1


def stage_table(chunks: list[ChunkTimes]) -> tuple[dict[str, float], float]:
    """Mean milliseconds a chunk by label, adding up to the chunk's own time, and the share no label explained."""
    whole = float(np.mean([c.total for c in chunks]))
    stages = {label: float(np.mean([c.stages.get(label, 0.0) for c in chunks])) for label in LABELS}
    unexplained = 1 - sum(stages.values()) / whole
    if abs(unexplained) > UNEXPLAINED:
        raise RuntimeError(f"stage table: got {1 - unexplained:.1%} of the chunk's time, expected 95% to 105%")
    stages["other"] += unexplained * whole
    used = any(label in c.stages for c in chunks for label in ("etm", "sdd"))
    unused = ("dit", "dit_context") if used else ("etm", "sdd_context", "sdd")
    return {label: 1e3 * value for label, value in stages.items() if label not in unused}, unexplained


def step_times(chunks: list[ChunkTimes]) -> list[float]:
    """Median milliseconds of each denoising call of a chunk."""
    calls = [c.calls.get("sdd") or c.calls.get("dit") or [] for c in chunks]
    return [1e3 * float(np.median(step)) for step in zip(*calls, strict=False)]


def roofline(
    stages_ms: dict[str, float], costs: dict[str, Cost], limits: ceilings.Ceilings
) -> dict[str, dict[str, float]]:
    """Per stage: counted work, and the time it would take at the measured ceilings."""
    return {
        name: {
            "ms": stages_ms.get(name, 0.0), "gflop": cost.flops / 1e9, "mb": cost.bytes / 1e6,
            "floor_ms": 1e3 * limits.floor(cost), "mfu": limits.mfu(cost, stages_ms.get(name, 0.0) / 1e3),
            "mbu": limits.mbu(cost, stages_ms.get(name, 0.0) / 1e3),
        }
        for name, cost in costs.items()
    }  # fmt: skip


def measure(
    make: Callable[[], Pipeline], label: str, prompt: str, seed: int, frames: int | None, rounds: int, sink: str
) -> tuple[dict[str, Any], list[check.Check]]:
    """The report on the pipeline that `make` loads, and the checks that allow it: a red one, and it has no numbers."""
    start = time.perf_counter()
    pipeline = make()
    load, loaded_mb = time.perf_counter() - start, memory.settle()
    size = pipeline.height, pipeline.width
    open_sink(sink, pipeline.fps, size).abort()  # refused now rather than after minutes
    # The very first chunk of the process, with whatever it has to set up.
    start = time.perf_counter()
    first, _, _ = metered_chunks(pipeline, prompt, 1, seed)
    ttff = time.perf_counter() - start
    report: dict[str, Any] = {"machine": machine(pipeline.device), "stream": stream_header(pipeline, label)}
    checks = check.run(pipeline, prompt, seed)
    report["checks"] = [asdict(c) for c in checks]
    if not all(c.passed for c in checks):
        return report, checks

    limits = ceilings.measure(pipeline.device, pipeline.dtype)
    chunks = chunks_for(pipeline, frames)
    begin = steady_from(pipeline, chunks)
    memory.reset_peak(pipeline.device)
    plain, metered, vae_cache, state_bytes = [], [], 0, 0
    for _ in range(rounds):  # side by side, so that both see the same machine
        with open_sink(sink, pipeline.fps, size) as out:
            plain.append(plain_run(pipeline, prompt, chunks, seed, out))
        with open_sink(sink, pipeline.fps, size) as out:
            times, opening, meter = metered_chunks(pipeline, prompt, chunks, seed, partial(write_all, out))
        metered.append((opening, times))
        vae_cache, state_bytes = meter.vae_cache_bytes, plain[-1].state_bytes
    peak = memory.peak_mb(pipeline.device)
    again = ceilings.measure(pipeline.device, pipeline.dtype)
    limits = ceilings.Ceilings(max(limits.flops, again.flops), max(limits.bytes, again.bytes))

    steady_ms = [1e3 * s for run in plain for s in run.chunks[begin:]]
    timed = [c for _, times in metered for c in times[begin:]]
    stages_ms, unexplained = stage_table(timed)
    metered_ms = 1e3 * float(np.mean([c.total for c in timed]))
    per_chunk = timed[-1].frames
    rows = pipeline.tokenizer.rows if pipeline.tokenizer else 0
    costs = chunk_cost(pipeline, rows, models.vae_config(pipeline), begin if begin > 1 else chunks - 1)
    cost, ms = total(costs), summary(steady_ms)
    # Where the VAE is a compiled graph its work is not counted, so neither is its time.
    busy = (ms["p50"] if "vae" in costs else sum(stages_ms[name] for name in costs)) / 1e3
    encoder = getattr(pipeline.stages, "text_encoder", None)
    prompt_cost = text_cost(pipeline.config, rows, 2 if pipeline.preset.family == "greedy" else 1, 1, encoder)
    whole = [run.opening + sum(run.chunks) for run in plain]
    # A share, because the metered stream of a round is another one than the plain stream.
    vae = sum(c.stages.get("vae", 0.0) for _, times in metered for c in times)
    rest = 1 - vae / sum(c.total for _, times in metered for c in times)
    count = plain[0].frames
    report |= {
        "fps": float(np.median([count / t for t in whole])),
        "fps_without_vae": float(np.median([count / (run.opening + rest * sum(run.chunks)) for run in plain])),
        "fps_without_text": float(np.median([count / sum(run.chunks) for run in plain])),
        "fps_steady": 1e3 * per_chunk / ms["mean"],
        "frames": count,
        "chunks": chunks,
        "rounds": rounds,
        "steady_from_chunk": begin,
        "frames_per_chunk": per_chunk,
        "ttff_ms": 1e3 * ttff,
        "ttff_split_ms": {
            "load": 1e3 * load,
            "text": 1e3 * (ttff - first[0].total),
            "first_chunk": 1e3 * (first[0].total - sum(first[0].stages.get(k, 0.0) for k in ("vae", "transfer"))),
            "decode": 1e3 * sum(first[0].stages.get(k, 0.0) for k in ("vae", "transfer")),
        },
        "ttff_warm_ms": 1e3 * float(np.median([run.opening + run.chunks[0] for run in plain])),
        "prompt_ms": 1e3 * float(np.median([opening.get("text", 0.0) for opening, _ in metered])),
        "ms_per_chunk": ms,
        "jitter_ms": float(np.mean(np.abs(np.diff(steady_ms)))) if len(steady_ms) > 1 else 0.0,
        "stages_ms": stages_ms,
        "steps_ms": step_times(timed),
        "metered_ms_per_chunk": metered_ms,
        "unexplained": unexplained,
        "peak_memory_mb": peak,
        "memory_mb": memory.breakdown(pipeline, state_bytes, vae_cache, loaded_mb, peak),
        "ceilings": limits.as_dict(),
        "roofline": roofline(stages_ms, costs, limits),
        "text_gflop": prompt_cost.flops / 1e9,
        "gflop_per_chunk": cost.flops / 1e9,
        "floor_ms": 1e3 * sum(limits.floor(c) for c in costs.values()),
        "mfu": limits.mfu(cost, busy),
        "mbu": limits.mbu(cost, busy),
        "timings": {"chunk": quartiles(steady_ms)} | {
            name: quartiles([1e3 * c.stages.get(name, 0.0) for c in timed]) for name in costs
        },
        "commit": report["machine"]["commit"],
        "device": report["machine"]["device"],
    }  # fmt: skip
    return report, checks


def print_report(r: dict[str, Any]) -> None:
    """The report for eyes."""
    ms, split, memory_mb = r["ms_per_chunk"], r["ttff_split_ms"], r["memory_mb"]
    lines = {
        "fps": f"{r['fps']:.2f} of everything, {r['fps_without_vae']:.2f} without VAE, "
        f"{r['fps_without_text']:.2f} without text, {r['fps_steady']:.2f} steady",
        "first frame": f"{r['ttff_ms']:.1f} ms cold, {r['ttff_warm_ms']:.1f} ms warm; cold: text {split['text']:.1f}, "
        f"first chunk {split['first_chunk']:.1f}, decode {split['decode']:.1f}; loading took {split['load']:.0f}",
        "ms a chunk": f"p50 {ms['p50']:.2f}, p90 {ms['p90']:.2f}, p99 {ms['p99']:.2f}, max {ms['max']:.2f}, "
        f"jitter {r['jitter_ms']:.2f}; {r['frames_per_chunk']} frames a chunk",
        "denoising calls": ", ".join(f"{step:.2f}" for step in r["steps_ms"]) + " ms",
        "memory": f"{r['peak_memory_mb']:.0f} MB at the peak: "
        + ", ".join(f"{name} {mb:.0f}" for name, mb in memory_mb.items()),
        "ceilings": f"{r['ceilings']['flops'] / 1e9:.1f} GFLOP/s, {r['ceilings']['bytes'] / 1e9:.1f} GB/s in this run",
        "limits": f"MFU {r['mfu']:.1%}, MBU {r['mbu']:.1%}, roofline floor {r['floor_ms']:.2f} ms a chunk",
    }
    print()
    for name, line in lines.items():
        print(f"{name:16} {line}")
    print()
    whole = sum(r["stages_ms"].values())
    rows = []
    for name, value in r["stages_ms"].items():
        line = r["roofline"].get(name, {})
        rows.append({"stage": name, "ms": value, "share": f"{value / whole:.1%}"} | {
            key: line.get(key) for key in ("gflop", "mb", "floor_ms", "mfu")})  # fmt: skip
    rows.append({"stage": "chunk", "ms": whole, "share": "100%", "gflop": r["gflop_per_chunk"],
                 "floor_ms": r["floor_ms"], "mfu": r["mfu"]})  # fmt: skip
    print(table(rows, 3))


def run(args: argparse.Namespace) -> int:
    source = models.source_of(args)
    if args.rounds < 1:
        raise ValueError(f"--rounds: got {args.rounds}, expected at least 1")
    make = partial(source.pipeline, args.preset)
    report, checks = measure(make, source.label, args.prompt, args.seed, args.frames, args.rounds, args.sink)
    shown = sys.stderr if args.json else sys.stdout
    if not args.json:
        print_header(report["machine"], report["stream"])
    for c in checks:
        print(f"{'ok' if c.passed else 'RED':16} {c.name}: {c.detail}", file=shown)
    if check.refused(checks):
        return 1
    if not args.json:
        print_report(report)
    what = report["stream"]
    backend = "" if what["backend"] == "torch" else f"-{what['backend']}"
    results.emit(args, f"stream-{Path(what['preset']).stem}{backend}", report)
    return 0


def add_parser(commands: Any) -> None:
    command = commands.add_parser("stream", help="one stream: fps, first frame, stages, memory, limits")
    models.add_arguments(command)
    command.add_argument("--preset", metavar="NAME|FILE.toml", help="default: the model's own")
    command.add_argument("--frames", type=int, help="default: enough for 20 chunks with full caches")
    command.add_argument("--rounds", type=int, default=3, help="streams measured")
    command.add_argument("--sink", default="null", help="where frames go: null, checksum, FILE.mp4, ...")
    results.add_arguments(command)
    command.set_defaults(run=run)
