"""This engine as an adapter, so that both sides of a race are measured in the same way: preset self-forcing.

python -m bench.adapters.ours      # speaks JSON lines on stdin and stdout
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor

import engine as greedy
from bench.adapters import given
from bench.adapters.protocol import Engine, serve
from bench.instruments.flops import steady_index
from bench.instruments.header import precision_of
from bench.instruments.meter import Meter, context_of, joined_of, metered
from engine import threads
from engine.config import Precision, Runtime
from engine.generators.base import Generator
from engine.runtime.device import DTYPES as TIMESTEPS
from engine.runtime.device import PRECISIONS
from engine.stream import Pipeline, PythonStream

# `dtype` of open -> precision, and whether attention is FP8 as well
DTYPES: dict[str, tuple[Precision, bool]] = {
    **{name: (name, False) for name in PRECISIONS},
    "fp8-attention": ("fp8", True),
}
DECODING = ("vae", "transfer")  # the meter's parts; transfer is the copies to and from the host
CONTEXT = (context_of("dit"), "cache")


class Rounded:
    """A generator whose network gets timesteps rounded to a dtype, as the other side's does. Levels stay exact."""

    def __init__(self, generator: Generator, dtype: torch.dtype) -> None:
        self._generator, self._dtype = generator, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def denoise(self, x: Tensor, t: float, state: Any, short: bool = False) -> Tensor:
        return self._generator.denoise(x, float(torch.tensor(t, dtype=self._dtype)), state, short)


@dataclass(frozen=True)
class RoundedPipeline(Pipeline):
    """A pipeline that shares its weights with another and rounds timesteps."""

    timesteps: torch.dtype = field(kw_only=True)

    @classmethod
    def of(cls, pipeline: Pipeline, dtype: torch.dtype) -> "RoundedPipeline":
        return cls(**{f.name: getattr(pipeline, f.name) for f in fields(Pipeline)}, timesteps=dtype)

    @cached_property
    def generator(self) -> Generator:
        return cast(Generator, Rounded(super().generator, self.timesteps))


class Ours:
    def __init__(self, settings: dict[str, Any]) -> None:
        precision, fp8_attention = DTYPES[settings["dtype"]]
        if "threads" in settings:
            threads.use(int(settings["threads"]))
        runtime = Runtime(device=settings["device"], precision=precision, fp8_attention=fp8_attention)
        self.pipeline = given.pipeline(settings, runtime)
        self.text = given.text(settings, self.pipeline.config)
        self.fills = steady_index(self.pipeline.preset)
        self._long: PythonStream | None = None
        self._meter = Meter(self.pipeline.device)

    def generate(self, prompt: str, seed: int, frames: int) -> Iterator[int]:
        made = 0
        with self.pipeline.stream(prompt, seed=seed) as stream:
            while made < frames:
                made = min(made + len(stream.next_chunk()), frames)
                yield made

    def warm(self) -> dict[str, Any]:
        stream = self._stream()
        while stream.state.index < self.fills:
            stream.next_chunk()
        self.stages(2)
        for _ in self.chunks(2):
            pass
        return {"captured": getattr(self.pipeline.stages, "captured", None)}

    def chunks(self, chunks: int) -> Iterator[int]:
        stream, made = self._stream(), 0
        for _ in range(chunks):
            made += len(stream.next_chunk())
            yield made
        self._meter.now()  # what the stream makes ahead must not run while others are timed

    def stages(self, chunks: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"denoise": [], "context": [], "decode": []}
        with metered(self._stream(), self._meter) as stream:
            for _ in range(chunks):
                self._meter.take()
                start = self._meter.now()
                stream.next_chunk()
                total = self._meter.now() - start
                parts, calls = self._meter.take()
                context = sum(parts.get(part, 0.0) for part in CONTEXT) + _beyond_a_step(calls)
                decode = sum(parts.get(part, 0.0) for part in DECODING)
                for name, seconds in zip(found, (total - context - decode, context, decode), strict=True):
                    found[name].append(1e3 * seconds)
        return found

    def latents(self, seed: int, chunks: int, file: str, timesteps: str) -> None:
        stream = self._begin(seed)
        stream.pipeline = RoundedPipeline.of(self.pipeline, TIMESTEPS[timesteps])
        given.write_latents(file, [stream.next_latent() for _ in range(chunks)])
        stream.pipeline = self.pipeline

    def _stream(self) -> PythonStream:
        """The long stream; it begins with the first request for it."""
        return self._long or self._begin(0)

    def _begin(self, seed: int) -> PythonStream:
        """Begin the long stream anew."""
        if self.text is None:
            raise ValueError("open: got no text, expected an embedding")
        self._long = self.pipeline.stream(self.text, seed=seed)
        return self._long


def _beyond_a_step(calls: Mapping[str, list[float]]) -> float:
    """Seconds that a joined pass takes more than a denoising call: what the context pass in it costs."""
    joined, steps = calls.get(joined_of("dit"), []), calls.get("dit", [])
    return max(0.0, sum(joined) - len(joined) * median(steps)) if joined and steps else 0.0


def build(settings: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    made = Ours(settings)
    preset = made.pipeline.preset
    about = (
        f"this engine {greedy.__version__}, {precision_of(made.pipeline)}, {len(preset.steps[0])} steps, chunks of "
        f"{preset.chunk}, window {preset.window}"
    )
    return made, {"about": about, "fills": made.fills, "backend": type(made.pipeline.stages).__name__}


if __name__ == "__main__":
    serve(build)
