"""What a search was worth at any time: gaps to the optimum against decisions and seconds, and when it was reached."""

from __future__ import annotations

import math
from collections.abc import Sequence

from datamodules.planning.problem import Problem, gap_percent
from datamodules.planning.searchers import Point, reached

STEP_MARKS = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
SECOND_MARKS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def anytime(
    problem: Problem,
    trace: Sequence[Point],
    optimum: float | None,
    steps: int,
    seconds: float,
    budget: int | None = None,
) -> dict[str, float]:
    """Return what a search logs. Before its first plan it stands at the reference plan, which needs no search.

    Args:
        problem: gives reference and scale.
        trace: every improvement, in order.
        optimum: the least cost there is; None where nobody asked, and nothing is then said against it.
        steps, seconds: spent in all.
        budget: decisions that it could have taken; `steps` where it is None.
    Returns:
        `search/cost`, `search/reference`, `search/optimum`; `search/speedup`, reference over cost; `search/gap` in percent;
        `search/reached`, 100 where the optimum was reached, else 0; `search/steps` and `search/seconds` until it was reached,
        the whole budget where it never was, which makes them lower bounds; `search/spent_steps`, `search/spent_seconds`;
        `search/mean_gap`, over the budget in steps; `gap_at/steps_N` and `gap_at/seconds_T` for marks within what was spent.
    """
    budget = steps if budget is None else budget
    line = [Point(0.0, 0, 0, problem.reference), *(p for p in trace if p.cost < problem.reference)]
    best = line[-1].cost
    found = {
        "search/cost": best,
        "search/reference": problem.reference,
        "search/speedup": problem.reference / best,
        "search/spent_steps": float(steps),
        "search/spent_seconds": seconds,
    }
    if optimum is None:
        return found
    first = next((point for point in line if reached(point.cost, optimum)), None)
    found |= {
        "search/optimum": optimum,
        "search/gap": max(0.0, gap_percent(problem, best, optimum)),
        "search/reached": 100.0 if first else 0.0,
        "search/steps": float(first.steps if first else budget),
        "search/seconds": first.seconds if first else seconds,
        "search/mean_gap": _mean_gap(problem, line, optimum, budget),
    }
    for mark in STEP_MARKS:
        if mark <= max(budget, steps):
            found[f"gap_at/steps_{mark}"] = _gap(problem, line, optimum, lambda p, m=mark: p.steps <= m)
    for tick in SECOND_MARKS:
        if tick <= seconds:
            found[f"gap_at/seconds_{tick:g}"] = _gap(problem, line, optimum, lambda p, t=tick: p.seconds <= t)
    return found


def _gap(problem: Problem, line: Sequence[Point], optimum: float, within: object) -> float:
    known = [point.cost for point in line if within(point)]  # type: ignore[operator]
    return max(0.0, gap_percent(problem, known[-1], optimum))


def _mean_gap(problem: Problem, line: Sequence[Point], optimum: float, budget: int) -> float:
    """The gap of the best so far, averaged over the budget's steps."""
    if budget <= 0:
        return max(0.0, gap_percent(problem, line[-1].cost, optimum))
    ends = [min(point.steps, budget) for point in line[1:]] + [budget]
    total = 0.0
    for point, end in zip(line, ends, strict=True):
        total += max(0.0, gap_percent(problem, point.cost, optimum)) * max(0, end - min(point.steps, budget))
    if not math.isfinite(total):
        raise ValueError(f"{problem.name}: its reference costs {problem.reference}, so there is no mean gap")
    return total / budget
