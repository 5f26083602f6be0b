"""One stream for minutes or hours, with prompt switches: does memory grow, does a chunk take longer, stay frames right?

The same frames again: fresh streams give those of the start after each tenth, and so does the long stream when it is
flushed. Then a stream opened anew is given the same prompts, as far as a tenth of the run's time lasts. Exit status 1
if a limit is broken.
"""

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bench.instruments import check, models
from bench.instruments.check import Check
from bench.instruments.header import machine, print_header, stream_header
from bench.instruments.spread import table
from bench.report import saved
from bench.soak.figures import PARTS, Figures, verdict
from engine.bundles.native import NativePipeline
from engine.bundles.registry import BACKENDS
from engine.loader import load_bundle
from engine.options import option
from engine.runtime.streams import Stream
from engine.stream import Pipeline

OTHERS = (
    "a blue square moving down quickly on a white background",
    "a yellow triangle moving left slowly on a black background",
    "a red circle moving up quickly on a gray background",
)
FRESH = 8  # chunks of each fresh stream; its prompt switches half-way
FEWEST = 20  # chunks that a run must have


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, models.PresetSource):
    backend: str | None = option(
        None, "torch; with --bundle its first that runs here", choices=("torch", *BACKENDS, "native")
    )
    minutes: float = option(10.0, "length of the run")
    fps: float | None = option(None, "pace; default: as fast as it can", metavar="F")
    switch: int = option(40, "chunks from one prompt to the next", metavar="CHUNKS")


