"""The best solution of an IOPDDL instance, with a bound that none is below: integer programming by HiGHS.

A search gives a solution first, message passing a bound, and what costs more than lies between the two is left out of the
programme. Then the linear relaxation, with a constraint for each moment at which it exceeds memory; then branch and bound.

Variables: y[n, s] whole, node n takes strategy s; e[p, a, b] between 0 and 1, the nodes of pair p take strategies of classes a
and b, a class being those whose costs with every strategy of the other node are the same (a tensor that leaves a node
split the same way costs the same moves).

Legend: N nodes, K strategies of a node, M moments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import optimize

from datamodules.planning import iopddl
from datamodules.planning.iopddl_bound import Relaxed, relax
from datamodules.planning.iopddl_factors import Factors, Pair
from datamodules.planning.iopddl_problem import StrategyProblem, cooled, descend
from datamodules.planning.optimum import TIGHT
from datamodules.planning.program import UNIT, Program
from datamodules.planning.searchers import Budget, search

TRIES = 300  # changes a node of the search before, at most
PEAKS = 20  # memory constraints added at once
LOOSE = 1e-6  # what HiGHS's values may be wrong by, as a share


@dataclass(frozen=True)
class StrategyOptimum:
    """A solution that fits, its cost, and a whole number that no solution that fits costs less than.

    Attributes:
        seconds: what finding and proving took.
        certificate: how the bound is known.
    """

    solution: tuple[int, ...]
    cost: int
    bound: int
    seconds: float
    certificate: str
    size: Mapping[str, int] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """(cost - bound) / cost; infinite where the cost is 0 and the bound is not."""
        if self.bound >= self.cost:
            return 0.0
        return (self.cost - self.bound) / abs(self.cost) if self.cost else math.inf

    @property
    def proven(self) -> bool:
        return self.gap <= TIGHT


def strategy_optimum(source: iopddl.Problem, time_limit: float = 60.0, precision: float = TIGHT) -> StrategyOptimum:
    """The best choice of strategies.

    Args:
        time_limit: seconds in all, about; what is best then comes back, with the bound reached.
        precision: how far cost and bound may lie apart, as a share of the cost, for the search to stop.
    Raises:
        IopddlError: no solution fits into memory; by how many bytes.
        ValueError: a time limit or precision that is not above 0.
    """
    if not time_limit > 0 or not precision > 0:
        raise ValueError(f"time limit and precision must be above 0, got {time_limit!r} and {precision!r}")
    clock = _Clock(time_limit)
    problem = StrategyProblem(source)
    tries = max(1, TRIES * problem.horizon)
    options = cooled(problem, tries)
    search(problem, "annealing", Budget(steps=tries, seconds=time_limit / 5), **options)
    while not problem.done:  # time was too short for a single plan: the reference
        problem.step(0)
    descend(problem)
    best = _Best(problem.plan(), int(problem.cost()), problem)
    relaxed = relax(problem.factors, problem.whole_order, best.cost)
    best.bound = relaxed.constant
    if best.closed(precision):
        return best.finished(clock.spent, "message passing reaches the same cost", {})
    model = _Model(problem.factors, relaxed, best.cost)
    why = _linear(model, best, clock, precision) or _branched(model, best, clock, precision)
    return best.finished(clock.spent, why, model.size)


class _Clock:
    def __init__(self, limit: float) -> None:
        self.started, self.limit = time.perf_counter(), limit

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.started

    @property
    def left(self) -> float:
        return max(self.limit - self.spent, 0.0)


@dataclass
class _Best:
    """The best solution and the best bound so far."""

    solution: tuple[int, ...]
    cost: int
    problem: StrategyProblem
    bound: int = -(2**200)

    def closed(self, precision: float) -> bool:
        return self.cost - self.bound <= precision * abs(self.cost)

    def try_near(self, solution: Sequence[int]) -> None:
        """Keep the solution where it is better, made to fit and improved by single changes."""
        problem = self.problem
        problem.reset()
        for action in problem.actions_of(solution):
            allowed = problem.allowed()
            problem.step(action if allowed[action] else int(np.flatnonzero(allowed)[0]))
        descend(problem)
        if problem.cost() < self.cost:
            self.solution, self.cost = problem.plan(), int(problem.cost())

    def finished(self, seconds: float, why: str, size: Mapping[str, int]) -> StrategyOptimum:
        """The result; no bound is above a solution's cost."""
        return StrategyOptimum(self.solution, self.cost, min(self.bound, self.cost), seconds, why, size)


