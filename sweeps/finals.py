"""The winner against the default and the other arms, on seeds that no trial used, with a verdict whether it is better at all.

A search takes the best of many noisy scores, so the winner's own score is too good on average. What counts is this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cell import Cell
from experiments.claims import Claim, Design, Operand, load_paper
from experiments.records import Record
from experiments.stats import Estimate, t_estimate
from experiments.store import Index
from experiments.verdict import Verdict, judge
from sweeps.space import DEFAULT, WINNER, Space

if TYPE_CHECKING:
    import optuna

Values = Mapping[str, Any] | None  # of the parameters; None for the ablation as it is


@dataclass(frozen=True)
class Final:
    """One side of the last comparison: what it is, and its runs on the report's seeds."""

    arm: str
    values: Values
    records: tuple[Record, ...]
    note: str = ""
    tuning: float | None = None  # its score in the search, on validation

    def estimate(self, metric: str) -> Estimate | None:
        """Return mean and interval of a metric over the seeds that have it; None where none has."""
        found = [r.metrics[metric] for r in self.records if metric in r.metrics]
        return t_estimate(found) if found else None


def best_of(study: optuna.Study, space: Space) -> optuna.trial.FrozenTrial | None:
    """Return the trial that a study recommends: the best by the first objective among those that ran to their end.

    With several objectives that is the end of the Pareto front at which the first is best.
    """
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return None
    sign = -1 if space.objectives[0].direction == "higher" else 1
    return min(done, key=lambda trial: (sign * trial.values[0], trial.number))


def values_of(trial: optuna.trial.FrozenTrial, space: Space) -> dict[str, Any]:
    """Return the values of all parameters that exist in a trial, fixed ones included, in the order of the file."""
    from sweeps.parameters import draw_all

    return draw_all(space.parameters, space.fixed, _Recorded(trial.params))


@dataclass(frozen=True)
class _Recorded:
    """Draws what a trial drew."""

    params: Mapping[str, Any]

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.params[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return self.params[name]

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return self.params[name]


def contenders(space: Space, studies: Mapping[str, optuna.Study]) -> list[Final]:
    """Return the winner, the default and the other arms, without runs yet; an arm without a finished trial is left out.

    Args:
        studies: of the search under "", and of each tuned arm under its name.
    """
    found = []
    for arm in ("", *(name for name, a in space.arms.items() if a.tuned)):
        own = space.arm(arm) if arm else space
        trial = best_of(studies[arm], own) if arm in studies else None
        if trial is not None:
            note = space.arms[arm].note if arm else "the best of the search"
            found.append(Final(arm or WINNER, values_of(trial, own), (), note, trial.values[0]))
    found.insert(1, Final(DEFAULT, None, (), f"{space.ablation} as it is"))
    found += [Final(n, dict(a.fix), (), a.note) for n, a in space.arms.items() if not a.tuned and n != DEFAULT]
    return found


def cells_of(space: Space, final: Final) -> list[Cell]:
    """Return a contender's cells, one for each of the report's seeds."""
    return [space.cell(final.values, s, space.report.settings, final.arm) for s in space.report.seeds]


def with_records(space: Space, final: Final, runs: Path, index: Index | None = None) -> Final:
    """Return a contender with what lies on disk of its runs."""
    index = index or Index(runs, {})
    records = [index.record(cell.key, cell.signature) for cell in cells_of(space, final)]
    named = [dataclasses.replace(r, key=dataclasses.replace(r.key, ablation=final.arm)) for r in records]
    return dataclasses.replace(final, records=tuple(named))


def verdicts(space: Space, finals: list[Final]) -> list[Verdict]:
    """Return the verdict on "the winner is better" for every other contender: paired by seed, Holm over all of them."""
    metric, claims = space.report.metric, []
    names = [final.arm for final in finals]
    if WINNER not in names:
        return []
    for other in names:
        if other == WINNER:
            continue
        operands = tuple(Operand(metric, space.data, arm) for arm in (WINNER, other))
        claims.append(
            Claim(
                id=f"{space.name}.{other}",
                text=f"What the search chose is better than {'the default' if other == DEFAULT else f'the arm {other}'}.",
                source=f"sweeps/spaces/{space.paper}/{space.name}.yaml",
                kind="comparison",
                operands=operands,
                margin=space.report.margin,
                design=Design(seeds=len(space.report.seeds)),
            )
        )
    paper = load_paper(space.paper)
    spec = dataclasses.replace(paper, claims=tuple(claims), tables=(), figures=(), data_in={})
    return judge(spec, [record for final in finals for record in final.records], space.profile)
