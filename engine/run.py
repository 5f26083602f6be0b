"""python -m engine.run: a prompt in, a video out, written while it is made."""

import argparse
import json
import resource
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from engine.bundles.native import NativePipeline, NativeStream
from engine.config import PRESETS, Preset
from engine.loader import EMBEDDED, PRECISIONS, is_untrained, load, load_bundle, settings_of, threads_of_bundle
from engine.media.sinks import ChecksumSink, OutputClosed, Sink, open_sink
from engine.media.sources import read_clip, read_image
from engine.stream import Pipeline, Stream

EXAMPLES = """\
examples:
  python -m engine.run --prompt "a red circle moving right slowly on a gray background" --seconds 10 --out red.mp4
  python -m engine.run --prompt "..." --prompt-at 3.0s "a blue square moving up quickly on a white background"
  python -m engine.run --model Wan2.1-T2V-1.3B --checkpoint self_forcing_dmd.pt --preset self-forcing --prompt "..."
  python -m engine.run --prompt "..." --out - | ffplay -

presets: """ + ", ".join(PRESETS)


# What a bundle fixes, so that it cannot be given beside one.
_OF_MODELS = (
    "model", "checkpoint", "checkpoint_state", "adapter", "preset", "height", "width", "device", "precision",
    "fp8_attention", "eager",
)  # fmt: skip


