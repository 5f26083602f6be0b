"""Where a chunk's time goes. The loop has no timer: the meter wraps the functions that the loop calls.

A part is a row of the table. At any moment exactly one part is charged: the part of the innermost call. Between calls
the loop itself runs, and the call before tells what it does: after noise it moves the draws to the device (transfer),
after a denoising call it runs the solver, after the VAE it moves frames to the host (transfer). The rest is `other`.
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

from engine.generators import FAMILIES
from engine.generators.base import Generator, Geometry
from engine.model.cache import RingCache
from engine.runtime.passes import Pass, Stages
from engine.runtime.transfer import SideStream
from engine.sampling.noise import NoiseSource
from engine.shared import Shared
from engine.stream import Pipeline, PythonStream

# Function of a backend -> part. A transformer's pass is the part that its graph names.
PART_OF = {
    "encode_text": "text", "prepare_text": "text",
    "vae_first": "vae", "vae_steady": "vae", "vae_encode_step": "vae",
}  # fmt: skip


def context_of(graph: str) -> str:
    """The part of a denoising pass that runs on a finished chunk, to write its keys and values."""
    return f"{graph}_context"


def joined_of(graph: str) -> str:
    """The part of a denoising pass that takes the context pass of the chunk before along."""
    return f"{graph}+context"


def parts_of(family: type[Generator]) -> tuple[str, ...]:
    """The parts that a family's passes are."""
    parts: list[str] = []
    for graph, timed in ((kind.graph, kind.timed) for kind in family.passes):
        parts += (context_of(graph), joined_of(graph), graph) if timed else (graph,)
    return tuple(dict.fromkeys(parts))


PASSES = tuple(part for family in FAMILIES.values() for part in parts_of(family))
DENOISING = tuple(kind.graph for family in FAMILIES.values() for kind in family.passes if kind.timed)
_AFTER = {"noise": "transfer", "denoise": "solver", "vae": "transfer"}


class Meter:
    """Seconds of each part since the last `take`, and of each call of a part, inner calls included, in order."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self._stack = ["other"]
        self._seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, list[float]] = defaultdict(list)
        self.vae_cache_bytes = 0
        self._mark = self.now()

    def now(self) -> float:
        """The clock, read after the device has finished its work."""
        if self._wait is not None:
            self._wait()
        return time.perf_counter()

    def _charge(self) -> float:
        now = self.now()
        self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now
        return now

    @contextmanager
    def span(self, call: str, part: str) -> Iterator[None]:
        """Charge the code inside to `part`; `call` tells what the loop does next."""
        start = self._charge()
        self._stack.append(part)
        try:
            yield
        finally:
            end = self._charge()
            self._stack.pop()
            self.calls[part].append(end - start)
            if len(self._stack) == 1:
                self._stack[0] = _AFTER.get(call, "other")

    def take(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Seconds and calls since the last `take`. It is called between two chunks and starts afresh."""
        self._charge()
        seconds, calls = dict(self._seconds), dict(self.calls)
        self._seconds, self.calls = defaultdict(float), defaultdict(list)
        self._stack = ["other"]
        return seconds, calls

    def committing(self) -> bool:
        return "cache" in self._stack


class MeteredStages:
    """A backend whose functions are timed. A denoising pass that only fills the caches has a part of its own."""

    def __init__(self, stages: Stages, meter: Meter) -> None:
        self._stages, self._meter = stages, meter

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stages, name)
        return self._timed(PART_OF[name], found) if name in PART_OF else found

    def run(self, step: Pass, cache: RingCache, text_kv: Any) -> Tensor:
        part = step.kind.graph
        named = part
        if step.context is not None:
            named = joined_of(part)
        elif step.kind.timed and self._meter.committing():
            named = context_of(part)
        with self._meter.span(part, named):
            return self._stages.run(step, cache, text_kv)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        meter = self._meter

        def run(*args: Any) -> Any:
            with meter.span(part, part):
                result = call(*args)
            if part == "vae" and isinstance(result, tuple):
                meter.vae_cache_bytes = sum(t.nbytes for t in result[1] if isinstance(t, Tensor))
            return result

        return run


class MeteredGenerator:
    """Times denoise and commit. Outside model calls a commit is `cache`, and a denoising call `other`."""

    def __init__(self, generator: Generator, meter: Meter) -> None:
        self._generator, self._meter = generator, meter

    def open(self, geometry: Geometry, text_kv: Any) -> Any:
        return self._generator.open(geometry, text_kv)

    def denoise(self, x: Tensor, t: float, state: Any, short: bool = False) -> Tensor:
        with self._meter.span("denoise", "other"):
            return self._generator.denoise(x, t, state, short)

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
    """A pipeline that charges a meter. It shares its weights with the pipeline that it was made from."""

    meter: Meter = field(kw_only=True)
    plain: Shared = field(kw_only=True)

    @classmethod
    def of(cls, pipeline: Shared, meter: Meter) -> "MeteredPipeline":
        values = {f.name: getattr(pipeline, f.name) for f in fields(Pipeline)}
        values["stages"] = cast(Stages, MeteredStages(pipeline.stages, meter))
        return cls(**values, meter=meter, plain=pipeline)

    @cached_property
    def side(self) -> SideStream:
        """The plain pipeline's queue: memory that was freed on one queue is not used again on another."""
        return self.plain.side

    @cached_property
    def generator(self) -> Generator:
        return cast(Generator, MeteredGenerator(super().generator, self.meter))

    def stream(self, *args: Any, **kwargs: Any) -> PythonStream:
        stream = super().stream(*args, **kwargs)
        stream.noise = MeteredNoise(stream.noise, self.meter)
        return stream


@contextmanager
def metered(stream: PythonStream, meter: Meter) -> Iterator[PythonStream]:
    """The same stream, caches and graphs included, charges the meter until the end of the block."""
    pipeline, noise = stream.pipeline, stream.noise
    meter.now()  # nothing of the plain stream's work is left on the device
    stream.pipeline, stream.noise = MeteredPipeline.of(pipeline, meter), MeteredNoise(noise, meter)
    try:
        yield stream
    finally:
        meter.now()
        stream.pipeline, stream.noise = pipeline, noise


@dataclass
class ChunkTimes:
    """One chunk: its seconds measured from outside, the seconds of each part, the seconds of each call of a part."""

    total: float
    parts: dict[str, float]
    calls: dict[str, list[float]]
    frames: int

    @property
    def residual(self) -> float:
        """Share of the chunk that no part explains (clock reads, the meter's own bookkeeping)."""
        return 1 - sum(self.parts.values()) / self.total


def metered_chunks(
    pipeline: Pipeline, prompt: str | Tensor, chunks: int, seed: int = 0,
    write: Callable[[Any], None] = lambda frames: None,
) -> tuple[list[ChunkTimes], dict[str, float], Meter]:  # fmt: skip
    """Stream `chunks` chunks under a meter. Returns their times, the seconds before the first, and the meter."""
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
