"""The backends of a bundle against torch's modules, in one run: chunks in turn, so that all see the same machine.

Where the C++ core is built, it streams the bundle as well, under the name native. Only its whole chunks are timed,
since Python cannot reach its passes.
"""

import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench.instruments import check, models
from bench.instruments.flops import steady_index
from bench.instruments.header import machine, print_header, stream_header
from bench.instruments.meter import PASSES, Meter, MeteredPipeline
from bench.instruments.spread import interleaved, paired_ratio, quartiles, table
from bench.report import saved
from engine.bundles.native import NativePipeline
from engine.config import Preset
from engine.loader import load
from engine.options import option
from engine.runtime.device import DTYPES
from engine.runtime.streams import Stream
from engine.stream import Pipeline

Pipelines = dict[str, Pipeline | NativePipeline]
PARTS = (*PASSES, "vae", "chunk")


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported):
    bundle: Path = option(help="the bundle whose backends race", metavar="DIR")
    model: Path | None = option(None, "what it was exported from; default: the embedded model", metavar="DIR")
    pairs: int = option(60, "chunks of each backend")
    check_chunks: int = option(21, "chunks compared first")
    prompt: str = option(models.PROMPT, "of every stream", metavar="TEXT")
    seed: int = option(0, "of the noise (0)")


def agreement(pipelines: Pipelines, prompt: str, seed: int, chunks: int) -> list[check.Check]:
    """Compare the frames of every backend with torch's."""
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
    """Seconds of `pairs` steady chunks of every backend, in turn: of the whole chunk and of its parts."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in pipelines}
    with ExitStack() as stack:
        streams = {}
        for name, pipeline in pipelines.items():
            meter = Meter(pipeline.device)
            measured: Any = pipeline
            if not isinstance(pipeline, NativePipeline):
                measured = MeteredPipeline.of(pipeline, meter)
            stream: Stream = stack.enter_context(measured.stream(prompt, seed=seed))
            for _ in range(steady_index(preset) + 1):
                stream.next_chunk()
            streams[name] = stream, meter
        turns = {name: partial(_chunk, *opened) for name, opened in streams.items()}
        for _, name, spent in interleaved(turns, pairs):
            for part, value in spent.items():
                seconds[name].setdefault(part, []).append(value)
    return seconds


def _chunk(stream: Stream, meter: Meter) -> dict[str, float]:
    """Seconds of one chunk, and of its parts."""
    meter.take()
    start = meter.now()
    stream.next_chunk()
    return {"chunk": meter.now() - start} | meter.take()[0]


def measure(options: Options) -> tuple[dict[str, Any], list[check.Check]]:
    """Median milliseconds per chunk by part and backend, and the ratio to torch over pairs of chunks."""
    from engine.bundles.manifest import read_manifest  # extra packages that only bundles need
    from engine.bundles.stages import NotHere

    manifest = read_manifest(options.bundle)
    if manifest.precision not in DTYPES:
        raise ValueError(f"bundle: got precision {manifest.precision}, expected one that torch's modules have")
    modules = load(
        options.model, preset=manifest.preset_name, device="cpu", precision=manifest.precision, height=manifest.height,
        width=manifest.width,
    )  # fmt: skip
    pipelines: Pipelines = {"torch": modules}
    for key, backend in manifest.backends.items():
        try:
            pipelines[backend.backend] = models.open_bundle(options.bundle, key)
        except NotHere as error:
            print(f"{key} is left out: {error}", file=sys.stderr)
    if "aoti" in pipelines and find_spec("engine._C"):
        pipelines["native"] = NativePipeline(options.bundle, "aoti")
    checks = agreement(pipelines, options.prompt, options.seed, options.check_chunks)
    report: dict[str, Any] = {"machine": machine(modules.device)}
    report |= {"stream": stream_header(modules, f"bundle {options.bundle.name}"), "checks": [asdict(c) for c in checks]}
    if not all(c.passed for c in checks):
        return report, checks
    seconds = race(pipelines, modules.preset, options.prompt, options.seed, options.pairs)
    parts = {}
    for part in PARTS:
        if part in seconds["torch"]:
            parts[part] = {
                name: {"ms": quartiles([1e3 * s for s in found[part]])}
                | ({} if name == "torch" else {"ratio": paired_ratio(found[part], seconds["torch"][part])})
                for name, found in seconds.items()
                if part in found
            }
    report |= {"pairs": options.pairs, "backends": list(pipelines), "stages": parts}  # the key of stored results
    report |= {key: report["machine"][key] for key in ("commit", "device")}
    return report, checks


def print_report(r: dict[str, Any]) -> None:
    rows = []
    for part, found in r["stages"].items():
        row: dict[str, Any] = {"part": part}
        for name in r["backends"]:
            timed = found.get(name)
            row[f"{name} ms"] = timed["ms"]["median"] if timed else ""
            if name != "torch":
                row[f"{name} / torch"] = ""
            if timed and "ratio" in timed:
                row[f"{name} / torch"] = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**timed["ratio"])
        rows.append(row)
    print(f"\n{r['pairs']} chunks of each in turn; median ms per chunk, ratio to torch: median [95% interval]\n")
    print(table(rows, 3))


def run(options: Options) -> int:
    if options.pairs < 1 or options.check_chunks < 1:
        raise ValueError(
            f"got {options.pairs} pairs, {options.check_chunks} chunks to check, expected at least 1 of both"
        )
    report, checks = measure(options)
    if not options.json:
        print_header(report["machine"], report["stream"])
    if check.refused(checks):
        return 1
    print("; ".join(c.detail for c in checks), file=sys.stderr)
    if not options.json:
        print_report(report)
    saved.emit(options, "runtimes", report)
    return 0
