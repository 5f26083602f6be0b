"""The ablation (Table 3 of the paper), long videos (Fig. 6) and quality against steps, on the embedded scale.

    make ablation                     (python -m distill.ablation --config distill/configs/scenes.toml)

Trains every arm with every seed on the same data in the same steps, scores all of them on the same held-out prompts
and noise, and writes tables and plots to docs/results/. What a run finds done under --out it skips, and it goes on
inside a training that was stopped, so it may be ended and started at any time.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill import next_chunk, rl
from distill.base import Base
from distill.codec import Codec
from distill.draws import Draws
from distill.next_chunk import AnyStudent, NextChunkConfig, load_student
from distill.rl import RlConfig
from distill.rollout import roll_out
from distill.tasks import find_task
from distill.training import load_config, run_stage
from engine.config import Preset, find_preset

ARMS = {
    "no-etm": "no ETM, no RL",
    "etm": "ETM",
    "etm-rl": "ETM + RL",
    "etm-cfg": "ETM, guidance at inference",
    "etm-longer": "ETM, next-chunk for RL's compute too",
    "etm-rl-critic": "ETM + RL with a trained critic",
    "no-etm-rl": "no ETM, RL",
    "causal": "causal DiT, clean history (CausVid's mask)",
    "causal-rl": "causal DiT, own rollouts, trained critic (as Self-Forcing)",
}

PARENTS = {"etm-rl": "etm", "etm-rl-critic": "etm", "no-etm-rl": "no-etm", "causal-rl": "causal"}  # what RL starts from
CRITICS = ("etm-rl-critic", "causal-rl")


@dataclass(frozen=True)
class AblationConfig:
    task: str = "scenes"
    vae: str = "runs/rich/vae/vae"
    arms: tuple[str, ...] = ("no-etm", "etm", "etm-rl", "etm-cfg", "etm-longer", "etm-rl-critic")
    seeds: tuple[int, ...] = (0, 1, 2)
    next_chunk_steps: int = 200
    rl_steps: int = 100
    longer_steps: int = 50  # next-chunk steps that take as long as rl_steps of RL
    causal_window: int = 7  # latent frames
    guidance: float = 1.5  # of etm-cfg
    prompts: int = 48
    frames: int = 9  # latent frames of the table's clips
    long_prompts: int = 16
    long_frames: int = 41  # latent frames of the long clips; 0 leaves them out
    window: int = 32  # pixel frames over which a long clip's quality is taken
    steps: tuple[int, ...] = (1, 2, 4, 8)  # of the trade-off
    prompt_seed: int = 5000

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown or not self.seeds:
            raise ValueError(f"arms: got {unknown or 'no seeds'}, expected some of {', '.join(ARMS)}")


class Runner:
    """Trains and scores arms under one folder."""

    def __init__(self, config: AblationConfig, made: NextChunkConfig, tuned: RlConfig, out: Path) -> None:
        self.config, self.made, self.tuned, self.out = config, made, tuned, out
        self.task = find_task(config.task)
        self.codec = Codec(AutoencoderKLWan.from_pretrained(config.vae))
        self.specs = self.task.draw(config.prompts, config.prompt_seed, hidden=True)
        self.base = Base(Path(made.teacher), made.dtype)

    def train(self, arm: str, seed: int) -> Path:
        """The student of an arm and seed, trained unless it is there."""
        config = self.config
        folder = self.out / f"{arm}-{seed}"
        path = folder / "student.pt"
        if arm == "etm-cfg":
            return self.train("etm", seed)
        if path.is_file():
            return path
        if arm in PARENTS:
            start = self.train(PARENTS[arm], seed)
            critic = "trained" if arm in CRITICS else "self"
            tuned = replace(self.tuned, student=str(start), steps=config.rl_steps, seed=seed, critic=critic)
            rl.train(tuned, folder)
            return path
        made = replace(self.made, seed=seed, steps=config.next_chunk_steps)
        if arm == "etm-longer":
            made = replace(made, steps=config.next_chunk_steps + config.longer_steps)
        elif arm == "no-etm":
            made = replace(made, etm=False, rank=2 * made.rank)
        elif arm == "causal":
            made = replace(made, family="causal", rank=2 * made.rank, window=config.causal_window)
        next_chunk.train(made, folder)
        return path

    @torch.no_grad()
    def videos(
        self, student: AnyStudent, preset: Preset, prompts: int, frames: int, guidance: float = 1.0
    ) -> list[Tensor]:
        """Clips of the first prompts, always from the same noise."""
        made = []
        for start in range(0, prompts, 16):
            specs = self.specs[start : min(start + 16, prompts)]
            seeds = Draws(self.config.prompt_seed, start, list(range(len(specs)))).seeds()
            emb = self.base.encode([spec.caption for spec in specs])
            if guidance != 1:
                empty = self.base.encode([""] * len(specs))
                with student.guided(guidance):
                    latent = roll_out(student, torch.cat([emb, empty]), frames, seeds * 2, preset)[: len(specs)]
            else:
                latent = roll_out(student, emb, frames, seeds, preset)
            made += [self.codec.decode(clip[None])[0] for clip in latent]
        return made

    def result(self, arm: str, seed: int) -> dict[str, Any]:
        """Scores of an arm and seed, measured unless they are there."""
        path = self.out / f"{arm}-{seed}" / "result.json"
        if path.is_file():
            return json.loads(path.read_text())
        begun = time.monotonic()
        student, made, _ = load_student(self.train(arm, seed), self.base)
        minutes = (time.monotonic() - begun) / 60
        config = self.config
        guidance = config.guidance if arm == "etm-cfg" else 1.0
        videos = self.videos(student, made.preset, config.prompts, config.frames, guidance)
        result: dict[str, Any] = {
            "arm": arm,
            "seed": seed,
            "trained": sum(p.numel() for p in student.trained().values()),
            "minutes": round(minutes, 1),
            "scores": self.task.score(videos, self.specs),
        }
        if config.long_frames:
            long = self.videos(student, made.preset, config.long_prompts, config.long_frames, guidance)
            result["long"] = self.over_time(long)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1))
        part.rename(path)
        return result

    def over_time(self, videos: list[Tensor]) -> list[dict[str, float]]:
        """Quality and semantic scores of successive windows of long clips."""
        length = self.config.window
        specs = self.specs[: len(videos)]
        rows = []
        for start in range(0, videos[0].shape[1] - length + 1, length):
            found = self.task.score([v[:, start : start + length] for v in videos], specs, begins=start == 0)
            row = {"from": float(start)}
            for name in ("quality", "object_class", "color", "multiple_objects", "imaging_quality"):
                row[name] = found[name]["mean"] if name in found else math.nan
            rows.append(row)
        return rows

    def trade_off(self, arm: str, seed: int) -> list[dict[str, float]]:
        """Total score and relative cost of the same student with other numbers of steps."""
        path = self.out / "trade_off.json"
        if path.is_file():
            return json.loads(path.read_text())
        student, made, _ = load_student(self.train(arm, seed), self.base)
        rows = []
        for count in self.config.steps:
            fields = made.preset_fields() | {"steps": list(range(1000, 0, -(1000 // count)))[:count]}
            videos = self.videos(student, find_preset("greedy", fields), self.config.prompts, self.config.frames)
            found = self.task.score(videos, self.specs)
            names = ("semantic", "quality", "total")
            rows.append({"steps": count, "cost": (2 + count) / 6} | {n: found[n]["mean"] for n in names}
                        | {f"{n}_se": found[n]["se"] for n in names})  # fmt: skip
        path.write_text(json.dumps(rows, indent=1))
        return rows


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    tensor = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if not len(tensor):
        return math.nan, math.nan
    error = float(tensor.std(correction=1)) / math.sqrt(len(tensor)) if len(tensor) > 1 else math.nan
    return float(tensor.mean()), error


def table(results: list[dict[str, Any]], names: tuple[str, ...] = ("total", "quality", "semantic")) -> str:
    """Markdown: a row an arm; mean over seeds and its standard error over seeds."""
    lines = ["| arm | seeds | trained | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for arm, title in ARMS.items():
        mine = [r for r in results if r["arm"] == arm]
        if not mine:
            continue
        cells = []
        for name in names:
            mean, error = spread([r["scores"].get(name, {"mean": math.nan})["mean"] for r in mine])
            cells.append(f"{100 * mean:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}"))
        lines.append(f"| {title} | {len(mine)} | {mine[0]['trained'] / 1e6:.2f} M | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_report(
    config: AblationConfig, results: list[dict[str, Any]], folder: Path, trade: list[dict[str, float]]
) -> None:
    """Tables as Markdown, numbers as JSON, and plots where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    dims = tuple(sorted({n for r in results for n in r["scores"]} - {"total", "quality", "semantic"}))
    about = (
        f"{config.prompts} held-out prompts (seed {config.prompt_seed}), {4 * config.frames - 3} frames, "
        f"the same noise for all; next-chunk {config.next_chunk_steps} steps, RL {config.rl_steps}, "
        f"the longer arm {config.longer_steps} more. In percent, mean and standard error over seeds.\n\n"
    )
    text = "# Ablation\n\n`make ablation`: " + about + table(results) + "\n## Dimensions\n\n" + table(results, dims)
    long = [r for r in results if r.get("long")]
    if long:
        starts = [int(row["from"]) for row in long[0]["long"]]
        text += (
            f"\n## Quality over time\n\n{config.long_prompts} prompts; a column a window of {config.window} frames.\n\n"
        )
        text += "| arm | " + " | ".join(f"{s}-{s + config.window - 1}" for s in starts) + " | last / first |\n"
        text += "|---" * (len(starts) + 2) + "|\n"
        for arm, title in ARMS.items():
            mine = [r["long"] for r in long if r["arm"] == arm]
            if mine:
                means = [spread([rows[i]["quality"] for rows in mine])[0] for i in range(len(starts))]
                row = " | ".join(f"{100 * m:.1f}" for m in means)
                text += f"| {title} | {row} | {means[-1] / means[0]:.3f} |\n"
    if trade:
        text += (
            "\n## Quality against steps\n\nThe ETM student of the first seed; cost a frame relative to four steps.\n\n"
        )
        text += "| steps | cost | total | quality | semantic |\n|---|---|---|---|---|\n"
        for row in trade:
            cells = [f"{100 * row[n]:.1f} ± {100 * row[n + '_se']:.1f}" for n in ("total", "quality", "semantic")]
            text += f"| {row['steps']} | {row['cost']:.2f} | " + " | ".join(cells) + " |\n"
    (folder / "ablation.md").write_text(text)
    (folder / "ablation.json").write_text(json.dumps({"results": results, "trade_off": trade}, indent=1) + "\n")
    plot(results, folder)


