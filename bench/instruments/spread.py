"""Medians, percentiles and confidence intervals of samples from a noisy machine."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

K = TypeVar("K")
T = TypeVar("T")


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum of the samples, in their own unit."""
    if not len(samples):
        raise ValueError("samples: got none, expected at least one")
    q = np.percentile(samples, [50, 90, 99])
    return {
        "mean": float(np.mean(samples)), "p50": float(q[0]), "p90": float(q[1]), "p99": float(q[2]),
        "max": float(np.max(samples)),
    }  # fmt: skip


def quartiles(samples: Sequence[float]) -> dict[str, float]:
    """The median and the middle half, which `bench diff` compares."""
    q1, median, q3 = np.percentile(samples, [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3), "samples": len(samples)}


def bootstrap(samples: Sequence[float], draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the median, by resampling; the range where there are fewer than three samples."""
    values = np.asarray(samples, dtype=float)
    if len(values) < 3:
        return float(values.min()), float(values.max())
    chosen = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(np.median(values[chosen], axis=1), [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def paired_ratio(ours: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median of ours / base over pairs measured side by side, with its confidence interval."""
    if len(ours) != len(base) or not len(ours):
        raise ValueError(f"pairs: got {len(ours)} and {len(base)} samples, expected as many of both")
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    low, high = bootstrap(ratios)
    return {"median": float(np.median(ratios)), "low": low, "high": high, "pairs": len(ratios)}


def interleaved(variants: Mapping[K, Callable[[], T]], rounds: int) -> Iterable[tuple[int, K, T]]:
    """(round, name, result) of every variant in every round; each round starts with another variant.

    A machine that slows down for a while then slows all of them, and no variant always follows the same one.
    """
    names = list(variants)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            yield number, name, variants[name]()


def line_fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares y = intercept + slope x, and the share of the variance that it explains."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - (intercept + slope * np.asarray(x))
    spread = float(np.sum((np.asarray(y) - np.mean(y)) ** 2))
    r2 = 1 - float(np.sum(rest**2)) / spread if spread else 1.0
    return {"slope": float(slope), "intercept": float(intercept), "r2": r2}


def power_fit(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y ~ x^p."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def table(rows: Sequence[dict[str, Any]], digits: int = 4) -> str:
    """Rows as text with aligned columns; floats get `digits` significant digits."""

    def text(value: Any) -> str:
        return f"{value:.{digits}g}" if isinstance(value, float) else "" if value is None else str(value)

    if not rows:
        return ""
    names = list(rows[0])
    cells = [names, *([text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in
                               enumerate(zip(line, widths, strict=True))).rstrip() for line in cells)  # fmt: skip
