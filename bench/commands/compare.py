"""A race in one run: presets of this engine and other engines take turns on the same weights and threads."""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.adapters.protocol import Adapter
from bench.commands.stream import chunks_for
from bench.instruments import check, models
from bench.instruments.flops import bidirectional_cost, chunk_cost, steady_index, total, vae_cost
from bench.instruments.header import machine, print_header, stream_header
from bench.instruments.spread import interleaved, paired_ratio, quartiles, table
from bench.report import saved
from engine.options import option
from engine.runtime.device import DTYPES
from engine.stream import Pipeline

PRESETS = ("greedy", "self-forcing-framewise", "self-forcing", "diagonal", "ffe-2step")
BASELINE = "self-forcing-framewise"
BUILT_IN = {
    "diffusers": [sys.executable, "-m", "bench.adapters.diffusers_wan"],
    "flashdreams": [sys.executable, "-m", "bench.adapters.flashdreams"],
}


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, models.Source):
    presets: str = option(",".join(PRESETS), "presets that race", metavar="A,B,...")
    baseline: str = option(BASELINE, "the preset that ratios are taken to", metavar="PRESET")
    frames: int = option(129, "frames per video, 1 + 4k")
    rounds: int = option(3, "videos of each")
    with_bundle: tuple[Path, ...] = option((), "race a bundle's graphs too; may be repeated", metavar="DIR")
    pairs: int = option(30, "chunks side by side, greedy against the baseline")
    adapter: tuple[str, ...] = option(
        (), "another engine; may be repeated; default: diffusers; none: no other engine", metavar="NAME[=COMMAND]"
    )
    teacher_steps: int = option(50, "steps of bidirectional engines")
    guidance: float = option(5.0, "their classifier-free guidance")
    plot: Path | None = option(None, "draw into this folder", metavar="DIR")

    @property
    def names(self) -> list[str]:
        """The presets, one by one."""
        return self.presets.split(",")

    @property
    def adapters(self) -> list[str]:
        """The other engines. Random weights cannot be read by another process, so none is the default there."""
        chosen = self.adapter or (() if self.random else ("diffusers",))
        return [name for name in chosen if name != "none"]


@dataclass(frozen=True)
class Lap:
    """One video: milliseconds per frame once it runs steadily, seconds in all, (seconds, frames so far)."""

    ms_per_frame: float
    seconds: float
    first_frame: float
    progress: list[tuple[float, int]]


def our_lap(pipeline: Pipeline, prompt: str, seed: int, frames: int) -> Lap:
    """Time one video as a user gets it."""
    count, begin = chunks_for(pipeline, frames), steady_index(pipeline.preset)
    begin = begin if count > begin else 1
    progress: list[tuple[float, int]] = []
    start, made = time.perf_counter(), 0
    with pipeline.stream(prompt, seed=seed) as stream:
        for _ in range(count):
            made += len(stream.next_chunk())
            progress.append((time.perf_counter() - start, made))
    times = np.diff([0.0, *(seconds for seconds, _ in progress)])[begin:]
    per_chunk = pipeline.preset.chunk * pipeline.temporal
    return Lap(1e3 * float(np.median(times)) / per_chunk, progress[-1][0], progress[0][0], progress)


def adapter_lap(adapter: Adapter, prompt: str, seed: int, frames: int) -> Lap:
    """Time one video of another engine: its steady chunks where it streams, all of it where it does not."""
    video = adapter.generate(prompt, seed, frames)
    progress = [*video.progress, (video.seconds, video.frames)]
    return Lap(video.steady_ms_per_frame(adapter.fills), video.seconds, video.first_frame, progress)


