"""Many streams on one machine: their rate together, the rate of each, and how many hold a frame rate."""

import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from bench.instruments import check, memory, models
from bench.instruments.header import machine, print_header, stream_header
from bench.instruments.spread import quartiles, summary, table
from bench.report import saved
from engine.options import option
from engine.stream import Pipeline, PythonStream


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, models.PresetSource):
    target_fps: float | None = option(None, "frames per second of every stream; default: the model's own")
    max_streams: int = option(64, "the most that are tried")
    seconds: float = option(4.0, "of every trial")
    mode: Literal["threads", "turns"] = option("threads", "a thread for each stream, or one thread for all in turn")


@dataclass(frozen=True)
class Trial:
    """N streams at once. `ms` holds every chunk of every stream; fps is the sum over all streams."""

    streams: int
    fps: float
    each: list[float]  # frames per second of every stream
    ms: list[float]
    worst_p99: float  # of one stream
    fairness: float  # Jain's index: 1 when all get the same, 1 / N when one gets everything
    state_mb: float  # caches and prompt of one stream
    growth_mb: float  # resident memory per stream


def fairness(each: list[float]) -> float:
    """Jain's index of the streams' rates."""
    return float(sum(each) ** 2 / (len(each) * sum(x * x for x in each)))


def trial(
    pipeline: Pipeline, prompt: str, streams: int, *, chunks: int | None = None, seconds: float | None = None,
    mode: str = "threads",
) -> Trial:  # fmt: skip
    """Run `streams` streams for `chunks` chunks each, or for `seconds` seconds.

    threads  every stream has a thread of its own, and the processor's threads are shared out among them
    turns    one thread asks each stream for a chunk in turn
    """
    before = memory.resident_mb()
    opened = [pipeline.stream(prompt, seed=number) for number in range(streams)]
    for stream in opened:  # the first chunks set things up
        stream.next_chunk()
        stream.next_chunk()
    growth = (memory.resident_mb() - before) / streams
    marks: list[list[float]] = [[] for _ in opened]
    frames = [0] * streams
    threads = torch.get_num_threads()
    start = time.perf_counter()

    def going(number: int) -> bool:
        if chunks is not None and len(marks[number]) >= chunks:
            return False
        return seconds is None or time.perf_counter() - start < seconds

    def step(number: int, stream: PythonStream) -> None:
        frames[number] += len(stream.next_chunk())
        marks[number].append(time.perf_counter())

    try:
        if mode == "threads" and streams > 1:
            torch.set_num_threads(max(1, threads // streams))
            failures = _in_threads([lambda n=n, s=s: _until(going, step, n, s) for n, s in enumerate(opened)])
            if failures:
                raise failures[0]
        else:
            while any(going(n) for n in range(streams)):
                for n, stream in enumerate(opened):
                    if going(n):
                        step(n, stream)
    finally:
        torch.set_num_threads(threads)
    gaps = [1e3 * np.diff([start, *found]) for found in marks]
    each = [made / (found[-1] - start) for made, found in zip(frames, marks, strict=True)]
    state = memory.tensor_bytes(opened[0].state) / memory.MB
    for stream in opened:
        stream.close()
    ends = max(found[-1] for found in marks) - start
    return Trial(
        streams, sum(frames) / ends, each, [float(g) for found in gaps for g in found],
        max(float(np.percentile(found, 99)) for found in gaps), fairness(each), state, max(0.0, growth),
    )  # fmt: skip


def _until(going: Any, step: Any, number: int, stream: PythonStream) -> None:
    while going(number):
        step(number, stream)


def _in_threads(jobs: list[Any]) -> list[BaseException]:
    """Run jobs at the same time; returns the exceptions that they raised."""
    failures: list[BaseException] = []

    def guarded(job: Any) -> None:
        try:
            job()
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return failures


def largest(holds: Any, most: int) -> int:
    """The largest N up to `most` for which holds(N) is true, provided that no N above a failing one holds."""
    good, bad = 0, None
    n = 1
    while bad is None and n <= most:
        if holds(n):
            good, n = n, min(2 * n, most) if n < most else most + 1
        else:
            bad = n
    while bad is not None and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def run(options: Options) -> int:
    options.prepare()
    if options.seconds <= 0 or options.max_streams < 1 or (options.target_fps or 1) <= 0:
        raise ValueError(f"got {options.seconds} seconds, {options.max_streams} streams, {options.target_fps} fps, "
                         "expected positive numbers")  # fmt: skip
    pipeline = options.pipeline(options.preset)
    if check.refused(check.run(pipeline, options.prompt, options.seed)):
        return 1
    target = options.target_fps or pipeline.fps
    trials: dict[int, Trial] = {}

    def holds(count: int) -> bool:
        trials[count] = found = trial(pipeline, options.prompt, count, seconds=options.seconds, mode=options.mode)
        print(f"{count} streams: {found.fps:.1f} fps together, slowest {min(found.each):.1f}", file=sys.stderr)
        return min(found.each) >= target

    best = largest(holds, options.max_streams)
    where = machine(pipeline.device)
    points: list[dict[str, Any]] = [
        {"streams": t.streams, "fps": t.fps, "slowest_fps": min(t.each), "ms_per_chunk": summary(t.ms),
         "worst_p99_ms": t.worst_p99, "fairness": t.fairness, "state_mb": t.state_mb, "growth_mb": t.growth_mb}
        for _, t in sorted(trials.items())
    ]  # fmt: skip
    result = {
        "machine": where, "stream": stream_header(pipeline, options.label), "target_fps": target, "mode": options.mode,
        "streams_at_target": best, "capped": best == options.max_streams, "points": points,
        "timings": {f"{t.streams} streams": quartiles(t.ms) for t in trials.values()},
        "device": where["device"], "commit": where["commit"],
    }  # fmt: skip
    if not options.json:
        print_header(where, result["stream"])
        rows = [{k: p[k] for k in p if k != "ms_per_chunk"} | {"p50_ms": p["ms_per_chunk"]["p50"]} for p in points]
        print("\n" + table(rows))
        more = " (the most that was tried)" if result["capped"] else ""
        print(f"\n{best} streams hold {target:g} frames per second each{more}")
    saved.emit(options, "load", result)
    return 0
