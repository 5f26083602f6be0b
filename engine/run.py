"""python -m engine.run: a prompt in, a video out, written while it is made."""

import json
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.bundles.manifest import read_manifest
from engine.bundles.native import NativePipeline, NativeStream
from engine.commands.interrupt import Interrupt
from engine.commands.job import Bundle, Job, Model, Output, Video
from engine.config import Preset, Runtime
from engine.loader import load, load_bundle, settings_for, threads_of_bundle
from engine.media.sinks import ChecksumSink, OutputClosed, Sink, open_sink
from engine.media.sources import read_clip, read_image
from engine.options import Parser, add_options
from engine.presets import PRESETS
from engine.runtime.memory_plan import MemoryPlan
from engine.stream import Pipeline, Stream

EXAMPLES = """\
examples:
  python -m engine.run --prompt "a red circle moving right slowly on a gray background" --seconds 10 --out red.mp4
  python -m engine.run --prompt "..." --prompt-at 3.0s "a blue square moving up quickly on a white background"
  python -m engine.run --model Wan2.1-T2V-1.3B --checkpoint self_forcing_dmd.pt --preset self-forcing --prompt "..."
  python -m engine.run --prompt "..." --out - | ffplay -

presets: """ + ", ".join(PRESETS)


_BAD_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, ImportError)


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


def _generate(
    stream: Stream | NativeStream, sink: Sink, limit: int | None, switches: list[tuple[int, str]], job: Job,
    interrupt: Interrupt, console: Console, fps: float, start: float,
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
        settings = settings_for(model.model, model.checkpoint, model.vae, model.text_encoder, model.tokenizer)
        return model.height or settings.height, model.width or settings.width, fps or settings.fps
    if job.fixed:
        name = job.fixed[0].replace("_", "-")
        raise ValueError(f"--bundle: got --{name} as well, expected none: a bundle fixes it")
    if job.output.plan:
        raise ValueError("--plan: got --bundle as well, expected a model: the memory of bundles is not planned")
    manifest = read_manifest(bundle)
    return manifest.height, manifest.width, fps or manifest.fps


class _Planned(Exception):
    """Ends a load after the memory plan."""


def _show_plan(plan: MemoryPlan, job: Job) -> None:
    """The plan as a table on stderr; with --plan the load ends with it. MemoryError if --plan asks for too much."""
    if not job.output.quiet or job.output.plan:
        print(plan.table(), file=sys.stderr)
    if job.output.plan:
        if job.output.json:
            print(json.dumps({"memory_plan": plan.report()}), flush=True)
        plan.check()
        raise _Planned


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
    return load(
        model.model, preset=model.preset, overrides=job.overrides, checkpoint=model.checkpoint,
        checkpoint_state=model.checkpoint_state, vae=model.vae, text_encoder=model.text_encoder,
        tokenizer=model.tokenizer, adapters=model.adapter, height=height, width=width, fps=fps, runtime=job.runtime,
        planned=lambda plan: _show_plan(plan, job),
    )  # fmt: skip


def _run(job: Job, interrupt: Interrupt) -> int:
    console, video, output = Console(stderr=True), job.video, job.output
    # Check the whole command line before reading weights.
    height, width, fps = _shape(job)
    if output.plan:
        with suppress(_Planned):
            _load(job, height, width, fps)
        return 0
    limit = _limit(video, fps)
    switches = sorted((_frame_of(when, fps), text) for when, text in video.prompt_at)
    clip = _clip(video, height, width, fps)
    sink = open_sink(output.out, fps, (height * output.scale, width * output.scale), format=output.format)
    begun = time.perf_counter()
    try:
        with _loading(console, output.quiet):
            pipeline = _load(job, height, width, fps)
            notes = [] if isinstance(pipeline, NativePipeline) else list(pipeline.notes)
            if not output.quiet:
                for note in notes:
                    print(f"note: {note}", file=sys.stderr)
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
        "notes": notes,
        "memory_plan": None if isinstance(pipeline, NativePipeline) or not pipeline.plan else pipeline.plan.report(),
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
        with Interrupt() as interrupt:
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
