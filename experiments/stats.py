"""The statistics behind a verdict: intervals, tests and corrections for a handful of seeds. Pure numpy and scipy.

p values are one-sided for "the effect is above the margin" unless said otherwise. Degenerate samples are decided, never
NaN: with no spread at all, the mean itself is the answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean with its sample standard deviation and interval; the interval is None where n is 1 and nothing is known."""

    mean: float
    sd: float | None
    n: int
    ci_low: float | None
    ci_high: float | None


def _student() -> Any:
    """Student's t distribution. scipy.stats takes most of a second to import, which few commands need."""
    from scipy.stats import t

    return t


def _sample(values: Values, least: int = 1) -> np.ndarray:
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or sample.size < least:
        raise ValueError(f"at least {least} values are needed, got {sample.size}")
    if not np.isfinite(sample).all():
        raise ValueError(f"values must be finite; a missing value is left out, not given as NaN: {sample.tolist()}")
    return sample


def t_estimate(values: Values, alpha: float = 0.05) -> Estimate:
    """Return the mean and its two-sided (1 - alpha) Student interval. One value has no interval."""
    sample = _sample(values)
    mean = float(sample.mean())
    if sample.size == 1:
        return Estimate(mean, None, 1, None, None)
    sd = float(sample.std(ddof=1))
    half = float(_student().ppf(1 - alpha / 2, sample.size - 1)) * sd / math.sqrt(sample.size)
    return Estimate(mean, sd, sample.size, mean - half, mean + half)


def t_test(differences: Values, margin: float = 0.0) -> float:
    """Return the one-sided p of a Student test that the mean difference is above `margin`.

    With no spread: 0.0 if the difference is above the margin, else 1.0.
    """
    sample = _sample(differences, 2)
    spread = sample.std(ddof=1)
    gap = float(sample.mean() - margin)
    if spread <= 1e-12 * max(1.0, abs(float(sample.mean()))):
        return 0.0 if gap > 1e-12 else 1.0
    return float(_student().sf(gap / (spread / math.sqrt(sample.size)), sample.size - 1))


def welch(a: Values, b: Values, margin: float = 0.0, alpha: float = 0.05) -> tuple[Estimate, float]:
    """Return the unpaired estimate of mean(a) - mean(b) and its one-sided p above `margin` (Welch)."""
    x, y = _sample(a, 2), _sample(b, 2)
    gap = float(x.mean() - y.mean())
    parts = x.var(ddof=1) / x.size, y.var(ddof=1) / y.size
    error = math.sqrt(sum(parts))
    n = min(x.size, y.size)
    if error <= 1e-12 * max(1.0, abs(gap)):
        return Estimate(gap, 0.0, n, gap, gap), 0.0 if gap > margin + 1e-12 else 1.0
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (x.size - 1) + parts[1] ** 2 / (y.size - 1))
    half = float(_student().ppf(1 - alpha / 2, freedom)) * error
    p = float(_student().sf((gap - margin) / error, freedom))
    return Estimate(gap, error * math.sqrt(n), n, gap - half, gap + half), p


def sign_flip(differences: Values, margin: float = 0.0) -> float:
    """Return the exact one-sided p of the paired sign-flip test; never below 1 / 2 ** n. At most 20 pairs.

    Raises:
        ValueError: no pair, more than 20, or a value that is not finite.
    """
    sample = _sample(differences, 1) - margin
    if sample.size > 20:
        raise ValueError(f"the exact test lists 2 ** n signs; {sample.size} pairs are too many, at most 20")
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=sample.size)))
    flipped = signs @ sample
    return float((flipped >= sample.sum() - 1e-9 * max(1.0, float(np.abs(sample).sum()))).mean())


def permutation(a: Values, b: Values) -> float:
    """Return the exact one-sided p that mean(a) exceeds mean(b), over all ways to split the pooled values.

    Raises:
        ValueError: an empty side, a value that is not finite, or more than 200,000 ways.
    """
    x, y = _sample(a), _sample(b)
    pooled = np.concatenate([x, y])
    if math.comb(pooled.size, x.size) > 200_000:
        raise ValueError(f"too many splits for an exact test: {x.size} against {y.size}")
    splits = [pooled[list(chosen)].sum() for chosen in itertools.combinations(range(pooled.size), x.size)]
    return float((np.array(splits) >= x.sum() - 1e-9 * max(1.0, float(np.abs(pooled).sum()))).mean())


