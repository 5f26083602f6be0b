"""Which kernels a chunk's time goes to: torch's profiler over a few steady chunks, kernel by kernel."""

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.instruments import models
from bench.instruments.flops import steady_index
from engine.stream import Pipeline

CHUNKS = 3
NAMED = 40  # kernels with a line of their own; the others are summed up
WIDTH = 90  # characters of a kernel's name


def kernels_of_a_chunk(pipeline: Pipeline) -> dict[str, Any]:
    """Milliseconds and launches of every kernel per steady chunk, the largest first.

    busy_ms   how long at least one kernel ran
    sum_ms    the kernels' own times; more than busy_ms where the VAE overlaps the transformers
    span_ms   from the first kernel's begin to the last one's end
    On a processor the kernels are torch's operations.
    """
    gpu = pipeline.device.type == "cuda"
    with pipeline.stream(models.PROMPT, seed=0) as made:
        for _ in range(steady_index(pipeline.preset)):
            made.next_chunk()
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU], acc_events=True) as recorded:
            for _ in range(CHUNKS):
                made.next_chunk()
            if gpu:
                torch.cuda.synchronize()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [event for event in recorded.events() or () if event.device_type == wanted]
    totals: dict[str, list[float]] = {}
    for event in events:
        own = event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
        entry = totals.setdefault(event.name, [0, 0.0])
        entry[0] += 1
        entry[1] += own
    ordered = sorted(totals.items(), key=lambda item: -item[1][1])
    rows = [{"kernel": name[:WIDTH], "launches": count / CHUNKS, "ms": us / 1e3 / CHUNKS}
            for name, (count, us) in ordered[:NAMED]]  # fmt: skip
    rest = [entry for _, entry in ordered[NAMED:]]
    rows.append({"kernel": "others", "launches": sum(count for count, _ in rest) / CHUNKS,
                 "ms": sum(us for _, us in rest) / 1e3 / CHUNKS})  # fmt: skip
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "kernels": rows,
        "busy_ms": busy / 1e3 / CHUNKS,
        "sum_ms": sum(us for _, us in totals.values()) / 1e3 / CHUNKS,
        "span_ms": (until - spans[0][0]) / 1e3 / CHUNKS if spans else 0.0,
    }
