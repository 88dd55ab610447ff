"""How a verdict came about, in sentences, for people who meet the page first: `fivefold explain` without its runs."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.claims import Claim, PaperSpec
from experiments.verdict import Verdict

TESTS = {"t": "a t test", "sign_flip": "a sign-flip test", "crossed": "t test over seeds and images, crossed"}


def explained(spec: PaperSpec, verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """Return {claim id: sentences}: what is compared, when it holds, the design, and its premises."""
    claims = {claim.id: claim for claim in spec.claims}
    tested = sum(verdict.p is not None for verdict in verdicts)
    return {v.id: _sentences(spec, claims[v.id], v, tested) for v in verdicts if v.id in claims}


def _sentences(spec: PaperSpec, claim: Claim, verdict: Verdict, tested: int) -> list[str]:
    if claim.beyond:
        return [
            "No profile of the suite can put this question; the paper's number stands here so that it is not forgotten."
        ]
    said = [_question(spec, claim), _rule(claim, verdict.unit)]
    if claim.kind != "identity":
        pairing = "paired by seed" if claim.design.paired else "unpaired"
        said.append(
            f"Design: {claim.design.seeds} seeds, {pairing}; {TESTS[claim.design.test]} at {claim.design.alpha:g}, "
            f"two-sided, corrected by Holm over the {tested} tested claims of this paper."
        )
    for metric, tolerance in claim.match.items():
        gap = verdict.premises.get(metric)
        found = "" if gap is None else f"; they differ by {gap:.2%}"
        said.append(f"Premise: the sides agree in {spec.metric(metric).label} to within {tolerance:.0%}{found}.")
    if claim.scale == "reduced":
        said.append("At reduced scale: nets, data or training are smaller than the paper's.")
    return said


def _question(spec: PaperSpec, claim: Claim) -> str:
    """What is set against what."""
    first = claim.operands[0]
    metric = spec.metric(first.metric)
    better = {"higher": ", higher is better", "lower": ", lower is better"}.get(metric.direction, "")
    what = f"{metric.label} ({metric.unit}{better})"
    names = [f"{operand.label} on {operand.data}" for operand in claim.operands]
    if claim.kind == "comparison":
        other = f"the number {claim.against:g}" if claim.against is not None else names[1]
        return f"Compared: {what} of {names[0]}, against {other}."
    if claim.kind == "trend":
        return f"Trend: the slope of {what} along {', '.join(names)}."
    if claim.kind == "value":
        return f"Value: {what} of {names[0]}, against the paper's own number."
    if claim.kind == "identity":
        return f"Exact relation of {what}: {_listed(claim, names)}."
    return f"Order in {what}: {_listed(claim, names)}."


def _listed(claim: Claim, names: Sequence[str]) -> str:
    if claim.kind == "ordering" and claim.pattern == "all":
        return f"{', '.join(names[:-1])}, each against {names[-1]}"
    if claim.against is not None:
        return f"{names[0]} against the number {claim.against:g}"
    pairs = [f"{a} against {b}" for a, b in zip(names[::2], names[1::2], strict=True)]
    return "; ".join(pairs[:6]) + (f"; and {len(pairs) - 6} pairs more" if len(pairs) > 6 else "")


def _rule(claim: Claim, unit: str) -> str:
    """When the claim holds."""
    margin = f"{claim.margin:g} {unit}"
    if claim.kind == "identity":
        return "It holds if it holds in every run; nothing is estimated, so nothing is tested."
    if claim.kind == "value":
        return f"It holds if an equivalence test puts the mean within {margin} of the paper's number."
    if claim.kind == "trend":
        return f"It holds if the slope per step, turned so that better is positive, lies above {margin}."
    where = {
        "each": "in every pair",
        "any": "in at least one pair",
        "mixed": "in some pair, and the second side in another",
    }
    which = f", {where[claim.pattern]}" if claim.kind == "ordering" and claim.pattern in where else ""
    turned = "The difference, in percent of the second side," if claim.relative else "The difference"
    return f"{turned} is turned so that positive is as the claim says; it holds if it lies above {margin}{which}."
