"""Tracking: one experiment per paper, one parent per ablation, one level of children, whatever kills a process."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch
from lightning import LightningModule, Trainer
from tracking_fixtures import (
    AXES,
    PAPER,
    TITLE,
    child,
    children,
    client_of,
    files,
    hang,
    joined,
    make_parent,
    parent,
    start,
    store,
    template,
    wait_for,
)

from experiments import tracking
from experiments.errors import UserError
from experiments.tracking import Store

__all__ = ["parent", "store", "template"]  # fixtures
Parent = tuple[str, str]


def test_nothing_is_written_outside_the_root(store: Store, parent: Parent, tmp_path: Path) -> None:
    with child(store, parent, log_system_metrics=True) as run:
        run.logger.log_metrics({"train/loss": 1.0}, 0)
    (tmp_path / "runs" / "table.md").write_text("| a |")
    tracking.log_artifacts(store, run.run_id, [tmp_path / "runs" / "table.md"], "tables")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "runs"]
    assert files(tmp_path / "cwd") == []
    kept = store.root / "mlartifacts" / PAPER / run.run_id / "artifacts"
    assert files(kept) == [Path("config.yaml"), Path("manifest.json"), Path("tables"), Path("tables/table.md")]


def test_two_runs_in_one_process_leave_nothing_behind(store: Store, parent: Parent) -> None:
    environment, threads = dict(os.environ), set(threading.enumerate())
    handler = signal.getsignal(signal.SIGTERM)
    for seed in range(2):
        with child(store, parent, seed, log_system_metrics=True) as run:
            run.logger.log_metrics({f"only/{seed}": 1.0}, 0)
        assert set(threading.enumerate()) == threads
        assert mlflow.active_run() is None
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGTERM) is handler
    mine = [{n for n in run.data.metrics if n.startswith("only")} for run in children(store, parent)]
    assert sorted(mine, key=str) == [{"only/0"}, {"only/1"}]


def test_only_an_http_address_replaces_the_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    assert Store(tmp_path / "runs").uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracker.example:5000")
    assert Store(tmp_path / "runs").uri == "https://tracker.example:5000"
    assert Store(tmp_path / "runs", server="http://other:1").uri == "http://other:1"
    tracking.prepare(Store(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


# ---- experiments and parents


def test_an_experiment_has_a_kind_a_note_and_one_id_under_any_title(store: Store) -> None:
    first = tracking.experiment_id(store, PAPER, "Old title", "old")
    assert tracking.experiment_id(store, PAPER, "New title", "new") == first
    found = client_of(store).get_experiment(first)
    assert found.name == "New title"
    assert found.tags["mlflow.experimentKind"] == "custom_model_development"
    assert found.tags["mlflow.note.content"] == "new"
    assert found.artifact_location == f"{store.artifacts}/{PAPER}"


def test_an_experiment_in_the_trash_comes_back_and_a_strangers_title_is_refused(store: Store) -> None:
    first = tracking.experiment_id(store, PAPER, TITLE, "")
    client_of(store).delete_experiment(first)
    assert tracking.experiment_id(store, PAPER, TITLE, "") == first
    assert client_of(store).get_experiment(first).lifecycle_stage == "active"
    with pytest.raises(UserError, match="not of min_max_plus"):
        tracking.experiment_id(store, "min_max_plus", TITLE, "")


def test_a_parent_is_found_again_by_its_axes_and_named_by_them(store: Store, parent: Parent) -> None:
    assert make_parent(store) == parent
    other = tracking.parent_run(store, parent[0], **(AXES | {"data": "cifar10"}), params={})
    assert other != parent[1]
    run = client_of(store).get_run(parent[1])
    assert run.info.run_name == "net1 on mnist (small)"
    assert run.data.params == AXES | {"width": "8"}
    assert AXES.items() <= run.data.tags.items()


def test_a_parent_says_mean_interval_and_n_and_leaves_out_what_is_missing(store: Store, parent: Parent) -> None:
    estimates = {"test/acc": (98.5, 98.1, 98.9, 6), "noise/salt_0.05/acc": (90.0, None, math.nan, 1)}
    tracking.summarise_parent(store, parent[1], estimates, "FINISHED")
    run = client_of(store).get_run(parent[1])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {
        "test/acc": 98.5,
        "test/acc.ci_low": 98.1,
        "test/acc.ci_high": 98.9,
        "test/acc.n": 6.0,
        "noise/salt_0.05/acc": 90.0,
        "noise/salt_0.05/acc.n": 1.0,
    }
    assert make_parent(store) == parent
    assert client_of(store).get_run(parent[1]).info.status == "RUNNING"
    tracking.summarise_parent(store, parent[1], {}, "FAILED")
    assert client_of(store).get_run(parent[1]).info.status == "FAILED"


# ---- children


def test_axes_are_params_and_tags_and_nesting_is_one_level(store: Store, parent: Parent) -> None:
    with child(store, parent, seed=4) as run:
        pass
    data = client_of(store).get_run(run.run_id).data
    axes = AXES | {"seed": "4", "signature": "signature4"}
    assert axes.items() <= data.params.items()
    assert axes.items() <= data.tags.items()
    assert data.tags["mlflow.parentRunId"] == parent[1]
    assert "mlflow.parentRunId" not in client_of(store).get_run(parent[1]).data.tags
    for wrong in (run.run_id, ""):
        with pytest.raises(UserError, match="exactly one level"), child(store, (parent[0], wrong)):
            pass


def test_a_long_value_is_cut_in_the_params_only(store: Store, parent: Parent) -> None:
    params = {f"layer.{i}": i for i in range(250)} | {"long": "x" * 9000, "n" * 400: 1, "noise/5%": "", "lr": None}
    config = "long: " + "x" * 9000 + "\n"
    with child(store, parent, params=params, config_yaml=config) as run:
        pass
    logged = client_of(store).get_run(run.run_id).data.params
    assert {logged[f"layer.{i}"] for i in range(250)} == {str(i) for i in range(250)}
    assert logged["long"] == "x" * 499 + "…"
    assert (logged["n" * 250], logged["noise/5_"], logged["lr"]) == ("1", "", "None")
    assert mlflow.artifacts.load_text(f"{store.artifacts}/{PAPER}/{run.run_id}/artifacts/config.yaml") == config
    manifest = mlflow.artifacts.load_dict(f"{store.artifacts}/{PAPER}/{run.run_id}/artifacts/manifest.json")
    assert manifest["mlflow_run_id"] == run.run_id


@pytest.mark.parametrize("interval", ["10", "0.02"])
def test_system_metrics_are_there_even_in_a_run_shorter_than_their_interval(
    store: Store, parent: Parent, monkeypatch: pytest.MonkeyPatch, interval: str
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", interval)
    with child(store, parent, log_system_metrics=True):
        threading.Event().wait(0.3)
    (run,) = children(store, parent)
    used = client_of(store).get_metric_history(run.info.run_id, "system/system_memory_usage_megabytes")
    assert all(0 < point.value <= psutil.virtual_memory().total / 1e6 for point in used)
    assert [point.step for point in used] == list(range(len(used)))
    assert len(used) == 1 if interval == "10" else len(used) > 2
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= run.data.metrics.keys()


class TrialPruned(Exception):
    """Named as optuna's, which only sweeps import."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("batch 0"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(1), "KILLED"),
        (TrialPruned(), "FINISHED"),
    ],
)
def test_a_run_ends_as_what_happened_inside(store: Store, parent: Parent, error: BaseException, status: str) -> None:
    def work() -> None:
        with child(store, parent) as run:
            run.logger.log_metrics({"train/loss": 3.0}, 2)
            run.logger.finalize("failed")
            raise error

    with pytest.raises(type(error)):
        work()
    (found,) = children(store, parent)
    assert found.info.status == status
    assert found.data.metrics == {"train/loss": 3.0}
    assert found.data.tags.get("error") == ("ValueError: batch 0" if status == "FAILED" else None)
    assert found.data.tags.get("state") == ("PRUNED" if status == "FINISHED" else None)
    with child(store, parent, resume_run_id=found.info.run_id) as again:
        pass
    assert again.run_id == found.info.run_id
    assert not {"error", "state"} & client_of(store).get_run(again.run_id).data.tags.keys()