def plot(results: list[dict[str, Any]], folder: Path) -> None:
    """ablation.png: the arms with error bars over seeds; long.png: quality against time."""
    try:
        import matplotlib
    except ImportError:
        print("plots: left out, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in ARMS if any(r["arm"] == arm for r in results)]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 0.5 * len(arms) + 1.6), sharey=True)
    for axis, name in zip(axes, ("total", "quality", "semantic"), strict=True):
        for place, arm in enumerate(arms):
            values = [100 * r["scores"][name]["mean"] for r in results if r["arm"] == arm]
            mean, error = spread(values)
            axis.errorbar(mean, place, xerr=0 if math.isnan(error) else error, fmt="o", color="black", capsize=3)
            axis.plot(values, [place] * len(values), ".", color="gray")
        axis.set_title(name)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), [ARMS[arm] for arm in arms])
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "ablation.png", dpi=110)
    pyplot.close(figure)
    if not any(r.get("long") for r in results):
        return
    figure, axis = pyplot.subplots(figsize=(7, 4))
    for arm in arms:
        mine = [r["long"] for r in results if r["arm"] == arm and r.get("long")]
        if mine:
            means = [100 * spread([rows[i]["quality"] for rows in mine])[0] for i in range(len(mine[0]))]
            axis.plot([row["from"] for row in mine[0]], means, marker=".", label=ARMS[arm])
    axis.set_xlabel("first frame of the window")
    axis.set_ylabel("quality")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "long.png", dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("distill/configs/scenes.toml"), help="TOML file")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of students and scores")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of tables and plots")
    parser.add_argument("--report", action="store_true", help="only write what is there, train nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, "ablation", AblationConfig)
    if arguments.report:
        found = sorted(arguments.out.glob("*/result.json"))
        if not found:
            raise FileNotFoundError(f"results: got none in {arguments.out}, expected */result.json")
        trade = arguments.out / "trade_off.json"
        rows = json.loads(trade.read_text()) if trade.is_file() else []
        write_report(config, [json.loads(path.read_text()) for path in found], arguments.results, rows)
        return
    made = load_config(arguments.config, "next_chunk", NextChunkConfig)
    runner = Runner(config, made, load_config(arguments.config, "rl", RlConfig), arguments.out)
    results: list[dict[str, Any]] = []
    for seed in config.seeds:
        for arm in config.arms:
            results.append(runner.result(arm, seed))
            print(json.dumps({"arm": arm, "seed": seed, "total": results[-1]["scores"]["total"]}), flush=True)
            write_report(config, results, arguments.results, [])
    write_report(config, results, arguments.results, runner.trade_off("etm", config.seeds[0]))


if __name__ == "__main__":
    run_stage(main)