@dataclass(frozen=True)
class Script:
    """A stream's seed, and its prompts in turn."""

    seed: int
    prompts: Sequence[str]
    switch: int  # chunks from one prompt to the next

    def prompt(self, chunk: int) -> str:
        return self.prompts[chunk // self.switch % len(self.prompts)]

    def open(self, pipeline: Pipeline | NativePipeline) -> Stream:
        return pipeline.stream(self.prompt(0), seed=self.seed)

    def next(self, stream: Stream, chunk: int) -> np.ndarray:
        """Chunk number `chunk`, under its prompt."""
        if chunk and chunk % self.switch == 0:
            stream.set_prompt(self.prompt(chunk))
        return stream.next_chunk()


def digest_of(frames: np.ndarray) -> int:
    """The first 64 bits of the frames' sha256."""
    return int.from_bytes(hashlib.sha256(frames.tobytes()).digest()[:8])


def beginning(pipeline: Pipeline | NativePipeline, script: Script) -> list[int]:
    """The digests of a fresh stream's first chunks, with a prompt switch half-way."""
    short = Script(script.seed, script.prompts, FRESH // 2)
    with short.open(pipeline) as stream:
        return [digest_of(short.next(stream, chunk)) for chunk in range(FRESH)]


def flushed(stream: Stream, script: Script) -> list[int]:
    """The digests of a stream's first chunks, once it has started over."""
    stream.set_prompt(script.prompt(0))
    stream.flush()
    return [digest_of(script.next(stream, chunk)) for chunk in range(FRESH)]


def soak(
    pipeline: Pipeline | NativePipeline, script: Script, seconds: float, fps: float | None = None
) -> tuple[dict[str, Any], list[Check]]:
    """Stream for `seconds`, paced at `fps` frames per second if given. Returns the report and the checks."""
    expected = beginning(pipeline, script)
    fresh, late, frames = list[bool](), 0, 0
    with script.open(pipeline) as stream:
        figures = Figures(pipeline.device, seconds)
        due = figures.begun
        while (now := figures.seconds()) < seconds:
            if now >= seconds * (len(fresh) + 1) / PARTS:
                begun = time.perf_counter()
                fresh.append(beginning(pipeline, script) == expected)
                print(f"{len(fresh)} of {PARTS} parts, {len(figures.wall)} chunks", file=sys.stderr)
                figures.paused += time.perf_counter() - begun
                due += time.perf_counter() - begun
            start, cpu = time.perf_counter(), time.process_time()
            chunk = script.next(stream, len(figures.wall))
            took, used = time.perf_counter() - start, time.process_time() - cpu
            figures.add(took, used, digest_of(chunk))
            frames += len(chunk)
            if fps:
                due += len(chunk) / fps
                left = due - time.perf_counter()
                late += left < 0
                due = max(due, time.perf_counter())  # a late chunk moves all that follow
                time.sleep(max(0.0, left))
        figures.sample()
        spent = figures.seconds()
        anew = flushed(stream, script) if len(figures.wall) >= FEWEST else []
    if len(figures.wall) < FEWEST:
        raise ValueError(f"--minutes: got {len(figures.wall)} chunks in {seconds:g} s, expected at least {FEWEST}")
    fresh.append(beginning(pipeline, script) == expected)
    numbers, checks = verdict(figures)
    again, replay = replayed(pipeline, script, figures, max(10.0, seconds / PARTS))
    good = f"{sum(fresh)} of {len(fresh)} give the frames of the start"
    equal = sum(a == b for a, b in zip(anew, figures.digests[:FRESH], strict=True))
    flush = Check("flush", equal == FRESH, f"{equal} of the first {FRESH} chunks come again from the same stream")
    checks += [Check("fresh streams", all(fresh), good), flush, replay]
    report = {
        "seconds": spent, "pace_fps": fps, "switch": script.switch, "chunks": len(figures.wall), "frames": frames,
        "fps": frames / spent, "late_chunks": late, "replayed_chunks": again, "tenths": figures.tenths(), **numbers,
        "checks": [asdict(c) for c in checks], "passed": all(c.passed for c in checks),
        "samples": [asdict(sample) for sample in figures.samples],
    }  # fmt: skip
    return report, checks


def replayed(
    pipeline: Pipeline | NativePipeline, script: Script, figures: Figures, seconds: float
) -> tuple[int, Check]:
    """Stream the run again from its start, for at most `seconds`: the number of equal chunks, and a check of all."""
    until, count = time.perf_counter() + seconds, len(figures.digests)
    with script.open(pipeline) as stream:
        for chunk in range(count):
            if time.perf_counter() > until:
                return chunk, Check("the same again", True, f"the first {chunk} of {count} chunks")
            if digest_of(script.next(stream, chunk)) != figures.digests[chunk]:
                return chunk, Check("the same again", False, f"chunk {chunk} of {count} has other frames")
    return count, Check("the same again", True, f"all {count} chunks")


def header_of(pipeline: Pipeline | NativePipeline, model: str) -> dict[str, Any]:
    """The stream's conditions; the C++ core tells fewer."""
    if isinstance(pipeline, Pipeline):
        return stream_header(pipeline, model)
    return {
        "model": model, "preset": pipeline.preset_name, "backend": pipeline.stages.name, "precision": pipeline.dtype,
        "height": pipeline.height, "width": pipeline.width, "target_fps": pipeline.fps,
    }  # fmt: skip


def _opened(options: Options) -> Pipeline | NativePipeline:
    options.prepare()
    if options.bundle is not None:
        return load_bundle(options.bundle, options.backend, threads=options.threads)
    return options.pipeline(options.preset)


def run(options: Options) -> int:
    if options.minutes <= 0 or options.switch < 1 or (options.fps is not None and options.fps <= 0):
        raise ValueError(f"got {options.minutes:g} minutes, a switch every {options.switch} chunks, "
                         f"{options.fps} fps, expected positive numbers")  # fmt: skip
    pipeline = _opened(options)
    if isinstance(pipeline, Pipeline) and check.refused(check.run(pipeline, options.prompt, options.seed)):
        return 1
    script = Script(options.seed, (options.prompt, *OTHERS), options.switch)
    where = machine(pipeline.device)
    report, checks = soak(pipeline, script, 60 * options.minutes, options.fps)
    result = {"machine": where, "stream": header_of(pipeline, options.label), **report}
    result |= {key: where[key] for key in ("commit", "device")}
    if not options.json:
        print_header(where, result["stream"])
        print("\n" + table(report["tenths"]) + "\n")
    passed = check.settled(checks, options.json)
    saved.emit(options, "soak", result, pipeline.stages.name)
    return 0 if passed else 1
