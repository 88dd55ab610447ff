"""What the runs say about a claim: an estimate, an interval and a p value, before anything is decided.

All differences are turned so that positive means "as the claim says": a better than b in the metric's own direction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments import stats
from experiments.claims import Claim, Metric, Operand, PaperSpec
from experiments.numbers import signed
from experiments.per_image import image_values
from experiments.records import Record
from experiments.stats import Estimate


class NotAssessable(Exception):
    """Nothing can be said, and why: a metric that was not measured, a premise that does not hold."""


@dataclass(frozen=True)
class Evidence:
    """The numbers of one claim.

    `p` is one-sided, for the claim being true beyond its margin; None where the answer is exact. `contrary` says whether
    the numbers speak against the claim (its interval lies wholly on the other side of the margin).
    """

    estimate: Estimate
    p: float | None
    contrary: bool
    holds: bool
    finding: str
    runs: tuple[str, ...] = ()
    premises: dict[str, float] = field(default_factory=dict)


class Runs:
    """The records of a claim's cells, looked up by (ablation, data)."""

    def __init__(self, spec: PaperSpec, records: Sequence[Record]) -> None:
        self.spec = spec
        self.by_cell: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in sorted(records, key=lambda r: r.key):
            self.by_cell[record.key.ablation, record.key.data].append(record)

    def of(self, claim: Claim) -> list[Record]:
        """Every record that the claim needs, each once."""
        pairs = dict.fromkeys((name, o.data) for o in claim.operands for name in o.ablations)
        return [record for pair in pairs for record in self.by_cell.get(pair, [])]

    def complete(self, claim: Claim) -> bool:
        """Whether every cell of the claim has a record at all."""
        return all(self.by_cell.get((name, o.data)) for o in claim.operands for name in o.ablations)

    def chosen(self, operand: Operand) -> str:
        """The ablation of an operand; of several, the best by their mean on a validation metric."""
        if operand.ablation:
            return operand.ablation
        by = operand.by or ""
        means = {name: float(np.mean(self._metric(name, operand.data, by))) for name in operand.best_of}
        best = min if self.spec.metric(by).direction == "lower" else max
        return best(means, key=lambda name: means[name])

    def values(self, operand: Operand) -> np.ndarray:
        """The operand's metric, seed by seed."""
        return self._metric(self.chosen(operand), operand.data, operand.metric)

    def _metric(self, ablation: str, data: str, metric: str) -> np.ndarray:
        records = self.by_cell[ablation, data]
        missing = [str(r.key.seed) for r in records if metric not in r.metrics]
        if missing:
            raise NotAssessable(f"{metric} was not measured for {ablation} on {data}, seed {', '.join(missing)}")
        return np.array([r.metrics[metric] for r in records])

    def images(self, *operands: Operand) -> list[np.ndarray]:
        """Each operand's metric (seeds, images), on the images that have a value in every run of all operands."""
        runs = [
            [image_values(record, operand.metric) for record in self.by_cell[self.chosen(operand), operand.data]]
            for operand in operands
        ]
        common = sorted(set.intersection(*(set(values) for side in runs for values in side)))
        if len(common) < 2:
            names = " and ".join(operand.metric for operand in operands)
            raise NotAssessable(f"{len(common)} test images have a value of {names} in every run")
        return [np.array([[values[image] for image in common] for values in side]) for side in runs]

    def mean(self, ablation: str, data: str, metric: str) -> float:
        """The mean over seeds of any metric of a cell."""
        return float(self._metric(ablation, data, metric).mean())


def gather(spec: PaperSpec, claim: Claim, runs: Runs) -> Evidence:
    """Return the evidence on a claim whose runs are all done.

    Raises:
        NotAssessable: a metric is missing or a premise does not hold.
    """
    premises = _premises(claim, runs)
    patterns = {"all": _ordering, "each": _each, "any": _any, "mixed": _mixed}
    kinds = {"comparison": _comparison, "trend": _trend, "value": _value, "identity": _identity}
    found = (patterns[claim.pattern] if claim.kind == "ordering" else kinds[claim.kind])(claim, runs)
    used = tuple(record.run_id for record in runs.of(claim))
    return Evidence(found.estimate, found.p, found.contrary, found.holds, found.finding, used, premises)


def _premises(claim: Claim, runs: Runs) -> dict[str, float]:
    """Relative gaps of the matched metrics between the operands' cells; beyond the tolerance nothing is compared."""
    sides = [claim.operands] if claim.pattern == "all" else claim.pairs
    gaps: dict[str, float] = {}
    for metric, tolerance in claim.match.items():
        gaps[metric] = max(_gap(metric, side, runs) for side in sides)
        if gaps[metric] > tolerance:
            raise NotAssessable(
                f"the two sides differ by {gaps[metric]:.1%} in {metric}, more than the {tolerance:.0%} the claim allows"
            )
    return gaps