_BAD_INPUT = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, ImportError)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage and message."""
        self.exit(2, f"error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m engine.run", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_argument_group("what to generate")
    what.add_argument("--prompt", required=True, metavar="TEXT")
    what.add_argument(
        "--prompt-at", nargs=2, action="append", default=[], metavar=("TIME", "TEXT"),
        help="switch the prompt while streaming, at 3.0s or frame 48f; may be repeated",
    )  # fmt: skip
    what.add_argument("--no-recommit", action="store_true", help="leave the past as it is when the prompt switches")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--image", type=Path, metavar="FILE", help="start from a picture (image-to-video)")
    source.add_argument(
        "--video", type=Path, metavar="FILE", help="continue a clip; its end is re-encoded and comes first"
    )
    what.add_argument(
        "--video-frames", type=int, default=81, metavar="N", help="how much of the clip's end to take (81)"
    )
    length = what.add_mutually_exclusive_group()
    length.add_argument("--frames", type=int, metavar="N", help="stop after N frames")
    length.add_argument("--seconds", type=float, metavar="S", help="stop after S seconds; default: until Ctrl-C")
    what.add_argument("--seed", type=int, default=0, help="the same seed gives the same video (0)")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", type=Path, metavar="DIR", help="diffusers pipeline directory; default: the embedded sprites model"
    )
    model.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="transformer weights: Self-Forcing-family .pt, or .safetensors"
    )
    model.add_argument("--checkpoint-state", metavar="NAME", help="state of a .pt to take: generator_ema, generator")
    model.add_argument(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="PEFT LoRA folder to merge; may be repeated",
    )
    model.add_argument("--bundle", type=Path, metavar="DIR", help="stream from a bundle of python -m export instead")
    model.add_argument("--height", type=int)
    model.add_argument("--width", type=int)
    model.add_argument("--fps", type=float, help="frame rate of the output")

    preset = parser.add_argument_group("preset", "any field of the preset can be replaced")
    preset.add_argument("--preset", metavar="NAME|FILE.toml", help="default: the model's own")
    for field in fields(Preset)[1:]:  # all but the family
        option, kind = "--" + field.name.replace("_", "-"), type(field.default)
        if kind is bool:
            preset.add_argument(option, action=argparse.BooleanOptionalAction)
        elif field.name == "steps":
            preset.add_argument(option, metavar="T,T,..[/T,..]", help="timesteps of chunk 0 / chunk 1 / ... / the rest")
        else:
            preset.add_argument(option, type=kind, metavar=kind.__name__.upper())

    run = parser.add_argument_group("output and machine")
    run.add_argument(
        "--out", default="video.mp4", metavar="TARGET",
        help="FILE.mp4, .y4m, .gif, .webp, DIR/ (png sequence), - (stdout), null, checksum (video.mp4)",
    )  # fmt: skip
    run.add_argument("--format", choices=("y4m", "mp4", "rgb"), help="what --out - writes (y4m)")
    run.add_argument("--scale", type=int, default=1, metavar="N", help="enlarge every pixel N times each way (1)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto",
        help="auto: bf16 on a GPU, else fp32; fp8: the large products on e4m3, made for an H100 and later",
    )  # fmt: skip
    run.add_argument("--fp8-attention", action="store_true", help="self-attention on e4m3 as well")
    run.add_argument("--eager", action="store_true", help="no fused kernels and no CUDA graphs on a GPU")
    run.add_argument(
        "--backend", choices=("torch", "onnx", "aoti", "tensorrt", "native"), help="torch; with --bundle its first"
    )
    run.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads; default: OMP_NUM_THREADS, else by the model's size"
    )
    run.add_argument("--json", action="store_true", help="print a report as the last line of stdout")
    run.add_argument("--quiet", action="store_true", help="no progress, no warnings")
    run.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _frame_of(when: str, fps: float) -> int:
    """'3.0s' or '3.0' in seconds, '48f' in frames -> frame number."""
    try:
        value = int(when[:-1]) if when.endswith("f") else round(float(when.removesuffix("s")) * fps)
    except (ValueError, OverflowError):
        value = -1
    if value < 0:
        raise ValueError(f"--prompt-at: got {when!r}, expected a time such as 3.0s or a frame such as 48f")
    return value


def _limit(args: argparse.Namespace, fps: float) -> int | None:
    for name in ("frames", "seconds"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name}: got {value}, expected a positive number")
    if args.seconds is not None:
        return max(1, round(args.seconds * fps))
    return args.frames


class _Interrupt:
    """Ctrl-C and SIGTERM stop the stream; one that comes while a frame is written waits until it is."""

    def __init__(self) -> None:
        self.writing = self.asked = False

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
        """One frame, whole or not at all."""
        self.writing = True
        try:
            sink.write(frame)
        finally:
            self.writing = False
        if self.asked:
            raise KeyboardInterrupt


def _generate(
    stream: Stream | NativeStream, sink: Sink, limit: int | None, switches: list[tuple[int, str]],
    args: argparse.Namespace, interrupt: _Interrupt, console: Console, fps: float, start: float,
) -> dict[str, Any]:  # fmt: skip
    """Pull chunks into the sink until the limit, Ctrl-C or a reader that left; returns what was measured."""
    frames, chunks, ttff, stopped = 0, [], 0.0, False
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} frames"),
        TextColumn("{task.fields[rate]:.1f} fps  first frame {task.fields[ttff]:.0f} ms"), TimeElapsedColumn(),
    )  # fmt: skip
    hidden = args.quiet or not console.is_terminal
    begun = time.perf_counter()
    with Progress(*columns, console=console, disable=hidden) as progress:
        task = progress.add_task("streaming", total=limit, rate=0.0, ttff=0.0)
        try:
            while limit is None or frames < limit:
                while switches and switches[0][0] <= frames:
                    stream.set_prompt(switches.pop(0)[1], recommit=not args.no_recommit)
                chunk_start = time.perf_counter()
                chunk = stream.next_chunk()
                now = time.perf_counter()
                chunks.append(now - chunk_start)
                ttff = ttff or now - start
                for frame in chunk[: None if limit is None else limit - frames]:
                    interrupt.write(sink, frame.repeat(args.scale, axis=0).repeat(args.scale, axis=1))
                    frames += 1
                rate = frames / (time.perf_counter() - begun)
                progress.update(task, completed=frames, rate=rate, ttff=1e3 * ttff)
        except KeyboardInterrupt:
            stopped = True
    spent = time.perf_counter() - begun
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
    """A spinner while weights are read, where somebody is watching."""
    return nullcontext() if quiet or not console.is_terminal else console.status("loading the model")


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {field.name: getattr(args, field.name, None) for field in fields(Preset)}
    return {name: value for name, value in given.items() if value is not None}


def _clip(args: argparse.Namespace, height: int, width: int, fps: float) -> np.ndarray | None:
    if args.image is not None:
        return read_image(args.image, height, width)
    if args.video is not None:
        return read_clip(args.video, height, width, fps, args.video_frames)
    return None


def _shape(args: argparse.Namespace) -> tuple[int, int, float]:
    """Height, width and frame rate of what will be loaded; a bundle's size is fixed."""
    if args.bundle is None:
        settings = settings_of(args.model or EMBEDDED)
        return args.height or settings["height"], args.width or settings["width"], args.fps or settings["fps"]
    given = [name for name in _OF_MODELS if getattr(args, name) not in (None, [], "auto", False)] + list(
        _overrides(args)
    )
    if given:
        raise ValueError(f"--bundle: got --{given[0].replace('_', '-')} as well, expected none: a bundle fixes it")
    from engine.bundles.manifest import read_manifest  # extra packages that only bundles need

    manifest = read_manifest(args.bundle)
    return manifest.height, manifest.width, args.fps or manifest.fps