def studentised_bootstrap(values: Values, alpha: float = 0.05, draws: int = 4000, seed: int = 0) -> Estimate:
    """Return the mean with a bootstrap-t interval, which does not assume normal values. At least 4 values.

    A resample without spread carries no t value and is left out.
    """
    sample = _sample(values, 4)
    mean, sd = float(sample.mean()), float(sample.std(ddof=1))
    if sd == 0:
        return Estimate(mean, 0.0, sample.size, mean, mean)
    picks = np.random.default_rng(seed).integers(0, sample.size, (draws, sample.size))
    resampled = sample[picks]
    spread = resampled.std(axis=1, ddof=1)
    usable = spread > 0
    t_values = (resampled.mean(axis=1)[usable] - mean) / (spread[usable] / math.sqrt(sample.size))
    low, high = np.quantile(t_values, [alpha / 2, 1 - alpha / 2])
    error = sd / math.sqrt(sample.size)
    return Estimate(mean, sd, sample.size, mean - float(high) * error, mean - float(low) * error)


def crossed(
    values_SI: Sequence[Sequence[float]] | np.ndarray, margin: float = 0.0, alpha: float = 0.05
) -> tuple[Estimate, float]:
    """Return the mean of values of seeds on the same images, and its one-sided p above `margin`: for other seeds and images.

    Seeds and images are both drawn from more of their kind, and crossed: every seed is tested on all images. The variance of
    the mean is that of the seeds' means over S plus that of the images' means over I (what a bootstrap over images comes
    to), which counts the variance within a seed and image twice and so errs on the safe side; freedom by Satterthwaite.

    Args:
        values_SI: (seeds, images), at least 2 of each, finite.
        margin, alpha: as for `welch`.
    Returns:
        The estimate, whose sd is that over seeds, and the p value.
    Raises:
        ValueError: fewer than 2 seeds or images, or a value that is not finite.
    """
    table = np.asarray(values_SI, dtype=float)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"at least 2 seeds and 2 images are needed, got {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("values must be finite; an image without a value is left out, not given as NaN")
    mean, n = float(table.mean()), table.shape
    parts = [float(table.mean(axis=1 - axis).var(ddof=1)) / n[axis] for axis in (0, 1)]
    error, spread = math.sqrt(sum(parts)), float(table.mean(axis=1).std(ddof=1))
    if error <= 1e-12 * max(1.0, abs(mean)):
        return Estimate(mean, 0.0, n[0], mean, mean), 0.0 if mean > margin + 1e-12 else 1.0
    freedom = error**4 / sum(part**2 / (count - 1) for part, count in zip(parts, n, strict=True))
    half = float(_student().ppf(1 - alpha / 2, freedom)) * error
    return Estimate(mean, spread, n[0], mean - half, mean + half), float(
        _student().sf((mean - margin) / error, freedom)
    )


def prediction_interval(values: Values, alpha: float = 0.05) -> tuple[float, float]:
    """Return the interval that one further value of the same kind falls into with probability 1 - alpha (Student).

    It is what a paper's single number is held against: a mean's interval would be too narrow.
    """
    sample = _sample(values, 2)
    half = float(_student().ppf(1 - alpha / 2, sample.size - 1)) * sample.std(ddof=1) * math.sqrt(1 + 1 / sample.size)
    return float(sample.mean() - half), float(sample.mean() + half)


def equivalence(differences: Values, margin: float) -> float:
    """Return the p of two one-sided tests (TOST) that the mean difference lies within (-margin, margin).

    Raises:
        ValueError: a margin that is not above 0.
    """
    if margin <= 0:
        raise ValueError(f"an equivalence margin must be above 0, got {margin}")
    sample = _sample(differences, 2)
    return max(t_test(sample, -margin), t_test(-sample, -margin))


def slopes(series: Sequence[Sequence[float]] | np.ndarray, positions: Values | range) -> np.ndarray:
    """Return each seed's least-squares slope over the positions of an axis; `series` is (seeds, positions)."""
    values, at = np.asarray(series, dtype=float), _sample(list(positions), 2)
    centered = at - at.mean()
    return values @ centered / (centered**2).sum()


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def least_p(test: str, n: int) -> float:
    """Return the smallest one-sided p that a design can give: 1 / 2 ** n for the sign-flip test, 0 for the others.

    Those of fewer than 2 differences give none, which counts as 1.
    """
    if test == "sign_flip":
        return 0.5**n if n else 1.0
    return 0.0 if n >= 2 else 1.0


TESTS: dict[str, Callable[[Values, float], float]] = {"t": t_test, "sign_flip": sign_flip}
