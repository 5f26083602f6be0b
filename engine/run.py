"""python -m engine.run: a prompt in, a video out, written while it is made."""

import argparse
import json
import resource
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.bundles.manifest import read_manifest
from engine.bundles.native import NativePipeline, NativeStream
from engine.bundles.registry import BACKENDS
from engine.config import Preset, Runtime
from engine.loader import EMBEDDED, is_untrained, load, load_bundle, settings_of, threads_of_bundle
from engine.media.sinks import ChecksumSink, OutputClosed, Sink, open_sink
from engine.media.sources import read_clip, read_image
from engine.options import Parser, add_options, chosen, option, options_of
from engine.presets import PRESETS
from engine.stream import Pipeline, Stream

EXAMPLES = """\
examples:
  python -m engine.run --prompt "a red circle moving right slowly on a gray background" --seconds 10 --out red.mp4
  python -m engine.run --prompt "..." --prompt-at 3.0s "a blue square moving up quickly on a white background"
  python -m engine.run --model Wan2.1-T2V-1.3B --checkpoint self_forcing_dmd.pt --preset self-forcing --prompt "..."
  python -m engine.run --prompt "..." --out - | ffplay -

presets: """ + ", ".join(PRESETS)


_BAD_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, ImportError)


@dataclass(frozen=True)
class Video:
    """The video to generate: prompts, first frames, length and seed."""

    prompt: str = option(metavar="TEXT", help="what the video shows")
    prompt_at: tuple[tuple[str, str], ...] = option(
        (), "switch the prompt while streaming, at 3.0s or frame 48f; may be repeated", metavar=("TIME", "TEXT")
    )
    no_recommit: bool = option(False, "leave the past as it is when the prompt switches")
    image: Path | None = option(None, "start from a picture (image-to-video)", metavar="FILE", exclusive="clip")
    video: Path | None = option(
        None, "continue a clip; its end is re-encoded and comes first", metavar="FILE", exclusive="clip"
    )
    video_frames: int = option(81, "how much of the clip's end to take", metavar="N")
    frames: int | None = option(None, "stop after N frames", metavar="N", exclusive="length")
    seconds: float | None = option(
        None, "stop after S seconds; default: stream until Ctrl-C", metavar="S", exclusive="length"
    )
    seed: int = option(0, "the same seed gives the same video", metavar="N")

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("--prompt: got an empty text, expected words")
        if self.video_frames < 1:
            raise ValueError(f"--video-frames: got {self.video_frames}, expected at least 1")
        for name, value in (("frames", self.frames), ("seconds", self.seconds)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name}: got {value}, expected a positive number")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"--seed: got {self.seed}, expected 0 to 2^64 - 1")


@dataclass(frozen=True)
class Model:
    """The model that streams."""

    model: Path | None = option(
        None, "diffusers pipeline directory; default: the embedded sprites model", metavar="DIR"
    )
    checkpoint: Path | None = option(
        None, "transformer weights: Self-Forcing-family .pt, or .safetensors", metavar="FILE"
    )
    checkpoint_state: str | None = option(
        None, "state of a .pt to take: generator_ema, generator, ...", metavar="NAME"
    )  # fmt: skip
    adapter: tuple[Path, ...] = option((), "PEFT LoRA folder to merge; may be repeated", metavar="PATH")
    preset: str | None = option(None, "default: the model's own", metavar="NAME|FILE.toml")
    height: int | None = option(None, "pixels; default: the model's own")
    width: int | None = option(None, "pixels; default: the model's own")

    def __post_init__(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}: got {value}, expected at least 1")


@dataclass(frozen=True)
class Bundle:
    """A bundle to stream from instead of a model."""

    bundle: Path | None = option(None, "stream from a bundle that python -m export wrote", metavar="DIR")
    backend: str | None = option(
        None, "default: torch; with --bundle its first", choices=("torch", *BACKENDS, "native")
    )  # fmt: skip


@dataclass(frozen=True)
class Output:
    """The frames' output and the report's."""

    out: str = option(
        "video.mp4", "FILE.mp4, .y4m, .gif, .webp, DIR/ (png sequence), - (stdout), null, checksum", metavar="TARGET"
    )
    format: Literal["y4m", "mp4", "rgb"] | None = option(None, "what --out - writes; default: y4m")
    fps: float | None = option(None, "frame rate of the output; default: the model's own", metavar="F")
    scale: int = option(1, "enlarge every pixel N times each way", metavar="N")
    json: bool = option(False, "print a report as the last line of stdout")
    quiet: bool = option(False, "print no progress and no warnings")
    debug: bool = option(False, "show tracebacks")

    def __post_init__(self) -> None:
        if self.json and self.out == "-":
            raise ValueError("--json: got --out -, expected a file (both write to stdout)")
        if self.scale < 1:
            raise ValueError(f"--scale: got {self.scale}, expected at least 1")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"--fps: got {self.fps}, expected a positive number")


