"""Numbers of a report: mass by distance, the first frame against others, and the errors of replacements."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.attention.probe import Watch
from distill.attention.replacements import Replacement, Table
from distill.attention.subjects import Subject
from distill.scores.dimensions import mean_and_error, with_totals
from distill.scores.tasks import Task

SHOWN = ("total", "all_right")


def by_distance(mass: Tensor) -> list[float | None]:
    """Mean mass [..., F, F] of the pairs that are |i - j| = 0, 1, ... apart; None where no pair is seen."""
    return [_mean(mass[..., _distance(mass) == d]) for d in range(mass.shape[-1])]


def on_first(mass: Tensor) -> list[float | None]:
    """The mass on frame 0 from d = 0, 1, ... frames later."""
    return [_mean(mass[..., d, 0]) for d in range(mass.shape[-1])]


def on_others(mass: Tensor) -> list[float | None]:
    """Mean mass on the frames after frame 0 from d = 0, 1, ... frames later: what frame 0 is to be compared with."""
    return [_mean(mass.diagonal(-d, -2, -1)[..., 1:]) for d in range(mass.shape[-1])]


def received(mass: Tensor) -> list[float | None]:
    """What every frame gets from the other frames that see it, on average."""
    return [_mean(mass[..., torch.arange(mass.shape[-1]) != j, j]) for j in range(mass.shape[-1])]


def far(values: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """Mean of the values from two frames away on, over the distances that both have."""
    found = [a for a, b in list(zip(values, others, strict=True))[2:] if a is not None and b is not None]
    return sum(found) / len(found) if found else None


def _distance(mass: Tensor) -> Tensor:
    frame = torch.arange(mass.shape[-1])
    return (frame[:, None] - frame).abs()


def _mean(values: Tensor) -> float | None:
    found = float(values.double().nanmean())
    return None if math.isnan(found) else round(found, 5)


def summary(mass: Tensor, levels: Sequence[float]) -> dict[str, Any]:
    """What the report says of one role's M [prompts, levels, layers, heads, F, F]."""
    first, others, table = on_first(mass), on_others(mass), Table.of(mass.flatten(0, 1))
    near = torch.where(_distance(mass) <= 1, table.mean, 0).sum(-1)
    later = table.mean.isnan().logical_not().any(-1).float()
    return {
        "by_distance": by_distance(mass),
        "by_distance_and_level": {str(s): by_distance(mass[:, n]) for n, s in enumerate(levels)},
        "on_frame_0": first,
        "on_other_frames": others,
        "far_on_frame_0": far(first, others),
        "far_on_other_frames": far(others, first),
        "received": received(mass),
        "near_share_by_head": ((near * later).sum(-1) / later.sum(-1)).mul(1e4).round().div(1e4).tolist(),
        "entry_deviation_quartiles": _quartiles(table.std),
        "head_deviation": table.of_heads().mul(1e4).round().div(1e4).tolist(),
    }


def _quartiles(values: Tensor) -> list[float]:
    return [round(float(values[~values.isnan()].quantile(share)), 4) for share in (0.25, 0.5, 0.75)]


def errors(subject: Subject, kinds: Mapping[str, Mapping[str, Watch]]) -> dict[str, dict[str, float]]:
    """Relative error of the flow by kind and noise level, |v' - v| / |v|: mean over the clips."""
    found: dict[str, dict[float, list[float]]] = {kind: {} for kind in kinds}
    for number in range(len(subject.clips.captions)):
        plain = subject.flows(number, {})
        for kind, watches in kinds.items():
            changed = subject.flows(number, watches)
            for level, flow in plain.items():
                found[kind].setdefault(level, []).append(float((changed[level] - flow).norm() / flow.norm()))
    return {
        kind: {str(level): round(sum(row) / len(row), 6) for level, row in sorted(rows.items())}
        for kind, rows in found.items()
    }


def replacements(subject: Subject, kind: str, tables: Mapping[str, Table], **limits: Any) -> dict[str, Replacement]:
    """The replacement of one kind for every role of a subject."""
    return {role: Replacement(kind, tables[role], subject.touched(role), **limits) for role in subject.levels}


def scored(
    subject: Subject, task: Task, specs: Sequence[Any], kinds: Mapping[str, Mapping[str, Watch]]
) -> dict[str, Any]:
    """The evaluator's totals of the subject's own clips of some captions, as it is ("plain") and by kind.

    `difference` is the mean absolute difference to the plain clip of the same noise, in levels of 255.
    """
    plain = [subject.video(number, {}) for number in range(len(specs))]
    found = {"plain": _totals(task, plain, specs)}
    for kind, watches in kinds.items():
        videos = [subject.video(number, watches) for number in range(len(specs))]
        gaps = [float((a - b).abs().mean()) * 127.5 for a, b in zip(videos, plain, strict=True)]
        found[kind] = _totals(task, videos, specs) | {"difference": round(sum(gaps) / len(gaps), 2)}
    return found


def _totals(task: Task, videos: Sequence[Tensor], specs: Sequence[Any]) -> dict[str, float]:
    scores = task.score(videos, list(specs))
    return {name: scores[name]["mean"] for name in SHOWN}


Rows = list[dict[str, float]]  # the scores of every clip


def rows_of(task: Task, videos: Sequence[Tensor], specs: Sequence[Any]) -> Rows:
    return [with_totals(task.dimensions(video, spec)) for video, spec in zip(videos, specs, strict=True)]


def paired(rows: Rows, others: Rows) -> dict[str, float]:
    """Means of SHOWN, and the mean difference in total to the other clips of the same captions, with its error."""
    gaps = mean_and_error(row["total"] - other["total"] for row, other in zip(rows, others, strict=True))
    means = {name: mean_and_error(row[name] for row in rows)["mean"] for name in SHOWN}
    return means | {"difference": gaps["mean"], "error_of_difference": gaps["se"]}
