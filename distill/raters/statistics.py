"""Preference shares and mean scores, with intervals from a bootstrap over raters and prompts."""

import warnings
from dataclasses import dataclass

import numpy as np

from distill.raters.answers import Answers
from distill.raters.items import ITEMS, QUESTIONS
from distill.raters.study import Study

COVERED = 0.95  # share of the draws inside an interval


@dataclass(frozen=True)
class Votes:
    """All answers as arrays; NaN where a rater did not finish the prompt.

    scores  [raters, prompts, models, items], 1 to 5
    best    [raters, prompts, questions], the index of the preferred model
    place   [raters, prompts, questions], where on the page the preferred video stood
    """

    scores: np.ndarray
    best: np.ndarray
    place: np.ndarray


def votes_of(answers: list[Answers], study: Study) -> Votes:
    shape = (len(answers), len(study.prompts))
    scores = np.full((*shape, len(study.models), len(ITEMS)), np.nan)
    best, place = np.full((2, *shape, len(QUESTIONS)), np.nan)
    for r, one in enumerate(answers):
        for p, prompt in enumerate(study.prompts):
            page = one.pages.get(prompt.id)
            if page is None:
                continue
            model = {video: study.models.index(name) for video, name in prompt.videos.items()}
            for video, given in page.scores.items():
                scores[r, p, model[video]] = [given[item.name] for item in ITEMS]
            best[r, p] = [model[page.best[question]] for question in QUESTIONS]
            place[r, p] = [page.shown.index(page.best[question]) for question in QUESTIONS]
    return Votes(scores, best, place)


def one_hot(values: np.ndarray, size: int) -> np.ndarray:
    """[..., size] of 0 and 1; NaN stays NaN."""
    return np.where(np.isnan(values)[..., None], np.nan, values[..., None] == np.arange(size))


@dataclass(frozen=True)
class Estimate:
    """Means over raters and prompts, and the ends of their intervals; arrays of one shape."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Bootstrap:
    """Draws of raters and, independently, of prompts, each with replacement: how often each one was drawn.

    The same draws serve all estimates, so that differences of models are paired.
    """

    def __init__(self, raters: int, prompts: int, draws: int, seed: int) -> None:
        numbers = np.random.default_rng(seed)
        self.raters = numbers.multinomial(raters, np.full(raters, 1 / raters), draws).astype(float)
        self.prompts = numbers.multinomial(prompts, np.full(prompts, 1 / prompts), draws).astype(float)

    def estimate(self, values: np.ndarray) -> Estimate:
        """The means of values [raters, prompts, ...] over what is not NaN."""
        known = ~np.isnan(values)
        flat, there = (x.reshape(*values.shape[:2], -1) for x in (np.where(known, values, 0.0), known.astype(float)))
        with np.errstate(invalid="ignore"), warnings.catch_warnings():  # 0 / 0 where a draw, or all, know nothing
            warnings.simplefilter("ignore", RuntimeWarning)
            mean = flat.sum((0, 1)) / there.sum((0, 1))
            drawn = self._sums(flat) / self._sums(there)
            low, high = np.nanquantile(drawn, [(1 - COVERED) / 2, (1 + COVERED) / 2], axis=0)
        return Estimate(*(x.reshape(values.shape[2:]) for x in (mean, low, high)))

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """[draws, values] of values [raters, prompts, values]."""
        columns = range(values.shape[2])
        return np.stack([((self.raters @ values[:, :, k]) * self.prompts).sum(1) for k in columns], 1)