def test_a_pruned_trial_can_be_tagged_by_hand(store: Store, parent: Parent) -> None:
    with child(store, parent) as run:
        tracking.mark_pruned(store, run.run_id, step=7)
    found = client_of(store).get_run(run.run_id)
    assert (found.info.status, found.data.tags["state"], found.data.tags["pruned_at"]) == ("FINISHED", "PRUNED", "7")


@pytest.mark.parametrize("manifest_was_written", [True, False])
def test_a_run_left_by_kill_9_goes_on_under_its_id(
    store: Store, parent: Parent, tmp_path: Path, manifest_was_written: bool
) -> None:
    process = start(hang, store, parent, tmp_path / "told")
    run_id = wait_for(tmp_path / "told")
    process.kill()
    assert joined([process]) == [-signal.SIGKILL]
    assert client_of(store).get_run(run_id).info.status == "RUNNING"
    params = {"optim.lr": 0.03, "optim.name": "adam"}
    with child(store, parent, params=params, resume_run_id=run_id if manifest_was_written else None) as run:
        assert run.run_id == run_id
        assert client_of(store).get_run(run_id).info.status == "RUNNING"
        run.logger.log_metrics({"train/loss": 5.0}, 2)
    found = client_of(store).get_run(run_id)
    assert found.info.status == "FINISHED"
    assert [p.value for p in client_of(store).get_metric_history(run_id, "train/loss")] == [7.0, 5.0]
    assert (found.data.params["optim.lr"], found.data.params["optim.name"]) == ("0.02", "adam")
    assert len(children(store, parent)) == 1


