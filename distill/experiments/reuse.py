"""What reuse of block residuals gains over its control, the same student with that step dropped: table and plot.

    python -m distill reuse                    (--config distill/configs/reuse.toml --results docs/results/reuse)

Every way to stream gets the same held-out prompts and noise. A pattern (steps:first:last, and a solver if it is not the
model's) has a control: the same steps without those at which it reuses. FLOPs are counted on Wan2.1-1.3B's shape at
832x480. CPU times are of this model, on one thread, the ways in turns. Scores in --out are kept, so that a run can
end and start again at any time.
"""

import json
import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import engine
from distill.experiments.measure import by_score
from distill.experiments.pairs import Spread, difference, spread
from distill.experiments.plots import can_plot, figure
from distill.experiments.tables import cell, table
from distill.models.rollout import SampleNoise
from distill.scores.dimensions import with_totals
from distill.scores.pixels import from_uint8
from distill.scores.tasks import find_task
from distill.training.stage import Stage, TableOptions
from engine.config import TransformerConfig
from engine.files import read_json, whole_file, write_json
from engine.generators import family_of
from engine.loader import assemble
from engine.model.cache import RingCache
from engine.model.transformer import TextKV, WanTransformer
from engine.model.vae import frames_to_uint8
from engine.options import option
from engine.presets import PRESETS, override
from engine.runtime.passes import Pass
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline

META = torch.device("meta")
TEXT_ROWS = 512  # of Wan2.1's prompts
SHOWN = ("quality", "semantic", "all_right")
WARM = 5  # chunks until the caches are full
BATCH = 16  # clips streamed at once


