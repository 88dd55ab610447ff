"""Sweeps in the tracker: one parent for a study, a child for each trial, and what became of it told apart."""

from __future__ import annotations

from typing import Any

import pytest
from tracking_fixtures import PAPER, TITLE, children, client_of, store, template

from experiments import tracking
from experiments.tracking_trials import open_trial, study_run

__all__ = ["store", "template"]  # fixtures
TAGS = {"study": "s.1", "storage": "sqlite:///optuna.db", "study_url": "http://127.0.0.1:8080/dashboard/studies/1"}


@pytest.fixture
def study(store: tracking.Store) -> tuple[str, str]:
    """(experiment, run of the study)."""
    experiment = tracking.experiment_id(store, PAPER, TITLE, "**About**")
    return experiment, study_run(store, experiment, "s.1", "sweep toy", {"sampler": "tpe"}, TAGS)


def _trial(store: tracking.Store, study: tuple[str, str], number: int, **options: Any) -> Any:
    return open_trial(store, *study, f"trial {number}", {"rate": 0.01}, TAGS | {"trial": str(number)}, **options)


class TrialPruned(Exception):
    """Named as Optuna's, which is not imported there."""


def test_a_study_has_one_run_however_often_it_is_asked_for(store: tracking.Store, study: tuple[str, str]) -> None:
    again = study_run(store, study[0], "s.1", "sweep toy", {"sampler": "tpe"}, TAGS)
    other = study_run(store, study[0], "s.2", "sweep toy", {"sampler": "tpe"}, TAGS)
    assert again == study[1] != other
    run = client_of(store).get_run(study[1])
    assert run.data.params["sampler"] == "tpe"
    assert {name: run.data.tags[name] for name in TAGS} == TAGS


def test_what_became_of_a_trial_is_told_apart(store: tracking.Store, study: tuple[str, str]) -> None:
    with _trial(store, study, 0) as child:
        child.log({"val/acc": 90.0}, 1000)
        child.log({"val/acc": 91.0}, 1001)
    with pytest.raises(TrialPruned), _trial(store, study, 1):
        raise TrialPruned("cut")
    with pytest.raises(ValueError, match="NaN"), _trial(store, study, 2):
        raise ValueError("the loss is NaN")
    with pytest.raises(KeyboardInterrupt), _trial(store, study, 3):
        raise KeyboardInterrupt
    found = {run.data.tags["trial"]: run for run in children(store, study)}
    assert {n: run.info.status for n, run in found.items()} == {
        "0": "FINISHED",
        "1": "FINISHED",
        "2": "FAILED",
        "3": "KILLED",
    }
    assert found["1"].data.tags["state"] == "PRUNED"
    assert "state" not in found["0"].data.tags
    assert "NaN" in found["2"].data.tags["error"]
    assert found["0"].data.metrics["val/acc"] == 91.0
    assert found["0"].data.params["rate"] == "0.01"
    assert {run.data.tags["storage"] for run in found.values()} == {TAGS["storage"]}


def test_a_retried_trial_goes_on_under_its_run_with_its_new_number(
    store: tracking.Store, study: tuple[str, str]
) -> None:
    with pytest.raises(ValueError, match="lost"), _trial(store, study, 0) as lost:
        raise ValueError("lost")
    with _trial(store, study, 4, resume_run_id=lost.run_id) as child:
        assert child.run_id == lost.run_id
    run = client_of(store).get_run(lost.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["trial"] == "4"
    assert "error" not in run.data.tags


def test_a_run_of_another_study_is_never_gone_on_with(store: tracking.Store, study: tuple[str, str]) -> None:
    other = study_run(store, study[0], "s.2", "sweep toy", {}, TAGS)
    with open_trial(store, study[0], other, "trial 0", {}, TAGS) as theirs:
        pass
    for foreign in (theirs.run_id, "no such run"):
        with _trial(store, study, 0, resume_run_id=foreign) as child:
            assert child.run_id != foreign
