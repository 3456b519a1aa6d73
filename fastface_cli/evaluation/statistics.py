"""Confidence intervals of means from a cluster bootstrap over identities. Pure functions of arrays.

Images of one person are correlated: a hundred images of five people are not a hundred independent
measurements. The bootstrap therefore resamples identities, each with all its images.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
"""Number of bootstrap samples; their noise moves interval ends by about 1% of the width."""
SEED = 20505


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval."""

    mean: float
    low: float | None
    """None with fewer than two identities, because the variance between people is then unknown."""
    high: float | None
    n: int
    """Number of values."""


def mean_interval(
    values: Sequence[float | None] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Return the mean and its confidence interval from a bootstrap over clusters.

    The plain percentile interval is too narrow for few clusters: it divides the variance by C instead of C
    - 1 and uses normal instead of Student quantiles. In 1,000 simulated runs it covers the true mean in 94%
    (50 identities), 91% (10) and 83% (5). The expanded percentile interval (Hesterberg, "What Teachers Should
    Know About the Bootstrap", The American Statistician 69, 2015) uses the tail probability
    Phi(-sqrt(C / (C - 1)) t) instead, with t the Student quantile for C - 1 degrees of freedom. It covers the
    mean in 94.5%, 95% and 92%, and keeps the advantages of percentiles: skewed values have skewed intervals,
    and a share stays between 0 and 1.

    Args:
        values: [n]; None and NaN are ignored.
        clusters: [n], the identity of each value.
        confidence: confidence level.
        resamples: number of bootstrap samples.

    Returns:
        None without values.
    """
    numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if len(numbers) != len(clusters):
        raise ValueError(f"{len(numbers)} values but {len(clusters)} clusters")
    kept = np.isfinite(numbers)
    if not kept.any():
        return None
    numbers = numbers[kept]
    sums, counts = _by_cluster(
        numbers, [cluster for cluster, keep in zip(clusters, kept, strict=True) if keep]
    )
    mean = float(numbers.mean())
    if len(sums) < 2:
        return Interval(mean, None, None, len(numbers))
    drawn = _draws(len(sums), resamples)
    # Relative to the mean, which reduces rounding errors.
    means = mean + (drawn @ (sums - mean * counts)) / (drawn @ counts)
    tail = expanded_tail(len(sums), confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, min(float(low), mean), max(float(high), mean), len(numbers))


def paired_difference(
    a: Sequence[float | None] | np.ndarray,
    b: Sequence[float | None] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Return the mean of a - b over pairs with two values, and its interval; see `mean_interval`.

    Args:
        a: [n]
        b: [n], in the order of `a`: same identity, prompt and seed.
        clusters: [n], the identity of each pair.

    Returns:
        `mean` is the mean difference. None without pairs.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}")
    differences = [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]
    return mean_interval(differences, clusters, confidence=confidence, resamples=resamples)


def expanded_tail(clusters: int, confidence: float = CONFIDENCE) -> float:
    """Return the tail probability of the expanded percentile interval for at least 2 clusters."""
    from scipy import stats

    reach = np.sqrt(clusters / (clusters - 1)) * stats.t.ppf((1 + confidence) / 2, clusters - 1)
    return float(stats.norm.cdf(-reach))


def _by_cluster(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and count of the values of each cluster, in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return np.bincount(index, values), np.bincount(index).astype(np.float64)


@functools.lru_cache(maxsize=4)  # 80 MB each at 1,000 identities
def _draws(clusters: int, resamples: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return how often each sample contains each cluster, [resamples, clusters]. Equal for all columns and
    recipes, so that equal data have equal intervals."""
    shares = np.full(clusters, 1 / clusters)
    drawn = np.random.default_rng(SEED).multinomial(clusters, shares, size=resamples)
    return drawn.astype(np.float64)