def _gap(metric: str, operands: Sequence[Operand], runs: Runs) -> float:
    means = [runs.mean(runs.chosen(o), o.data, metric) for o in operands]
    top = max(abs(mean) for mean in means)
    return (max(means) - min(means)) / top if top else 0.0


def _oriented(metric: Metric, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return b - a if metric.direction == "lower" else a - b


def _against(estimate: Estimate, margin: float) -> bool:
    """Whether the interval lies wholly at or below the margin."""
    if estimate.ci_high is None:
        return False
    return estimate.ci_high < margin or (not estimate.sd and estimate.mean <= margin)


def _paired(claim: Claim, runs: Runs, a: Operand, b: Operand, alpha: float) -> tuple[Estimate, float]:
    x, y = (_scaled(claim, runs.values(operand)) for operand in (a, b))
    metric = runs.spec.metric(a.metric)
    if claim.design.test == "crossed":
        return _crossed(claim, runs, alpha, a, b)
    if not claim.design.paired and min(len(x), len(y)) < 2:
        return stats.t_estimate(_oriented(metric, x.mean(keepdims=True), y.mean(keepdims=True)), alpha), 1.0
    if not claim.design.paired:
        return stats.welch(*((y, x) if metric.direction == "lower" else (x, y)), claim.margin, alpha)
    if len(x) != len(y):
        raise NotAssessable(f"{a.label} has {len(x)} seeds and {b.label} {len(y)}: they cannot be paired")
    gaps = _oriented(metric, x, y)
    estimate = stats.t_estimate(gaps, alpha)
    p = stats.TESTS[claim.design.test](gaps, claim.margin) if len(gaps) > 1 else 1.0
    return estimate, p


def _crossed(claim: Claim, runs: Runs, alpha: float, a: Operand, b: Operand | None = None) -> tuple[Estimate, float]:
    """Another operand, or a number, against the first, image by image."""
    operands = [a] if b is None else [a, b]
    x, *rest = runs.images(*operands)
    y = rest[0] if rest else np.full_like(x, claim.against or 0.0)
    if x.shape != y.shape:
        raise NotAssessable(f"the sides have {len(x)} and {len(y)} seeds: they cannot be paired")
    gaps = _oriented(runs.spec.metric(a.metric), x, y)
    if len(gaps) < 2:
        return stats.t_estimate(gaps.mean(axis=1), alpha), 1.0
    return stats.crossed(gaps, claim.margin, alpha)


def _scaled(claim: Claim, values: np.ndarray) -> np.ndarray:
    """The values as they are compared; of a relative claim the logarithm, whose differences are shares."""
    if not claim.relative:
        return values
    if (values <= 0).any():
        raise NotAssessable("a relative difference needs values above 0")
    return 100 * np.log(values)


def _unit(claim: Claim, runs: Runs, operand: Operand) -> str:
    return "%" if claim.relative else runs.spec.metric(operand.metric).unit


def _interval(estimate: Estimate, unit: str, alpha: float = 0.05) -> str:
    if estimate.ci_low is None or estimate.ci_high is None:
        return f"{signed(estimate.mean, unit)} {unit} from one run"
    low, high = signed(estimate.ci_low, unit), signed(estimate.ci_high, unit)
    return f"{signed(estimate.mean, unit)} {unit}, {100 * (1 - alpha):.3g}% interval {low} to {high}"


def _comparison(claim: Claim, runs: Runs) -> Evidence:
    if claim.against is not None:
        return _against_number(claim, claim.against, runs)
    a, b = claim.operands
    estimate, p = _paired(claim, runs, a, b, claim.design.alpha)
    unit = _unit(claim, runs, a)
    finding = f"{_against_each_other(runs, a, b)}: {_interval(estimate, unit)}"
    if a.best_of:
        finding = f"the best on validation is {runs.chosen(a)}; {finding}"
    return Evidence(estimate, p, _against(estimate, claim.margin), True, finding)


def _ordering(claim: Claim, runs: Runs) -> Evidence:
    """Every operand but the last is better than the last: the p of the weakest pair (intersection-union)."""
    *winners, last = claim.operands
    alpha = claim.design.alpha / len(winners)
    pairs = [(a, *_paired(claim, runs, a, last, alpha)) for a in winners]
    a, _, p = max(pairs, key=lambda pair: (pair[2], -pair[1].mean))
    estimate, _ = _paired(claim, runs, a, last, claim.design.alpha)
    losers = [x.label for x, e, _ in pairs if _against(e, claim.margin)]
    unit = _unit(claim, runs, a)
    finding = f"the weakest of {len(winners)} is {a.label} against {last.label}: {_interval(estimate, unit)}"
    if losers:
        finding += f"; not better: {', '.join(losers)}"
    return Evidence(estimate, p, bool(losers), True, finding)


def _against_number(claim: Claim, number: float, runs: Runs) -> Evidence:
    """One operand is better than a number."""
    (a,) = claim.operands
    values = runs.values(a)
    metric = runs.spec.metric(a.metric)
    gaps = _oriented(metric, values, np.full_like(values, number))
    if claim.design.test == "crossed":
        estimate, p = _crossed(claim, runs, claim.design.alpha, a)
    else:
        estimate = stats.t_estimate(gaps, claim.design.alpha)
        p = stats.TESTS[claim.design.test](gaps, claim.margin) if len(gaps) > 1 else 1.0
    finding = f"{runs.chosen(a)} has {values.mean():.4g} {metric.unit} on average, against {number:g}"
    return Evidence(estimate, p, _against(estimate, claim.margin), True, finding)


def _each(claim: Claim, runs: Runs) -> Evidence:
    """The first of every pair is better: the p of the weakest pair (intersection-union)."""
    alpha = claim.design.alpha / len(claim.pairs)
    results = [(pair, *_paired(claim, runs, *pair, alpha)) for pair in claim.pairs]
    weakest, _, p = max(results, key=lambda r: (r[2], -r[1].mean))
    estimate, _ = _paired(claim, runs, *weakest, claim.design.alpha)
    unit = _unit(claim, runs, weakest[0])
    finding = f"{_tally(claim, results)}; the weakest is {_name(weakest, runs)}: {_interval(estimate, unit)}"
    return Evidence(estimate, p, any(_against(e, claim.margin) for _, e, _ in results), True, finding)


def _any(claim: Claim, runs: Runs) -> Evidence:
    """The first of some pair is better: Bonferroni over pairs. Contrary only if every pair speaks against it."""
    alpha = claim.design.alpha / len(claim.pairs)
    results = [(pair, *_paired(claim, runs, *pair, alpha)) for pair in claim.pairs]
    best, estimate, p = min(results, key=lambda r: (r[2], -r[1].mean))
    unit = _unit(claim, runs, best[0])
    finding = f"{_tally(claim, results)}; the clearest is {_name(best, runs)}: {_interval(estimate, unit, alpha)}"
    contrary = all(_against(_paired(claim, runs, *pair, claim.design.alpha)[0], claim.margin) for pair in claim.pairs)
    return Evidence(estimate, min(1.0, p * len(results)), contrary, True, finding)


def _tally(claim: Claim, results: Sequence[tuple[Any, Estimate, float]]) -> str:
    count = len(results)
    ahead = sum(p * count <= claim.design.alpha / 2 for _, _, p in results)
    behind = sum(_against(estimate, claim.margin) for _, estimate, _ in results)
    return f"of {count} settings the first side is clearly ahead in {ahead} and clearly not in {behind}"


def _name(pair: tuple[Operand, Operand], runs: Runs) -> str:
    return f"{_against_each_other(runs, *pair)} on {pair[0].data}"


def _against_each_other(runs: Runs, a: Operand, b: Operand) -> str:
    """Two ablations by name; of one ablation, which of its metrics are compared."""
    one, other = runs.chosen(a), runs.chosen(b)
    if one != other or a.metric == b.metric:
        return f"{one} against {other}"
    labels = [runs.spec.metric(operand.metric).label for operand in (a, b)]
    return f"{one}: {labels[0]} against {labels[1]}"


def _mixed(claim: Claim, runs: Runs) -> Evidence:
    """In some pair the first side wins, in some the second: Bonferroni over pairs, then both sides must hold."""
    pairs = claim.pairs
    alpha = claim.design.alpha / len(pairs)
    sides = []
    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
        results = [(o[0], *_paired(claim, runs, *o, alpha)) for o in (order(a, b) for a, b in pairs)]
        best = min(results, key=lambda r: (r[2], -r[1].mean))
        wins = sum(min(1.0, r[2] * len(pairs)) <= claim.design.alpha / 2 for r in results)
        nowhere = all(_against(r[1], claim.margin) for r in results)
        sides.append((min(1.0, best[2] * len(pairs)), best, wins, nowhere))
    p, (_, estimate, _), _, _ = max(sides, key=lambda side: side[0])  # the weaker side decides
    names = [side[1][0].label for side in sides]
    unit = runs.spec.metric(claim.operands[0].metric).unit
    heights = "; ".join(
        f"{name} is ahead under {s[1][0].metric.split('/')[1].replace('_', ' ')} ({signed(s[1][1].mean, unit)})"
        for name, s in zip(names, sides, strict=True)
    )
    finding = (
        f"of {len(pairs)} conditions {names[0]} clearly wins {sides[0][2]} and {names[1]} {sides[1][2]} by more than "
        f"{claim.margin:g}; at best {heights}"
    )
    return Evidence(estimate, p, any(side[3] for side in sides), True, finding)


def _trend(claim: Claim, runs: Runs) -> Evidence:
    """Each seed's slope along the operands, in the metric's better direction."""
    series = np.array([_scaled(claim, runs.values(o)) for o in claim.operands]).T
    metric = runs.spec.metric(claim.operands[0].metric)
    slopes = stats.slopes(series if metric.direction == "higher" else -series, range(len(claim.operands)))
    estimate = stats.t_estimate(slopes, claim.design.alpha)
    p = stats.TESTS[claim.design.test](slopes, claim.margin) if len(slopes) > 1 else 1.0
    finding = f"slope per step: {_interval(estimate, _unit(claim, runs, claim.operands[0]))}"
    return Evidence(estimate, p, _against(estimate, claim.margin), True, finding)


def _value(claim: Claim, runs: Runs) -> Evidence:
    if claim.reported is None:
        raise NotAssessable("the paper's number could not be read, so there is nothing to compare with")
    values = runs.values(claim.operands[0])
    estimate = stats.t_estimate(values, claim.design.alpha)
    if len(values) < 2:
        raise NotAssessable("one run gives no interval to hold the paper's number against")
    low, high = stats.prediction_interval(values, claim.design.alpha)
    finding = f"ours {estimate.mean:.2f}, a further run would lie in {low:.2f} to {high:.2f}; the paper has {claim.reported:g}"
    outside = not low <= claim.reported <= high
    if claim.margin <= 0:
        return Evidence(estimate, 1.0, outside, True, f"{finding}; no margin of agreement was stated")
    p = stats.equivalence(values - claim.reported, claim.margin)
    apart = abs(estimate.mean - claim.reported) - claim.margin
    half = (estimate.ci_high or estimate.mean) - estimate.mean
    return Evidence(estimate, p, outside and apart > half, True, finding)


def _identity(claim: Claim, runs: Runs) -> Evidence:
    if claim.against is not None or claim.pattern == "each":
        return _every_run(claim, runs)
    a, b = (runs.values(operand) for operand in claim.operands)
    for operand, values in zip(claim.operands, (a, b), strict=True):
        if np.unique(values).size > 1:
            raise NotAssessable(f"{operand.metric} of {operand.label} differs between runs, so it is no exact quantity")
    metric = runs.spec.metric(claim.operands[0].metric)
    first, second = float(a[0]), float(b[0])
    holds = bool(_oriented(metric, a[:1], b[:1])[0] > claim.margin)
    ratio = first / second if second else float("inf")
    if claim.reported is not None:
        holds &= abs(ratio - claim.reported) <= 5e-4
    estimate = Estimate(ratio, 0.0, len(a), ratio, ratio)
    names = claim.operands[0].label, claim.operands[1].label
    finding = f"{names[0]} has {first:,.0f} {metric.unit} and {names[1]} {second:,.0f}: a ratio of {ratio:.3f}"
    return Evidence(estimate, None, not holds, holds, finding)


def _every_run(claim: Claim, runs: Runs) -> Evidence:
    """An exact statement, looked at run by run: the smallest slack says by how much it held, or by how much it failed."""
    slacks = []
    for pair in claim.pairs if claim.against is None else [(claim.operands[0], None)]:
        values = runs.values(pair[0])
        other = np.full_like(values, claim.against or 0.0) if pair[1] is None else runs.values(pair[1])
        slacks.append(_oriented(runs.spec.metric(pair[0].metric), values, other))
    least = float(min(slack.min() for slack in slacks))
    count, unit = sum(slack.size for slack in slacks), runs.spec.metric(claim.operands[0].metric).unit
    broken = sum(int((slack < 0).sum()) for slack in slacks)
    told = f"in every one of {count} runs" if not broken else f"in {count - broken} of {count} runs, not in {broken}"
    finding = f"it holds {told}; the smallest slack is {least:.3g} {unit}"
    estimate = Estimate(least, 0.0, len(slacks[0]), least, least)
    return Evidence(estimate, None, broken > 0, not broken, finding)
