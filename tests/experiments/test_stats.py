"""Intervals and tests against scipy, exact enumeration and simulation; degenerate samples are decided, never NaN."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments import stats

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(12345)


def test_t_estimate_and_test_are_scipys() -> None:
    values = RNG.normal(1.0, 2.0, 6)
    estimate = stats.t_estimate(values)
    low, high = scipy_stats.t.interval(0.95, 5, values.mean(), scipy_stats.sem(values))
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((low, high))
    expected = scipy_stats.ttest_1samp(values, 0.5, alternative="greater").pvalue
    assert stats.t_test(values, 0.5) == pytest.approx(expected)


def test_scipy_is_imported_only_where_it_is_used() -> None:
    code = (
        "import sys, experiments.stats as s; before = 'scipy.stats' in sys.modules; s.t_test([1.0, 2.0]); "
        "print(before, 'scipy.stats' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.sign_flip([]),
        lambda: stats.sign_flip([0.0] * 21),
        lambda: stats.permutation([], [1.0]),
        lambda: stats.permutation([0.0] * 15, [1.0] * 15),
    ],
)
def test_what_docstrings_say_is_refused_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"needed|finite|too many"):
        call()
    for function in (stats.sign_flip, stats.permutation, stats.crossed):
        assert "Raises:" in (function.__doc__ or "")


def test_welch_is_scipys() -> None:
    a, b = RNG.normal(1.0, 2.0, 6), RNG.normal(0.0, 1.0, 5)
    expected = scipy_stats.ttest_ind(a, b, equal_var=False, alternative="greater")
    estimate, p = stats.welch(a, b)
    assert p == pytest.approx(expected.pvalue)
    interval = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((interval.low, interval.high))


def test_sign_flip_is_exact_and_cannot_go_below_its_floor() -> None:
    assert stats.sign_flip([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 1 / 64
    assert stats.sign_flip([1.0] * 3) == 1 / 8 == stats.least_p("sign_flip", 3)
    assert stats.sign_flip([-1.0, -2.0]) == 1.0
    values = RNG.normal(0.3, 1, 7)
    by_hand = np.mean([np.dot(s, values) >= values.sum() - 1e-12 for s in itertools.product((1, -1), repeat=7)])
    assert stats.sign_flip(values) == pytest.approx(by_hand)


def test_permutation_of_four_against_four_has_the_known_floor() -> None:
    assert stats.permutation([5, 6, 7, 8], [1, 2, 3, 4]) == pytest.approx(1 / 70)
    assert stats.permutation([1, 2], [1, 2]) == pytest.approx(5 / 6)  # only the split 1, 1 sums lower


def test_without_spread_the_mean_itself_decides() -> None:
    assert stats.t_test([0.5] * 6, 0.4) == 0.0
    assert stats.t_test([0.5] * 6, 0.5) == 1.0
    assert stats.t_test([0.0] * 6) == 1.0
    assert stats.t_estimate([2.0, 2.0]).ci_high == 2.0
    assert stats.welch([1.0, 1.0], [0.0, 0.0])[1] == 0.0


def test_one_value_has_no_interval() -> None:
    assert stats.t_estimate([3.0]) == stats.Estimate(3.0, None, 1, None, None)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf]])
def test_missing_values_are_refused_not_averaged(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needed|finite"):
        stats.t_estimate(values)


def test_holm_against_a_worked_example() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_equivalence_needs_both_sides() -> None:
    near, far = [0.01, -0.02, 0.0, 0.02, -0.01, 0.01], [0.5, 0.52, 0.48, 0.5, 0.51, 0.49]
    assert stats.equivalence(near, 0.1) < 1e-4
    assert stats.equivalence(far, 0.1) > 0.99
    with pytest.raises(ValueError, match="above 0"):
        stats.equivalence(near, 0)


def test_slopes_of_a_line_are_its_slope() -> None:
    assert stats.slopes([[0, 2, 4], [1, 2, 3]], [0, 1, 2]) == pytest.approx([2, 1])


def test_prediction_interval_holds_a_new_value_as_often_as_it_says() -> None:
    samples = np.random.default_rng(7).normal(size=(4000, 7))
    inside = 0
    for row in samples:
        low, high = stats.prediction_interval(row[:6])
        inside += low <= row[6] <= high
    assert abs(inside / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_t_interval_covers_at_n_six() -> None:
    samples = np.random.default_rng(8).normal(size=(4000, 6))
    covered = sum(bool(e.ci_low <= 0 <= e.ci_high) for e in map(stats.t_estimate, samples))
    assert abs(covered / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_bootstrap_t_covers_a_skewed_mean_better_than_percentiles_would() -> None:
    rng = np.random.default_rng(9)
    samples = rng.exponential(size=(400, 8))
    covered = sum(
        bool(e.ci_low <= 1 <= e.ci_high) for e in (stats.studentised_bootstrap(s, draws=500, seed=1) for s in samples)
    )
    percentile = 0
    for sample in samples:
        means = sample[rng.integers(0, 8, (500, 8))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        percentile += low <= 1 <= high
    assert covered > percentile
    assert covered / 400 > 0.90


def test_crossed_covers_other_seeds_and_other_images() -> None:
    """Three seeds on sixty images with effects of both and noise: the interval must hold for new ones of either."""
    rng = np.random.default_rng(5)
    covered = naive = 0
    for _ in range(600):
        table = 1 + rng.normal(0, 0.3, (3, 1)) + rng.normal(0, 1.5, (1, 60)) + rng.normal(0, 1, (3, 60))
        estimate, p = stats.crossed(table, margin=1.0)
        covered += bool(estimate.ci_low <= 1 <= estimate.ci_high)
        naive += bool(abs(table.mean() - 1) <= 1.96 * table.std() / math.sqrt(table.size))
        assert (p < 0.025) == (estimate.ci_low > 1)
    assert covered / 600 > 0.94
    assert naive / 600 < 0.8  # as if the values were independent


def test_crossed_is_a_t_test_over_seeds_where_images_agree_and_over_images_where_seeds_do() -> None:
    seeds, images = np.array([1.0, 2.0, 4.0]), np.array([0.5, 1.5, 2.5, 5.0])
    for table, values in ((np.repeat(seeds[:, None], 9, 1), seeds), (np.repeat(images[None], 3, 0), images)):
        estimate, p = stats.crossed(table, margin=0.5)
        expected = stats.t_estimate(values)
        assert (estimate.ci_low, estimate.ci_high) == pytest.approx((expected.ci_low, expected.ci_high))
        assert p == pytest.approx(stats.t_test(values, 0.5))


def test_crossed_refuses_what_has_no_spread_to_measure() -> None:
    for bad in ([[1.0, 2.0]], [[1.0], [2.0]], [[1.0, math.nan], [1.0, 2.0]]):
        with pytest.raises(ValueError, match=r"at least 2 seeds and 2 images|finite"):
            stats.crossed(bad)
