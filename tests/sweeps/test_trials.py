"""Trials of one process: the same twice, the same when stopped and gone on with, cut, refused, failed, and never run again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from experiments.cell import Cell
from experiments.errors import UserError
from experiments.records import Record
from experiments.store import CellBusy
from sweeps.objective import CELLS, SCORES, wait_for
from sweeps.samplers import EXCESS, REJECTED
from sweeps.storage import counted, open_storage, open_study
from sweeps.worker import reachable
from tests.sweeps.toys import BEST, NOISE, Train, run_toy, score, space


def _url(folder: Path) -> str:
    return f"sqlite:///{folder / 'optuna.db'}"


def _drawn(study: Any) -> list[tuple[dict[str, Any], list[float]]]:
    return [(t.params, t.values) for t in study.trials]


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_sweep_run_twice_draws_and_finds_the_same(tmp_path: Path, storage: str) -> None:
    urls = [
        _url(tmp_path / str(i)) if storage == "sqlite" else f"journal:{tmp_path / str(i) / 'log.journal'}"
        for i in (1, 2)
    ]
    first, second = (run_toy(space(), tmp_path / f"runs{i}", url, 8) for i, url in enumerate(urls))
    assert _drawn(first) == _drawn(second)
    assert len({str(params) for params, _ in _drawn(first)}) == 8
    for trial in first.trials:
        expected = sum(
            score({"optim": {"optimizer": {"lr": trial.params["rate"]}}, "net": trial.params, "seed": s}) for s in NOISE
        )
        assert trial.value == pytest.approx(expected / 3)


def test_a_sweep_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = run_toy(space(), tmp_path / "a", _url(tmp_path / "a"), 8)
    run_toy(space(), tmp_path / "b", _url(tmp_path / "b"), 3)
    run_toy(space(), tmp_path / "b", _url(tmp_path / "b"), 3)  # nothing is left to do
    parts = run_toy(space(), tmp_path / "b", _url(tmp_path / "b"), 8)
    assert _drawn(whole) == _drawn(parts)


def test_the_search_finds_the_known_best(tmp_path: Path) -> None:
    study = run_toy(space(), tmp_path, _url(tmp_path), 30)
    assert abs(math.log10(study.best_trial.params["rate"] / BEST)) < 0.15
    assert study.best_trial.params["width"] == 8


def test_another_seed_of_the_sampler_draws_otherwise(tmp_path: Path) -> None:
    first = run_toy(space(), tmp_path / "a", _url(tmp_path / "a"), 3)
    second = run_toy(space(sampler={"name": "tpe", "seed": 4}), tmp_path / "b", _url(tmp_path / "b"), 3)
    assert all(a != b for a, b in zip(_drawn(first), _drawn(second), strict=True))


@pytest.mark.parametrize("name", ["grid", "brute_force"])
def test_a_grid_is_gone_through_once_and_then_over(tmp_path: Path, name: str) -> None:
    rates = {"rate": {"path": "optim.optimizer.lr", "choices": [0.01, 0.02, 0.05]}}
    made = space(parameters={**rates, "width": {"path": "net.width", "choices": [4, 8]}}, sampler={"name": name})
    total = reachable(made, 100)
    assert total == 6
    run_toy(made, tmp_path, _url(tmp_path), 4)
    study = run_toy(made, tmp_path, _url(tmp_path), total)
    found = sorted((t.params["rate"], t.params["width"]) for t in study.trials)
    assert found == [(r, w) for r in (0.01, 0.02, 0.05) for w in (4, 8)]


def test_cells_that_have_been_run_are_not_run_again(tmp_path: Path) -> None:
    made = space(
        parameters={"rate": {"path": "optim.optimizer.lr", "choices": [0.01, 0.02]}}, sampler={"name": "random"}
    )
    train = Train()
    study = run_toy(made, tmp_path, _url(tmp_path), 12, train)
    assert len(study.trials) == 12
    assert len(train.trained) == len(set(train.trained)) == 2 * 3
    for trial in study.trials:  # equal parameters, equal cells, equal scores
        same = [t for t in study.trials if t.params == trial.params]
        assert {tuple(t.user_attrs[CELLS]) for t in same} == {tuple(trial.user_attrs[CELLS])}
        assert {t.value for t in same} == {trial.value}


def test_wilcoxon_cuts_what_is_worse_on_two_seeds_and_keeps_the_best_whole(tmp_path: Path) -> None:
    made = space(pruner={"name": "wilcoxon", "p_threshold": 0.26})
    study = run_toy(made, tmp_path, _url(tmp_path), 12)
    states = [t.state.name for t in study.trials]
    assert "PRUNED" in states
    assert study.best_trial.state.name == "COMPLETE"
    for trial in study.trials:
        seeds = [first for (first,) in trial.user_attrs[SCORES]]
        if trial.state.name == "PRUNED":
            assert len(seeds) == 2
            assert trial.number > 0
        else:
            assert len(seeds) == 3
    best_before = study.trials[0].value
    for trial in study.trials[1:]:  # nobody who beat the best so far was cut
        mean = (
            score({"optim": {"optimizer": {"lr": trial.params["rate"]}}, "net": trial.params, "seed": 1000})
            + sum(NOISE.values()) / 3
        )
        if trial.state.name == "PRUNED":
            assert mean < best_before
        else:
            best_before = max(best_before, trial.value)


def test_hyperband_sees_means_with_seeds_as_the_resource(tmp_path: Path) -> None:
    made = space(pruner={"name": "hyperband", "min_resource": 1, "max_resource": 3, "reduction_factor": 3})
    study = run_toy(made, tmp_path, _url(tmp_path), 12)
    for trial in study.trials:
        seeds = [first for (first,) in trial.user_attrs[SCORES]]
        for step, value in trial.intermediate_values.items():
            assert value == pytest.approx(sum(seeds[:step]) / step)


def test_what_breaks_a_constraint_is_never_trained_and_takes_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sweeps.objective.costs_of", lambda cell: {"cost/multiplications": 490.0 * cell.config["net"].get("width", 4)}
    )
    train = Train()
    made = space(constraints=[{"metric": "cost/multiplications", "at_most": 2000}])
    study = run_toy(made, tmp_path, _url(tmp_path), 6, train)
    rejected = [t for t in study.trials if REJECTED in t.user_attrs]
    assert rejected
    assert all(t.params["width"] == 8 and CELLS not in t.user_attrs for t in rejected)
    assert all(t.user_attrs[EXCESS] == [pytest.approx(3920 / 2000 - 1)] for t in rejected)
    taken = counted(study.trials)
    assert len(taken) == 6
    assert {t.params["width"] for t in taken} == {4}
    assert len(train.trained) == 18


def test_constraints_relative_to_the_default_are_multiples_of_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    made = space(constraints=[{"metric": "cost/flops", "at_most": 1.25, "at_least": 0.8, "of": "default"}])
    (c,) = made.constraints
    assert c.excess(125.0, 100.0) <= 0 < c.excess(126.0, 100.0)
    assert c.excess(80.0, 100.0) <= 0 < c.excess(79.0, 100.0)


def test_a_search_that_nothing_is_allowed_in_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.objective.costs_of", lambda cell: {"cost/params": 100.0})
    monkeypatch.setattr("sweeps.worker.REJECTIONS", 5)
    with pytest.raises(UserError, match="the constraints allow 0"):
        run_toy(space(constraints=[{"metric": "cost/params", "at_most": 1}]), tmp_path, _url(tmp_path), 2)


class _Faulty(Train):
    """Trains, but for some rates gives nothing, nothing finite, or stops."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def __call__(self, cell: Cell, runs: Path) -> Record:
        if cell.config["net"]["width"] == 8:
            if self.fault == "stops":
                raise ValueError("the loss is not finite")
            record = super().__call__(cell, runs)
            value = {"val/acc": math.nan} if self.fault == "nan" else {}
            return Record(record.key, record.signature, "done", record.path, value)
        return super().__call__(cell, runs)


