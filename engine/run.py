"""python -m engine.run: a prompt in, a video out, written while it is made."""

import json
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.bundles.native import NativePipeline
from engine.commands.interrupt import Interrupt
from engine.commands.job import Bundle, Job, Model, Output, Video
from engine.commands.notes import Notes
from engine.commands.opening import open_pipeline, shape_of
from engine.commands.prompts import Prompts, frame_of
from engine.commands.record import Recording, Times
from engine.commands.sources import check_source, open_source
from engine.commands.stderr import Forgiving, is_bad_input, line_of, say
from engine.commands.strengths import strengths_at
from engine.config import Preset, Runtime
from engine.media.base import shown
from engine.media.clips import read_clip
from engine.media.pictures import read_image
from engine.media.sinks import ChecksumSink, Encoding, OutputClosed, open_sink
from engine.model.quantized import FORMATS
from engine.options import Parser, add_options
from engine.presets import PRESETS
from engine.program import drop_stdout
from engine.runtime.memory_plan import MemoryPlan
from engine.stream import Pipeline

EXAMPLES = """\
examples:
  python -m engine.run --prompt "a red circle moving right slowly on a gray background" --seconds 10 --out red.mp4
  python -m engine.run --prompt "..." --prompt-at 3.0s "a blue square moving up quickly on a white background"
  python -m engine.run --prompt-file story.txt --frames 96   # story.txt: lines such as "[3.0s] a blue square ..."
  python -m engine.run --model Wan2.1-T2V-1.3B --checkpoint self_forcing_dmd.pt --preset self-forcing --prompt "..."
  python -m engine.run --prompt "..." --model Wan2.1-T2V-1.3B --adapter style.safetensors:0.8 --adapter-at 4s style=0
  python -m engine.run --prompt "..." --out - | ffplay -

presets: """ + ", ".join(PRESETS)


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


def _limit(video: Video, fps: float) -> int | None:
    """Number of frames to make; None means no limit. ValueError for more than a counter holds."""
    if video.seconds is None:
        return video.frames
    if video.seconds * fps > 2**53:
        raise ValueError(f"--seconds: got {video.seconds:g} at {fps:g} fps, expected fewer than 2^53 frames")
    return max(1, round(video.seconds * fps))


def _loading(console: Console, quiet: bool) -> AbstractContextManager[object]:
    """Show a spinner on a terminal while weights load."""
    return nullcontext() if quiet or not console.is_terminal else console.status("loading the model")


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _clip(job: Job, height: int, width: int, fps: float, notes: Notes, console: Console) -> np.ndarray | None:
    """The picture or the clip to start from, if there is one: uint8 [T, height, width, 3]."""
    video, changed = job.video, list[str]()
    if video.image is not None:
        clip = read_image(video.image, height, width, changed)
    elif video.video is not None:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
        hidden = job.output.quiet or not console.is_terminal
        with Progress(*columns, TimeElapsedColumn(), console=console, disable=hidden, transient=True) as progress:
            task = progress.add_task(f"reading {escape(video.video.name)}", total=1.0)
            clip = read_clip(
                video.video, height, width, fps, video.video_frames, notes=changed,
                progress=lambda share: progress.update(task, completed=share),
            )  # fmt: skip
    else:
        return None
    notes.take(changed)
    return clip


def _shape(job: Job) -> tuple[int, int, float]:
    """Height and width in pixels, and frame rate, of the model or bundle to load."""
    if job.output.plan and job.bundle.backend == "native":
        raise ValueError("--plan: got --backend native, expected another: the C++ core's memory is not planned")
    return shape_of(job.model, job.bundle, job.fixed, job.output.fps)


class _Planned(Exception):
    """Ends a load after the memory plan."""


def _show_plan(plan: MemoryPlan, job: Job) -> None:
    """The plan as a table on stderr; with --plan the load ends with it. MemoryError if --plan asks for too much."""
    if not job.output.quiet or job.output.plan:
        say(plan.table())
    if job.output.plan:
        if job.output.json:
            print(json.dumps({"memory_plan": plan.report()}), flush=True)
        plan.check()
        raise _Planned


def _load(job: Job, shape: tuple[int, int, float]) -> Pipeline | NativePipeline:
    planned = partial(_show_plan, job=job)
    return open_pipeline(job.model, job.bundle, job.runtime, job.overrides, shape, planned)


