"""The backends of a bundle against torch's modules, in one run: chunks in turn, so that all see the same machine.

Where the C++ core is built, it streams the bundle as well, under the name native: whole chunks only, since its stages
are out of Python's reach.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.instruments import check, models
from bench.instruments.flops import steady_index
from bench.instruments.header import machine, print_header, stream_header
from bench.instruments.meter import Meter, MeteredPipeline
from bench.instruments.spread import interleaved, paired_ratio, quartiles, table
from bench.report import saved as results
from engine.bundles.native import NativePipeline, NativeStream
from engine.config import Preset
from engine.loader import load
from engine.runtime.device import DTYPES
from engine.stream import Pipeline, Stream

Pipelines = dict[str, Pipeline | NativePipeline]


def agreement(pipelines: Pipelines, prompt: str, seed: int, chunks: int) -> list[check.Check]:
    """Frames of every backend against torch's."""
    frames = {}
    for name, pipeline in pipelines.items():
        with pipeline.stream(prompt, seed=seed) as stream:
            frames[name] = np.concatenate([stream.next_chunk() for _ in range(chunks)]).astype(int)
    found = []
    for name in list(frames)[1:]:
        worst = int(np.abs(frames[name] - frames["torch"]).max())
        detail = f"{len(frames[name])} frames, at most {worst} grey levels off"
        found.append(check.Check(f"{name} gives torch's frames", worst <= check.GREY_LEVELS, detail))
    return found


def race(pipelines: Pipelines, preset: Preset, prompt: str, seed: int, pairs: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of `pairs` steady chunks of every backend, in turn: whole, and by stage."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in pipelines}
    with ExitStack() as stack:
        streams = {}
        for name, pipeline in pipelines.items():
            meter = Meter(pipeline.device)
            measured: Any = pipeline
            if not isinstance(pipeline, NativePipeline):
                measured = MeteredPipeline.of(pipeline, meter)
            stream: Stream | NativeStream = stack.enter_context(measured.stream(prompt, seed=seed))
            for _ in range(steady_index(preset) + 1):
                stream.next_chunk()
            streams[name] = stream, meter
        turns = {name: partial(_chunk, *opened) for name, opened in streams.items()}
        for _, name, spent in interleaved(turns, pairs):
            for label, value in spent.items():
                seconds[name].setdefault(label, []).append(value)
    return seconds


def _chunk(stream: Stream | NativeStream, meter: Meter) -> dict[str, float]:
    """Seconds of one chunk by stage, and of all of it."""
    meter.take()
    start = meter.now()
    stream.next_chunk()
    return {"chunk": meter.now() - start} | meter.take()[0]


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], list[check.Check]]:
    """Median milliseconds a chunk by stage and backend, and the ratio to torch over pairs of chunks."""
    from engine.bundles.manifest import read_manifest  # extra packages that only bundles need

    manifest = read_manifest(args.bundle)
    if manifest.precision not in DTYPES:
        raise ValueError(f"bundle: got precision {manifest.precision}, expected one that torch's modules have")
    modules = load(
        args.model, preset=manifest.preset_name, device="cpu", dtype=manifest.precision, height=manifest.height,
        width=manifest.width,
    )  # fmt: skip
    pipelines: Pipelines = {"torch": modules}
    for backend in manifest.backends.values():
        pipelines[backend.backend] = models.open_bundle(args.bundle, backend.backend)
    if "aoti" in pipelines and find_spec("engine._C"):
        pipelines["native"] = NativePipeline(args.bundle, "aoti")
    checks = agreement(pipelines, args.prompt, args.seed, args.check_chunks)
    report: dict[str, Any] = {"machine": machine(modules.device)}
    report |= {"stream": stream_header(modules, f"bundle {args.bundle.name}"), "checks": [asdict(c) for c in checks]}
    if not all(c.passed for c in checks):
        return report, checks
    seconds = race(pipelines, modules.preset, args.prompt, args.seed, args.pairs)
    stages = {}
    for label in ("etm", "sdd_context", "sdd", "dit", "dit_context", "vae", "chunk"):
        if label in seconds["torch"]:
            stages[label] = {
                name: {"ms": quartiles([1e3 * s for s in found[label]])}
                | ({} if name == "torch" else {"ratio": paired_ratio(found[label], seconds["torch"][label])})
                for name, found in seconds.items()
                if label in found
            }
    report |= {"pairs": args.pairs, "backends": list(pipelines), "stages": stages}
    report |= {key: report["machine"][key] for key in ("commit", "device")}
    return report, checks


def print_report(r: dict[str, Any]) -> None:
    rows = []
    for label, found in r["stages"].items():
        row: dict[str, Any] = {"stage": label}
        for name in r["backends"]:
            timed = found.get(name)
            row[f"{name} ms"] = timed["ms"]["median"] if timed else ""
            if name != "torch":
                row[f"{name} / torch"] = ""
            if timed and "ratio" in timed:
                row[f"{name} / torch"] = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**timed["ratio"])
        rows.append(row)
    print(f"\n{r['pairs']} chunks of each in turn; median ms a chunk, ratio to torch: median [95% interval]\n")
    print(table(rows, 3))


def run(args: argparse.Namespace) -> int:
    if args.pairs < 1 or args.check_chunks < 1:
        raise ValueError(f"got {args.pairs} pairs, {args.check_chunks} chunks to check, expected at least 1 of both")
    report, checks = measure(args)
    if not args.json:
        print_header(report["machine"], report["stream"])
    if check.refused(checks):
        return 1
    print("; ".join(c.detail for c in checks), file=sys.stderr)
    if not args.json:
        print_report(report)
    results.emit(args, "runtimes", report)
    return 0


def add_parser(commands: Any) -> None:
    command = commands.add_parser("runtimes", help="a bundle's backends against torch's modules, chunk by chunk")
    command.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    command.add_argument("--model", type=Path, metavar="DIR", help="what it was exported from (the embedded model)")
    command.add_argument("--pairs", type=int, default=60, help="chunks of each backend")
    command.add_argument("--check-chunks", type=int, default=21, help="chunks compared first")
    command.add_argument("--prompt", default=models.PROMPT)
    command.add_argument("--seed", type=int, default=0)
    results.add_arguments(command)
    command.set_defaults(run=run)
