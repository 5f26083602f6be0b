"""The plots of the probe, where matplotlib is installed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.experiments.plots import can_plot
from engine.files import whole_file

TITLES = {
    "teacher": "teacher: every frame sees all",
    "etm": "student, ETM: the frames of its window",
    "sdd": "student, SDD: frame 0, the last frame, itself",
    "dit": "student: the frames of its window",
}
STYLES = {"steady": "o-", "varying": "s--", "distant": "^-.", "constant": "x:"}


def plot(report: Mapping[str, Any], means: Mapping[str, Tensor], folder: Path) -> list[str]:
    """distance.png, heads-ROLE.png and, with replacements, errors.png; returns their names, none without matplotlib."""
    if not can_plot():
        return []
    _plot_distance(report["roles"], folder / "distance.png")
    for role, mean in means.items():
        _plot_heads(role, mean, folder / f"heads-{role}.png")
    changed = {name: kinds for name, kinds in report["replacements"].items() if kinds}
    if changed:
        _plot_errors(changed, folder / "errors.png")
    return ["distance.png", *(f"heads-{role}.png" for role in means), *(["errors.png"] if changed else [])]


@contextmanager
def _figure(path: Path, columns: int, width: float, height: float) -> Iterator[list[Any]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    try:
        yield list(axes[0])
        with whole_file(path) as part:
            figure.savefig(part, dpi=100, format="png")
    finally:
        pyplot.close(figure)


def _plot_distance(roles: Mapping[str, Any], path: Path) -> None:
    """Mass by |i - j|, with a thin line per noise level, and the mass on frame 0 from as far away."""
    from matplotlib import colormaps

    with _figure(path, len(roles), 4.6 * len(roles), 4.2) as axes:
        for axis, (role, found) in zip(axes, roles.items(), strict=True):
            levels = found["by_distance_and_level"]
            for n, (level, values) in enumerate(levels.items()):
                colour = colormaps["viridis"](0.9 * n / max(len(levels) - 1, 1))
                if len(levels) > 1:
                    axis.plot(*_known(values), color=colour, linewidth=1, label=f"noise level {level}")
            axis.plot(*_known(found["by_distance"]), "o-", color="black", label="mean of all pairs")
            axis.plot(*_known(found["on_frame_0"], 1), "s--", color="tab:red", label="looking back at frame 0")
            axis.plot(*_known(found["on_other_frames"], 1), "^:", color="tab:blue", label="looking back at others")
            axis.set_title(TITLES.get(role, role), fontsize=10)
            axis.set_xlabel("distance |i - j| in latent frames")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        axes[0].set_ylabel("mean share of a query's attention")


def _known(values: list[float | None], least: int = 0) -> tuple[list[int], list[float]]:
    """Distances from `least` on, and the values that are known there."""
    found = [(d, value) for d, value in enumerate(values) if value is not None and d >= least]
    return [d for d, _ in found], [value for _, value in found]


def _plot_heads(role: str, mean: Tensor, path: Path) -> None:
    """Small multiples: the mean matrix of every head, rows are layers. mean [layers, heads, F, F]."""
    from matplotlib import pyplot

    layers, heads, frames, _ = mean.shape
    gap = max(1, frames // 8)
    tiles = torch.nn.functional.pad(mean, (0, gap, 0, gap), value=torch.nan)
    picture = tiles.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)[:-gap, :-gap]
    side = min(1.6, 16 / max(layers, heads))
    with _figure(path, 1, side * heads + 1.6, side * layers + 1.1) as (axis,):
        colours = pyplot.get_cmap("magma").with_extremes(bad="white")
        image = axis.imshow(picture, cmap=colours, vmin=0, interpolation="nearest")
        step, middle = frames + gap, (frames - 1) / 2
        axis.set_xticks([head * step + middle for head in range(heads)], [f"head {head}" for head in range(heads)])
        axis.set_yticks(
            [layer * step + middle for layer in range(layers)], [f"layer {layer}" for layer in range(layers)]
        )
        axis.tick_params(length=0, labelsize=8)
        if heads > 6:
            axis.tick_params(axis="x", labelrotation=90)
        for side_of in axis.spines.values():
            side_of.set_visible(False)
        about = "row: query frame i, column: key frame j, both from 0; white: not seen"
        axis.set_title(f"{TITLES.get(role, role)}\n{about}", fontsize=9)
        axis.figure.colorbar(image, ax=axis, shrink=0.7, label="mean attention mass")


def _plot_errors(changed: Mapping[str, Any], path: Path) -> None:
    """Relative error of the velocity against the noise level, a line per kind of replacement."""
    with _figure(path, len(changed), 5 * len(changed), 4) as axes:
        for axis, (name, kinds) in zip(axes, changed.items(), strict=True):
            for kind, found in kinds.items():
                levels = [float(level) for level in found["errors"]]
                axis.plot(levels, list(found["errors"].values()), STYLES[kind], label=kind)
            axis.set_yscale("symlog", linthresh=0.001)
            axis.set_ylim(bottom=0)
            axis.set_title(f"{name} with a part of its attention replaced", fontsize=10)
            axis.set_xlabel("noise level (0 clean, 1 noise)")
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=8)
        axes[0].set_ylabel("relative error of the velocity")


def plot_heads_left(report: Mapping[str, Any], path: Path) -> list[str]:
    """Velocity error, and the total where clips were scored, by the share of local heads; as `plot`."""
    if not can_plot():
        return []
    values = {"error": "relative error of the velocity"} | ({"total": "total score"} if report["scored"] else {})
    with _figure(path, len(values), 5 * len(values), 4) as axes:
        for axis, (value, label) in zip(axes, values.items(), strict=True):
            start = report["whole"]["total"] if value == "total" else 0.0
            for kind, style in {"local": "o-", "random": "s", "reverse": "x:"}.items():
                found = [(row["share"], row[value]) for row in report["tables"] if row["table"].startswith(kind)]
                axis.plot(*zip(*([] if kind == "random" else [(0, start)]), *found, strict=True), style, label=kind)
            axis.set_xlabel("share of heads that keep few frames")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    return [path.name]
