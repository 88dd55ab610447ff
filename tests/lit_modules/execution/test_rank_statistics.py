"""Rank correlations against brute force, and intervals that behave."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lit_modules.execution.rank_statistics import interval, kendall, right_pairs, spearman, within


def test_monotone_lists_agree_wholly_and_reversed_ones_not_at_all() -> None:
    p, m = np.array([1.0, 2.0, 3.0, 5.0]), np.array([2.0, 4.0, 8.0, 9.0])
    assert kendall(p, m) == pytest.approx(1)
    assert spearman(p, m) == pytest.approx(1)
    assert kendall(p, -m) == pytest.approx(-1)
    assert spearman(p, -m) == pytest.approx(-1)
    assert math.isnan(spearman(p, np.ones(4)))


def test_within_counts_pairs_of_one_group_only() -> None:
    generator = np.random.default_rng(0)
    groups = ["a", "b", "a", "b", "a", "b", "a"]
    p, m = (np.exp(generator.normal(size=7)) for _ in range(2))
    pairs = [(i, j) for i, j in itertools.combinations(range(7), 2) if groups[i] == groups[j]]
    same = [np.sign(p[i] - p[j]) == np.sign(m[i] - m[j]) for i, j in pairs]
    everything = np.arange(7)
    assert within(groups, p, m, everything) == pytest.approx(2 * np.mean(same) - 1)
    far = [ok for (i, j), ok in zip(pairs, same, strict=True) if max(p[i], p[j]) / min(p[i], p[j]) > 1.3]
    assert right_pairs(groups, 1.3, p, m, everything) == pytest.approx(100 * np.mean(far))


def test_a_plan_drawn_twice_is_no_pair() -> None:
    p, m = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    assert math.isnan(within(["a", "a"], p, m, np.array([1, 1])))
    assert within(["a", "a"], p, m, np.array([0, 1, 1])) == 1


def test_intervals_hold_the_value_and_shrink_with_agreement() -> None:
    generator = np.random.default_rng(1)
    p = np.exp(generator.normal(size=20))
    close, loose = p * np.exp(0.1 * generator.normal(size=20)), p * np.exp(generator.normal(size=20))
    widths = []
    for m in (close, loose):
        low, high = interval(kendall, p, m)
        assert low <= kendall(p, m) <= high
        widths.append(high - low)
    assert widths[0] < widths[1]
    assert all(map(math.isnan, interval(spearman, p[:3], np.ones(3))))