@dataclass(frozen=True)
class Job:
    """A whole command line."""

    video: Video
    model: Model
    overrides: dict[str, Any]  # fields of the preset
    bundle: Bundle
    runtime: Runtime
    output: Output
    fixed: tuple[str, ...]  # options that the user set and that a bundle would fix

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Job":
        overrides = chosen(args, Preset)
        set_by_user = [*chosen(args, Model), *chosen(args, Runtime), *overrides]
        return cls(
            options_of(args, Video), options_of(args, Model), overrides, options_of(args, Bundle),
            options_of(args, Runtime), options_of(args, Output), tuple(n for n in set_by_user if n != "threads"),
        )  # fmt: skip


def parser() -> Parser:
    """The command line of `python -m engine.run`."""
    made = Parser(prog="python -m engine.run", description=__doc__, epilog=EXAMPLES)
    add_options(made, Video, "what to generate")
    add_options(made, Model, "model")
    add_options(made, Preset, "preset: fields to replace", skip=("family",), defaults=False)
    add_options(made, Bundle, "bundle")
    add_options(made, Runtime, "machine")
    add_options(made, Output, "output")
    return made


def _frame_of(when: str, fps: float) -> int:
    """'3.0s' or '3.0' in seconds, '48f' in frames -> frame number."""
    try:
        value = int(when[:-1]) if when.endswith("f") else round(float(when.removesuffix("s")) * fps)
    except (ValueError, OverflowError):
        value = -1
    if value < 0:
        raise ValueError(f"--prompt-at: got {when!r}, expected a time such as 3.0s or a frame such as 48f")
    return value


def _limit(video: Video, fps: float) -> int | None:
    """Number of frames to make; None means no limit."""
    return video.frames if video.seconds is None else max(1, round(video.seconds * fps))


class _Interrupt:
    """Ctrl-C and SIGTERM stop the stream, but never during the write of a frame."""

    def __init__(self) -> None:
        self.writing = self.asked = False
        self.written = 0  # frames, each counted with its write: a signal cannot come in between

    def __enter__(self) -> "_Interrupt":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.writing:
            raise KeyboardInterrupt

    def write(self, sink: Sink, frame: np.ndarray) -> None:
        """Write one frame completely, then raise KeyboardInterrupt if a signal has arrived."""
        self.writing = True
        try:
            sink.write(frame)
            self.written += 1
        finally:
            self.writing = False
        if self.asked:
            raise KeyboardInterrupt


def _generate(
    stream: Stream | NativeStream, sink: Sink, limit: int | None, switches: list[tuple[int, str]], job: Job,
    interrupt: _Interrupt, console: Console, fps: float, start: float,
) -> dict[str, Any]:  # fmt: skip
    """Write chunks to the sink until the limit, Ctrl-C or the reader's end; returns the measurements."""
    chunks, ttff, stopped = [], 0.0, False
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} frames"),
        TextColumn("{task.fields[rate]:.1f} fps  first frame {task.fields[ttff]:.0f} ms"), TimeElapsedColumn(),
    )  # fmt: skip
    hidden, scale = job.output.quiet or not console.is_terminal, job.output.scale
    begun = time.perf_counter()
    with Progress(*columns, console=console, disable=hidden) as progress:
        task = progress.add_task("streaming", total=limit, rate=0.0, ttff=0.0)
        try:
            while limit is None or interrupt.written < limit:
                while switches and switches[0][0] <= interrupt.written:
                    stream.set_prompt(switches.pop(0)[1], recommit=not job.video.no_recommit)
                chunk_start = time.perf_counter()
                chunk = stream.next_chunk()
                now = time.perf_counter()
                chunks.append(now - chunk_start)
                ttff = ttff or now - start
                for frame in chunk[: None if limit is None else limit - interrupt.written]:
                    interrupt.write(sink, frame.repeat(scale, axis=0).repeat(scale, axis=1))
                rate = interrupt.written / (time.perf_counter() - begun)
                progress.update(task, completed=interrupt.written, rate=rate, ttff=1e3 * ttff)
        except KeyboardInterrupt:
            stopped = True
    spent, frames = time.perf_counter() - begun, interrupt.written
    steady = [1e3 * seconds for seconds in chunks[1:] or chunks] or [0.0]
    return {
        "frames": frames,
        "fps": frames / spent,
        "ttff_ms": 1e3 * ttff,
        "ms_per_chunk": {"p50": float(np.percentile(steady, 50)), "p99": float(np.percentile(steady, 99))},
        "chunks": len(chunks),
        "seconds": spent,
        "realtime": frames / spent / fps,
        "stopped": stopped,
    }