def _run(job: Job, interrupt: Interrupt) -> int:
    console, video, output = Console(file=Forgiving(sys.stderr)), job.video, job.output  # type: ignore[arg-type]
    notes = Notes(output.quiet)
    # Check the whole command line before reading weights.
    height, width, fps = shape = _shape(job)
    if output.plan:
        with suppress(_Planned):
            _load(job, shape)
        return 0
    limit = _limit(video, fps)
    prompts = Prompts.of(video, fps, limit, notes)
    strengths = strengths_at(
        video.adapter_at, job.model.adapter, lambda when: frame_of(when, fps, "--adapter-at"), limit
    )
    encoding = Encoding(output.codec, output.pix_fmt, output.crf)
    if video.source is not None:
        check_source(video.source)
    begun, sink, source = time.perf_counter(), None, None
    interrupt.to_stdout = output.out == "-"
    try:
        sink = open_sink(output.out, fps, (height * output.scale, width * output.scale), output.format, encoding)
        notes.take(sink.notes)
        clip = _clip(job, height, width, fps, notes, console)
        with _loading(console, output.quiet):
            pipeline = _load(job, shape)
            notes.take(list(pipeline.notes))
            if pipeline.device.type == "cuda":
                pipeline.warm()
        start = time.perf_counter()
        times = Times(start, start)
        begin = partial(pipeline.stream, prompts.due(0) or "", seed=video.seed, frames=limit, clip=clip)
        room = pipeline.preset.pixel_frames(1, pipeline.temporal) if isinstance(pipeline, Pipeline) else 1
        if (source := open_source(video, height, width, fps, room)) is not None:
            options = {"strength": video.strength, "noise_scale": video.noise_scale}
            begin = partial(begin, source=source.frames, **options)
        with notes.of_prompts(), begin() as stream:
            times.begun = time.perf_counter()
            recording = Recording(job, sink, limit, prompts, strengths, interrupt, console, notes, source)
            stopped = recording.make(stream, times)
        report = times.report(interrupt.written, fps, stopped)
        interrupt.close(sink)
    except OutputClosed as error:
        if sink is not None:
            interrupt.abort(sink, error)  # the reader has left: no failure, and stdout has no reader to report to
        return 0
    except BaseException as error:
        if sink is not None:
            interrupt.abort(sink, error)
        raise
    finally:
        if source is not None:
            source.close()
            notes.take(source.notes)
    notes.take(sink.notes)
    quantized = job.runtime.precision in FORMATS
    report |= {
        "load_ms": 1e3 * (start - begun),
        "peak_memory_mb": _peak_memory_mb(pipeline.device),
        "preset": pipeline.preset_name,
        "backend": pipeline.stages.name,
        "device": str(pipeline.device),
        "threads": torch.get_num_threads(),
        "precision": job.runtime.precision if quantized else str(pipeline.dtype).removeprefix("torch."),
        "seed": video.seed,
        "height": pipeline.height,
        "width": pipeline.width,
        "out": output.out,
        "prompts": prompts.shown,
        "notes": notes,
        "source": source and source.report,
        "memory_plan": None if isinstance(pipeline, NativePipeline) or not pipeline.plan else pipeline.plan.report(),
    }
    if isinstance(sink, ChecksumSink):
        report["sha256"] = sink.digest
    if not output.quiet:
        made = report.get("sha256", shown(output.out))
        told = say(f"{report['frames']} frames at {report['fps']:.1f} fps, first after {report['ttff_ms']:.0f} ms, "
            f"{report['ms_per_chunk']['p50']:.1f} ms per chunk -> {made}")  # fmt: skip
        if "sha256" in report and not output.json and not told:
            return 1  # the sum was all there is
    return _print(report) if output.json else 0


def _print(report: dict[str, Any]) -> int:
    """Print the report; exit status 1 where stdout cannot take it. A reader that has left is no failure."""
    try:
        print(json.dumps(report), flush=True)
    except OSError as error:
        drop_stdout()
        if not isinstance(error, BrokenPipeError):
            say(f"error: report: got {error.strerror} on stdout, expected it to be written; the video is whole")
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped by a signal, 2 bad input, 1 a failure.

    A signal before the first frame gives 128 + its number: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    interrupt, args = Interrupt(), None
    try:
        with interrupt:
            args = parser().parse_args(argv)
            return _run(Job.of(args), interrupt)
    except KeyboardInterrupt:
        say("stopped before the first frame")
        return interrupt.status
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        # Libraries turn a signal during load into errors of their own.
        if interrupt.stopped and not interrupt.written:
            say("stopped before the first frame")
            return interrupt.status
        say(f"error: {line_of(error)}")
        # Input was good if it gave frames.
        return 2 if is_bad_input(error) and not interrupt.written else 1


if __name__ == "__main__":
    sys.exit(main())
