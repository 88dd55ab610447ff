"""Tables of a search: the winner on fresh seeds, the best trials, how much each parameter matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.claims import load_paper
from experiments.numbers import signed, with_half_width
from experiments.tables import MISSING, TableCell, TableModel
from experiments.verdict import Verdict
from sweeps import figures, finals
from sweeps.figures import Point
from sweeps.finals import Final
from sweeps.objective import CELLS, SCORES
from sweeps.samplers import REJECTED, combinations
from sweeps.space import Space
from sweeps.storage import counted

if TYPE_CHECKING:
    import optuna

TOP = 8  # settings in the table of the best


def points(study: optuna.Study, space: Space) -> list[Point]:
    """Return the trials that have a score, those that were cut with the mean of the seeds they had."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        scores = trial.user_attrs.get(SCORES)
        if trial.state.name not in ("COMPLETE", "PRUNED") or not scores:
            continue
        means = tuple(sum(column) / len(column) for column in zip(*scores, strict=True))
        found.append(Point(trial.number, finals.values_of(trial, space), means, trial.state.name == "PRUNED"))
    return found


def described(space: Space, final: Final) -> str:
    """Return what a contender is: its note and its parameters."""
    if final.values is None:
        return final.note
    values = ", ".join(f"{name} {short(value)}" for name, value in final.values.items())
    return f"{final.note}: {values}" if final.note else values


def short(value: Any) -> str:
    """Return a parameter's value as it is shown."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def final_table(space: Space, contenders: Sequence[Final], verdicts: Sequence[Verdict]) -> TableModel:
    """Return the table of the winner and what it is held against, on fresh seeds."""
    metric = load_paper(space.paper).metric(space.report.metric)
    found = {v.id.rpartition(".")[2]: v for v in verdicts}
    rows = []
    for final in contenders:
        verdict = found.get(final.arm)
        score = MISSING if final.tuning is None else f"{final.tuning:.5g}"
        shown = (final.arm, described(space, final), score, _mean(final, metric.name, metric.unit))
        gap = _gap(verdict, metric.unit) if verdict is not None else MISSING
        rows.append(tuple(TableCell(text) for text in (*shown, gap, MISSING if verdict is None else verdict.verdict)))
    unit = "%" if metric.unit == "points" else metric.unit
    first = f"{space.objectives[0].metric} in the search"
    header = ("setting", "what it is", first, f"{metric.label} ({unit})", "the winner is better by", "verdict")
    arms = [_tuned(space, name) for name, arm in space.arms.items() if arm.tuned]
    notes = [
        f"Mean ± half the 95% Student interval over seeds {', '.join(map(str, space.report.seeds))}, which no trial used; "
        f"trials used {', '.join(map(str, space.seeds))}.",
        'The verdict is on "the winner is better": paired by seed, Holm over all comparisons here. The score in the search is '
        "the best of many, and so too good on average.",
        *arms,
        f"Profile: {space.profile}. Data: {space.data}.",
    ]
    title = f"{space.title}: the winner on fresh seeds"
    return TableModel("final", title, header, tuple(rows), tuple(n for n in notes if n), (0, 1, 5))


def _tuned(space: Space, name: str) -> str:
    own = space.arm(name)
    if own.exhaustive and not space.exhaustive:
        return f"Of {name}, all {combinations(own)} combinations of what it leaves open were tried."
    return f"Of {name}, what it leaves open was searched with as many trials as the whole space."


def _mean(final: Final, metric: str, unit: str) -> str:
    estimate = final.estimate(metric)
    if estimate is None:
        return "not run"
    if estimate.ci_high is None:
        return f"{estimate.mean:.5g} (one seed)"
    return with_half_width(estimate.mean, estimate.ci_high - estimate.mean, unit)


def _gap(verdict: Verdict, unit: str) -> str:
    if verdict.estimate is None or verdict.ci is None:
        return MISSING
    return f"{signed(verdict.estimate, unit)} ({signed(verdict.ci[0], unit)} to {signed(verdict.ci[1], unit)})"


def best_table(space: Space, study: optuna.Study) -> TableModel:
    """Return the best settings, each by the first trial that had it; with several objectives the Pareto front."""
    paper = load_paper(space.paper)
    whole = [p for p in points(study, space) if not p.cut]
    sign = -1 if space.objectives[0].direction == "higher" else 1
    ranked = sorted(whole, key=lambda p: (sign * p.scores[0], p.number))
    first: dict[tuple[tuple[str, Any], ...], Point] = {}
    for point in ranked:
        first.setdefault(tuple(sorted(point.params.items())), point)
    shown = figures.front(space, whole) if space.several else list(first.values())[:TOP]
    names = [name for name in space.parameters if any(name in p.params for p in shown)]
    rows = []
    for point in shown:
        drawn = [short(point.params[name]) if name in point.params else MISSING for name in names]
        pairs = zip(space.objectives, point.scores, strict=True)
        scores = [f"{s:,.0f}" if o.metric.startswith("cost/") else f"{s:.5g}" for o, s in pairs]
        rows.append(tuple(TableCell(text) for text in (str(point.number), *drawn, *scores)))
    title = "the Pareto front" if space.several else f"the best {len(shown)} settings"
    header = ("trial", *names, *(paper.metric(o.metric).label for o in space.objectives))
    notes = (f"Mean over seeds {', '.join(map(str, space.seeds))}, on validation.", counts_line(study))
    return TableModel("best", f"{space.title}: {title}", header, tuple(rows), notes, tuple(range(len(names) + 1)))


def importance_table(space: Space, study: optuna.Study, shares: Mapping[str, Mapping[str, float]]) -> TableModel:
    """Return how much each parameter matters, by each method."""
    names = sorted(space.free, key=lambda n: -max((s.get(n, 0.0) for s in shares.values()), default=0.0))
    done = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    rows = []
    for name in names:
        own = [f"{method[name]:.2f}" if name in method else MISSING for method in shares.values()]
        rows.append(tuple(TableCell(text) for text in (name, *own, str(sum(name in t.params for t in done)))))
    notes = (
        "Shares of 1. fANOVA: of the variance of the score over the space, parameters of every trial only. PED-ANOVA: of what "
        "sets the best trials apart.",
        f"First objective: {space.objectives[0].metric}.",
    )
    header = ("parameter", *shares, "trials that have it")
    return TableModel("importance", f"{space.title}: importance", header, tuple(rows), notes)


def counts(study: optuna.Study) -> dict[str, int]:
    """Return how many trials ended how; `repeated` of them were the same cells as an earlier one."""
    every = study.get_trials(deepcopy=False)
    taken, repeated = counted(every), 0
    seen: set[tuple[str, ...]] = set()
    for trial in taken:
        cells = tuple(trial.user_attrs.get(CELLS, ()))
        repeated += bool(cells) and cells in seen
        seen.add(cells)
    states = {"complete": "COMPLETE", "cut": "PRUNED", "failed": "FAIL"}
    ended = {name: sum(trial.state.name == state for trial in taken) for name, state in states.items()}
    return {**ended, "repeated": repeated, "rejected": sum(REJECTED in trial.user_attrs for trial in every)}


def counts_line(study: optuna.Study) -> str:
    """Return what became of a study's trials, in words."""
    n = counts(study)
    whole = n["complete"] + n["cut"] + n["failed"]
    text = f"{whole} trials: {n['complete']} complete, {n['cut']} cut early, {n['failed']} failed"
    text += f"; {n['repeated']} were cells that an earlier trial had run" if n["repeated"] else ""
    return text + (f"; {n['rejected']} more were not allowed and never trained." if n["rejected"] else ".")
