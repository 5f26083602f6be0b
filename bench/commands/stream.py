"""One stream: time to the first frame, time per chunk, frames per second with and without VAE and text, memory."""

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
from bench.instruments.meter import DENOISING, PASSES, ChunkTimes, joined_of, metered_chunks
from bench.instruments.spread import quartiles, summary, table
from bench.report import saved
from engine.media.sinks import Sink, open_sink
from engine.options import option
from engine.stream import Pipeline

UNEXPLAINED = 0.05  # largest share of a chunk that the table of parts may leave unnamed
PARTS = ("text", *PASSES, "noise", "solver", "cache", "vae", "transfer",
         "sink", "other")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, models.PresetSource):
    frames: int | None = option(None, "default: enough for 20 chunks with full caches")
    rounds: int = option(3, "streams measured")
    sink: str = option("null", "where frames go: null, checksum, FILE.mp4, ...", metavar="TARGET")


@dataclass(frozen=True)
class PlainRun:
    """One stream without a meter: seconds before the first chunk, and seconds of each chunk with its sink."""

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
    """How many chunks give at least `frames` frames; None asks for 20 chunks at the steady cost."""
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
    """The first chunk that counts: the first with full caches, or the second where the stream is too short for that."""
    index = steady_index(pipeline.preset)
    return index if chunks - index >= 5 else 1


def part_table(chunks: list[ChunkTimes]) -> tuple[dict[str, float], float]:
    """Mean milliseconds per chunk of each part, and the share of the chunk that no part explained.

    The unexplained time is added to `other`, so that the parts add up to the chunk's own time.
    """
    whole = float(np.mean([c.total for c in chunks]))
    parts = {part: float(np.mean([c.parts.get(part, 0.0) for c in chunks])) for part in PARTS}
    unexplained = 1 - sum(parts.values()) / whole
    if abs(unexplained) > UNEXPLAINED:
        raise RuntimeError(f"parts: got {1 - unexplained:.1%} of the chunk's time, expected 95% to 105%")
    parts["other"] += unexplained * whole
    seen = {part for c in chunks for part in c.parts}
    return {part: 1e3 * value for part, value in parts.items() if part in seen or part not in PASSES}, unexplained


def step_times(chunks: list[ChunkTimes]) -> list[float]:
    """Median milliseconds of each denoising call of a chunk."""
    named = [(joined_of(graph), graph) for graph in DENOISING]
    calls = [[ms for pair in named for part in pair for ms in c.calls.get(part, [])] for c in chunks]
    return [1e3 * float(np.median(step)) for step in zip(*calls, strict=False)]


def roofline(
    parts_ms: dict[str, float], costs: dict[str, Cost], limits: ceilings.Ceilings
) -> dict[str, dict[str, float]]:
    """For each part: its counted work, and the time that this work takes at the measured ceilings."""
    return {
        name: {
            "ms": parts_ms.get(name, 0.0), "gflop": cost.flops / 1e9, "mb": cost.bytes / 1e6,
            "floor_ms": 1e3 * limits.floor(cost), "mfu": limits.mfu(cost, parts_ms.get(name, 0.0) / 1e3),
            "mbu": limits.mbu(cost, parts_ms.get(name, 0.0) / 1e3),
        }
        for name, cost in costs.items()
    }  # fmt: skip


