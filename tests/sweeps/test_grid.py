"""Grids: the full product, what is chosen and what is out, the table, and refusals; on made-up trials, nothing trained."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from experiments.errors import UserError
from experiments.executors import Finished, Job
from experiments.store import write_json
from sweeps import grid as module
from sweeps.grid import SPACES, Grid, Trial, choose, run_grid, table

LR, DECAY = "optim.optimizer.lr", "optim.optimizer.weight_decay"


def _grid(**options: Any) -> Grid:
    return Grid(
        **{
            "paper": "tropical_cnn",
            "data": "mnist",
            "profile": "smoke",
            "ablations": ["net0", "net1"],
            "axes": {"a.x": [1, 2], "a.y": [0.1, 0.2, 0.3]},
            "seeds": [1000, 1001],
            "metric": "val/acc",
            "direction": "higher",
            **options,
        }
    )


def _trials(grid: Grid, score: Any) -> list[Trial]:
    return [Trial(a, c, s, score(a, c, s)) for s in grid.seeds for a in grid.ablations for c in grid.combinations]


def test_the_combinations_are_the_full_product() -> None:
    grid = _grid()
    assert grid.combinations == [(1, 0.1), (1, 0.2), (1, 0.3), (2, 0.1), (2, 0.2), (2, 0.3)]
    assert grid.named((2, 0.3)) == {"a.x": 2, "a.y": 0.3}


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_the_best_mean_is_chosen_for_each_ablation(direction: str) -> None:
    """The two seeds disagree on which is best; their means decide: 8 of (1, 0.2) for net0 and of (2, 0.3) for net1."""
    sign = 1 if direction == "higher" else -1
    means = {("net0", (1, 0.2)): 8.0, ("net1", (2, 0.3)): 8.0}

    def score(ablation: str, combination: tuple, seed: int) -> float:
        mean = means.get((ablation, combination), 7.0)
        wobble = 5.0 if combination == (1, 0.1) else 0.0  # a lucky seed and an unlucky one
        return sign * (mean + (wobble if seed == 1000 else -wobble))

    grid = _grid(direction=direction)
    assert choose(grid, _trials(grid, score)) == {"net0": {"a.x": 1, "a.y": 0.2}, "net1": {"a.x": 2, "a.y": 0.3}}


def test_a_combination_with_a_failed_trial_is_out() -> None:
    grid = _grid(ablations=["net0"])

    def score(_: str, combination: tuple, seed: int) -> float | None:
        if combination == (2, 0.3) and seed == 1001:
            return None
        return {(2, 0.3): 99.0, (1, 0.1): 0.0}.get(combination, -1.0)  # 0.0 is a score, not a failure

    assert choose(grid, _trials(grid, score)) == {"net0": {"a.x": 1, "a.y": 0.1}}


def test_ties_go_to_the_first_of_the_grid_and_the_order_of_trials_does_not_matter() -> None:
    grid = _grid(ablations=["net0"])
    trials = _trials(grid, lambda *_: 1.0)
    assert choose(grid, trials) == choose(grid, trials[::-1]) == {"net0": {"a.x": 1, "a.y": 0.1}}


def test_an_ablation_without_a_whole_combination_cannot_be_chosen_for_but_is_in_the_table() -> None:
    grid = _grid()
    trials = _trials(grid, lambda ablation, *_: None if ablation == "net1" else 1.0)
    with pytest.raises(UserError, match="net1"):
        choose(grid, trials)
    rows = list(csv.DictReader(io.StringIO(table(grid, trials))))
    assert len(rows) == 24
    assert {row["val/acc"] for row in rows if row["ablation"] == "net1"} == {""}
    assert [row["chosen"] for row in rows if row["ablation"] == "net1"] == [""] * 12


def test_the_table_has_a_column_per_axis_and_marks_every_seed_of_the_choice() -> None:
    grid = _grid()
    text = table(grid, _trials(grid, lambda a, c, s: c[0] + c[1]))
    assert text.splitlines()[0] == "paper,data,profile,ablation,a.x,a.y,seed,val/acc,chosen"
    chosen = [row for row in csv.DictReader(io.StringIO(text)) if row["chosen"]]
    assert [(r["ablation"], r["a.x"], r["a.y"], r["seed"], r["val/acc"]) for r in chosen] == [
        (a, "2", "0.3", str(s), "2.3") for s, a in itertools.product((1000, 1001), ("net0", "net1"))
    ]


@pytest.mark.parametrize("metric", ["test/acc", "published/test_acc", "noise/sp_10/acc"])
def test_nothing_is_chosen_on_test_data(metric: str) -> None:
    with pytest.raises(UserError, match="never on test"):
        _grid(metric=metric)
    assert _grid(metric="train/loss", direction="lower").metric == "train/loss"


def test_every_trial_of_a_grid_has_what_is_fixed() -> None:
    grid = _grid(axes={LR: [0.01, 0.02]}, fix={"budget.batch_size": 48}, ablations=["net0"])
    configs = [grid.cell("net0", combination, 1000).config for combination in grid.combinations]
    assert [c["budget"]["batch_size"] for c in configs] == [48, 48]
    assert [c["optim"]["optimizer"]["lr"] for c in configs] == [0.01, 0.02]
    with pytest.raises(UserError, match=r"has no key 'budget\.batch'"):
        _grid(axes={LR: [0.01]}, fix={"budget.batch": 1}).cell("net0", (0.01,), 1000)


def test_a_search_of_plans_is_chosen_by_what_it_met_on_another_problem_than_the_report_has() -> None:
    from experiments.claims import load_paper

    files = [f for f in (SPACES / "auto_map").glob("*.yaml") if "axes" in yaml.safe_load(f.read_text())]
    grids = [Grid.load("auto_map", f.stem) for f in files]
    compared = {(o.ablation, o.data) for claim in load_paper("auto_map").claims for o in claim.operands}
    assert len({len(grid.combinations) for grid in grids}) == 1, "tuned with unequal numbers of trials"
    for grid in grids:
        assert grid.metric == "search/cost"
        assert grid.fix.keys() - {"datamodule.prove"} or not compared & {
            (ablation, grid.data) for ablation in grid.ablations
        }


def test_faulty_grids_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'highest' .nearest valid: 'higher'"):
        _grid(direction="highest")
    with pytest.raises(UserError, match=r"a\.y empty"):
        _grid(axes={"a.x": [1], "a.y": []})
    with pytest.raises(UserError, match=r"axis a\.x: .*not a list"):
        _grid(axes={"a.x": [[1, 2]]})


def test_a_space_in_the_old_form_or_with_a_wrong_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPACES", tmp_path)
    folder = tmp_path / "tropical_cnn"
    folder.mkdir()
    text = (SPACES / "tropical_cnn" / "learning_rate_mnist.yaml").read_text()
    (folder / "wrong.yaml").write_text(text.replace("axes:", "axis:"))
    with pytest.raises(UserError, match=r"wrong\.yaml: unknown key 'axis' .nearest valid: 'axes'"):
        Grid.load("tropical_cnn", "wrong")
    (folder / "short.yaml").write_text(text.replace("direction: higher", ""))
    with pytest.raises(UserError, match=r"short\.yaml: missing direction"):
        Grid.load("tropical_cnn", "short")
    (folder / "tested.yaml").write_text(text.replace("val/acc", "test/acc"))
    with pytest.raises(UserError, match=r"tested\.yaml: .*never on test"):
        Grid.load("tropical_cnn", "tested")
    with pytest.raises(UserError, match=r"'wrang'.*'wrong'"):
        Grid.load("tropical_cnn", "wrang")


def test_a_cell_has_the_settings_of_its_trial_and_a_signature_of_its_own() -> None:
    grid = _grid(axes={LR: [0.01, 0.02], "budget.batch_size": [32, 64]})
    cells = [grid.cell("net1", combination, 1000) for combination in grid.combinations]
    assert [
        (c.config["optim"]["optimizer"]["lr"], c.config["budget"]["batch_size"]) for c in cells
    ] == grid.combinations
    assert len({cell.signature for cell in cells}) == 4


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("optim.optimizer.lrr", r"net1 has no key 'optim\.optimizer\.lrr' \(nearest valid: 'lr'\)"),
        ("optim.optimiser.lr", r"no key 'optim\.optimiser' \(nearest valid: 'optimizer'\)"),
        ("seed.lr", r"no key 'seed\.lr'"),
        ("trainer.devices", r"no key 'trainer'"),  # says where a cell runs: every trial would be the same cell
    ],
)
def test_an_axis_must_be_a_key_of_every_ablation(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        _grid(axes={path: [1]}).cell("net1", (1,), 1000)


def test_an_impossible_value_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match="learning rate must be above 0"):
        _grid(axes={LR: [-1.0]}).cell("net0", (-1.0,), 1000)


GRIDS = [f for f in sorted(SPACES.glob("*/*.yaml")) if "axes" in yaml.safe_load(f.read_text())]


@pytest.mark.parametrize("file", GRIDS, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_every_space_of_the_suite_loads_and_resolves(file: Path) -> None:
    grid = Grid.load(file.parent.name, file.stem)
    for ablation in grid.ablations:
        for combination in grid.combinations:
            cell = grid.cell(ablation, combination, grid.seeds[0])
            for path, value in grid.named(combination).items():
                node: Any = cell.config
                for name in path.split("."):
                    node = node[name]
                assert node == value


class _Pool:
    """Finishes every job at once with made-up scores: 100 less a thousand times the distance of the rate from 0.02."""

    outcome = "done"

    def __init__(self, _: int) -> None:
        self.jobs: list[Job] = []
        self.closed = False

    def submit(self, job: Job) -> str:
        self.jobs.append(job)
        return job.cell.signature

    def poll(self, timeout_s: float) -> Iterator[Finished]:
        while self.jobs:
            job = self.jobs.pop()
            folder, rate = job.runs / job.cell.signature, job.cell.config["optim"]["optimizer"]["lr"]
            write_json(folder / "manifest.json", vars(job.cell.key))
            if rate < 1 and self.outcome == "done":
                write_json(folder / "metrics.json", {"val/acc": 100 - 1000 * abs(rate - 0.02)})
                write_json(folder / "done.json", {"weights_sha256": "0", "seconds": 1.0})
            else:
                write_json(folder / "failed.json", {"error": "diverged"})
            yield Finished(job.cell.signature, self.outcome)  # type: ignore[arg-type]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.data_sets.card_of", lambda name: None)
    monkeypatch.setattr(module, "LocalPool", _Pool)


@pytest.mark.usefixtures("_no_data")
def test_a_grid_is_run_told_written_and_chosen(tmp_path: Path) -> None:
    grid = _grid(axes={LR: [0.01, 0.02, 5.0], "budget.batch_size": [32]})
    console = Console(record=True, width=200)
    chosen = run_grid(grid, tmp_path, tmp_path / "tuning.csv", console, jobs=1)
    assert chosen == {key: {LR: 0.02, "budget.batch_size": 32} for key in ("net0", "net1")}
    told = console.export_text()
    assert f"net1, {LR} = 0.02, budget.batch_size = 32, seed 1001: val/acc 100.0000" in told
    assert f"net0, {LR} = 5, budget.batch_size = 32, seed 1000: failed" in told
    rows = list(csv.DictReader((tmp_path / "tuning.csv").open()))
    assert len(rows) == 12
    assert sum(row["val/acc"] == "" for row in rows) == 4


@pytest.mark.usefixtures("_no_data")
def test_a_misspelt_metric_is_told_as_such(tmp_path: Path) -> None:
    grid = _grid(axes={LR: [0.01]}, metric="val/acx")
    with pytest.raises(UserError, match=r"no run measures val/acx .nearest valid: 'val/acc'"):
        run_grid(grid, tmp_path, tmp_path / "tuning.csv", Console(quiet=True), jobs=1)


@pytest.mark.usefixtures("_no_data")
def test_a_trial_that_another_command_runs_is_not_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Pool, "outcome", "busy")
    with pytest.raises(UserError, match="another command"):
        run_grid(_grid(axes={LR: [0.01]}), tmp_path, tmp_path / "tuning.csv", Console(quiet=True), jobs=1)
    assert not (tmp_path / "tuning.csv").exists()
