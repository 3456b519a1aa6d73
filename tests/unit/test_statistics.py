"""Intervals: against scipy, against known answers, and against simulated runs whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fastface_cli.evaluation.statistics import expanded_tail, mean_interval, paired_difference


def test_percentiles_are_those_of_scipys_bootstrap() -> None:
    """One value an identity: scipy's plain percentile interval at our widened probability."""
    values = np.random.default_rng(4).gamma(2.0, 1.0, 40)
    ours = mean_interval(values, range(40), resamples=20_000)
    level = 1 - 2 * expanded_tail(40)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=level, method="percentile", rng=1
    ).confidence_interval
    assert ours is not None
    assert (ours.mean, ours.n) == (pytest.approx(values.mean()), 40)
    assert (ours.low, ours.high) == pytest.approx(
        (theirs.low, theirs.high), abs=0.02 * (ours.high - ours.low)
    )


def test_normal_values_get_students_interval() -> None:
    values = np.random.default_rng(2).standard_normal(60)
    ours = mean_interval(values, range(60))
    low, high = stats.t.interval(0.95, 59, values.mean(), stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.03)


@pytest.mark.parametrize("identities", [10, 50])
def test_confidence_intervals_have_their_nominal_coverage(identities: int) -> None:
    """1,000 runs of two recipes whose difference is 0.3; pictures of one identity are alike."""
    random = np.random.default_rng(1)
    clusters = np.repeat(np.arange(identities), 4).tolist()
    hits = 0
    for _ in range(1000):
        base = random.standard_normal((identities, 4))
        gain = 0.3 + 0.5 * random.standard_normal((identities, 1)) + random.standard_normal((identities, 4))
        actual = paired_difference((base + gain).ravel(), base.ravel(), clusters, resamples=2000)
        hits += actual.low <= 0.3 <= actual.high
    assert 0.93 <= hits / 1000 <= 0.97


def test_similar_images_do_not_count_as_independent_measurements() -> None:
    """Copying every picture nine times tells nothing new."""
    values = np.random.default_rng(3).standard_normal(20)
    once = mean_interval(values, range(20))
    copied = mean_interval(np.repeat(values, 9), np.repeat(range(20), 9).tolist())
    assert copied.n == 180
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))


def test_pairs_cancel_what_both_recipes_share() -> None:
    a = np.random.default_rng(5).standard_normal(30) * 100
    actual = paired_difference(a + 1.5, a, range(30))
    assert (actual.mean, actual.low, actual.high) == pytest.approx((1.5, 1.5, 1.5))


def test_what_was_not_measured_is_left_out() -> None:
    actual = mean_interval([1.0, None, 3.0, float("nan")], ["a", "a", "b", "c"])
    assert (actual.mean, actual.n) == (2.0, 2)
    assert mean_interval([None], ["a"]) is None
    assert paired_difference([1.0, None, 5.0], [None, 2.0, 3.0], "abc").mean == 2.0
    assert paired_difference([None], [1.0], "a") is None


def test_one_identity_has_a_mean_and_no_interval() -> None:
    actual = mean_interval([0.2, 0.4], ["a", "a"])
    assert (actual.mean, actual.low, actual.high, actual.n) == (pytest.approx(0.3), None, None, 2)


def test_equal_values_have_an_interval_of_no_width_and_shares_stay_shares() -> None:
    same = mean_interval([0.1] * 7, range(7))
    assert (same.low, same.high) == pytest.approx((0.1, 0.1), abs=1e-12)
    share = mean_interval([1.0] * 11 + [0.0], range(12))
    assert 0 <= share.low < share.mean < share.high <= 1


def test_identities_with_more_images_weigh_more() -> None:
    assert mean_interval([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]).mean == 0.25


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 values but 1 clusters"):
        mean_interval([1, 2], ["a"])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([1, 2], [1], ["a"])
