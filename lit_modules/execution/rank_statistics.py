"""Do two lists of times put plans in the same order? Rank correlations, with bootstrap intervals.

Legend: P plans, I indices of a resample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

DRAWS = 2000


def kendall(predicted_P: np.ndarray, measured_P: np.ndarray) -> float:
    """Kendall's tau-b; NaN where all of one list is equal."""
    from scipy.stats import kendalltau

    if len(predicted_P) < 2:
        return float("nan")
    return float(kendalltau(predicted_P, measured_P).statistic)


def spearman(predicted_P: np.ndarray, measured_P: np.ndarray) -> float:
    """Spearman's rho; NaN where all of one list is equal."""
    from scipy.stats import rankdata

    a, b = rankdata(predicted_P), rankdata(measured_P)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def within(groups: Sequence[str], predicted_P: np.ndarray, measured_P: np.ndarray, chosen_I: np.ndarray) -> float:
    """(pairs in the same order - pairs in the other order) / pairs, over pairs of one group; NaN where there are none.

    Pairs of a plan with itself, as a resample has them, do not count.
    """
    signs = _pairs(groups, 1.0, predicted_P, measured_P, chosen_I)
    return float(signs.mean()) if len(signs) else float("nan")


def right_pairs(
    groups: Sequence[str], ratio: float, predicted_P: np.ndarray, measured_P: np.ndarray, chosen_I: np.ndarray
) -> float:
    """Percentage of the pairs of one group whose predictions differ by more than `ratio` that are measured in that order."""
    signs = _pairs(groups, ratio, predicted_P, measured_P, chosen_I)
    return float(100 * (signs > 0).mean()) if len(signs) else float("nan")


def interval(
    statistic: Callable[..., float],
    predicted_P: np.ndarray,
    measured_P: np.ndarray,
    indexed: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile bootstrap over plans; NaN where the statistic is not defined in most resamples.

    Args:
        indexed: whether the statistic takes whole lists and the indices of a resample, or resampled lists.
    """
    generator, count = np.random.default_rng(seed), len(predicted_P)
    values = []
    for _ in range(DRAWS):
        chosen_I = generator.integers(count, size=count)
        if indexed:
            values.append(statistic(predicted_P, measured_P, chosen_I))
        else:
            values.append(statistic(predicted_P[chosen_I], measured_P[chosen_I]))
    found = np.array([value for value in values if np.isfinite(value)])
    if len(found) < DRAWS // 2:
        return float("nan"), float("nan")
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _pairs(
    groups: Sequence[str], ratio: float, predicted_P: np.ndarray, measured_P: np.ndarray, chosen_I: np.ndarray
) -> np.ndarray:
    """+1, 0 or -1 for each pair whose predictions differ by more than `ratio`: measured in that order, equal, or not."""
    names = np.unique(np.array(groups), return_inverse=True)[1][chosen_I]
    p, m = np.log(predicted_P[chosen_I]), np.log(measured_P[chosen_I])
    i, j = np.triu_indices(len(chosen_I), 1)
    gap = p[i] - p[j]
    kept = (names[i] == names[j]) & (chosen_I[i] != chosen_I[j]) & (np.abs(gap) > np.log(ratio))
    return np.sign(gap[kept]) * np.sign(m[i][kept] - m[j][kept])
