"""A grid over one setting, the same for every net, decided on validation: how the tuned recipes were tuned.

    python -m sweeps.grid tropical_cnn learning_rate_mnist

writes every trial to results/tropical_cnn/tuning_learning_rate_mnist.csv and prints the chosen values.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import yaml
from rich.console import Console
from rich.progress import Progress

from experiments.cell import Cell, resolve
from experiments.errors import UserError
from experiments.executors import Job, LocalPool, default_jobs
from experiments.records import CellKey
from experiments.store import read_run, write_atomically

SPACES = Path(__file__).parent / "spaces"


@dataclass(frozen=True)
class Grid:
    """One setting's values, tried for every ablation on the same seeds; `metric` must be a validation metric."""

    paper: str
    data: str
    profile: str
    ablations: list[str]
    path: str
    values: list[float]
    seeds: list[int]
    metric: str
    direction: str

    @classmethod
    def load(cls, paper: str, space: str) -> Grid:
        """Read sweeps/spaces/<paper>/<space>.yaml.

        Raises:
            UserError: no such file, or a metric that is not measured on validation data.
        """
        file = SPACES / paper / f"{space}.yaml"
        if not file.is_file():
            known = ", ".join(f.stem for f in (SPACES / paper).glob("*.yaml")) or "none"
            raise UserError(f"no search space {file.name} for {paper}; there are: {known}")
        grid = cls(**yaml.safe_load(file.read_text()))
        if not grid.metric.startswith("val/"):
            raise UserError(f"{file.name}: selection is on validation only, and {grid.metric} is not a val/ metric")
        return grid

    def cell(self, ablation: str, value: float, seed: int) -> Cell:
        """Return the cell of one trial: the ablation's, with the setting replaced and nothing tracked."""
        cell = resolve(CellKey(self.paper, ablation, self.data, seed, self.profile))
        *parents, leaf = self.path.split(".")
        node = cell.config
        for name in parents:
            node = node[name]
        node[leaf] = value
        return cell


@dataclass(frozen=True)
class Trial:
    """The outcome of one cell of the grid."""

    ablation: str
    value: float
    seed: int
    score: float | None


def run_grid(grid: Grid, runs: Path, table_file: Path, console: Console, jobs: int | None = None) -> dict[str, float]:
    """Run what is missing of the grid, write its trials as CSV, and return the chosen value of each ablation.

    A trial that failed (a diverging rate, say) has no score and cannot be chosen.
    """
    trials = [(a, v, s) for s in grid.seeds for a in grid.ablations for v in grid.values]
    cells = {trial: grid.cell(*trial) for trial in trials}
    pool = LocalPool(jobs or default_jobs())
    waiting = {pool.submit(Job(cell, runs, tracked=False)) for cell in cells.values()}
    with Progress(console=console) as progress:
        bar = progress.add_task("trials", total=len(waiting))
        while waiting:
            finished = pool.poll(timeout_s=1)
            waiting -= {f.handle for f in finished}
            progress.advance(bar, len(finished))
    done = []
    for (ablation, value, seed), cell in cells.items():
        record = read_run(runs / cell.signature)
        done.append(Trial(ablation, value, seed, record.metrics.get(grid.metric)))
    write_atomically(table_file, table(grid, done))
    return choose(grid, done)


def choose(grid: Grid, trials: list[Trial]) -> dict[str, float]:
    """Return the value with the best mean score of each ablation; a value with a failed trial is out."""
    scores: dict[tuple[str, float], list[float | None]] = defaultdict(list)
    for trial in trials:
        scores[trial.ablation, trial.value].append(trial.score)
    best = {}
    for ablation in grid.ablations:
        means = {v: fmean(s) for (a, v), s in scores.items() if a == ablation and s and None not in s}  # type: ignore[type-var]
        if not means:
            raise UserError(f"every trial of {ablation} failed: nothing to choose from")
        best[ablation] = (max if grid.direction == "higher" else min)(means, key=lambda value: means[value])
    return best


def table(grid: Grid, trials: list[Trial]) -> str:
    """Return the trials as CSV: ablation, the setting, seed, score, and whether the value was chosen."""
    chosen = choose(grid, trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["paper", "data", "profile", "ablation", grid.path, "seed", grid.metric, "chosen"])
    for t in trials:
        score = "" if t.score is None else f"{t.score:.4f}"
        mark = "yes" if chosen[t.ablation] == t.value else ""
        writer.writerow([grid.paper, grid.data, grid.profile, t.ablation, t.value, t.seed, score, mark])
    return text.getvalue()


def main(paper: str, space: str) -> None:
    """Run a space of sweeps/spaces/<paper>/ and print what was chosen."""
    from experiments.reproduce import Places

    console, places = Console(), Places.default()
    grid = Grid.load(paper, space)
    chosen = run_grid(grid, places.runs, places.results / paper / f"tuning_{space}.csv", console)
    for ablation, value in chosen.items():
        console.print(f"{ablation}: {grid.path} = {value:g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