def _load(args: argparse.Namespace, height: int, width: int, fps: float) -> Pipeline | NativePipeline:
    if args.bundle is not None:
        if args.backend == "native":  # the C++ core reads the bundle itself, and chooses among its backends
            from engine.bundles.manifest import read_manifest

            native = NativePipeline(args.bundle, threads=args.threads)
            threads_of_bundle(args.threads, read_manifest(args.bundle), native.device)
            return native
        return load_bundle(args.bundle, args.backend, threads=args.threads)
    if args.backend not in (None, "torch"):
        raise ValueError(f"--backend: got {args.backend}, expected --bundle with it (python -m export writes one)")
    pipeline = load(
        args.model, preset=args.preset, overrides=_overrides(args), checkpoint=args.checkpoint,
        checkpoint_state=args.checkpoint_state, adapters=args.adapter, device=args.device, dtype=args.precision,
        height=height, width=width, fps=fps, fp8_attention=args.fp8_attention, eager=args.eager,
        threads=args.threads,
    )  # fmt: skip
    if is_untrained(args.model, pipeline.preset, args.checkpoint, args.adapter) and not args.quiet:
        print(f"note: no weights trained for preset {pipeline.preset_name} were given; "
              "the bidirectional model streams untrained", file=sys.stderr)  # fmt: skip
    return pipeline


def _run(args: argparse.Namespace, interrupt: _Interrupt) -> int:
    console = Console(stderr=True)
    if not args.prompt.strip():
        raise ValueError("--prompt: got an empty text, expected words")
    if args.json and args.out == "-":
        raise ValueError("--json: got --out -, expected a file (both write to stdout)")
    for name in ("video_frames", "scale", "threads", "height", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    if args.fps is not None and not args.fps > 0:
        raise ValueError(f"--fps: got {args.fps}, expected a positive number")
    if not 0 <= args.seed < 2**64:
        raise ValueError(f"--seed: got {args.seed}, expected 0 to 2^64 - 1")
    # Everything that can be wrong with what was asked is found before weights are read.
    height, width, fps = _shape(args)
    limit = _limit(args, fps)
    switches = sorted((_frame_of(when, fps), text) for when, text in args.prompt_at)
    clip = _clip(args, height, width, fps)
    sink = open_sink(args.out, fps, (height * args.scale, width * args.scale), format=args.format)
    begun = time.perf_counter()
    try:
        with _loading(console, args.quiet):
            pipeline = _load(args, height, width, fps)
            if pipeline.device.type == "cuda":
                pipeline.warm()
        start = time.perf_counter()
        with pipeline.stream(args.prompt, seed=args.seed, frames=limit, clip=clip) as stream:
            report = _generate(stream, sink, limit, switches, args, interrupt, console, fps, start)
        sink.close()
    except OutputClosed:
        sink.abort()  # the reader has seen enough: nothing went wrong, and nobody is there to be told
        return 0
    except BaseException:
        sink.abort()
        raise
    report |= {
        "load_ms": 1e3 * (start - begun),
        "peak_memory_mb": _peak_memory_mb(pipeline.device),
        "preset": pipeline.preset_name,
        "backend": pipeline.stages.name,
        "device": str(pipeline.device),
        "threads": torch.get_num_threads(),
        "precision": args.precision if args.precision == "fp8" else str(pipeline.dtype).removeprefix("torch."),
        "seed": args.seed,
        "height": pipeline.height,
        "width": pipeline.width,
        "out": args.out,
    }
    if isinstance(sink, ChecksumSink):
        report["sha256"] = sink.digest
    if not args.quiet:
        print(f"{report['frames']} frames at {report['fps']:.1f} fps, first after {report['ttff_ms']:.0f} ms, "
              f"{report['ms_per_chunk']['p50']:.1f} ms a chunk -> {report.get('sha256', args.out)}",
              file=sys.stderr)  # fmt: skip
    if args.json:
        print(json.dumps(report), flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped by Ctrl-C, 2 bad input, 1 a failure."""
    args = _parser().parse_args(argv)
    try:
        with _Interrupt() as interrupt:
            return _run(args, interrupt)
    except KeyboardInterrupt:
        print("stopped before the first frame", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"error: {lines[0]}", file=sys.stderr)
        return 2 if isinstance(error, _BAD_INPUT) else 1


if __name__ == "__main__":
    sys.exit(main())
