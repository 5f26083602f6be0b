"""The plots of an ablation, where matplotlib is installed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.experiments.pairs import SURE, Scores, Spread, clips_name, spread
from engine.files import whole_file


def plot(scores: Scores, folder: Path) -> None:
    """ablation.png: arms with errors; differences.png; long.png: quality over time; trade_off.png: against passes."""
    if not can_plot():
        return
    names = [clips_name(frames) for frames, _ in scores.plan.config.lengths]
    _plot_arms(scores, names[0], folder / "ablation.png")
    _plot_differences(scores, names, folder / "differences.png")
    _plot_windows(scores, folder / "long.png")
    _plot_steps(scores, names[:2], folder / "trade_off.png")


def can_plot() -> bool:
    """Whether matplotlib is installed; says so where it is not. Plots then go to files, not to a screen."""
    try:
        import matplotlib
    except ImportError:
        print("plots: left out, matplotlib is not installed")
        return False
    matplotlib.use("Agg")
    return True


@contextmanager
def figure(
    path: Path, width: float, height: float, columns: int = 1, projection: str | None = None, share: bool = True
) -> Iterator[Any]:
    """Axes in a row, with one vertical scale if they `share` it; the picture is written at the end."""
    from matplotlib import pyplot

    whole, axes = pyplot.subplots(
        1,
        columns,
        figsize=(width, height),
        sharey=share and columns > 1,
        squeeze=False,
        subplot_kw={"projection": projection},
    )
    try:
        yield axes[0]
        whole.tight_layout()
        with whole_file(path) as part:
            whole.savefig(part, dpi=110, format="png", bbox_inches="tight")
    finally:
        pyplot.close(whole)


def _height(rows: int) -> float:
    return 0.32 * rows + 1.4


def _error(found: Spread, width: float = 1.0) -> float:
    return 0.0 if math.isnan(found.error) else 100 * width * found.error


def _plot_arms(scores: Scores, clips: str, path: Path) -> None:
    """Totals of every arm at its first steps: mean and standard error in black, seeds in gray."""
    arms = scores.arms()
    with figure(path, 12, _height(len(arms)), 3) as axes:
        for axis, name in zip(axes, ("total", "quality", "semantic"), strict=True):
            for place, row in enumerate(arms):
                values = scores.clips(*row, clips, name)
                if values is None:
                    continue
                seeds, found = (100 * values.nanmean(1)).tolist(), spread(values)
                axis.errorbar(100 * found.mean, place, xerr=_error(found), fmt="o", color="black", capsize=3)
                axis.plot(seeds, [place] * len(seeds), ".", color="gray")
            axis.set_title(f"{name}, {clips} frames")
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(arms)), [scores.plan.title(arm) for arm, _ in arms], fontsize=8)
        axes[0].invert_yaxis()


def _plot_differences(scores: Scores, names: list[str], path: Path) -> None:
    """Paired differences in total to the baselines, with SURE standard errors."""
    arms = [row for row in scores.arms() if any(scores.difference(*row, name) for name in names)]
    if not arms:
        return
    with figure(path, 9, _height(len(arms))) as (axis,):
        for number, name in enumerate(names):
            found = [scores.difference(*row, name) for row in arms]
            known = [(place + 0.15 * number, gap) for place, gap in enumerate(found) if gap is not None]
            axis.errorbar(
                [100 * gap.mean for _, gap in known], [place for place, _ in known],
                xerr=[_error(gap, SURE) for _, gap in known], fmt="o", markersize=4, capsize=2, label=f"{name} frames",
            )  # fmt: skip
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(arms)), [scores.plan.title(arm) for arm, _ in arms], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(f"difference in total to the baseline, points, with {SURE:g} standard errors")
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8)


def _plot_windows(scores: Scores, path: Path) -> None:
    """Quality of the windows of the longest clips."""
    found = [(arm, windows) for arm, steps in scores.arms() if (windows := scores.windows(arm, steps))]
    if not found:
        return
    with figure(path, 10, max(4.0, 0.17 * len(found) + 1)) as (axis,):
        for number, (arm, (starts, values)) in enumerate(found):
            points = [spread(values[:, [i]]) for i in range(values.shape[1])]
            axis.errorbar(
                starts, [100 * point.mean for point in points], yerr=[_error(point) for point in points],
                marker=".", capsize=2, label=scores.plan.title(arm), linestyle=("-", "--", ":")[number // 10 % 3],
            )  # fmt: skip
        axis.set_xlabel("first frame of the window")
        axis.set_ylabel("quality")
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        axis.grid(alpha=0.3)


def _plot_steps(scores: Scores, names: list[str], path: Path) -> None:
    """Total against passes per latent frame; a point per steps, with their name."""
    arms = [arm for arm in scores.plan.arms if sum(row[0] == arm for row in scores.rows()) > 1]
    if not arms:
        return
    with figure(path, 5.5 * len(names) + 1, max(4.0, 0.2 * len(arms) + 1.5), len(names)) as axes:
        for axis, name in zip(axes, names, strict=True):
            for number, arm in enumerate(arms):
                _steps_of_an_arm(axis, scores, arm, name, ("-", "--", ":")[number // 10 % 3])
            axis.set_title(f"{name} frames")
            axis.set_xlabel("transformer passes per latent frame")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("total")
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _steps_of_an_arm(axis: Any, scores: Scores, arm: str, clips: str, line: str) -> None:
    """A line through the numbers of steps; a star for other samplings, such as ffe, which have no neighbours on it."""
    found = []
    for row in scores.rows():
        values = scores.clips(*row, clips, "total") if row[0] == arm else None
        if values is not None:
            found.append((scores.first(*row)["passes"], spread(values), row[1]))
    found.sort(key=lambda point: point[0])
    (drawn,) = axis.plot([], [], label=scores.plan.title(arm), linestyle=line, marker="o", markersize=4)
    for even in (True, False):
        points = [point for point in found if point[2].isdecimal() == even]
        axis.errorbar(
            [x for x, _, _ in points], [100 * one.mean for _, one, _ in points],
            yerr=[_error(one) for _, one, _ in points], color=drawn.get_color(), capsize=2,
            linestyle=line if even else "", marker="o" if even else "*", markersize=4 if even else 9,
        )  # fmt: skip
    for x, one, steps in found:
        if not steps.isdecimal():
            axis.annotate(steps, (x, 100 * one.mean), xytext=(4, 4), textcoords="offset points", fontsize=7)
