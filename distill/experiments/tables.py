"""The arms of an ablation, and its report: Markdown, JSON, and pictures where matplotlib is installed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.files import whole_file, write_json
from engine.options import option

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


@dataclass(frozen=True)
class AblationConfig:
    """The table [ablation]. Reports of older runs are read by these keys and those of the results."""

    task: str = option("scenes", "task of prompts and scores: sprites or scenes")
    vae: str = option("runs/rich/vae/vae", "VAE that decodes the clips")
    arms: tuple[str, ...] = option(
        ("no-etm", "etm", "etm-rl", "etm-cfg", "etm-longer", "etm-rl-critic"), "arms, of: " + ", ".join(ARMS)
    )
    seeds: tuple[int, ...] = option((0, 1, 2), "training seeds of every arm")
    next_chunk_steps: int = option(200, "steps of next-chunk training")
    rl_steps: int = option(100, "steps of RL")
    longer_steps: int = option(50, "next-chunk steps that take as long as rl_steps of RL")
    causal_window: int = option(7, "window of the causal arms, in latent frames")
    guidance: float = option(1.5, "guidance scale of etm-cfg")
    prompts: int = option(48, "held-out prompts")
    frames: int = option(9, "latent frames per clip of the table")
    given: int = option(2, "drawn latent frames that a second set of clips continues; 0: no second set")
    long_prompts: int = option(16, "prompts of the long clips")
    long_frames: int = option(41, "latent frames per long clip; 0: no long clips")
    window: int = option(32, "pixel frames over which a long clip's quality is taken")
    steps: tuple[int, ...] = option((1, 2, 4, 8), "denoising steps of the trade-off")
    prompt_seed: int = option(5000, "of prompts and noise")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown or not self.seeds:
            raise ValueError(f"arms: got {unknown or 'no seeds'}, expected some of {', '.join(ARMS)}")


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds; NaN values are left out."""
    tensor = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if not len(tensor):
        return math.nan, math.nan
    error = float(tensor.std(correction=1)) / math.sqrt(len(tensor)) if len(tensor) > 1 else math.nan
    return float(tensor.mean()), error


def percent(values: list[float]) -> str:
    """A cell of a table: the mean in percent and its standard error."""
    mean, error = spread(values)
    return f"{100 * mean:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


