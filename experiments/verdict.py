"""One function decides: claims and runs in, verdicts out.

The words are a closed set. `reproduced`: the claim holds beyond its margin at the paper-wide alpha (Holm over all tested
claims of the paper, one-sided alpha / 2, which is the side of a two-sided interval). `not reproduced`: the interval lies
wholly on the other side of the margin. `inconclusive`: neither. `not assessable`: the question cannot be put. A claim
whose runs are not all there has a run state instead, and a crashed run is never "not reproduced".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.claims import Claim, PaperSpec
from experiments.evidence import Evidence, NotAssessable, Runs, gather
from experiments.records import Record
from experiments.stats import holm, least_p, t_estimate

VERDICTS = ("reproduced", "not reproduced", "inconclusive", "not assessable")
RUN_STATES = ("failed", "running", "stale", "not run")  # the most urgent first


@dataclass(frozen=True)
class Verdict:
    """What became of a claim, with the numbers and the runs that say so. `estimate` is positive where the claim is right."""

    id: str
    text: str
    kind: str
    verdict: str
    reason: str
    metric: str
    unit: str
    n: int
    source: str
    scale: str
    margin: float
    estimate: float | None = None
    ci: tuple[float, float] | None = None
    p: float | None = None
    p_adjusted: float | None = None
    reported: float | None = None
    runs: tuple[str, ...] = ()
    premises: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of verdicts.json."""
        return {**vars(self), "ci": list(self.ci) if self.ci else None, "runs": list(self.runs)}


@dataclass(frozen=True)
class EstimateRow:
    """A row of estimates.csv: one metric of one ablation on one data set over its finished seeds."""

    paper: str
    ablation: str
    data: str
    metric: str
    unit: str
    n: int
    mean: float
    sd: float | None
    ci_low: float | None
    ci_high: float | None
    profile: str
    runs: str


def judge(spec: PaperSpec, records: Sequence[Record], profile: str) -> list[Verdict]:
    """Return the verdict on every claim of a paper that this profile judges, in the order of the file.

    Args:
        spec: the paper.
        records: of every cell the profile needs, finished or not.
        profile: "smoke" decides nothing.
    """
    runs = Runs(spec, records)
    claims = spec.claims_of(profile)
    found = {claim.id: _look(spec, claim, runs, profile) for claim in claims}
    tested = {name: e.p for name, e in found.items() if isinstance(e, Evidence) and e.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [_decide(spec, claim, found[claim.id], adjusted.get(claim.id), len(tested)) for claim in claims]


def _look(spec: PaperSpec, claim: Claim, runs: Runs, profile: str) -> Evidence | tuple[str, str]:
    """The evidence on a claim, or (verdict, reason) where there is none to weigh."""
    if claim.beyond:
        return "not assessable", claim.beyond
    if not runs.complete(claim):
        return "not run", "some of its cells have not been run"
    states: dict[str, list[Record]] = defaultdict(list)
    for record in runs.of(claim):
        states[record.state].append(record)
    for state in RUN_STATES:
        if states[state]:
            first = states[state][0]
            detail = f": {first.error}" if first.error else ""
            return state, f"{len(states[state])} of its cells are in the state '{state}', such as {first.key}{detail}"
    if profile == "smoke":
        return "not assessable", "the smoke profile only shows that everything runs; it is too small to decide anything"
    try:
        return gather(spec, claim, runs)
    except NotAssessable as reason:
        return "not assessable", str(reason)


def _decide(
    spec: PaperSpec, claim: Claim, found: Evidence | tuple[str, str], p_adjusted: float | None, tested: int
) -> Verdict:
    metric = spec.metric(claim.operands[0].metric)
    common: dict[str, Any] = {
        "id": claim.id,
        "text": claim.text,
        "kind": claim.kind,
        "metric": metric.name,
        "unit": "%" if claim.relative else metric.unit,
        "source": claim.source,
        "scale": claim.scale,
        "margin": claim.margin,
        "reported": claim.reported,
    }
    if not isinstance(found, Evidence):
        return Verdict(verdict=found[0], reason=found[1], n=0, **common)
    word, why = _word(claim, found, p_adjusted, tested)
    estimate = found.estimate
    interval = None if estimate.ci_low is None or estimate.ci_high is None else (estimate.ci_low, estimate.ci_high)
    return Verdict(
        verdict=word,
        reason=_sentence(claim, found, why),
        n=estimate.n,
        estimate=estimate.mean,
        ci=interval,
        p=found.p,
        p_adjusted=p_adjusted,
        runs=found.runs,
        premises=found.premises,
        **common,
    )


def _word(claim: Claim, found: Evidence, p_adjusted: float | None, tested: int) -> tuple[str, str]:
    if found.p is None or p_adjusted is None:
        return "reproduced" if found.holds else "not reproduced", "exact, so there is nothing to test"
    design, n = claim.design, found.estimate.n
    if found.contrary:
        return "not reproduced", f"the interval lies wholly below the margin of {claim.margin:g}"
    if n < design.seeds:
        return "inconclusive", f"only {n} of the {design.seeds} seeds that the design asks for"
    if least_p(design.test, n) * tested > design.alpha / 2:
        return (
            "inconclusive",
            f"a {design.test} test of {n} seeds cannot reach alpha {design.alpha} over {tested} claims",
        )
    if p_adjusted <= design.alpha / 2:
        return "reproduced", f"above the margin of {claim.margin:g}, Holm-adjusted p {_p(p_adjusted)}"
    return (
        "inconclusive",
        f"the interval does not clear the margin of {claim.margin:g}, Holm-adjusted p {_p(p_adjusted)}",
    )


def _sentence(claim: Claim, found: Evidence, why: str) -> str:
    seeds = f"{found.estimate.n} {'paired ' if claim.design.paired else ''}seeds"
    tail = "" if found.p is None else f" ({seeds})"
    scale = "" if claim.scale == "full" else " At reduced scale."
    return f"{found.finding}{tail}; {why}.{scale}"


def _p(value: float) -> str:
    return "below 0.0001" if value < 1e-4 else f"{value:.4f}"


def estimates(spec: PaperSpec, records: Sequence[Record]) -> list[EstimateRow]:
    """Return a row for every metric that the paper's file knows, of every ablation on every data set, sorted."""
    groups: dict[tuple[str, str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.state == "done":
            groups[record.key.paper, record.key.ablation, record.key.data, record.key.scale].append(record)
    rows = []
    for (paper, ablation, data, profile), members in sorted(groups.items()):
        members = sorted(members, key=lambda r: r.key.seed)
        for name in sorted({metric for record in members for metric in record.metrics}):
            try:
                unit = spec.metric(name).unit
            except ValueError:
                continue
            having = [record for record in members if name in record.metrics]
            e = t_estimate([record.metrics[name] for record in having])
            ids = " ".join(record.run_id for record in having)
            rows.append(
                EstimateRow(paper, ablation, data, name, unit, e.n, e.mean, e.sd, e.ci_low, e.ci_high, profile, ids)
            )
    return rows
