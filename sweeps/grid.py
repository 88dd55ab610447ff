"""A grid over settings, the same for every net, decided on validation or training data: how the tuned recipes were tuned.

    python -m sweeps.grid tropical_cnn learning_rate_mnist

writes every trial to results/tropical_cnn/tuning_learning_rate_mnist.csv and prints the chosen values.
"""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from experiments.cell import Cell, resolve
from experiments.errors import UserError
from experiments.executors import Job, LocalPool, default_jobs
from experiments.records import CellKey
from experiments.schema import hashed_keys, nearest, validate
from experiments.store import read_run, write_atomically

SPACES = Path(__file__).parent / "spaces"
DIRECTIONS = {"higher": max, "lower": min}
PREFIXES = ("val/", "train/", "search/", "gap_at/")
Combination = tuple[Any, ...]  # one value per axis, in the order of Grid.axes


@dataclass(frozen=True)
class Grid:
    """Settings and their values, every combination tried for every ablation on the same seeds.

    `axes` maps a key of the resolved configuration, such as optim.optimizer.lr, to its values; `metric` is measured on
    validation or training data, never on test data. A search of plans (`search/`, `gap_at/`) has no test data: its grid is
    over another problem than the report's, by `data` and `fix`, settings that every trial has.
    """

    paper: str
    data: str
    profile: str
    ablations: list[str]
    axes: dict[str, list[Any]]
    seeds: list[int]
    metric: str
    direction: str
    fix: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.metric.startswith(PREFIXES):
            raise UserError(
                f"selection is by one of {', '.join(PREFIXES)}, never on test data; {self.metric} is none of them"
            )
        if self.direction not in DIRECTIONS:
            raise UserError(f"unknown direction '{self.direction}'{nearest(self.direction, DIRECTIONS)}")
        empty = [name for name in ("ablations", "axes", "seeds") if not getattr(self, name)]
        empty += [path for path, values in self.axes.items() if not values]
        if empty:
            raise UserError(f"nothing to try: {', '.join(empty)} empty")
        for path, values in self.axes.items():
            if any(isinstance(value, list | dict) for value in values):
                raise UserError(f"axis {path}: a value is a number, a word or a truth value, not a list or a mapping")

    @classmethod
    def load(cls, paper: str, space: str) -> Grid:
        """Read sweeps/spaces/<paper>/<space>.yaml.

        Raises:
            UserError: no such file, a key too many or too few, or a metric of test data.
        """
        file = SPACES / paper / f"{space}.yaml"
        if not file.is_file():
            known = [f.stem for f in (SPACES / paper).glob("*.yaml")]
            raise UserError(f"there is no search space '{space}' for {paper}{nearest(space, known)}")
        read, names = yaml.safe_load(file.read_text()), [known.name for known in fields(cls)]
        for name in read:
            if name not in names:
                raise UserError(f"{file.name}: unknown key '{name}'{nearest(name, names)}")
        if missing := [name for name in names if name not in read and name != "fix"]:
            raise UserError(f"{file.name}: missing {', '.join(missing)}")
        try:
            return cls(**read)
        except UserError as error:
            raise UserError(f"{file.name}: {error}") from None

    @property
    def combinations(self) -> list[Combination]:
        """The full product of the axes, the last one running fastest."""
        return list(itertools.product(*self.axes.values()))

    def named(self, combination: Combination) -> dict[str, Any]:
        """Return a combination as {path: value}."""
        return dict(zip(self.axes, combination, strict=True))

    def cell(self, ablation: str, combination: Combination, seed: int) -> Cell:
        """Return the cell of one trial: the ablation's, with the settings replaced.

        Raises:
            UserError: an axis that the ablation's configuration does not have, or that does not change what is computed.
            ConfigError: an impossible value.
        """
        cell = resolve(CellKey(self.paper, ablation, self.data, seed, self.profile))
        for path, value in {**self.fix, **self.named(combination)}.items():
            set_leaf(cell.config, path, value, ablation)
        validate(cell.config, f"{ablation} with {describe(self.named(combination))}")
        return cell


def set_leaf(config: dict[str, Any], path: str, value: Any, origin: str) -> None:
    """Replace a setting of a resolved configuration, in place.

    Raises:
        UserError: there is no such setting, or none that enters a cell's signature; nearest valid key included.
    """
    *parents, leaf = path.split(".")
    node: Any = config
    for depth, name in enumerate([*parents, leaf]):
        known = node if isinstance(node, Mapping) else {}
        if depth == 0:
            known = {key: known[key] for key in hashed_keys() if key in known}
        if name not in known:
            raise UserError(
                f"axis {path}: {origin} has no key '{'.'.join([*parents, leaf][: depth + 1])}'{nearest(name, known)}"
            )
        if depth < len(parents):
            node = node[name]
    node[leaf] = value


def describe(settings: Mapping[str, Any]) -> str:
    """Return "path = value, path = value"."""
    return ", ".join(
        f"{path} = {value:g}" if isinstance(value, float) else f"{path} = {value}" for path, value in settings.items()
    )


@dataclass(frozen=True)
class Trial:
    """The outcome of one cell of the grid; a failed one has no score."""

    ablation: str
    combination: Combination
    seed: int
    score: float | None


