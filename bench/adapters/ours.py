"""This engine as an adapter, so that both sides of a race are measured in the same way: preset self-forcing.

python -m bench.adapters.ours      # speaks JSON lines on stdin and stdout
"""

from collections.abc import Iterator
from typing import Any

import torch

import engine as greedy
from bench.adapters import given
from bench.adapters.protocol import Engine, serve
from bench.instruments.flops import steady_index
from bench.instruments.header import precision_of
from bench.instruments.meter import Meter, context_of, metered
from engine import threads
from engine.config import Precision, Runtime
from engine.runtime.device import PRECISIONS
from engine.stream import Stream

# `dtype` of open -> precision, and whether attention is FP8 as well
DTYPES: dict[str, tuple[Precision, bool]] = {
    **{name: (name, False) for name in PRECISIONS},
    "fp8-attention": ("fp8", True),
}
DECODING = ("vae", "transfer")  # the meter's parts; transfer is the copies to and from the host
CONTEXT = (context_of("dit"), "cache")


class Ours:
    def __init__(self, settings: dict[str, Any]) -> None:
        precision, fp8_attention = DTYPES[settings["dtype"]]
        if "threads" in settings:
            threads.use(int(settings["threads"]))
        runtime = Runtime(device=settings["device"], precision=precision, fp8_attention=fp8_attention)
        self.pipeline = given.pipeline(settings, runtime)
        self.text = given.text(settings, self.pipeline.config)
        self.fills = steady_index(self.pipeline.preset)
        self._long: Stream | None = None
        self._meter = Meter(self.pipeline.device)

    def generate(self, prompt: str, seed: int, frames: int) -> Iterator[int]:
        made = 0
        with self.pipeline.stream(prompt, seed=seed) as stream:
            while made < frames:
                made = min(made + len(stream.next_chunk()), frames)
                yield made

    def warm(self) -> dict[str, Any]:
        stream = self._stream()
        for _ in range(self.fills):
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
                parts, _ = self._meter.take()
                context = sum(parts.get(part, 0.0) for part in CONTEXT)
                decode = sum(parts.get(part, 0.0) for part in DECODING)
                for name, seconds in zip(found, (total - context - decode, context, decode), strict=True):
                    found[name].append(1e3 * seconds)
        return found

    def latents(self, seed: int, chunks: int, file: str) -> None:
        with self.pipeline.stream(self._prompt(), seed=seed) as stream:
            given.write_latents(file, [stream.next_latent() for _ in range(chunks)])

    def _stream(self) -> Stream:
        """The long stream; it begins with the first request for it."""
        if self._long is None:
            self._long = self.pipeline.stream(self._prompt())
        return self._long

    def _prompt(self) -> torch.Tensor:
        if self.text is None:
            raise ValueError("open: got no text, expected an embedding")
        return self.text


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