class _Model:
    """The programme, in units of `unit` above the relaxed constant, and which of its variables mean what."""

    def __init__(self, factors: Factors, relaxed: Relaxed, ceiling: int) -> None:
        self.factors, self.constant = factors, relaxed.constant
        self.slack = max(ceiling - relaxed.constant, 0)
        self.unit = max(1.0, self.slack / UNIT)
        self.program, self.limited = Program(), set[int]()
        self.choice: list[dict[int, int]] = [self._node(own) for own in relaxed.own]
        for pair in relaxed.pairs:
            self._pair(pair)
        for wide in relaxed.wides:
            self._wide(wide.nodes, wide.table)
        self.cuts = 0

    @property
    def size(self) -> dict[str, int]:
        program = self.program
        return {"variables": len(program.cost), "whole": sum(program.whole), "constraints": len(program.low)}

    def _node(self, own: np.ndarray) -> dict[int, int]:
        """A variable for each strategy that a solution worth the ceiling may take, one of which it takes."""
        program = self.program
        kept = [s for s in range(len(own)) if own[s] <= self.slack]
        found = {s: program.variable(float(own[s]) / self.unit, whole=True) for s in kept}
        program.constraint([(column, 1.0) for column in found.values()], 1, 1)
        return found

    def _pair(self, pair: Pair) -> None:
        rows, columns = list(self.choice[pair.first]), list(self.choice[pair.second])
        table = pair.table[np.ix_(rows, columns)]
        if not table.any():
            return
        costs, (of_rows, of_columns) = _classes(table)
        program = self.program
        cells = {
            (a, b): program.variable(float(costs[a, b]) / self.unit)
            for a, b in np.ndindex(*costs.shape)
            if costs[a, b] <= self.slack
        }
        for axis, (node, classes, strategies) in enumerate(
            ((pair.first, of_rows, rows), (pair.second, of_columns, columns))
        ):
            for one in range(costs.shape[axis]):
                terms = [(column, 1.0) for cell, column in cells.items() if cell[axis] == one]
                taken = [self.choice[node][s] for s, c in zip(strategies, classes, strict=True) if c == one]
                program.constraint(terms + [(column, -1.0) for column in taken], 0, 0)

    def _wide(self, nodes: Sequence[int], table: np.ndarray) -> None:
        program, kept = self.program, [list(self.choice[node]) for node in nodes]
        if not table.any():
            return
        cells = {
            cell: program.variable(float(table[cell]) / self.unit)
            for place in np.ndindex(*map(len, kept))
            if table[cell := tuple(row[i] for row, i in zip(kept, place, strict=True))] <= self.slack
        }
        for axis, node in enumerate(nodes):
            for strategy, column in self.choice[node].items():
                terms = [(variable, 1.0) for cell, variable in cells.items() if cell[axis] == strategy]
                program.constraint([*terms, (column, -1.0)], 0, 0)

    def solve(self, whole: bool, seconds: float, precision: float) -> optimize.OptimizeResult:
        program = self.program
        share = precision * (self.constant + self.slack) / max(self.slack, 1)
        options = {"time_limit": max(seconds, 0.1)}
        if whole:
            options["mip_rel_gap"] = max(min(share / 2, 1e-4), 1e-12)
        return optimize.milp(
            np.array(program.cost),
            integrality=np.array(program.whole) if whole else None,
            bounds=optimize.Bounds(np.array(program.least), np.array(program.most)),
            constraints=optimize.LinearConstraint(program.matrix(), np.array(program.low), np.array(program.high)),
            options=options,
        )

    def bound_of(self, value: float) -> int:
        """The cost that no solution is below where the programme's least value is this: costs are whole numbers."""
        return self.constant + math.ceil((value - LOOSE * max(1.0, abs(value))) * self.unit)

    def solution(self, values: np.ndarray) -> tuple[int, ...]:
        """Of each node the strategy whose variable is largest."""
        return tuple(max(options, key=lambda s: values[options[s]]) for options in self.choice)

    def excess(self, values: np.ndarray) -> np.ndarray:
        """How far the memory of a fractional solution is above the limit at each moment (M,), as a share of the limit."""
        limit = max(1, self.factors.limit)
        change = np.zeros(self.factors.moments + 1)
        for (first, last), usages, options in zip(self.factors.alive, self.factors.usages, self.choice, strict=True):
            if first < last:
                held = sum(usages.item(s) / limit * values[column] for s, column in options.items())
                change[first] += held
                change[last] -= held
        return np.cumsum(change[:-1]) - self.factors.limit / limit

    def limit_memory(self, moment: int) -> None:
        """What nodes alive at a moment use above their least is at most what the limit leaves."""
        rows = self._alive(moment)
        least = sum(int(self.factors.usages[n].min()) for n in rows)
        room = self.factors.limit - least
        above = [
            (column, self.factors.usages[n].item(s) - int(self.factors.usages[n].min()))
            for n in rows
            for s, column in self.choice[n].items()
        ]
        scale = room or max((more for _, more in above), default=1) or 1
        self.program.constraint([(c, more / scale) for c, more in above if more], -np.inf, 1.0 if room else 0.0)
        self.limited.add(moment)

    def forbid(self, moment: int, solution: Sequence[int]) -> None:
        """Nodes that exceed the limit with these strategies never all take these or larger ones (where tolerances let them)."""
        usages = self.factors.usages
        rows = [n for n in self._alive(moment) if usages[n][solution[n]] > usages[n].min()]
        terms = [
            (column, 1.0)
            for n in rows
            for s, column in self.choice[n].items()
            if usages[n][s] >= usages[n][solution[n]]
        ]
        self.program.constraint(terms, -np.inf, len(rows) - 1)
        self.cuts += 1

    def _alive(self, moment: int) -> list[int]:
        return [n for n, (first, last) in enumerate(self.factors.alive) if first <= moment < last]


