"""How numbers are written for people: points of accuracy to the hundredth, everything else to three digits that matter."""

from __future__ import annotations

import math


def amount(n: int, note: str) -> str:
    """Return how many samples a data set has, or its note where it has none, as a model to plan for."""
    return f"{n:,} samples in all" if n else note or "no samples"


def signed(value: float, unit: str) -> str:
    """Return a difference with its sign, such as "+2.89" points or "-0.00123" of anything else."""
    return f"{value:+.2f}" if unit == "points" else f"{value:+.3g}"


def with_half_width(mean: float, half: float, unit: str) -> str:
    """Return "mean ± half": points to the hundredth, else as many places as show two digits of the half-width."""
    if unit == "points" or half == 0:
        return f"{mean:.2f} ± {half:.2f}" if unit == "points" else f"{mean:.3g} ± 0"
    places = max(0, 1 - math.floor(math.log10(half)))
    if places > 6:
        return f"{mean:.3g} ± {half:.1g}"
    return f"{mean:,.{places}f} ± {half:,.{places}f}"
