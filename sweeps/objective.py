"""One trial: parameter values -> cells, one per seed -> a score. It may be cut after any seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cell import Cell
from experiments.errors import UserError
from experiments.records import Record
from experiments.schema import nearest
from experiments.store import CellBusy
from sweeps.parameters import draw_all
from sweeps.samplers import EXCESS, REJECTED, reported
from sweeps.space import Constraint, Space
from sweeps.storage import SURPLUS, WORKER, places, this_process

if TYPE_CHECKING:
    import optuna

Run = Callable[[Cell, Path], Record]
BUSY_S = 1.0  # how often a cell that another process runs is looked at again
CELLS, SCORES, SECONDS, MLFLOW, WHY = "cells", "scores", "seconds", "mlflow_run_id", "why"  # user attributes of a trial


class TrialFailed(RuntimeError):
    """A trial whose training stopped or gave no number: it is lost, the search goes on."""


class Surplus(RuntimeError):
    """A trial beyond the total: two workers asked for the last place at once."""


class Untracked:
    """What a trial writes to where nothing is tracked."""

    run_id: str | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""


@dataclass
class Trials:
    """Runs the trials of one study in this process.

    Args:
        space: of the study.
        runs: the folder of runs.
        total: how many trials the study is to have.
        run: trains a cell, or answers it from disk.
        track: makes the context in which a trial is tracked, given its number, values and earlier run; None for none.
    """

    space: Space
    runs: Path
    total: int
    run: Run
    track: Callable[[optuna.Trial, Mapping[str, Any]], Any] | None = None
    number: int | None = None  # of the trial at hand

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        """Return the trial's score, or one per objective.

        Raises:
            TrialPruned: it was losing, or its net breaks a constraint, in which case nothing was trained.
            TrialFailed, Surplus: see there.
            UserError: what would stop every trial, such as a metric that no run measures.
        """
        self.number = trial.number
        trial.set_user_attr(WORKER, this_process())
        self._claim_place(trial)
        values = draw_all(self.space.parameters, self.space.fixed, trial)
        cells = [self.space.cell(values, seed) for seed in self.space.seeds]
        self._check_constraints(trial, cells[0])
        if self.track is None:
            return self._score(trial, cells, Untracked())
        with self.track(trial, values) as child:
            trial.set_user_attr(MLFLOW, child.run_id)
            return self._score(trial, cells, child)

    def _claim_place(self, trial: optuna.Trial) -> None:
        """Leave where the trials before this one fill the total already."""
        before = [t for t in places(self.space, trial.study.get_trials(deepcopy=False)) if t.number < trial.number]
        again = trial.study.trials[trial.number].system_attrs.get("retry_history")  # it has its place
        if len(before) >= self.total and not again:
            trial.set_user_attr(SURPLUS, True)
            raise Surplus(f"trial {trial.number} is beyond the total of {self.total}")

    def _check_constraints(self, trial: optuna.Trial, cell: Cell) -> None:
        import optuna

        if not self.space.constraints:
            return
        try:
            costs = costs_of(cell)
        except ValueError as error:  # no such net
            trial.set_user_attr(EXCESS, [1.0] * len(self.space.constraints))
            trial.set_user_attr(REJECTED, str(error)[:300])
            raise optuna.TrialPruned(str(error)) from None
        default = default_costs(self.space)
        found = [c.excess(_cost(c, costs), _cost(c, default)) for c in self.space.constraints]
        trial.set_user_attr(EXCESS, found)
        broken = [
            f"{c.metric} {_cost(c, costs):,.0f}"
            for c, over in zip(self.space.constraints, found, strict=True)
            if over > 0
        ]
        if broken:
            trial.set_user_attr(REJECTED, "; ".join(broken))
            raise optuna.TrialPruned(f"not allowed: {'; '.join(broken)}")

    def _score(self, trial: optuna.Trial, cells: list[Cell], child: Any) -> float | tuple[float, ...]:
        import optuna

        trial.set_user_attr(CELLS, [cell.signature for cell in cells])
        scores: list[list[float]] = []
        started = time.monotonic()
        for seed, cell in zip(self.space.seeds, cells, strict=True):
            scores.append(self._scores_of(cell))
            child.log(self._logged(scores), seed)
            trial.set_user_attr(SCORES, scores)
            trial.set_user_attr(SECONDS, round(time.monotonic() - started, 2))
            if not self.space.several:
                trial.report(*reported(self.space, [first for first, *_ in scores]))
                if len(scores) < len(cells) and trial.should_prune():
                    raise optuna.TrialPruned(f"cut after {len(scores)} of {len(cells)} seeds")
        means = tuple(sum(column) / len(column) for column in zip(*scores, strict=True))
        return means if self.space.several else means[0]

    def _logged(self, scores: list[list[float]]) -> dict[str, float]:
        """What the tracker is told after a seed: its own score, and the mean so far, which ends as the trial's."""
        found = {}
        for i, objective in enumerate(self.space.objectives):
            found[objective.metric] = sum(own[i] for own in scores) / len(scores)
            found[f"{objective.metric}.seed"] = scores[-1][i]
        return found

    def _scores_of(self, cell: Cell) -> list[float]:
        record = wait_for(self.run, cell, self.runs)
        found = []
        for objective in self.space.objectives:
            if objective.metric not in record.metrics:
                raise UserError(f"no run measures {objective.metric}{nearest(objective.metric, record.metrics)}")
            value = record.metrics[objective.metric]
            if not math.isfinite(value):
                raise TrialFailed(f"{objective.metric} is {value} with seed {cell.key.seed}")
            found.append(float(value))
        return found


def wait_for(run: Run, cell: Cell, runs: Path) -> Record:
    """Run a cell, or wait for the process that does.

    Raises:
        TrialFailed: whatever stopped its training.
    """
    while True:
        try:
            return run(cell, runs)
        except CellBusy:
            time.sleep(BUSY_S)
        except UserError:
            raise
        except Exception as error:
            raise TrialFailed(f"{type(error).__name__}: {error}") from error


def costs_of(cell: Cell) -> dict[str, float]:
    """Return what a cell's net costs: parameters and scalar operations of one sample, under the names that runs log.

    Raises:
        ValueError: there is no such net.
    """
    from experiments.run import build_net
    from experiments.schema import Data
    from lit_modules.nets.counting import count_ops, count_params

    try:
        net = build_net(cell.config)
    except Exception as error:  # Hydra wraps what a constructor refuses
        raise ValueError(f"no such net: {str(error).splitlines()[-1]}") from error
    ops = count_ops(net, Data(**cell.config["data"]).input_shape)
    return {
        "cost/params": float(count_params(net)),
        "cost/multiplications": float(ops.multiplications),
        "cost/additions": float(ops.additions),
        "cost/comparisons": float(ops.comparisons),
        "cost/flops": float(ops.total),
    }


def default_costs(space: Space) -> dict[str, float]:
    """Return what the net of the ablation as it is costs."""
    return costs_of(space.cell(None, space.seeds[0]))


def _cost(constraint: Constraint, costs: Mapping[str, float]) -> float:
    if constraint.metric not in costs:
        raise UserError(f"constraints: nothing is known of {constraint.metric}{nearest(constraint.metric, costs)}")
    return costs[constraint.metric]
