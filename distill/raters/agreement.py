"""Krippendorff's alpha: how far raters agree beyond chance. 1 is full agreement, 0 is chance.

After K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011.
"""

import math

import numpy as np


def alpha(values: np.ndarray, ordinal: bool) -> float:
    """Alpha of values [raters, units], NaN where a rater gave none; of ranks if `ordinal`, else of names.

    NaN where no unit has two values, and where all values are the same: agreement by chance is then unknown.
    """
    domain = np.unique(values[~np.isnan(values)])
    counts = (values.T[:, :, None] == domain).sum(1).astype(float)  # [units, values]
    counts = counts[counts.sum(1) >= 2]
    each, totals = counts.sum(1), counts.sum(0)
    # Pairs of values within units, each unit weighing as much as it has values; and pairs by chance.
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(domain))
    within = (pairs / (each - 1)[:, None, None]).sum(0)
    distance = 1 - np.eye(len(domain))
    if ordinal:
        ranks = np.cumsum(totals) - totals / 2
        distance = (ranks[:, None] - ranks) ** 2
    expected = (np.outer(totals, totals) * distance).sum()
    if not expected:
        return math.nan
    return float(1 - (totals.sum() - 1) * (within * distance).sum() / expected)