def _classes(table: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """A table with equal rows and equal columns as one each, and which one each row and each column is."""
    _, first_row, rows = np.unique(table.astype(np.float64), axis=0, return_index=True, return_inverse=True)
    _, first_column, columns = np.unique(table.astype(np.float64), axis=1, return_index=True, return_inverse=True)
    return table[np.ix_(first_row, first_column)], (rows.ravel(), columns.ravel())


def _peaks(excess: np.ndarray) -> list[int]:
    """The moments at which the limit is exceeded more than beside them, the worst first."""
    before = np.concatenate([[-np.inf], excess[:-1]])
    after = np.concatenate([excess[1:], [-np.inf]])
    found = np.flatnonzero((excess > LOOSE) & (excess > before) & (excess >= after))
    return found[np.argsort(-excess[found], kind="stable")][:PEAKS].tolist()


def _linear(model: _Model, best: _Best, clock: _Clock, precision: float) -> str:
    """Raise the bound by the linear relaxation; how that ended where nothing is left to do, else nothing."""
    while clock.left > 0:
        found = model.solve(False, clock.left, precision)
        if found.x is None or found.status != 0:
            break
        best.bound = max(best.bound, model.bound_of(found.fun))
        peaks = [m for m in _peaks(model.excess(found.x)) if m not in model.limited]
        if not peaks:
            best.try_near(model.solution(found.x))
            break
        for moment in peaks:
            model.limit_memory(moment)
    if best.closed(precision):
        return "the linear relaxation reaches the same cost"
    return "" if clock.left > 0 else f"time is up at the linear relaxation, {_apart(best)}"


def _branched(model: _Model, best: _Best, clock: _Clock, precision: float) -> str:
    """Branch and bound, again with a constraint more while its solution exceeds memory; how that ended."""
    while clock.left > 0 and not best.closed(precision):
        found = model.solve(True, clock.left, precision)
        if found.mip_dual_bound is not None and math.isfinite(found.mip_dual_bound):
            best.bound = max(best.bound, model.bound_of(found.mip_dual_bound))
        if found.x is None:
            break
        solution = model.solution(found.x)
        over = model.factors.held(solution) - model.factors.limit if model.factors.moments else np.zeros(1)
        best.try_near(solution)
        if over.max() <= 0:
            if found.status == 0:
                break  # solved
            continue
        for moment in _peaks(over.astype(float) / max(1, model.factors.limit)) or [int(np.argmax(over))]:
            if moment in model.limited:
                model.forbid(moment, solution)
            else:
                model.limit_memory(moment)
    if best.closed(precision):
        return f"branch and bound, {len(model.limited)} memory constraints"
    return f"time is up at {_apart(best)}"


def _apart(best: _Best) -> str:
    return f"a gap of {(best.cost - best.bound) / max(1, abs(best.cost)):.3%}"
