"""Krippendorff's alpha: his own worked example, the limits, and the library `krippendorff` on data with gaps."""

import math

import numpy as np
import pytest

from distill.raters.agreement import alpha

NAN = math.nan
# K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, section C: four observers, twelve units.
PUBLISHED = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
])  # fmt: skip


def test_the_published_example() -> None:
    assert round(alpha(PUBLISHED, ordinal=False), 3) == 0.743
    assert round(alpha(PUBLISHED, ordinal=True), 3) == 0.815


@pytest.mark.parametrize("ordinal", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_library_agrees(ordinal: bool, seed: int) -> None:
    krippendorff = pytest.importorskip("krippendorff")
    numbers = np.random.default_rng(seed)
    values = numbers.integers(1, 6, (7, 40)).astype(float)
    values[:4] = np.where(numbers.random((4, 40)) < 0.6, values[0], values[:4])
    values[numbers.random(values.shape) < 0.3] = NAN
    expected = krippendorff.alpha(values, level_of_measurement="ordinal" if ordinal else "nominal")
    assert alpha(values, ordinal) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ordinal", [False, True])
def test_its_limits(ordinal: bool) -> None:
    numbers = np.random.default_rng(0)
    row = numbers.integers(1, 6, 200).astype(float)
    assert alpha(np.stack([row] * 5), ordinal) == 1
    assert abs(alpha(numbers.integers(1, 6, (20, 400)).astype(float), ordinal)) < 0.02
    assert alpha(np.stack([row, 6 - row]), ordinal) < 0


@pytest.mark.parametrize("values", [[[1, 2, 3]], [[2, 2], [2, 2]], [[1, NAN], [NAN, 2]], [[NAN], [NAN]]])
@pytest.mark.parametrize("ordinal", [False, True])
def test_it_is_unknown_without_pairs_or_differences(values: list[list[float]], ordinal: bool) -> None:
    assert math.isnan(alpha(np.array(values, float), ordinal))