def table(
    results: list[dict[str, Any]], names: tuple[str, ...] = ("total", "quality", "semantic"), what: str = "scores"
) -> str:
    """Markdown, one row per arm: mean and standard error over seeds, of `scores` or `given` of the results."""
    lines = ["| arm | seeds | trained | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for arm, title in ARMS.items():
        mine = [r for r in results if r["arm"] == arm and what in r]
        if not mine:
            continue
        cells = [percent([r[what].get(name, {"mean": math.nan})["mean"] for r in mine]) for name in names]
        lines.append(f"| {title} | {len(mine)} | {mine[0]['trained'] / 1e6:.2f} M | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def loss_table(results: list[dict[str, Any]]) -> str:
    """Held-out Eq. 6, and its difference to the first arm, seed by seed; the noise is the same."""
    names = ("all", "reappearing")
    lines = ["| arm | all frames | reappearing | difference, all | difference, reappearing |", "|---" * 5 + "|"]
    by = {(r["arm"], r["seed"]): r["loss"] for r in results if "loss" in r}
    first = next(arm for arm in ARMS if any(arm == known for known, _ in by))
    for arm, title in ARMS.items():
        seeds = [seed for known, seed in by if known == arm]
        if not seeds:
            continue
        cells = [f"{spread([by[arm, seed].get(name, math.nan) for seed in seeds])[0]:.4f}" for name in names]
        for name in names:
            shared = [seed for seed in seeds if (first, seed) in by]
            gaps = [by[arm, seed].get(name, math.nan) - by[first, seed].get(name, math.nan) for seed in shared]
            mean, error = spread(gaps)
            cells.append(f"{mean:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}"))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def time_table(config: AblationConfig, results: list[dict[str, Any]]) -> str:
    """Quality of successive windows of long clips, one row per arm, mean over seeds."""
    starts = [int(row["from"]) for row in results[0]["long"]]
    lines = [
        "| arm | " + " | ".join(f"{s}-{s + config.window - 1}" for s in starts) + " | last / first |",
        "|---" * (len(starts) + 2) + "|",
    ]
    for arm, title in ARMS.items():
        mine = [r["long"] for r in results if r["arm"] == arm]
        if mine:
            means = [spread([rows[i]["quality"] for rows in mine])[0] for i in range(len(starts))]
            row = " | ".join(f"{100 * mean:.1f}" for mean in means)
            lines.append(f"| {title} | {row} | {means[-1] / means[0]:.3f} |")
    return "\n".join(lines) + "\n"


def blinking_table(results: list[dict[str, Any]]) -> str:
    """Share of the clips that blink, one row per arm, mean and standard error over seeds."""
    lines = ["| arm | clips that blink |", "|---" * 2 + "|"]
    for arm, title in ARMS.items():
        mine = [r["blinking"] for r in results if r["arm"] == arm and "blinking" in r]
        if mine:
            lines.append(f"| {title} | {percent(mine)} |")
    return "\n".join(lines) + "\n"


def trade_table(rows: list[dict[str, float]]) -> str:
    """Scores against denoising steps; standard errors over clips."""
    lines = ["| steps | cost | total | quality | semantic |", "|---" * 5 + "|"]
    for row in rows:
        cells = [f"{100 * row[n]:.1f} ± {100 * row[n + '_se']:.1f}" for n in ("total", "quality", "semantic")]
        lines.append(f"| {row['steps']} | {row['cost']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_report(
    config: AblationConfig, results: list[dict[str, Any]], trade: list[dict[str, float]], folder: Path
) -> None:
    """ablation.md with every table, ablation.json with every number, and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    dims = tuple(sorted({n for r in results for n in r["scores"]} - {"total", "quality", "semantic", "blink"}))
    about = (
        f"`make ablation`: {config.prompts} held-out prompts (seed {config.prompt_seed}), {4 * config.frames - 3} "
        f"frames, the same noise for all; next-chunk {config.next_chunk_steps} steps, RL {config.rl_steps}, the longer "
        f"arm {config.longer_steps} more. In percent, mean and standard error over seeds."
    )
    parts = ["# Ablation", about, table(results), "## Dimensions", table(results, dims)]
    if any("given" in r for r in results):
        parts += [f"## Going on from {config.given} drawn latent frames", table(results, what="given")]
        parts += [table(results, dims, what="given")]
    if any("loss" in r for r in results):
        about = "Mean squared error of the flow (Eq. 6) on drawn held-out clips, the same noise for all arms."
        parts += ["## Held-out loss", about, loss_table(results)]
    if any("blinking" in r for r in results):
        about = (
            "Share of the text-to-video clips whose mover blinks, in percent. No caption states it; no score counts it."
        )
        parts += ["## What no caption states", about, blinking_table(results)]
    long = [r for r in results if r.get("long")]
    if long:
        about = f"Quality of text-to-video, {config.long_prompts} prompts, one column per {config.window} frames."
        parts += ["## Quality over time", about, time_table(config, long)]
    if trade:
        about = "The ETM student of the first seed; cost of a frame relative to four steps, in passes."
        parts += ["## Quality against steps", about, trade_table(trade)]
    with whole_file(folder / "ablation.md") as part:
        part.write_text("\n\n".join(text.strip() for text in parts) + "\n")
    write_json(folder / "ablation.json", {"results": results, "trade_off": trade})
    plot(results, trade, folder)


def plot(results: list[dict[str, Any]], trade: list[dict[str, float]], folder: Path) -> None:
    """ablation.png: arms with error bars over seeds; long.png: quality over time; trade_off.png: against cost."""
    try:
        import matplotlib
    except ImportError:
        print("plots: left out, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        pyplot.close(figure)

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
    save(figure, "ablation.png")

    long = [r for r in results if r.get("long")]
    if long:
        figure, axis = pyplot.subplots(figsize=(9.5, 4))
        for arm in arms:
            mine = [r["long"] for r in long if r["arm"] == arm]
            if mine:
                points = [spread([100 * rows[i]["quality"] for rows in mine]) for i in range(len(mine[0]))]
                means, errors = zip(*points, strict=True)
                errors = [0 if math.isnan(error) else error for error in errors]
                axis.errorbar(
                    [row["from"] for row in mine[0]], means, yerr=errors, marker=".", capsize=2, label=ARMS[arm]
                )
        axis.set_xlabel("first frame of the window")
        axis.set_ylabel("quality")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.grid(alpha=0.3)
        save(figure, "long.png")
    if trade:
        figure, axis = pyplot.subplots(figsize=(5, 4))
        for name in ("total", "quality", "semantic"):
            values, errors = ([100 * row[key] for row in trade] for key in (name, f"{name}_se"))
            axis.errorbar([row["cost"] for row in trade], values, yerr=errors, marker="o", capsize=3, label=name)
        axis.set_xlabel("cost of a frame, four steps = 1")
        axis.legend()
        axis.grid(alpha=0.3)
        save(figure, "trade_off.png")
