"""How a stream's cost grows: not with its length; with resolution, chunk, window, steps, streams, threads."""

import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.commands import concurrent
from bench.instruments import check, models
from bench.instruments.flops import bidirectional_cost, chunk_cost, steady_index, stream_costs, total
from bench.instruments.header import machine, print_header, stream_header
from bench.instruments.memory import resident_mb
from bench.instruments.meter import PASSES, Meter, MeteredPipeline
from bench.instruments.spread import interleaved, line_fit, power_fit, quartiles, table
from bench.report import saved
from engine.options import option
from engine.stream import Pipeline, PythonStream

SWEEPS = ("resolution", "chunk", "window", "steps", "threads", "streams")
_STEPS = (1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)


@dataclass(frozen=True, kw_only=True)
class Options(saved.Reported, models.PresetSource):
    chunks: int = option(400, "length of the stream", metavar="N")
    sweep: str = option("", "also measure along " + ", ".join(SWEEPS), metavar="A,B|all")
    rounds: int = option(12, "chunks measured at each point of a sweep")
    plot: Path | None = option(None, "draw into this folder", metavar="DIR")


def scaling(pipeline: Pipeline, prompt: str, chunks: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield {"chunk": i} for progress, then the report.

    The first twentieth (at least 10 chunks) is warm-up; of the rest the first and the last quarter are compared.
    A machine's own speed drifts. So each chunk has a neighbour from a stream that is always young, and its time is
    taken over the neighbour's.
    """
    if chunks < 40:
        raise ValueError(f"chunks: got {chunks}, expected at least 40")
    meter = Meter(pipeline.device)
    warm = max(10, chunks // 20)
    quarter = (chunks - warm) // 4
    seconds, model, resident, young = [], [], [], []
    control = _Young(pipeline, prompt, seed)
    with MeteredPipeline.of(pipeline, meter).stream(prompt, seed=seed) as stream:
        for index in range(chunks):
            if index == warm:
                gc.collect()
            meter.take()
            start = time.perf_counter()
            stream.next_chunk()
            seconds.append(time.perf_counter() - start)
            parts, _ = meter.take()
            model.append(sum(parts.get(part, 0.0) for part in (*PASSES, "vae")))
            young.append(control.seconds())
            resident.append(resident_mb())
            yield {"chunk": index + 1}
    control.stream.close()
    early, late = seconds[warm : warm + quarter], seconds[-quarter:]
    ms = [1e3 * value for value in seconds[warm:]]
    beside = [whole / other for whole, other in zip(seconds[warm:], young[warm:], strict=True)]
    own = [1 - inside / whole for inside, whole in zip(model[warm:], seconds[warm:], strict=True)]
    yield {
        "time_ratio": statistics.median(beside[-quarter:]) / statistics.median(beside[:quarter]),
        "machine_drift": statistics.median(young[-quarter:]) / statistics.median(young[warm : warm + quarter]),
        "memory_growth_mb": statistics.median(resident[-quarter:]) - statistics.median(resident[warm : warm + quarter]),
        "chunks": chunks,
        "ms_per_chunk_early": 1e3 * statistics.median(early),
        "ms_per_chunk_late": 1e3 * statistics.median(late),
        "ms_per_chunk_p50": statistics.median(ms),
        "loop_overhead": statistics.median(own),
        "resident_mb": resident[-1],
        "preset": pipeline.preset_name,
        "backend": pipeline.stages.name,
        "device": str(pipeline.device),
    }


class _Young:
    """A stream that starts over every LIFE chunks. Its caches are full whenever it is timed."""

    LIFE = 20

    def __init__(self, pipeline: Pipeline, prompt: str, seed: int) -> None:
        self.pipeline, self.prompt, self.seed = pipeline, prompt, seed
        self._start()

    def _start(self) -> None:
        self.stream = self.pipeline.stream(self.prompt, seed=self.seed)
        for _ in range(steady_index(self.pipeline.preset)):
            self.stream.next_chunk()
        self.left = self.LIFE

    def seconds(self) -> float:
        """Time of one chunk."""
        if not self.left:
            self.stream.close()
            self._start()
        self.left -= 1
        start = time.perf_counter()
        self.stream.next_chunk()
        return time.perf_counter() - start


def variants(pipeline: Pipeline, sweep: str) -> dict[int, Pipeline]:
    """The pipelines of a sweep, by the value that the sweep changes."""
    preset = pipeline.preset

    def changed(**fields: Any) -> Pipeline:
        return replace(pipeline, preset=replace(preset, **fields))

    if sweep == "resolution":
        unit = pipeline.spatial * pipeline.config.patch_size[1], pipeline.spatial * pipeline.config.patch_size[2]
        sizes = [[max(1, pixels * k // 4 // u) * u for pixels, u in
                  zip((pipeline.height, pipeline.width), unit, strict=True)] for k in (3, 4, 6, 8)]  # fmt: skip
        made = [replace(pipeline, height=height, width=width) for height, width in sizes]
        return {p.height // unit[0] * (p.width // unit[1]): p for p in made}
    if sweep == "steps":
        return {count: changed(steps=(_STEPS[:count],), stop_after=0) for count in (1, 2, 4, 8)}
    if preset.family == "greedy":
        if sweep == "chunk":
            chunks, most = preset.window // preset.chunk, preset.max_position
            return {k: changed(chunk=k, window=chunks * k, max_position=max(most, 2 * k)) for k in (1, 2, 3)}
        return {w: changed(window=(w + 1) * preset.chunk) for w in (0, 1, 3, 7, 15)}
    if sweep == "chunk":
        return {k: changed(chunk=k, first_chunk=0, window=max(preset.window, preset.attn_sink + k)) for k in (1, 2, 3)}
    least = preset.attn_sink + preset.chunk
    return {w: changed(window=w) for w in (6, 9, 12, 21) if w >= least}


def _timed_chunk(stream: PythonStream) -> float:
    start = time.perf_counter()
    stream.next_chunk()
    return time.perf_counter() - start


def turns(pipelines: dict[int, Pipeline], prompt: str, seed: int, rounds: int) -> dict[int, list[float]]:
    """Milliseconds of steady chunks; each round times one chunk of every variant."""
    streams: dict[int, PythonStream] = {value: p.stream(prompt, seed=seed) for value, p in pipelines.items()}
    ms: dict[int, list[float]] = {value: [] for value in streams}
    for value, stream in streams.items():
        for _ in range(steady_index(pipelines[value].preset)):
            stream.next_chunk()
    for _, value, seconds in interleaved({v: partial(_timed_chunk, s) for v, s in streams.items()}, rounds):
        ms[value].append(1e3 * seconds)
    for stream in streams.values():
        stream.close()
    return ms


def sweep_points(pipeline: Pipeline, sweep: str, prompt: str, seed: int, rounds: int) -> list[dict[str, Any]]:
    """One sweep: at each value the milliseconds and the counted FLOPs per chunk."""
    if sweep == "threads":
        before = torch.get_num_threads()
        points = []
        for count in sorted({1, *(2**k for k in range(10) if 2**k <= (before if before > 1 else 2))}):
            torch.set_num_threads(count)
            points.append({"value": count, "ms_per_chunk": quartiles(turns({0: pipeline}, prompt, seed, rounds)[0])})
        torch.set_num_threads(before)
        return points
    if sweep == "streams":
        points = []
        for count in (1, 2, 4):
            trial = concurrent.trial(pipeline, prompt, count, chunks=max(5, rounds // 2))
            points.append({"value": count, "ms_per_chunk": quartiles(trial.ms), "fps": trial.fps})
        return points
    found = variants(pipeline, sweep)
    ms = turns(found, prompt, seed, rounds)
    rows = pipeline.tokenizer.rows if pipeline.tokenizer else 0
    points = []
    for value, variant in found.items():
        costs = chunk_cost(variant, rows, models.vae_config(pipeline))
        latent = total({name: cost for name, cost in costs.items() if name != "vae"})
        points.append({
            "value": value, "ms_per_chunk": quartiles(ms[value]), "gflop": total(costs).flops / 1e9,
            "latent_gflop": latent.flops / 1e9, "attention_gflop": latent.attention / 1e9,
        })  # fmt: skip
    return points


def claim(pipeline: Pipeline, sweeps: dict[str, list[dict[str, Any]]], time_ratio: float) -> dict[str, Any] | None:
    """The paper's (w + T) F L^2, term by term, in counted FLOPs and in time. The paper claims it for the greedy family.

    A chunk of L tokens attends to (w + 1) L keys in the ETM, 2 L in the context pass and 3 L in each of T steps. So
    attention takes 4 d layers L^2 (w + 3 T + 3): linear in w, T and the number of chunks F, quadratic in L.
    """
    if pipeline.preset.family != "greedy" or not {"window", "steps", "resolution"} <= set(sweeps):
        return None
    config, preset = pipeline.config, pipeline.preset
    steps = len(preset.steps[-1][: preset.stop_after or None])
    unit = [pipeline.spatial * p for p in config.patch_size[1:]]
    tokens = pipeline.height // unit[0] * (pipeline.width // unit[1])

    def expected(value: int, sweep: str) -> float:
        w = value if sweep == "window" else preset.window // preset.chunk - 1
        t = value if sweep == "steps" else steps
        length = preset.chunk * (value if sweep == "resolution" else tokens)
        return 4 * config.dim * config.num_layers * length**2 * (w + 3 * t + 3) / 1e9

    exact = all(
        abs(p["attention_gflop"] / expected(p["value"], sweep) - 1) < 1e-9
        for sweep in ("window", "steps", "resolution") for p in sweeps[sweep]
    )  # fmt: skip
    rows = pipeline.tokenizer.rows if pipeline.tokenizer else 0
    each = [total(c).flops / 1e9 for c in stream_costs(pipeline, 60, rows)]
    lengths = range(steady_index(preset), 60)
    cumulative = [sum(each[: n + 1]) for n in lengths]
    frames = [10, 20, 40, 80]
    teacher = [bidirectional_cost(pipeline, n, rows, steps).attention for n in frames]

    def fit(sweep: str, key: str) -> dict[str, float]:
        y = [p["ms_per_chunk"]["median"] if key == "ms" else p[key] for p in sweeps[sweep]]
        return line_fit([p["value"] for p in sweeps[sweep]], y)

    def exponent(key: str) -> float:
        y = [p["ms_per_chunk"]["median"] if key == "ms" else p[key] for p in sweeps["resolution"]]
        return power_fit([p["value"] for p in sweeps["resolution"]], y)

    return {
        "formula": "attention of a chunk = 4 d layers L^2 (w + 3 T + 3)",
        "flops": {
            "formula_exact": exact, "F": line_fit(list(lengths), cumulative), "T": fit("steps", "latent_gflop"),
            "w": fit("window", "latent_gflop"), "L_exponent_attention": exponent("attention_gflop"),
            "L_exponent_all": exponent("gflop"), "bidirectional_F_exponent_attention": power_fit(frames, teacher),
        },
        "time": {
            "F_late_over_early": time_ratio, "T": fit("steps", "ms"), "w": fit("window", "ms"),
            "L_exponent_all": exponent("ms"),
        },
    }  # fmt: skip


def print_claim(c: dict[str, Any]) -> None:
    flops, took = c["flops"], c["time"]
    print(f"\n(w + T) F L^2: {c['formula']}, {'exactly' if flops['formula_exact'] else 'NOT'} as counted")
    lines = [
        {"term": "F", "counted": f"linear, r2 {flops['F']['r2']:.6f}",
         "timed": f"late / early chunk {took['F_late_over_early']:.3f}"},
        *({"term": term, "counted": f"{flops[term]['slope']:.4g} GFLOP each, r2 {flops[term]['r2']:.6f}",
           "timed": f"{took[term]['slope']:.4g} ms each, r2 {took[term]['r2']:.3f}"} for term in ("T", "w")),
        {"term": "L", "counted": f"exponent {flops['L_exponent_attention']:.3f} (attention), "
         f"{flops['L_exponent_all']:.3f} (all)", "timed": f"exponent {took['L_exponent_all']:.3f} (all)"},
    ]  # fmt: skip
    print(table(lines))


def run(options: Options) -> int:
    options.prepare()
    if options.bundle and options.sweep:
        raise ValueError("--sweep: got a bundle, whose shapes are fixed, expected a model")
    asked = SWEEPS if options.sweep == "all" else tuple(filter(None, options.sweep.split(",")))
    unknown = sorted(set(asked) - set(SWEEPS))
    if unknown:
        raise ValueError(f"--sweep: got {', '.join(unknown)}, expected all or some of {', '.join(SWEEPS)}")
    pipeline = options.pipeline(options.preset)
    if check.refused(check.run(pipeline, options.prompt, options.seed)):
        return 1
    result: dict[str, Any] = {}
    for result in scaling(pipeline, options.prompt, options.chunks, options.seed):
        if "chunk" in result and sys.stderr.isatty():
            print(f"\rchunk {result['chunk']} of {options.chunks}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    where = machine(pipeline.device)
    result |= {"device": where["device"], "commit": where["commit"], "machine": where}
    result |= {"stream": stream_header(pipeline, options.label)}
    if asked:
        sweeps = {name: sweep_points(pipeline, name, options.prompt, options.seed, options.rounds) for name in asked}
        result |= {"sweeps": sweeps, "claim": claim(pipeline, sweeps, result["time_ratio"])}
        result["timings"] = {f"{name} {p['value']}": p["ms_per_chunk"] for name in asked for p in sweeps[name]}
    if options.plot:
        from bench.report import plots

        plots.draw("scaling", result, options.plot)
    if not options.json:
        print_report(result)
    saved.emit(options, "scaling", result)
    return 0


def print_report(result: dict[str, Any]) -> None:
    print_header(result["machine"], result["stream"])
    print()
    for key, value in result.items():
        if not isinstance(value, dict):
            print(f"{key:20} {value:.4g}" if isinstance(value, float) else f"{key:20} {value}")
    for name, points in result.get("sweeps", {}).items():
        rows = []
        for p in points:
            ms, also = p["ms_per_chunk"], {key: p[key] for key in ("gflop", "attention_gflop", "fps") if key in p}
            rows.append({name: p["value"], "ms/chunk": ms["median"], "q1": ms["q1"], "q3": ms["q3"], **also})
        print("\n" + table(rows))
    if result.get("claim"):
        print_claim(result["claim"])
