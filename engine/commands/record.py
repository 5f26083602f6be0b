"""Writes a stream to a sink: switches what is due, shows progress, measures, and ends well where a signal comes."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.commands.interrupt import Interrupt
from engine.commands.job import Job
from engine.commands.notes import Notes
from engine.commands.prompts import Prompts
from engine.commands.sources import Followed
from engine.media.sinks import Sink
from engine.runtime.streams import SourceEnded, Stream


@dataclass
class Times:
    """When a stream made its chunks."""

    start: float
    begun: float
    ttff: float = 0.0
    chunks: list[float] = field(default_factory=list)

    def report(self, frames: int, fps: float, stopped: bool) -> dict[str, Any]:
        """The measurements of a stream that ends now."""
        spent = time.perf_counter() - self.begun
        steady = [1e3 * seconds for seconds in self.chunks[1:] or self.chunks] or [0.0]
        return {
            "frames": frames,
            "fps": frames / spent,
            "ttff_ms": 1e3 * self.ttff,
            "ms_per_chunk": {"p50": float(np.percentile(steady, 50)), "p99": float(np.percentile(steady, 99))},
            "chunks": len(self.chunks),
            "seconds": spent,
            "realtime": frames / spent / fps,
            "stopped": stopped,
        }


@dataclass
class Recording:
    """A run from its first frame on.

    strengths  frame and new strengths of adapters, by frame
    """

    job: Job
    sink: Sink
    limit: int | None
    prompts: Prompts
    strengths: list[tuple[int, dict[str, float]]]
    interrupt: Interrupt
    console: Console
    notes: Notes
    source: Followed | None = None

    def make(self, stream: Stream, times: Times) -> bool:
        """Write chunks until the limit; returns whether a signal ended it before.

        After a signal it still writes what is decoded, unless another signal comes. KeyboardInterrupt where there is
        no frame yet.
        """
        before = 0  # frames that were written before the last chunk
        handed = 0  # chunks that were written
        try:
            with self._progress() as progress:
                task = progress.add_task("streaming", total=self.limit, rate=0.0, ttff=0.0)
                while self.limit is None or self.interrupt.written < self.limit:
                    self._switch(stream)
                    if self.source is not None:
                        self.notes.take(self.source.notes)
                    chunk_start = time.perf_counter()
                    chunk = stream.next_chunk()
                    now = time.perf_counter()
                    self.prompts.took(self.interrupt.written)
                    times.chunks.append(now - chunk_start)
                    times.ttff = times.ttff or now - times.start
                    self._write(chunk)
                    before, handed = self.interrupt.written, stream.handed
                    rate = self.interrupt.written / (time.perf_counter() - times.begun)
                    progress.update(task, completed=self.interrupt.written, rate=rate, ttff=1e3 * times.ttff)
                self.interrupt.end()
        except SourceEnded as error:
            if not self.interrupt.written:
                raise ValueError(str(error)) from None
            self.interrupt.end()
        except KeyboardInterrupt:
            if stream.handed > handed:  # handed over, but not written to the end
                self._write(stream.last[self.interrupt.written - before :])
            if not self.interrupt.hurry:
                self._write(self._rest(stream))
            if not self.interrupt.written:
                raise
            self.interrupt.end()
            return True
        for frame, strengths in self.strengths:
            names = ", ".join(f"{name}={strength:g}" for name, strength in strengths.items())
            self.notes.add(f"--adapter-at {frame}f {names} has no effect: the last chunk began before it")
        self.prompts.finish()
        return False

    def _rest(self, stream: Stream) -> np.ndarray:
        """The frames that are decoded; none of a stream that the signal has spoiled."""
        try:
            return stream.rest()
        except ValueError:
            return np.zeros((0, 1, 1, 3), np.uint8)

    def _switch(self, stream: Stream) -> None:
        recommit = not self.job.video.no_recommit
        if (prompt := self.prompts.due(self.interrupt.written)) is not None:
            stream.set_prompt(prompt, recommit=recommit, transition=self.job.video.transition)
        due: dict[str, float] = {}
        while self.strengths and self.strengths[0][0] <= self.interrupt.written:
            frame, strengths = self.strengths.pop(0)
            for name in strengths.keys() & due.keys():
                why = f"{name}={strengths[name]:g} at {frame}f replaces it before a chunk begins"
                self.notes.add(f"--adapter-at {name}={due[name]:g} has no effect: {why}")
            due |= strengths
        if due:
            stream.set_adapters(due, recommit=recommit)

    def _write(self, frames: np.ndarray) -> None:
        scale = self.job.output.scale
        for frame in frames[: None if self.limit is None else self.limit - self.interrupt.written]:
            if self.interrupt.hurry:
                break
            self.interrupt.write(self.sink, frame.repeat(scale, axis=0).repeat(scale, axis=1))

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} frames"),
            TextColumn("{task.fields[rate]:.1f} fps  first frame {task.fields[ttff]:.0f} ms"), TimeElapsedColumn(),
        )  # fmt: skip
        hidden = self.job.output.quiet or not self.console.is_terminal
        return Progress(*columns, console=self.console, disable=hidden)