def test_sigterm_kills_a_run_by_name(store: Store, parent: Parent, tmp_path: Path) -> None:
    process = start(hang, store, parent, tmp_path / "told")
    run_id = wait_for(tmp_path / "told")
    process.terminate()
    assert joined([process]) == [1]
    assert client_of(store).get_run(run_id).info.status == "KILLED"


def test_no_other_cells_run_is_resumed(store: Store, parent: Parent) -> None:
    with child(store, parent, seed=1) as other:
        pass
    for resume in (other.run_id, "0" * 32, "../etc"):
        with child(store, parent, seed=2, resume_run_id=resume) as run:
            assert run.run_id not in (other.run_id, resume)
    client_of(store).delete_run(other.run_id)
    with child(store, parent, seed=1, resume_run_id=other.run_id) as run:
        assert run.run_id != other.run_id


def test_off_means_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with child(None, ("", ""), log_every=10) as run:
        assert (run.run_id, run.logger, run.log_every) == (None, None, 10)
    assert files(tmp_path) == []


# ---- Lightning


class Line(LightningModule):
    """One weight, whose hyperparameters print differently in every process."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        self.log("train/loss", loss := (self.weight * batch[0]).square().mean())
        return loss

    def test_step(self, batch: list[torch.Tensor]) -> None:
        self.log("test/loss", (self.weight * batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.01)


def test_fit_does_not_end_the_run_that_test_still_logs_to(store: Store, parent: Parent, tmp_path: Path) -> None:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 1)), batch_size=1)
    for attempt in range(2):
        resume = children(store, parent)[0].info.run_id if attempt else None
        with child(store, parent, resume_run_id=resume, log_every=2) as run:
            trainer = Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=run.logger,
                log_every_n_steps=run.log_every,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path / "runs",
            )
            module = Line(optimizer=object())
            trainer.fit(module, data)
            assert client_of(store).get_run(run.run_id).info.status == "RUNNING"
            trainer.test(module, data, verbose=False)
    found = client_of(store).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert "optimizer" not in found.data.params
    steps = [p.step for p in client_of(store).get_metric_history(run.run_id, "train/loss")]
    assert sorted(set(steps)) == [1, 3, 5, 7]
    assert found.data.metrics["test/loss"] == pytest.approx(module.weight.item() ** 2)
    assert files(tmp_path / "cwd") == []
    assert len(children(store, parent)) == 1