def _loading(console: Console, quiet: bool) -> AbstractContextManager[object]:
    """Show a spinner on a terminal while weights load."""
    return nullcontext() if quiet or not console.is_terminal else console.status("loading the model")


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _clip(video: Video, height: int, width: int, fps: float) -> np.ndarray | None:
    if video.image is not None:
        return read_image(video.image, height, width)
    if video.video is not None:
        return read_clip(video.video, height, width, fps, video.video_frames)
    return None


def _shape(job: Job) -> tuple[int, int, float]:
    """Height and width in pixels, and frame rate, of the model or bundle to load. A bundle fixes its size."""
    model, fps, bundle = job.model, job.output.fps, job.bundle.bundle
    if bundle is None:
        settings = settings_of(model.model or EMBEDDED)
        return model.height or settings.height, model.width or settings.width, fps or settings.fps
    if job.fixed:
        name = job.fixed[0].replace("_", "-")
        raise ValueError(f"--bundle: got --{name} as well, expected none: a bundle fixes it")
    manifest = read_manifest(bundle)
    return manifest.height, manifest.width, fps or manifest.fps


def _load(job: Job, height: int, width: int, fps: float) -> Pipeline | NativePipeline:
    model, bundle, backend = job.model, job.bundle.bundle, job.bundle.backend
    if bundle is not None:
        if backend == "native":  # the C++ core reads the bundle and chooses a backend
            native = NativePipeline(bundle, threads=job.runtime.threads)
            threads_of_bundle(job.runtime.threads, read_manifest(bundle), native.device)
            return native
        return load_bundle(bundle, backend, threads=job.runtime.threads)
    if backend not in (None, "torch"):
        raise ValueError(f"--backend: got {backend}, expected --bundle with it (python -m export writes one)")
    pipeline = load(
        model.model, preset=model.preset, overrides=job.overrides, checkpoint=model.checkpoint,
        checkpoint_state=model.checkpoint_state, adapters=model.adapter, height=height, width=width, fps=fps,
        runtime=job.runtime,
    )  # fmt: skip
    if is_untrained(model.model, pipeline.preset, model.checkpoint, model.adapter) and not job.output.quiet:
        print(f"note: no weights trained for preset {pipeline.preset_name} were loaded; "
              "the bidirectional model streams untrained", file=sys.stderr)  # fmt: skip
    return pipeline


def _run(job: Job, interrupt: _Interrupt) -> int:
    console, video, output = Console(stderr=True), job.video, job.output
    # Check the whole command line before reading weights.
    height, width, fps = _shape(job)
    limit = _limit(video, fps)
    switches = sorted((_frame_of(when, fps), text) for when, text in video.prompt_at)
    clip = _clip(video, height, width, fps)
    sink = open_sink(output.out, fps, (height * output.scale, width * output.scale), format=output.format)
    begun = time.perf_counter()
    try:
        with _loading(console, output.quiet):
            pipeline = _load(job, height, width, fps)
            if pipeline.device.type == "cuda":
                pipeline.warm()
        start = time.perf_counter()
        with pipeline.stream(video.prompt, seed=video.seed, frames=limit, clip=clip) as stream:
            report = _generate(stream, sink, limit, switches, job, interrupt, console, fps, start)
        sink.close()
    except OutputClosed:
        sink.abort()  # the reader has left: this is no failure, and stdout has no reader to report to
        return 0
    except BaseException:
        sink.abort()
        raise
    fp8 = job.runtime.precision == "fp8"
    report |= {
        "load_ms": 1e3 * (start - begun),
        "peak_memory_mb": _peak_memory_mb(pipeline.device),
        "preset": pipeline.preset_name,
        "backend": pipeline.stages.name,
        "device": str(pipeline.device),
        "threads": torch.get_num_threads(),
        "precision": "fp8" if fp8 else str(pipeline.dtype).removeprefix("torch."),
        "seed": video.seed,
        "height": pipeline.height,
        "width": pipeline.width,
        "out": output.out,
    }
    if isinstance(sink, ChecksumSink):
        report["sha256"] = sink.digest
    if not output.quiet:
        print(f"{report['frames']} frames at {report['fps']:.1f} fps, first after {report['ttff_ms']:.0f} ms, "
              f"{report['ms_per_chunk']['p50']:.1f} ms per chunk -> {report.get('sha256', output.out)}",
              file=sys.stderr)  # fmt: skip
    if output.json:
        print(json.dumps(report), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped by Ctrl-C, 130 stopped before the first frame, 2 bad input, 1 a failure."""
    args = parser().parse_args(argv)
    try:
        with _Interrupt() as interrupt:
            return _run(Job.of(args), interrupt)
    except KeyboardInterrupt:
        print("stopped before the first frame", file=sys.stderr)
        return 130
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"error: {lines[0]}", file=sys.stderr)
        return 2 if isinstance(error, _BAD_INPUT) else 1


if __name__ == "__main__":
    sys.exit(main())