def measure(
    make: Callable[[], Pipeline], label: str, prompt: str, seed: int, frames: int | None, rounds: int, sink: str
) -> tuple[dict[str, Any], list[check.Check]]:
    """The report on the pipeline that `make` loads, and its checks. Where a check is red the report has no numbers."""
    start = time.perf_counter()
    pipeline = make()
    load, loaded_mb = time.perf_counter() - start, memory.settle()
    size = pipeline.height, pipeline.width
    open_sink(sink, pipeline.fps, size).abort()  # a bad sink is refused now rather than after minutes
    # The first chunk of the process includes all set-up.
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
    for _ in range(rounds):  # plain and metered streams alternate, so that both see the same machine
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
    parts_ms, unexplained = part_table(timed)
    metered_ms = 1e3 * float(np.mean([c.total for c in timed]))
    per_chunk = timed[-1].frames
    rows = pipeline.tokenizer.rows if pipeline.tokenizer else 0
    costs = chunk_cost(pipeline, rows, models.vae_config(pipeline), begin if begin > 1 else chunks - 1)
    cost, ms = total(costs), summary(steady_ms)
    # The work of a compiled VAE is not counted, so its time is not either.
    busy = (ms["p50"] if "vae" in costs else sum(parts_ms[name] for name in costs)) / 1e3
    encoder = pipeline.stages.modules().get("text_encoder")
    prompt_cost = text_cost(pipeline.config, rows, len(pipeline.generator.roles()), 1, encoder)
    whole = [run.opening + sum(run.chunks) for run in plain]
    # The VAE's time is taken as a share, because the metered stream of a round is not the plain stream.
    vae = sum(c.parts.get("vae", 0.0) for _, times in metered for c in times)
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
            "first_chunk": 1e3 * (first[0].total - sum(first[0].parts.get(k, 0.0) for k in ("vae", "transfer"))),
            "decode": 1e3 * sum(first[0].parts.get(k, 0.0) for k in ("vae", "transfer")),
        },
        "ttff_warm_ms": 1e3 * float(np.median([run.opening + run.chunks[0] for run in plain])),
        "prompt_ms": 1e3 * float(np.median([opening.get("text", 0.0) for opening, _ in metered])),
        "ms_per_chunk": ms,
        "jitter_ms": float(np.mean(np.abs(np.diff(steady_ms)))) if len(steady_ms) > 1 else 0.0,
        "stages_ms": parts_ms,  # the key of stored results
        "steps_ms": step_times(timed),
        "metered_ms_per_chunk": metered_ms,
        "unexplained": unexplained,
        "peak_memory_mb": peak,
        "memory_mb": memory.breakdown(pipeline, state_bytes, vae_cache, loaded_mb, peak),
        "ceilings": limits.as_dict(),
        "roofline": roofline(parts_ms, costs, limits),
        "text_gflop": prompt_cost.flops / 1e9,
        "gflop_per_chunk": cost.flops / 1e9,
        "floor_ms": 1e3 * sum(limits.floor(c) for c in costs.values()),
        "mfu": limits.mfu(cost, busy),
        "mbu": limits.mbu(cost, busy),
        "timings": {"chunk": quartiles(steady_ms)} | {
            name: quartiles([1e3 * c.parts.get(name, 0.0) for c in timed]) for name in costs
        },
        "commit": report["machine"]["commit"],
        "device": report["machine"]["device"],
    }  # fmt: skip
    return report, checks


def print_report(r: dict[str, Any]) -> None:
    """Print the report for people."""
    ms, split, memory_mb = r["ms_per_chunk"], r["ttff_split_ms"], r["memory_mb"]
    lines = {
        "fps": f"{r['fps']:.2f} all included, {r['fps_without_vae']:.2f} without VAE, "
        f"{r['fps_without_text']:.2f} without text, {r['fps_steady']:.2f} steady",
        "first frame": f"{r['ttff_ms']:.1f} ms cold, {r['ttff_warm_ms']:.1f} ms warm; cold: text {split['text']:.1f}, "
        f"first chunk {split['first_chunk']:.1f}, decode {split['decode']:.1f}; loading took {split['load']:.0f}",
        "ms per chunk": f"p50 {ms['p50']:.2f}, p90 {ms['p90']:.2f}, p99 {ms['p99']:.2f}, max {ms['max']:.2f}, "
        f"jitter {r['jitter_ms']:.2f}; {r['frames_per_chunk']} frames per chunk",
        "denoising calls": ", ".join(f"{step:.2f}" for step in r["steps_ms"]) + " ms",
        "memory": f"{r['peak_memory_mb']:.0f} MB at the peak: "
        + ", ".join(f"{name} {mb:.0f}" for name, mb in memory_mb.items()),
        "ceilings": f"{r['ceilings']['flops'] / 1e9:.1f} GFLOP/s, {r['ceilings']['bytes'] / 1e9:.1f} GB/s in this run",
        "limits": f"MFU {r['mfu']:.1%}, MBU {r['mbu']:.1%}, roofline floor {r['floor_ms']:.2f} ms per chunk",
    }
    print()
    for name, line in lines.items():
        print(f"{name:16} {line}")
    print()
    whole = sum(r["stages_ms"].values())
    rows = []
    for name, value in r["stages_ms"].items():
        line = r["roofline"].get(name, {})
        rows.append({"part": name, "ms": value, "share": f"{value / whole:.1%}"} | {
            key: line.get(key) for key in ("gflop", "mb", "floor_ms", "mfu")})  # fmt: skip
    rows.append({"part": "chunk", "ms": whole, "share": "100%", "gflop": r["gflop_per_chunk"],
                 "floor_ms": r["floor_ms"], "mfu": r["mfu"]})  # fmt: skip
    print(table(rows, 3))


def run(options: Options) -> int:
    options.prepare()
    if options.rounds < 1:
        raise ValueError(f"--rounds: got {options.rounds}, expected at least 1")
    make = partial(options.pipeline, options.preset)
    report, checks = measure(
        make, options.label, options.prompt, options.seed, options.frames, options.rounds, options.sink
    )
    if not options.json:
        print_header(report["machine"], report["stream"])
    if not check.settled(checks, options.json):
        return 1
    if not options.json:
        print_report(report)
    what = report["stream"]
    backend = "" if what["backend"] == "torch" else f"-{what['backend']}"
    saved.emit(options, "stream", report, f"{Path(what['preset']).stem}{backend}")
    return 0
