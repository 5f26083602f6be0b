"""The results of a study as Markdown."""

from collections.abc import Callable
from typing import Any

from distill.experiments.tables import table
from distill.raters.items import GROUPS, OVERALL, QUESTIONS

Row = list[float] | None


def percent(row: Row, sign: str = "") -> str:
    if row is None:
        return ""
    mean, low, high = (100 * value for value in row)
    return f"{mean:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def points(row: Row, sign: str = "") -> str:
    return "" if row is None else "{:{s}.2f} ({:{s}.2f} to {:{s}.2f})".format(*row, s=sign)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def page(results: dict[str, Any]) -> str:
    """All tables, one under the other."""
    models, agreement = results["models"], results["agreement"]
    counted = f"{results['raters']} raters ({results['finished']} finished), {results['prompts']} prompts"
    parts = [
        f"# {results['title']}",
        f"{counted}, {len(models)} models. In brackets: 95 % of {results['draws']} draws of raters and prompts.",
        "## Preference, percent of choices",
        _by_model(results["preference"], models, dict(QUESTIONS), percent, agreement["preference"]),
        "## Preference overall by length of the videos, percent",
        _by_model(results["lengths"], models, {name: name for name in results["lengths"]}, percent),
        "## Mean score, 1 to 5",
        _by_model(results["groups"] | {OVERALL: results["mean"]}, models, dict(QUESTIONS), points),
    ]
    for group in GROUPS:
        titles = {item.name: item.title for item in group.items}
        parts += [f"## {group.title}", _by_model(results["items"], models, titles, points, agreement["items"])]
    gaps = results["differences"]
    rows = [[model, percent(gaps["share"][model], "+"), points(gaps["score"][model], "+")] for model in models[1:]]
    parts += [f"## {models[0]} against each other model",
              table(["against", "share overall, percentage points", "mean score"], rows)]  # fmt: skip
    places = [[place, percent(row)] for place, row in results["places"].items()]
    parts += ["## Choices overall by place on the page, percent", table(["video", "chosen"], places)]
    if results["skipped"]:
        rows = [[file, why.replace("|", "/")] for file, why in results["skipped"].items()]
        parts += [f"## Files that do not count: {len(rows)}", table(["file", "why"], rows)]
    return "\n\n".join(parts) + "\n"


def _by_model(
    found: dict[str, Any], models: list[str], titles: dict[str, str], cell: Callable[[Row], str],
    agreement: dict[str, float | None] | None = None,
) -> str:  # fmt: skip
    """A row per name of `titles` and a column per model; the last one is alpha, where it is known."""
    rows = [[title, *(cell(found[name][model]) for model in models)] for name, title in titles.items()]
    if agreement is None:
        return table(["", *models], rows)
    return table(
        ["", *models, "alpha"], [[*row, number(agreement[name])] for row, name in zip(rows, titles, strict=True)]
    )