@pytest.mark.parametrize("fault", ["stops", "nan"])
def test_a_trial_that_fails_is_lost_and_the_search_goes_on(tmp_path: Path, fault: str) -> None:
    study = run_toy(space(), tmp_path, _url(tmp_path), 8, _Faulty(fault))
    states = {t.number: t.state.name for t in study.trials}
    assert len(states) == 8  # a failed one takes its place: it would fail again
    assert {s for n, s in states.items() if study.trials[n].params["width"] == 8} == {"FAIL"}
    assert {s for n, s in states.items() if study.trials[n].params["width"] == 4} == {"COMPLETE"}


def test_a_metric_that_no_run_measures_stops_the_search_at_once(tmp_path: Path) -> None:
    made = space(objectives=[{"metric": "val/acx", "direction": "higher"}])
    with pytest.raises(UserError, match=r"no run measures val/acx .nearest valid: 'val/acc'"):
        run_toy(made, tmp_path, _url(tmp_path), 8)


def test_two_objectives_are_means_over_seeds(tmp_path: Path) -> None:
    two = [{"metric": "val/acc", "direction": "higher"}, {"metric": "cost/multiplications", "direction": "lower"}]
    study = run_toy(space(objectives=two), tmp_path, _url(tmp_path), 6)
    for trial in study.trials:
        assert trial.values[1] == 490 * trial.params["width"]
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["val/acc", "cost/multiplications"]


def test_an_interrupted_trial_is_queued_again_and_keeps_its_parameters(tmp_path: Path) -> None:
    class Stopped(Train):
        def __call__(self, cell: Cell, runs: Path) -> Record:
            if len(self.trained) == 4:
                raise KeyboardInterrupt
            return super().__call__(cell, runs)

    with pytest.raises(KeyboardInterrupt):
        run_toy(space(), tmp_path, _url(tmp_path), 4, Stopped())
    train = Train()
    study = run_toy(space(), tmp_path, _url(tmp_path), 4, train)
    taken = counted(study.trials)
    assert len(taken) == 4
    assert {t.state.name for t in taken} == {"COMPLETE"}
    lost = [t for t in study.trials if t not in taken]
    assert len(lost) == 1
    assert lost[0].params in [t.params for t in taken]
    assert len(train.trained) == 4 * 3 - 4  # what its seeds had finished is not run again


def test_a_busy_cell_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.objective.BUSY_S", 0.0)
    train, asked = Train(), []

    def busy_twice(cell: Cell, runs: Path) -> Record:
        asked.append(cell)
        if len(asked) < 3:
            raise CellBusy("another process")
        return train(cell, runs)

    cell = space().cell({"rate": 0.02, "width": 4}, 1000)
    assert wait_for(busy_twice, cell, tmp_path).state == "done"
    assert len(asked) == 3


def test_the_study_says_what_was_searched_and_with_which_optuna(tmp_path: Path) -> None:
    import optuna

    made = space()
    study = open_study(made, open_storage(_url(tmp_path)))
    assert study.user_attrs["optuna"] == optuna.__version__
    assert study.user_attrs["definition"] == made.definition
    assert study.user_attrs["code"] == made.cell(None, 1000, {}).signature