def run_grid(
    grid: Grid, runs: Path, table_file: Path, console: Console, jobs: int | None = None
) -> dict[str, dict[str, Any]]:
    """Run what is missing of the grid, write its trials as CSV, and return the chosen settings of each ablation.

    A trial that failed (a diverging rate, say) has no score and cannot be chosen.

    Raises:
        UserError: another command is running some of the trials, or all trials of an ablation failed.
    """
    from experiments.data_sets import card_of

    cells = {
        (a, c, s): grid.cell(a, c, s) for s in grid.seeds for a in grid.ablations for c in grid.combinations
    }  # all of them resolved before anything runs
    card_of(grid.data)
    trials: dict[tuple[str, Combination, int], Trial] = {}
    parents = {cell.parent.signature: cell.parent for cell in cells.values() if cell.parent}
    wanted = {cell.signature: cell for cell in cells.values()}
    pool = LocalPool(jobs or default_jobs())
    try:
        with Progress(console=console) as progress:
            bar = progress.add_task("trials", total=len(wanted))
            for handle in _finished(pool, parents, runs):  # once each, before those that start from their weights
                if read_run(runs / handle).state != "done":
                    raise UserError(f"{parents[handle].key} failed, and with it all trials that start from its weights")
            for handle in _finished(pool, wanted, runs):
                progress.advance(bar)
                for trial in [t for t, cell in cells.items() if cell.signature == handle]:
                    trials[trial] = outcome = Trial(*trial, _score(grid, runs / handle))
                    progress.console.print(escape(_line(grid, outcome)), soft_wrap=True, highlight=False)
    finally:
        pool.close()
    done = [trials[trial] for trial in cells]
    write_atomically(table_file, table(grid, done))
    return choose(grid, done)


def _finished(pool: LocalPool, cells: Mapping[str, Cell], runs: Path) -> Iterator[str]:
    """Run cells and yield the signature of each as it ends."""
    for cell in cells.values():
        pool.submit(Job(cell, runs, tracked=False))
    left = len(cells)
    while left:
        for finished in pool.poll(timeout_s=1):
            if finished.outcome == "busy":
                raise UserError("another command is running some of these trials; try again after it")
            left -= 1
            yield finished.handle


def _score(grid: Grid, folder: Path) -> float | None:
    record = read_run(folder)
    if record.state == "done" and grid.metric not in record.metrics:
        raise UserError(f"no run measures {grid.metric}{nearest(grid.metric, record.metrics)}")
    return record.metrics.get(grid.metric)


def _line(grid: Grid, trial: Trial) -> str:
    outcome = "failed" if trial.score is None else f"{grid.metric} {trial.score:.4f}"
    return f"{trial.ablation}, {describe(grid.named(trial.combination))}, seed {trial.seed}: {outcome}"


def choose(grid: Grid, trials: list[Trial]) -> dict[str, dict[str, Any]]:
    """Return {path: value} of the combination with the best mean score, for each ablation.

    A combination with a failed trial is out; of equal ones the first in the grid is taken.

    Raises:
        UserError: an ablation of which no combination is left.
    """
    best = _best(grid, trials)
    for ablation in grid.ablations:
        if ablation not in best:
            raise UserError(f"every combination has a failed trial of {ablation}: nothing to choose from")
    return {ablation: grid.named(combination) for ablation, combination in best.items()}


def _best(grid: Grid, trials: list[Trial]) -> dict[str, Combination]:
    """The best combination of each ablation that has one without a failed trial."""
    scores: dict[tuple[str, Combination], list[float | None]] = defaultdict(list)
    for trial in trials:
        scores[trial.ablation, trial.combination].append(trial.score)
    best = {}
    for ablation in grid.ablations:
        means: dict[Combination, float] = {}
        for combination in grid.combinations:
            found = scores[ablation, combination]
            whole = [score for score in found if score is not None]
            if whole and len(whole) == len(found):
                means[combination] = fmean(whole)
        if means:
            best[ablation] = DIRECTIONS[grid.direction](means, key=lambda combination: means[combination])
    return best


def table(grid: Grid, trials: list[Trial]) -> str:
    """Return the trials as CSV: ablation, one column per axis, seed, score, and whether the combination was chosen."""
    best = _best(grid, trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["paper", "data", "profile", "ablation", *grid.axes, "seed", grid.metric, "chosen"])
    for t in trials:
        score = "" if t.score is None else f"{t.score:.6g}"
        mark = "yes" if best.get(t.ablation) == t.combination else ""
        writer.writerow([grid.paper, grid.data, grid.profile, t.ablation, *t.combination, t.seed, score, mark])
    return text.getvalue()


def main(paper: str, space: str) -> None:
    """Run a space of sweeps/spaces/<paper>/ and print what was chosen."""
    from experiments.reproduce import Places

    console, places = Console(emoji=False), Places.default()
    grid = Grid.load(paper, space)
    chosen = run_grid(grid, places.runs, places.results / paper / f"tuning_{space}.csv", console)
    for ablation, settings in chosen.items():
        console.print(escape(f"{ablation}: {describe(settings)}"), soft_wrap=True)


if __name__ == "__main__":
    from datamodules.sources import DataUnavailable, UnknownData

    try:
        main(*sys.argv[1:])
    except (UserError, DataUnavailable, UnknownData) as error:
        raise SystemExit(f"sweeps.grid: {error}") from None
