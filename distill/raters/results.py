"""All numbers of a study as one JSON object; tables and plots are made from it."""

import math
from typing import Any

import numpy as np

from distill.raters.agreement import alpha
from distill.raters.answers import Collected
from distill.raters.items import GROUPS, ITEMS, QUESTIONS
from distill.raters.statistics import Bootstrap, Estimate, Votes, one_hot, votes_of
from distill.raters.study import LENGTHS, Study

Table = dict[str, Any]


def results_of(study: Study, found: Collected, draws: int, seed: int) -> Table:
    """Means with the ends of their intervals, as [mean, low, high]; null where nothing is known.

    preference   question -> model -> share of the pages on which the model was chosen
    lengths      length of the videos -> model -> the same, overall
    groups, items  name -> model -> mean score
    differences  model -> the first model minus it: share overall, mean score
    agreement    item or question -> alpha
    places       letter on the page -> share of the pages on which that video was chosen, overall
    """
    votes = votes_of(found.answers, study)
    bootstrap = Bootstrap(len(found.answers), len(study.prompts), draws, seed)
    columns = [[item in group.items for item in ITEMS] for group in GROUPS]
    groups = np.stack([votes.scores[..., members].mean(-1) for members in columns], -1)
    everything = votes.scores.mean(-1)
    first = one_hot(votes.best[..., -1], len(study.models))
    return {
        "study": study.id,
        "title": study.title,
        "models": list(study.models),
        "prompts": len(study.prompts),
        "raters": len(found.answers),
        "finished": sum(not one.missing(study) for one in found.answers),
        "skipped": found.skipped,
        "draws": draws,
        "seed": seed,
        "preference": _named(bootstrap.estimate(one_hot(votes.best, len(study.models))), list(QUESTIONS), study.models),
        "lengths": _lengths(study, votes, bootstrap),
        "groups": _named(_turned(bootstrap.estimate(groups)), [group.name for group in GROUPS], study.models),
        "items": _named(_turned(bootstrap.estimate(votes.scores)), [item.name for item in ITEMS], study.models),
        "mean": _named(bootstrap.estimate(everything), study.models),
        "differences": {
            "share": _named(bootstrap.estimate(first[..., :1] - first[..., 1:]), study.models[1:]),
            "score": _named(bootstrap.estimate(everything[..., :1] - everything[..., 1:]), study.models[1:]),
        },
        "agreement": _agreement(votes),
        "places": _named(
            bootstrap.estimate(one_hot(votes.place[..., -1], len(study.models))), "ABCDEFGHI"[: len(study.models)]
        ),
    }


def _lengths(study: Study, votes: Votes, bootstrap: Bootstrap) -> Table:
    """Overall preference by the length of the videos, for lengths that the study has."""
    chosen, found = one_hot(votes.best[..., -1], len(study.models)), {}
    for name in LENGTHS:
        others = np.array([prompt.length != name for prompt in study.prompts])
        if not others.all():
            values = np.where(others[None, :, None], np.nan, chosen)
            found[name] = _named(bootstrap.estimate(values), study.models)
    return found


def _agreement(votes: Votes) -> Table:
    """Alpha of each item over videos, on ranks, and of each question over prompts, on names."""
    raters = len(votes.scores)
    items = {
        item.name: alpha(votes.scores[..., number].reshape(raters, -1), ordinal=True)
        for number, item in enumerate(ITEMS)
    }
    questions = {name: alpha(votes.best[..., number], ordinal=False) for number, name in enumerate(QUESTIONS)}
    return {"items": _plain(items), "preference": _plain(questions)}


def _plain(values: dict[str, float]) -> Table:
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _turned(found: Estimate) -> Estimate:
    """[models, names] as [names, models]."""
    return Estimate(found.mean.T, found.low.T, found.high.T)


def _named(found: Estimate, *names: Any) -> Table:
    """Nested tables of [mean, low, high], one level per axis."""
    if len(names) > 1:
        rows = zip(found.mean, found.low, found.high, strict=True)
        return {name: _named(Estimate(*row), *names[1:]) for name, row in zip(names[0], rows, strict=True)}
    rows = np.stack([found.mean, found.low, found.high], -1).tolist()
    return {
        name: None if any(map(math.isnan, row)) else row for name, row in zip(names[0], rows, strict=True)
    }  # fmt: skip