def _row(name: str, laps: list[Lap], base: list[Lap]) -> dict[str, Any]:
    ms = [lap.ms_per_frame for lap in laps]
    middle = laps[int(np.argsort([lap.seconds for lap in laps])[len(laps) // 2])]
    return {
        "name": name,
        "ms_per_frame": quartiles(ms),
        "fps": 1e3 / float(np.median(ms)),
        "latency_ms": 1e3 * float(np.median([lap.first_frame for lap in laps])),
        "video_seconds": float(np.median([lap.seconds for lap in laps])),
        "ratio": paired_ratio(ms, [lap.ms_per_frame for lap in base]),
        "cumulative": [[frames, seconds] for seconds, frames in middle.progress],
    }


def _command(name: str) -> tuple[str, list[str]]:
    """Name and command of an adapter, from the text of --adapter."""
    label, equals, command = name.partition("=")
    if not equals and label not in BUILT_IN:
        raise ValueError(f"--adapter: got {name!r}, expected {', '.join(BUILT_IN)} or NAME=COMMAND")
    return label, shlex.split(command) if equals else BUILT_IN[label]


def _open(name: str, pipeline: Pipeline, options: Options) -> Adapter:
    kind = next(key for key, value in DTYPES.items() if value == pipeline.dtype)
    settings = {
        "model": str(options.directory()), "height": pipeline.height, "width": pipeline.width,
        "device": str(pipeline.device), "dtype": kind, "threads": torch.get_num_threads(),
        "steps": options.teacher_steps, "guidance": options.guidance,
    }  # fmt: skip
    return Adapter(*_command(name), settings)


def _flops(pipeline: Pipeline) -> dict[str, float]:
    """GFLOP per frame of this pipeline's steady chunk, with and without the VAE."""
    rows = pipeline.tokenizer.rows if pipeline.tokenizer else 0
    costs = chunk_cost(pipeline, rows, models.vae_config(pipeline))
    per = pipeline.preset.chunk * pipeline.temporal * 1e9
    latent = total({name: cost for name, cost in costs.items() if name != "vae"})
    return {"gflop_per_frame": total(costs).flops / per, "latent_gflop_per_frame": latent.flops / per}


def duel(a: Pipeline, b: Pipeline, prompt: str, seed: int, pairs: int, decoded: bool) -> dict[str, Any]:
    """Time steady chunks of two streams in turn, each pair a moment apart: the ratio of a's time to b's."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with a.stream(prompt, seed=seed) as first, b.stream(prompt, seed=seed) as second:
        steps = [s.next_chunk if decoded else s.next_latent for s in (first, second)]
        for pipeline, step in zip((a, b), steps, strict=True):
            for _ in range(steady_index(pipeline.preset)):
                step()
        for pair in range(pairs):
            for side in (0, 1) if pair % 2 else (1, 0):
                start = time.perf_counter()
                steps[side]()
                seconds[side].append(time.perf_counter() - start)
    ms = {name: quartiles([1e3 * s for s in found]) for name, found in zip(("ours", "base"), seconds, strict=True)}
    return paired_ratio(*seconds) | ms


def _claim(pipelines: dict[str, Pipeline], options: Options) -> dict[str, Any] | None:
    """Time the greedy chunk against the frame-wise causal chunk with a window of 21 frames, at the same geometry."""
    if not {"greedy", BASELINE} <= set(pipelines):
        return None
    ours, base = pipelines["greedy"], pipelines[BASELINE]
    counted = [_flops(p) for p in (ours, base)]
    return {
        "flops_ratio": counted[0]["gflop_per_frame"] / counted[1]["gflop_per_frame"],
        "flops_ratio_without_vae": counted[0]["latent_gflop_per_frame"] / counted[1]["latent_gflop_per_frame"],
        "time_ratio": duel(ours, base, options.prompt, options.seed, options.pairs, decoded=True),
        "time_ratio_without_vae": duel(ours, base, options.prompt, options.seed, options.pairs, decoded=False),
    }


def measure(options: Options) -> tuple[dict[str, Any], list[check.Check]]:
    """Race all engines. Where a check is red the report has no numbers."""
    baseline = options.baseline if options.baseline in options.names else options.names[0]
    pipelines: dict[str, Pipeline] = {}
    families: dict[str, Pipeline] = {}
    for name in options.names:
        made = families.get(models.family_name(name))
        pipelines[name] = models.with_preset(made, name) if made else options.pipeline(name)
        families.setdefault(models.family_name(name), pipelines[name])
    one = pipelines[baseline]
    for folder in options.with_bundle:
        made = models.open_bundle(folder)
        if (made.height, made.width, made.dtype) != (one.height, one.width, one.dtype):
            raise ValueError(f"bundle {folder.name}: got {made.width}x{made.height} {made.dtype}, "
                             f"expected {one.width}x{one.height} {one.dtype}")  # fmt: skip
        pipelines[f"{made.stages.name} {made.preset_name}"] = made
    report: dict[str, Any] = {"machine": machine(one.device), "stream": stream_header(one, options.label)}
    checks = [c for i, p in enumerate(pipelines.values()) for c in check.run(p, options.prompt, options.seed, i > 0)]
    report["checks"] = [asdict(c) for c in checks]
    if not all(c.passed for c in checks):
        return report, checks

    laps: dict[str, list[Lap]] = {name: [] for name in pipelines}
    lengths: dict[str, list[list[float]]] = {}
    about: dict[str, str] = {}
    with ExitStack() as stack:
        race: dict[str, Callable[[], Lap]] = {
            name: partial(our_lap, p, options.prompt, options.seed, options.frames) for name, p in pipelines.items()
        }
        for text in options.adapters:
            adapter = stack.enter_context(_open(text, one, options))
            about[adapter.name] = str(adapter.about.get("about", adapter.name))
            laps[adapter.name] = []
            race[adapter.name] = partial(adapter_lap, adapter, options.prompt, options.seed, options.frames)
            shorter = sorted({1 + 4 * max(1, options.frames // part // 4) for part in (8, 4, 2)})
            # The shortest video is made twice, because the first call also sets things up.
            timed = [adapter.generate(options.prompt, options.seed, n) for n in (shorter[0], *shorter)][1:]
            lengths[adapter.name] = [[video.frames, video.seconds] for video in timed]
        for name in pipelines:
            race[name]()  # warm up
        for number, name, lap in interleaved(race, options.rounds):
            laps[name].append(lap)
            print(f"round {number + 1}: {name} {lap.ms_per_frame:.2f} ms per frame", file=sys.stderr)

    rows = {}
    for name, found in laps.items():
        row = _row(name, found, laps[baseline])
        if name in pipelines:
            row |= {"about": f"this engine, {name}", **_flops(models.on_torch(pipelines[name], one))}
        else:
            row |= {"about": about[name], "cumulative": lengths[name] + [[options.frames, row["video_seconds"]]]}
        rows[name] = row
    _teacher_flops(rows.get("diffusers"), one, options)
    for row in rows.values():
        if "gflop_per_frame" in row:
            row["flops_ratio"] = row["gflop_per_frame"] / rows[baseline]["gflop_per_frame"]
    report |= {
        "frames": options.frames,
        "rounds": options.rounds,
        "baseline": baseline,
        "variants": list(rows.values()),
        "claim": _claim(pipelines, options),
        "timings": {name: row["ms_per_frame"] for name, row in rows.items()},
        "commit": report["machine"]["commit"],
        "device": report["machine"]["device"],
    }
    return report, checks


def _teacher_flops(row: dict[str, Any] | None, pipeline: Pipeline, options: Options) -> None:
    """Add the GFLOP per frame of the bidirectional video, counted in the same way as ours."""
    vae, rows = models.vae_config(pipeline), pipeline.tokenizer.rows if pipeline.tokenizer else 0
    if row is None or vae is None:
        return
    latents = 1 + (options.frames - 1) // pipeline.temporal
    height, width = pipeline.height // pipeline.spatial, pipeline.width // pipeline.spatial
    model = bidirectional_cost(pipeline, latents, rows, options.teacher_steps, options.guidance > 1).flops
    decode = [vae_cost(vae, height, width, 4, steady).flops for steady in (False, True)]
    row["latent_gflop_per_frame"] = model / options.frames / 1e9
    row["gflop_per_frame"] = (model + decode[0] + (latents - 1) * decode[1]) / options.frames / 1e9


def print_report(r: dict[str, Any]) -> None:
    lines = [
        {
            "engine": v["name"], "ms/frame": v["ms_per_frame"]["median"], "fps": v["fps"],
            "first frame ms": v["latency_ms"], "video s": v["video_seconds"], "GFLOP/frame": v.get("gflop_per_frame"),
            "time ratio": "{median:.3f} [{low:.3f}, {high:.3f}]".format(**v["ratio"]),
            "FLOPs ratio": v.get("flops_ratio"),
        }
        for v in r["variants"]
    ]  # fmt: skip
    print(f"\n{r['frames']} frames, {r['rounds']} rounds; ratios to {r['baseline']}: median [95% interval]\n")
    print(table(lines))
    if r["claim"]:
        c = r["claim"]
        print(f"\ngreedy chunk / {BASELINE} chunk, {c['time_ratio']['pairs']} pairs side by side:")
        for what, key in (("with VAE", ""), ("without VAE", "_without_vae")):
            flops, took = c["flops_ratio" + key], c["time_ratio" + key]
            print(f"  {what:12} FLOPs {flops:.3f}, time {took['median']:.3f} [{took['low']:.3f}, {took['high']:.3f}] "
                  f"({took['ours']['median']:.2f} of {took['base']['median']:.2f} ms)")  # fmt: skip


def run(options: Options) -> int:
    options.prepare()
    if options.bundle:
        raise ValueError("--bundle: got one, expected --with-bundle beside the torch model")
    if options.rounds < 1 or options.frames < 9 or options.frames % 4 != 1:
        raise ValueError(
            f"got {options.rounds} rounds of {options.frames} frames, expected at least 1 of 1 + 4k, k > 1"
        )
    for text in options.adapters:
        _command(text)
        options.directory()  # refuses weights that no other process can read
    report, checks = measure(options)
    if not options.json:
        print_header(report["machine"], report["stream"])
    if check.refused(checks):
        return 1
    print(f"{len(checks)} checks passed", file=sys.stderr)
    if not options.json:
        print_report(report)
    if options.plot:
        from bench.report import plots

        plots.draw("compare", report, options.plot)
    saved.emit(options, "compare", report)
    return 0