@dataclass(frozen=True)
class ReuseConfig:
    """The table [reuse]."""

    model: str = option("engine/assets/sprites", "pipeline directory")
    task: str = option("scenes", "task of prompts and scores: sprites or scenes")
    prompts: int = option(48, "held-out prompts")
    frames: int = option(33, "pixel frames per clip")
    seed: int = option(7000, "of the prompts and of the noise")
    steps: tuple[int, ...] = option((1000, 750, 500, 250), "timesteps of all full steps")
    patterns: tuple[str, ...] = option(("3:1:1",), "STEP,..:FIRST:LAST as --reuse takes it, then a solver, if another")
    trained: tuple[tuple[int, ...], ...] = option((), "timesteps of fewer steps that the student was trained for")
    rounds: int = option(4, "of CPU times, each with all ways in turn")

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("frames", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"[reuse] {name}: got {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class ReuseOptions(TableOptions):
    config: Path = option(Path("distill/configs/reuse.toml"), "TOML file with the table [reuse]", metavar="FILE")
    out: Path = option(Path("runs/reuse"), "folder of scores")
    results: Path = option(Path("docs/results/reuse"), "folder of table and plot")


@dataclass(frozen=True)
class Way:
    """A way to stream the student: fields of its preset, and the ways that it is compared with."""

    name: str
    kind: Literal["full", "reuse", "dropped", "trained"]
    fields: dict[str, Any] = field(default_factory=dict)
    full: str = ""  # all steps, none of them short
    control: str = ""  # the steps of a reuse dropped


def ways_of(config: ReuseConfig) -> list[Way]:
    """All ways, each after those that it is compared with. ValueError for a pattern that is none."""
    found: dict[str, Way] = {}

    def add(way: Way) -> str:
        return found.setdefault(way.name, way).name

    def steps(kept: tuple[int, ...], kind: Any, full: str, solver: dict[str, str]) -> str:
        name = " ".join([",".join(map(str, kept)), *solver.values()])
        return add(Way(name, kind, {"steps": list(kept), **solver}, full))

    full = steps(config.steps, "full", "", {})
    for few in config.trained:  # before the patterns: one may be the control of a pattern, too
        steps(few, "trained", full, {})
    for text in config.patterns:
        pattern, _, solver_name = text.partition(" ")
        solver = {"solver": solver_name} if solver_name else {}
        preset = override(PRESETS["greedy"], {"steps": list(config.steps), "reuse": pattern, **solver})
        if preset.reuse is None:
            raise ValueError(f"[reuse] patterns: got {text!r}, expected STEP,..:FIRST:LAST")
        kept = tuple(t for number, t in enumerate(config.steps, 1) if number not in preset.reuse.steps)
        same = steps(config.steps, "full", "", solver)
        control = steps(kept, "dropped", same, solver)
        fields = {"steps": list(config.steps), "reuse": asdict(preset.reuse), **solver}
        add(Way(f"reuse {text}", "reuse", fields, same, control))
    return list(found.values())


def scores_of(config: ReuseConfig, pipeline: Pipeline, way: Way, out: Path) -> dict[str, Any]:
    """Scores of every clip, and its PSNR to that of the full steps; from the folder where it has them."""
    path = out / f"{re.sub('[^a-z0-9]+', '-', way.name)}.json"
    settings = {name: v for name, v in asdict(config).items() if name in ("model", "task", "prompts", "frames", "seed")}
    settings = json.loads(json.dumps(settings | {"preset": way.fields}))  # as a file has them
    if path.is_file():
        found: dict[str, Any] = read_json(path)
        if found["settings"] != settings:
            raise ValueError(f"{path}: got scores of other settings, expected those of this run (or another --out)")
        return found
    task = find_task(config.task)
    specs = task.draw(config.prompts, config.seed, hidden=True)
    videos = clips_of(streamed(pipeline, way), specs, config.frames, config.seed)
    scores = by_score([with_totals(task.dimensions(video, spec)) for video, spec in zip(videos, specs, strict=True)])
    clips, reference = torch.stack(videos).half().numpy(), out / f"{re.sub('[^a-z0-9]+', '-', way.full)}.npy"
    if way.full:
        scores["psnr"] = psnr(clips, np.load(reference))
    else:
        with whole_file(path.with_suffix(".npy")) as part, open(part, "wb") as file:
            np.save(file, clips)
    found = {"settings": settings, "scores": scores}
    write_json(path, found, indent=0)
    return found


@torch.inference_mode()
def clips_of(pipeline: Pipeline, specs: list[Any], frames: int, seed: int) -> list[Tensor]:
    """One video [3, T, H, W] per prompt, several streamed as one batch; clip i has the noise of `seed + i`."""
    videos, stages = list[Tensor](), pipeline.stages
    for first in range(0, len(specs), BATCH):
        part = specs[first : first + BATCH]
        text = torch.cat([pipeline.encode_prompt(spec.caption) for spec in part])
        noise, shown, cache = SampleNoise([seed + first + i for i in range(len(part))]), list[Tensor](), None
        with pipeline.stream(text, noise=noise) as stream:
            while sum(frame.shape[2] for frame in shown) < frames:
                for latent in stream.next_latent().split(1, dim=2):
                    more, cache = stages.vae_first(latent) if cache is None else stages.vae_steady(latent, cache)
                    shown.append(more)
        videos += [from_uint8(clip.numpy()) for clip in frames_to_uint8(torch.cat(shown, 2)[:, :, :frames])]
    return videos


def psnr(clips: np.ndarray, reference: np.ndarray) -> list[float | None]:
    """Decibels of each clip, with values in [-1, 1]; None where it equals the reference."""
    errors = ((clips.astype(np.float64) - reference) ** 2).reshape(len(clips), -1).mean(1)
    return [None if error == 0 else round(float(10 * np.log10(4 / error)), 3) for error in errors]


def streamed(pipeline: Pipeline, way: Way) -> Pipeline:
    return replace(pipeline, preset=override(pipeline.preset, way.fields))


@torch.inference_mode()
def cpu_times(pipeline: Pipeline, ways: list[Way], rounds: int) -> dict[str, float]:
    """CPU seconds of a chunk's latent as a share of the full steps', each the least of several rounds in turn."""
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    prompt = torch.zeros(1, pipeline.tokenizer.rows if pipeline.tokenizer else 1, pipeline.config.text_dim)
    for number in range(rounds + 1):  # the first one warms up
        for way in ways:
            with streamed(pipeline, way).stream(prompt, seed=number) as stream:
                for _ in range(WARM):
                    stream.next_latent()
                begun = time.process_time()
                for _ in range(WARM):
                    stream.next_latent()
                found[way.name].append(time.process_time() - begun)
    least = {name: min(values) for name, values in found.items()}
    return {name: value / least[ways[0].name] for name, value in least.items()}


class _Counting(TorchStages):
    """Counts the FLOPs of passes on tensors without memory, equal passes once."""

    def __init__(self, models: dict[str, WanTransformer]) -> None:
        super().__init__(models, None, None)
        self.flops: float | None = None  # since it was set to 0; None: nothing is counted
        self._known: dict[Any, int] = {}

    def prepare_text(self, text_emb: Tensor) -> dict[str, TextKV]:
        config = next(iter(self.models.values())).config
        shape = config.num_layers, 1, TEXT_ROWS, config.num_attention_heads, config.attention_head_dim
        return dict.fromkeys(self.models, (text_emb.new_empty(shape), text_emb.new_empty(shape)))

    def run(self, step: Pass, cache: RingCache, text_kv: dict[str, TextKV]) -> Tensor:
        if self.flops is not None:
            key = step.kind.graph, step.reuse if step.short else None, step.valid
            if key not in self._known:
                with FlopCounterMode(display=False) as counter:
                    super().run(step, cache, text_kv)
                self._known[key] = counter.get_total_flops()
            self.flops += self._known[key]
        width = self.models[step.kind.role].config.dim
        return step.latent.new_empty(1, len(step.cos), width) if step.kind.hidden else step.latent


class _NoNoise:
    def draw(self, chunk: int, count: int, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(count, *shape, device=META)


def full_size() -> Pipeline:
    """Wan2.1-1.3B's shape at 832x480, without memory."""
    config, preset = TransformerConfig(), PRESETS["greedy"]
    family = family_of(preset)
    with META:
        models = {role: WanTransformer(config, family.conditioned(role)) for role in family.roles()}
    return assemble(_Counting(models), config, preset, torch.float32, META, height=480, width=832)


def counted_flops(pipeline: Pipeline, way: Way) -> float:
    """FLOPs of a chunk's transformer passes, once the caches are full."""
    text, stages = torch.empty(1, TEXT_ROWS, pipeline.config.text_dim, device=META), cast(_Counting, pipeline.stages)
    stages.flops, stream = None, streamed(pipeline, way).stream(text, noise=_NoNoise())
    for _ in range(WARM):
        stream.next_latent()
    stages.flops = 0
    stream.next_latent()
    return stages.flops


def rows_of(ways: list[Way], found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything that table and plot show, a row per way."""

    def values(name: str, score: str) -> Tensor:
        scores = found[name]["scores"][score]
        return torch.tensor([[np.nan if v is None else v for v in scores]], dtype=torch.float64)

    rows = []
    for way in ways:
        own = values(way.name, "total")
        row = asdict(way) | {name: spread(values(way.name, name)) for name in ("total", *SHOWN)}
        row["psnr"] = spread(values(way.name, "psnr")) if way.full else None
        row["to_full"] = difference(own, values(way.full, "total")) if way.full else None
        row["to_control"] = difference(own, values(way.control, "total")) if way.control else None
        gain = difference(values(way.name, "psnr"), values(way.control, "psnr")) if way.control else None
        rows.append(row | {"psnr_to_control": gain, "flops": found[way.name]["flops"], "cpu": found[way.name]["cpu"]})
    return rows


def report(config: ReuseConfig, rows: list[dict[str, Any]]) -> str:
    """reuse.md."""
    heads = ["steps", "FLOPs", "CPU", "total", "to the full steps", "to its control", *SHOWN, "PSNR", "to its control"]
    lines = [
        [row["name"], f"{100 * row['flops'] / rows[0]['flops']:.0f} %", f"{100 * row['cpu']:.0f} %", cell(row["total"]),
         *(cell(row[name], form="+.2f") for name in ("to_full", "to_control")), *(cell(row[name]) for name in SHOWN),
         cell(row["psnr"], 1.0), cell(row["psnr_to_control"], 1.0, "+.1f")]
        for row in rows
    ]  # fmt: skip
    about = (
        f"`python -m distill reuse`: {config.prompts} held-out prompts (seed {config.seed}), {config.frames} frames, "
        "the same prompts and noise for all. Scores and differences in percent, with standard errors over prompts; "
        "differences are paired. `reuse 3:1:1`: at step 3 only the first and the last block run. Its control has the "
        "same steps without that one. PSNR is to the clips of all full steps, in dB. FLOPs: of the transformers on "
        "Wan2.1-1.3B's shape (30 blocks, 832x480), counted. CPU: time of a latent on this model (4 blocks), measured "
        "in turns, the least of some rounds."
    )
    return "\n\n".join(["# Reuse of block residuals against dropping the step", about, table(heads, lines)]) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Differences to the controls; and PSNR against FLOPs, where a line joins a reuse and its control."""
    at, tried = {row["name"]: row for row in rows}, [row for row in rows if row["control"]]
    looks = {"reuse": ("o", "tab:blue", 6), "dropped": ("o", "tab:orange", -6), "trained": ("*", "tab:green", -8)}
    with figure(path, 13, 5.5, 2, share=False) as (left, right):
        left.errorbar([100 * row["to_control"].mean for row in tried], range(len(tried)), fmt="o", capsize=3,
                      xerr=[200 * row["to_control"].error for row in tried])  # fmt: skip
        left.set_yticks(range(len(tried)), [f"{row['name']}\nagainst {row['control']}" for row in tried], fontsize=8)
        left.axvline(0, color="black", linewidth=0.8)
        left.invert_yaxis()
        left.set_xlabel("total: paired difference to the control, points, with 2 standard errors")
        place = {name: 100 * row["flops"] / rows[0]["flops"] for name, row in at.items()}
        for kind, (marker, colour, aside) in looks.items():
            shown = sorted((row for row in rows if row["kind"] == kind and row["psnr"]), key=lambda r: r["psnr"].mean)
            spots = [(place[row["name"]], row["psnr"].mean) for row in shown]
            if not shown:
                continue
            right.errorbar(*zip(*spots, strict=True), yerr=[row["psnr"].error for row in shown], fmt=marker,
                           color=colour, capsize=2, label=kind)  # fmt: skip
            lowest = -np.inf
            for row, spot in zip(shown, spots, strict=True):
                lowest = max(spot[1], lowest + 0.55)  # labels stand apart
                right.annotate(row["name"], (spot[0], lowest), xytext=(aside, 0), textcoords="offset points",
                               fontsize=7, ha="left" if aside > 0 else "right", va="center")  # fmt: skip
        for row in tried:
            both = (row, at[row["control"]])
            right.plot([place[one["name"]] for one in both], [one["psnr"].mean for one in both], color="gray",
                       linewidth=0.7, zorder=0)  # fmt: skip
        right.set_xlim(40, 100)
        right.set_xlabel("FLOPs of the transformers, percent of all full steps (Wan2.1-1.3B's shape)")
        right.set_ylabel("PSNR to the clips of all full steps, dB")
        right.legend(fontsize=8, loc="upper left")
        for axis in (left, right):
            axis.grid(alpha=0.3)


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Spread) else value


def run(config: ReuseConfig, options: ReuseOptions) -> None:
    """Score what is missing, measure, count, and write reuse.md, reuse.json and reuse.png."""
    ways, pipeline = ways_of(config), engine.load(config.model, device="cpu", threads=options.threads)
    for way in ways:
        if (reuse := streamed(pipeline, way).preset.reuse) is not None:
            reuse.check(pipeline.config.num_layers)  # before minutes of clips
    found = {}
    for number, way in enumerate(ways, 1):
        found[way.name] = scores_of(config, pipeline, way, options.out)
        totals = found[way.name]["scores"]["total"]
        print(f"{number}/{len(ways)} {way.name}: total {100 * sum(totals) / len(totals):.2f}", flush=True)
    times, large = cpu_times(pipeline, ways, config.rounds), full_size()
    for way in ways:
        found[way.name] |= {"cpu": times[way.name], "flops": counted_flops(large, way)}
    rows = rows_of(ways, found)
    options.results.mkdir(parents=True, exist_ok=True)
    with whole_file(options.results / "reuse.md") as part:
        part.write_text(report(config, rows), encoding="utf-8")
    plain = [{name: _plain(value) for name, value in row.items()} for row in rows]
    write_json(options.results / "reuse.json", {"settings": asdict(config), "ways": plain})
    if can_plot():
        draw(rows, options.results / "reuse.png")


STAGE = Stage(ReuseOptions, run, ReuseConfig, "reuse")
