"""Means, standard errors and paired differences of an ablation's scores, and which differences count.

Scores of an arm are [seeds, prompts], NaN where a score does not apply. All arms have the same prompts and noise, so
that the difference of two arms is taken prompt by prompt and seed by seed.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.experiments.arms import Plan

SURE = 2.0  # standard errors that a difference has to exceed


@dataclass(frozen=True)
class Spread:
    """A mean and its standard error, which is NaN where one number is all there is."""

    mean: float
    error: float
    seeds: int

    @property
    def sure(self) -> bool:
        """Whether the mean differs from 0 by more than SURE standard errors."""
        return abs(self.mean) > SURE * self.error


def _error(values: Tensor) -> float:
    """Standard error of the mean of the values that are not NaN."""
    known = values[~values.isnan()]
    return float(known.std(correction=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan


def spread(scores: Tensor) -> Spread:
    """Mean and standard error over seeds; of one seed, over prompts."""
    means = scores.nanmean(1)
    return Spread(float(means.nanmean()), _error(means) if len(scores) > 1 else _error(scores[0]), len(scores))


def difference(ours: Tensor, theirs: Tensor) -> Spread:
    """Mean of the paired differences, and the larger one of its standard errors over seeds and over prompts.

    Seeds alone would leave out that there are few prompts, prompts alone that there are few trainings.
    """
    gaps = ours - theirs
    errors = [error for error in (_error(gaps.nanmean(1)), _error(gaps.nanmean(0))) if not math.isnan(error)]
    return Spread(float(gaps.nanmean(1).nanmean()), max(errors, default=math.nan), len(gaps))


class Scores:
    """All scores that a folder holds, by arm, steps and seed."""

    def __init__(self, plan: Plan, results: list[dict[str, Any]], losses: dict[tuple[str, int], dict[str, float]]):
        self.plan, self._losses = plan, losses
        self._results = {(r["arm"], r["steps"], r["seed"]): r for r in results}

    def seeds(self, arm: str, steps: str) -> list[int]:
        return [seed for seed in self.plan.seeds(arm) if (arm, steps, seed) in self._results]

    def rows(self) -> list[tuple[str, str]]:
        """Arms and steps with scores, in the order of the file."""
        every = [(arm, steps) for arm in self.plan.arms for steps in self.plan.steps(arm)]
        return [row for row in every if self.seeds(*row)]

    def arms(self) -> list[tuple[str, str]]:
        """Every arm that has scores at its first steps, with these steps."""
        return [row for row in self.rows() if row[1] == self.plan.steps(row[0])[0]]

    def first(self, arm: str, steps: str) -> dict[str, Any]:
        """The result of the first seed."""
        return self._results[arm, steps, self.seeds(arm, steps)[0]]

    def clips(self, arm: str, steps: str, clips: str, score: str, seeds: list[int] | None = None) -> Tensor | None:
        """One score of a set of clips, [seeds, prompts]; None where it was not measured."""
        rows = []
        for seed in self.seeds(arm, steps) if seeds is None else seeds:
            values = self._results[arm, steps, seed]["clips"].get(clips, {}).get(score)
            if values is not None:
                rows.append([math.nan if value is None else value for value in values])
        return torch.tensor(rows, dtype=torch.float64) if rows else None

    def difference(self, arm: str, steps: str, clips: str, score: str = "total") -> Spread | None:
        """Of an arm and what it is compared with, over the seeds of both; None where there is nothing to compare."""
        against = self.plan.against(arm, steps)
        if against is None:
            return None
        shared = [seed for seed in self.seeds(arm, steps) if seed in self.seeds(*against)]
        ours = self.clips(arm, steps, clips, score, shared)
        theirs = self.clips(*against, clips, score, shared)
        return None if ours is None or theirs is None else difference(ours, theirs)

    def windows(self, arm: str, steps: str) -> tuple[list[int], Tensor] | None:
        """First frames of the windows of the longest clips, and their quality [seeds, windows]."""
        found = [self._results[arm, steps, seed].get("windows") for seed in self.seeds(arm, steps)]
        rows = [[window["quality"] for window in windows] for windows in found if windows]
        return ([w["from"] for w in found[0]], torch.tensor(rows, dtype=torch.float64)) if rows and found[0] else None

    def loss(self, arm: str, name: str, against: bool = False) -> Spread | None:
        """Eq. 6 of the student that an arm streams, over seeds; or its difference to the baseline's."""
        pair = self.plan.against(arm, self.plan.steps(arm)[0]) if against else None
        if against and pair is None:
            return None
        values = []
        for seed in self.plan.seeds(arm):
            ours = self._losses.get((self.plan.owner(arm), seed), {}).get(name)
            theirs = self._losses.get((self.plan.owner(pair[0]), seed), {}).get(name) if pair else 0.0
            if ours is not None and theirs is not None:
                values.append([ours - theirs])
        return spread(torch.tensor(values, dtype=torch.float64)) if values else None

    def verdict(self, arm: str) -> str:
        """Whether a gain in `total` counts: sure over the first set of clips, not turned round over the second.

        A gain with guidance in the training counts only if the arm gains without it, too.
        """
        known = list(map(clips_name, (frames for frames, _ in self.plan.config.lengths)))
        gaps = [self.difference(arm, self.plan.steps(arm)[0], name) for name in known[:2]]
        if gaps[0] is None or math.isnan(gaps[0].error):
            return "not judged"
        if not gaps[0].sure:
            found = "no gain"
        elif gaps[0].mean < 0:
            found = "loss"
        elif len(gaps) > 1 and gaps[1] is not None and gaps[1].mean < 0:
            found = f"no gain: turned round at {known[1]} frames"
        else:
            found = "gain"
        guidance = self.plan.guidance(arm)
        if found != "gain" or guidance == 1:
            return found
        twin = self.plan.twin(arm)
        return f"gain at guidance {guidance:g}; at 1 {self.verdict(twin) if twin else 'not judged'}"


def clips_name(frames: int) -> str:
    """The name of a set of clips: its pixel frames."""
    return str(4 * frames - 3)
