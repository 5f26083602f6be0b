"""The plots of a study, as in the paper: preference by dimension, and the items round a circle."""

import math
from pathlib import Path
from typing import Any

from distill.experiments.plots import can_plot, figure
from distill.raters.items import ITEMS, QUESTIONS, SCALE


def plot(results: dict[str, Any], folder: Path) -> None:
    """preference.png: shares with their intervals; radar.png: mean scores of all items."""
    if can_plot():
        _plot_preference(results, folder / "preference.png")
        _plot_radar(results, folder / "radar.png")


def _plot_preference(results: dict[str, Any], path: Path) -> None:
    models = results["models"]
    width = 0.8 / len(models)
    with figure(path, 9, 4) as (axis,):
        for number, model in enumerate(models):
            rows = [[100 * value for value in results["preference"][name][model]] for name in QUESTIONS]
            errors = [[mean - low for mean, low, _ in rows], [high - mean for mean, _, high in rows]]
            places = [place + width * (number - (len(models) - 1) / 2) for place in range(len(rows))]
            axis.bar(places, [row[0] for row in rows], width, yerr=errors, capsize=3, label=model)
        axis.axhline(100 / len(models), color="gray", linewidth=0.8, linestyle="--", label="by chance")
        axis.set_xticks(range(len(QUESTIONS)), list(QUESTIONS.values()))
        axis.set_ylabel("chosen as best, percent")
        axis.set_ylim(0, 100)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)


def _plot_radar(results: dict[str, Any], path: Path) -> None:
    angles = [2 * math.pi * number / len(ITEMS) for number in range(len(ITEMS))]
    with figure(path, 9, 8, projection="polar") as (axis,):
        axis.set_theta_offset(math.pi / 2)
        axis.set_theta_direction(-1)
        for model in results["models"]:
            means = [results["items"][item.name][model][0] for item in ITEMS]
            (line,) = axis.plot([*angles, angles[0]], [*means, means[0]], marker=".", label=model)
            axis.fill([*angles, angles[0]], [*means, means[0]], color=line.get_color(), alpha=0.08)
        axis.set_xticks(angles, [item.title.replace(" ", "\n", 1) for item in ITEMS], fontsize=8)
        axis.tick_params(axis="x", pad=20)
        axis.set_rlim(1, len(SCALE))
        axis.set_yticks(range(2, len(SCALE) + 1))
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.05, 1.08))
