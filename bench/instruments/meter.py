"""Where a chunk's time goes, without a timer in the loop: everything the loop calls is wrapped.

Time is exclusive: at any moment exactly one label is charged, the innermost call's. Between calls the loop itself
runs; what it does there is known from the call before: after noise the draws go to the device (transfer), after a
denoising call the solver runs, after the VAE the frames go to the host (transfer). The rest is `other`.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from engine.generators.base import Generator, Geometry
from engine.model.cache import RingCache
from engine.runtime.passes import Pass, Stages
from engine.sampling.noise import NoiseSource
from engine.stream import Pipeline, Stream

# Function of the backend -> label in the table; a transformer's pass has the name of its graph.
LABELS = {
    "encode_text": "text", "prepare_text": "text", "vae_first": "vae", "vae_steady": "vae", "vae_encode": "vae",
}  # fmt: skip
MODEL = ("etm", "sdd_context", "sdd", "dit", "dit_context", "vae")  # labels of model calls
_AFTER = {"noise": "transfer", "denoise": "solver", "vae": "transfer"}


class Meter:
    """Seconds by label since the last `take`; calls by label, inclusive, in order."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self._stack = ["other"]
        self._seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, list[float]] = defaultdict(list)
        self.vae_cache_bytes = 0
        self._mark = self.now()

    def now(self) -> float:
        """The clock, once the device has done what it was given."""
        if self._wait is not None:
            self._wait()
        return time.perf_counter()

    def _charge(self) -> float:
        now = self.now()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now
        return now

    @contextmanager
    def span(self, call: str, label: str) -> Iterator[None]:
        """Charge what runs inside to `label`; `call` says what the loop does next."""
        start = self._charge()
        self._stack.append(label)
        try:
            yield
        finally:
            end = self._charge()
            self._stack.pop()
            self.calls[label].append(end - start)
            if len(self._stack) == 1:
                self._stack[0] = _AFTER.get(call, "other")

    def take(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Everything since the last call, and a fresh start: the boundary between two chunks."""
        self._charge()
        seconds, calls = dict(self._seconds), dict(self.calls)
        self._seconds, self.calls = defaultdict(float), defaultdict(list)
        self._stack = ["other"]
        return seconds, calls

    def committing(self) -> bool:
        return "cache" in self._stack


class MeteredStages:
    """A backend whose functions are timed; a causal model's cache pass is told from its denoising steps."""

    def __init__(self, stages: Stages, meter: Meter) -> None:
        self._stages, self._meter = stages, meter

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stages, name)
        return self._timed(LABELS[name], found) if name in LABELS else found

    def run(self, step: Pass, cache: RingCache, text_kv: Any) -> Tensor:
        label = step.kind.graph
        cache_pass = label == "dit" and self._meter.committing()
        with self._meter.span(label, "dit_context" if cache_pass else label):
            return self._stages.run(step, cache, text_kv)

    def _timed(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        meter = self._meter

        def run(*args: Any) -> Any:
            with meter.span(label, label):
                result = call(*args)
            if label == "vae" and isinstance(result, tuple):
                meter.vae_cache_bytes = sum(t.nbytes for t in result[1] if isinstance(t, Tensor))
            return result

        return run


class MeteredGenerator:
    """denoise and commit, timed; a commit's own time is the caches' (slot copies), a denoising call's own is other."""

    def __init__(self, generator: Generator, meter: Meter) -> None:
        self._generator, self._meter = generator, meter

    def open(self, geometry: Geometry, text_kv: Any) -> Any:
        return self._generator.open(geometry, text_kv)

    def denoise(self, x: Tensor, t: float, state: Any) -> Tensor:
        with self._meter.span("denoise", "other"):
            return self._generator.denoise(x, t, state)

    def commit(self, x: Tensor, state: Any, supplied: bool = False) -> None:
        with self._meter.span("commit", "cache"):
            self._generator.commit(x, state, supplied)

    def set_text(self, text_kv: Any, state: Any, recommit: bool = True) -> None:
        self._generator.set_text(text_kv, state, recommit)


class MeteredNoise:
    def __init__(self, source: NoiseSource, meter: Meter) -> None:
        self._source, self._meter = source, meter

    def draw(self, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
        with self._meter.span("noise", "noise"):
            return self._source.draw(chunk, count, shape)


@dataclass(frozen=True)
class MeteredPipeline(Pipeline):
    """A pipeline that charges a meter; weights are shared with the one it was made from."""

    meter: Meter = field(kw_only=True)

    @classmethod
    def of(cls, pipeline: Pipeline, meter: Meter) -> "MeteredPipeline":
        parts = {f.name: getattr(pipeline, f.name) for f in fields(Pipeline)}
        parts["stages"] = cast(Stages, MeteredStages(pipeline.stages, meter))
        return cls(**parts, meter=meter)

    @cached_property
    def generator(self) -> Generator:
        return cast(Generator, MeteredGenerator(super().generator, self.meter))

    def stream(self, *args: Any, **kwargs: Any) -> Stream:
        stream = super().stream(*args, **kwargs)
        stream.noise = MeteredNoise(stream.noise, self.meter)
        return stream


@dataclass
class ChunkTimes:
    """One chunk: seconds from outside, seconds by label, calls by label."""

    total: float
    stages: dict[str, float]
    calls: dict[str, list[float]]
    frames: int

    @property
    def residual(self) -> float:
        """Share of the chunk that no label explains (clock reads, the meter's own bookkeeping)."""
        return 1 - sum(self.stages.values()) / self.total


def metered_chunks(
    pipeline: Pipeline, prompt: str | Tensor, chunks: int, seed: int = 0,
    write: Callable[[Any], None] = lambda frames: None,
) -> tuple[list[ChunkTimes], dict[str, float], Meter]:  # fmt: skip
    """Stream `chunks` chunks under a meter: their times, the seconds before the first, and the meter."""
    meter = Meter(pipeline.device)
    with MeteredPipeline.of(pipeline, meter).stream(prompt, seed=seed) as stream:
        opening, _ = meter.take()
        times = []
        for _ in range(chunks):
            start = meter.now()
            frames = stream.next_chunk()
            with meter.span("sink", "sink"):
                write(frames)
            total = meter.now() - start
            seconds, calls = meter.take()
            times.append(ChunkTimes(total, seconds, calls, len(frames)))
    return times, opening, meter
