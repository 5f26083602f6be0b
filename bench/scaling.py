"""Does a stream's cost stay constant? Time and resident memory a chunk, early against late in one stream."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil

from engine.stream import Pipeline


class LoopTimer:
    """Time inside model calls, by wrapping a pipeline's stages: what is left of a chunk is the loop's own."""

    STAGES = ("etm", "sdd_context", "sdd", "dit", "vae_first", "vae_steady")

    def __init__(self, stages: Any) -> None:
        self._stages = stages
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stages, name)
        return self._timed(found) if name in self.STAGES else found

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return run


def _resident_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def scaling(pipeline: Pipeline, prompt: str, chunks: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield {"chunk": i} for progress, then the report.

    The first twentieth (at least 10 chunks) is warm-up; of the rest the first and the last quarter are compared.
    """
    if chunks < 40:
        raise ValueError(f"chunks: got {chunks}, expected at least 40")
    timer = LoopTimer(pipeline.stages)
    timed = replace(pipeline, stages=timer)
    warm = max(10, chunks // 20)
    quarter = (chunks - warm) // 4
    seconds, model, resident = [], [], []
    with timed.stream(prompt, seed=seed) as stream:
        for index in range(chunks):
            if index == warm:
                gc.collect()
            before, start = timer.seconds, time.perf_counter()
            stream.next_chunk()
            seconds.append(time.perf_counter() - start)
            model.append(timer.seconds - before)
            resident.append(_resident_mb())
            yield {"chunk": index + 1}
    early, late = seconds[warm : warm + quarter], seconds[-quarter:]
    ms = [1e3 * value for value in seconds[warm:]]
    yield {
        "time_ratio": statistics.median(late) / statistics.median(early),
        "memory_growth_mb": statistics.median(resident[-quarter:]) - statistics.median(resident[warm : warm + quarter]),
        "chunks": chunks,
        "ms_per_chunk_early": 1e3 * statistics.median(early),
        "ms_per_chunk_late": 1e3 * statistics.median(late),
        "ms_per_chunk_p50": statistics.median(ms),
        "loop_overhead": 1 - sum(model[warm:]) / sum(seconds[warm:]),
        "resident_mb": resident[-1],
        "preset": pipeline.preset_name,
        "backend": pipeline.stages.name,
        "device": str(pipeline.device),
    }
