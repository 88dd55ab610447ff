"""What `fivefold plan-iopddl` does: read an instance of the contest's format, search or prove, and write a solution."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from datamodules.planning import iopddl
from experiments.errors import UserError
from experiments.store import write_atomically

if TYPE_CHECKING:
    from datamodules.planning.iopddl_problem import StrategyProblem

PROGRAMME = "programme"


@dataclass(frozen=True)
class Result:
    """A solution that fits, its cost, a bound that none that fits is below, and how both were found."""

    solution: tuple[int, ...]
    cost: int
    bound: int
    how: str
    why: str


def plan_iopddl(
    file: Path, method: str, seconds: float, seed: int, out: Path | None, force: bool, console: Console
) -> None:
    """Read, find, print, and write the solution where asked."""
    _check(method, out, force)
    source = read(file)
    try:
        found, reference = solve(source, method, seconds, seed)
    except iopddl.IopddlError as error:
        raise UserError(str(error)) from error
    for line in [*instance_lines(source), f"  reference (cheapest fit) {reference:,}", *result_lines(source, found)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        write_atomically(out, json.dumps(list(found.solution)) + "\n")
        console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)


def _check(method: str, out: Path | None, force: bool) -> None:
    from datamodules.planning.searchers import METHODS
    from experiments.schema import nearest

    if method not in {*METHODS, PROGRAMME}:
        raise UserError(f"no method '{method}'{nearest(method, [*METHODS, PROGRAMME])}")
    if out is not None and out.is_dir():
        raise UserError(f"{out} is a folder; name a file with --out")
    if out is not None and out.exists() and not force:
        raise UserError(f"{out} is there already: --force replaces it; or name another file with --out")


def read(file: Path) -> iopddl.Problem:
    """An instance from its file, gzipped or not."""
    try:
        return iopddl.read(file)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {file}") from error
    except (iopddl.IopddlError, OSError) as error:
        raise UserError(str(error)) from error


def solve(source: iopddl.Problem, method: str, seconds: float, seed: int) -> tuple[Result, int]:
    """The best solution of a method, and the reference's cost."""
    from datamodules.planning.iopddl_problem import StrategyProblem

    problem = StrategyProblem(source)
    reference = int(problem.cost())
    if method == PROGRAMME:
        from datamodules.planning.optimum_iopddl import strategy_optimum

        best = strategy_optimum(source, seconds)
        return Result(best.solution, best.cost, best.bound, f"in {best.seconds:.1f} s", best.certificate), reference
    return _searched(problem, method, seconds, seed), reference


def _searched(problem: StrategyProblem, method: str, seconds: float, seed: int) -> Result:
    from datamodules.planning.iopddl_problem import options_for
    from datamodules.planning.searchers import Budget, search

    options = options_for(problem, method, seconds)
    found = search(problem, method, Budget(seconds=seconds), seed, **options)
    if math.isinf(found.cost):
        raise UserError(
            f"{method} finished no plan of {problem.horizon:,} decisions within {seconds:g} s; allow more --seconds or take "
            "--method annealing"
        )
    how = f"after {found.steps:,} decisions and {found.evaluations:,} plans in {found.seconds:.1f} s"
    if found.proven:
        return Result(
            problem.plan(), int(found.cost), int(found.cost), how, "every other plan was looked at or bounded"
        )
    bound = min(problem.relaxed().constant, int(found.cost))
    return Result(problem.plan(), int(found.cost), bound, how, "message passing, memory left aside")


def instance_lines(source: iopddl.Problem) -> list[str]:
    """What an instance is, for people."""
    sizes = source.sizes
    limit = "no limit on memory" if source.usage_limit is None else f"memory limit {source.usage_limit:,}"
    choice = sum(size > 1 for size in sizes)
    return [
        f"{source.name}: {len(sizes):,} nodes ({choice:,} with a choice), {len(source.edges):,} edges, "
        f"{sum(sizes):,} strategies (at most {max(sizes, default=0):,} of a node), {limit}"
    ]


def result_lines(source: iopddl.Problem, found: Result) -> list[str]:
    """What a solution is worth, priced by the contest's rules."""
    value = iopddl.evaluate(source, found.solution)
    if value.cost != found.cost or not value.feasible:
        raise AssertionError(f"{source.name}: {found.cost} was found and {value} is what the evaluator says")
    share = f", {value.peak / source.usage_limit:.1%} of the limit" if source.usage_limit else ""
    memory = f"  memory at most {value.peak:,}, at time {value.peak_time:,}{share}"
    bound = f"  no solution costs less than {found.bound:,} ({found.why})"
    return [f"  cost {value.cost:,} {found.how}", memory, bound, f"  gap {gap_text(found)}"]


def gap_text(found: Result) -> str:
    """How far a cost is above the bound, in percent of the bound."""
    if found.cost == found.bound:
        return "0%: nothing is cheaper"
    return (
        f"at most {100 * (found.cost - found.bound) / found.bound:.2g}%"
        if found.bound > 0
        else "unknown: no bound above 0"
    )
