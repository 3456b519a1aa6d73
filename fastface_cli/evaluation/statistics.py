"""How sure a mean is: intervals from a bootstrap over identities. Pure functions of arrays.

Pictures of one person are alike, so that a hundred pictures of five people are no hundred measurements: what
is drawn again, with replacement, are identities with all their pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
"""Draws; they move the ends of an interval by about 1% of its width."""
SEED = 20505


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it."""

    mean: float
    low: float | None
    """None where fewer than two identities were measured: then nothing is known of how people differ."""
    high: float | None
    n: int
    """Values behind the mean."""


def mean_interval(
    values: Sequence[float | None] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """The mean of values and its interval, from a bootstrap over clusters.

    The plain percentile interval is too narrow when clusters are few: it takes their spread as known
    (divides by C and not by C - 1) and their mean as normal where it is Student's. Of 1,000 simulated runs
    it covers the truth in 94% at 50 identities, 91% at 10 and 83% at 5. Its ends are therefore taken
    further out, at the probability Phi(-sqrt(C / (C - 1)) t), with t the quantile of Student's distribution
    on C - 1 degrees (the expanded percentile interval: Hesterberg, "What Teachers Should Know About the
    Bootstrap", The American Statistician 69, 2015), which covers it in 94.5%, 95% and 92%. That keeps what
    is good about percentiles: skewed values get skewed intervals, and a share stays between 0 and 1.

    Args:
        values: [n]; None and NaN are left out.
        clusters: [n], the identity of each value.
        confidence: share of intervals that hold the truth.
        resamples: how often clusters are drawn.

    Returns:
        None where no value is left.
    """
    numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if len(numbers) != len(clusters):
        raise ValueError(f"{len(numbers)} values but {len(clusters)} clusters")
    kept = np.isfinite(numbers)
    if not kept.any():
        return None
    numbers = numbers[kept]
    sums, counts = _by_cluster(numbers, [one for one, keep in zip(clusters, kept, strict=True) if keep])
    mean = float(numbers.mean())
    if len(sums) < 2:
        return Interval(mean, None, None, len(numbers))
    drawn = _draws(len(sums), resamples)
    # Around the mean: differences from it lose less to rounding.
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
    """The mean of a - b over pairs of which both were measured, and its interval; see `mean_interval`.

    Args:
        a: [n]
        b: [n], in the order of `a`: same identity, prompt and seed.
        clusters: [n], the identity of each pair.

    Returns:
        `mean` is the difference. None where no pair is left.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}")
    differences = [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]
    return mean_interval(differences, clusters, confidence=confidence, resamples=resamples)


def expanded_tail(clusters: int, confidence: float = CONFIDENCE) -> float:
    """The probability below which an interval's lower end lies, for that many clusters (at least 2)."""
    from scipy import stats

    reach = np.sqrt(clusters / (clusters - 1)) * stats.t.ppf((1 + confidence) / 2, clusters - 1)
    return float(stats.norm.cdf(-reach))


def _by_cluster(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of each cluster's values, in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return np.bincount(index, values), np.bincount(index).astype(np.float64)


@functools.lru_cache(maxsize=4)  # 80 MB each at 1,000 identities
def _draws(clusters: int, resamples: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How often each cluster is in each draw, [resamples, clusters]: the same for every column and recipe, so
    that equal data have equal intervals."""
    shares = np.full(clusters, 1 / clusters)
    drawn = np.random.default_rng(SEED).multinomial(clusters, shares, size=resamples)
    return drawn.astype(np.float64)
