"""Smoke cells of paper 1, really run: shared parents, equal starts, cuts that leave no trace, and every claim's metric."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import run
from experiments.cell import Cell, resolve
from experiments.claims import load_paper
from experiments.records import CellKey, Record
from experiments.run import build_net, inherit, run_cell, weights_sha256
from lit_modules.expert_watch import STEPS

SPEC = load_paper("moe_upcycling")
RAN = ("e8g1t1_10", "e8g8t8_10", "step0_e8g8t8", "step0_e8g8t8_ts")  # their parent is run because they need it


def _cell(ablation: str, seed: int = 0) -> Cell:
    cell = resolve(CellKey("moe_upcycling", ablation, "python_stdlib", seed, "smoke"))
    cell.config["tracking"] = {**cell.config["tracking"], "enabled": False}
    return cell


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the cells above have run, only they were asked for."""
    folder = tmp_path_factory.mktemp("runs")
    for ablation in RAN:
        run_cell(_cell(ablation), folder)
    return folder


def _record(runs: Path, ablation: str) -> Record:
    return run_cell(_cell(ablation), runs)


def _state(runs: Path, ablation: str, name: str = "best", prefix: str = "net.") -> dict[str, torch.Tensor]:
    state = torch.load(runs / _cell(ablation).signature / f"{name}.ckpt", weights_only=False)["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _started(runs: Path, ablation: str) -> torch.nn.Module:
    cell = _cell(ablation)
    net = build_net(cell.config)
    inherit(net, cell, runs)
    return net


def test_a_parent_is_trained_once_and_shared(runs: Path) -> None:
    manifests = {m["ablation"]: m for m in (json.loads(f.read_text()) for f in runs.glob("*/manifest.json"))}
    assert sorted(manifests) == sorted(["dense", *RAN])
    assert len(list(runs.glob("*/done.json"))) == 5
    dense = _cell("dense").signature
    for ablation in RAN:
        assert manifests[ablation]["parent"] == {"ablation": "dense", "signature": dense}
    assert "parent" not in manifests["dense"]
    files = [f for f in (runs / dense).iterdir() if f.name != ".lock"]
    before = {f: f.stat().st_mtime_ns for f in files}
    (runs / _cell("step0_e8g8t8_ts").signature / "done.json").unlink()
    _record(runs, "step0_e8g8t8_ts")
    assert {f: f.stat().st_mtime_ns for f in files} == before


def test_every_arm_of_a_seed_starts_from_the_same_weights(runs: Path) -> None:
    parent = _state(runs, "dense")
    assert weights_sha256(_started(runs, "dense_10").state_dict()) == weights_sha256(parent)
    kept = [name for name in parent if ".mlp." not in name]
    for ablation in ("e8g1t1_10", "e8g8t8_10", "e8g1t1_10_noise", "e8g1t1_10_drop"):  # the last two draw anew
        net = _started(runs, ablation)
        assert all(torch.equal(net.state_dict()[name], parent[name]) for name in kept)
        again = _started(runs, ablation)
        assert weights_sha256(again.state_dict()) == weights_sha256(net.state_dict())
    granular = _started(runs, "e8g8t8_10").moe_layers()[1]  # 64 experts, expert e a shard of 32 rows, e mod 8, times 4
    for e in (0, 5, 8, 63):
        shard = parent["blocks.1.mlp.up.weight"].unflatten(0, (8, 32))[e % 8]
        torch.testing.assert_close(granular.up[e].detach(), 4 * shard)
    assert not torch.equal(
        parent["embedding.weight"], build_net(_cell("dense").config).state_dict()["embedding.weight"]
    )


def test_an_exact_upcycling_has_its_parents_test_loss_and_a_scaled_one_nearly(runs: Path) -> None:
    dense, exact, near = (_record(runs, name).metrics for name in ("dense", "step0_e8g8t8_ts", "step0_e8g8t8"))
    assert exact["test/loss"] == pytest.approx(dense["test/loss"], rel=1e-6)
    assert exact["check/relative_error"] < 1e-5
    assert exact["test/cloze"] == dense["test/cloze"]
    assert 1e-5 < near["check/relative_error"] < 0.01
    assert near["check/loss_gap"] == pytest.approx(near["test/loss"] - dense["test/loss"], abs=1e-5)
    assert [m["check/params_gap"] for m in (exact, near)] == [0, 0]
    assert exact["train/samples"] == 0
    assert "train/tokens" not in exact


def test_without_its_parent_a_net_cannot_start_and_the_command_to_run_is_named(tmp_path: Path) -> None:
    cell = _cell("e8g1t1_10", seed=5)
    with pytest.raises(FileNotFoundError, match=r"fivefold reproduce moe_upcycling --only dense .*--seed 5") as error:
        inherit(build_net(cell.config), cell, tmp_path)
    assert str(cell.parent.key) in str(error.value)  # type: ignore[union-attr]
    assert inherit(build_net(cell.config), _cell("scratch_10"), tmp_path) is None


def test_a_parent_that_fails_stops_its_child_and_says_which_it_was(tmp_path: Path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise FloatingPointError("the loss became nan")

    monkeypatch.setattr(run, "_execute", broken)
    child = _cell("e8g1t1_10", seed=6)
    with pytest.raises(run.ParentFailed, match="the loss became nan"):
        run_cell(child, tmp_path)
    failed = {file.parent.name for file in tmp_path.glob("*/failed.json")}
    assert failed == {child.signature, child.parent.signature}  # type: ignore[union-attr]


class _Stopped(Exception):
    """What a test raises in the place of a kill."""


@pytest.mark.parametrize("ablation", ["dense", "e8g8t8_10"])
def test_cut_after_an_epoch_a_run_ends_as_an_uninterrupted_one(
    ablation: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, started = _cell(ablation), []
    if cell.parent is not None:
        shutil.copytree(runs / cell.parent.signature, tmp_path / cell.parent.signature)
    seeded = run.EpochRandomness.on_train_epoch_start

    def stop(self, trainer, module) -> None:
        started.append(trainer.current_epoch)
        if started == [0, 1]:
            raise _Stopped
        seeded(self, trainer, module)

    monkeypatch.setattr(run.EpochRandomness, "on_train_epoch_start", stop)
    with pytest.raises(_Stopped):
        run_cell(cell, tmp_path)
    cut = torch.load(tmp_path / cell.signature / "last.ckpt", weights_only=False)
    assert cut["epoch"] == 0
    assert sorted(cut["curve"]) == [50]
    record = run_cell(cell, tmp_path)
    assert started == [0, 1, 1]  # the first epoch is not run again
    whole = _record(runs, ablation)
    assert record.done["weights_sha256"] == whole.done["weights_sha256"]
    same = [{k: v for k, v in r.metrics.items() if k != "train/seconds"} for r in (record, whole)]
    assert same[0] == same[1]
    assert {"val_at/050", "val_at/100", "train/tokens"} <= same[0].keys()
    ends = [torch.load(r.path / "last.ckpt", weights_only=False) for r in (record, whole)]
    assert ends[0]["curve"] == ends[1]["curve"]
    assert ends[0]["tokens"] == ends[1]["tokens"] == 2 * 32 * 128
    watches = [{k: v for k, v in e["callbacks"].items() if k.startswith("ExpertWatch")} for e in ends]
    assert watches[0] == watches[1]
    assert bool(watches[0]) == (ablation != "dense")
    if ablation != "dense":
        loads = [json.loads((r.path / "expert_load.json").read_text()) for r in (record, whole)]
        assert loads[0] == loads[1]
        assert len(loads[0]["epochs"]) == 2
        (watch,) = watches[0].values()
        assert loads[0]["epochs"] == watch["loads"]


@pytest.mark.parametrize("ablation", ["e8g1t1_10", "e8g8t8_10"])
def test_what_is_tested_is_the_last_epochs_net_against_the_one_that_was_inherited(ablation: str, runs: Path) -> None:
    """Also the resumed run's, whose numbers are the same to the bit."""
    record = _record(runs, ablation)
    best, last = _state(runs, ablation), _state(runs, ablation, "last")
    assert weights_sha256(best) == weights_sha256(last)
    start, cosines = _started(runs, ablation).moe_layers(), []
    for at, layer in start.items():
        pairs = zip(layer.up.detach().double().flatten(1), best[f"blocks.{at}.mlp.up"].double().flatten(1), strict=True)
        cosines += [(a @ b / a.norm() / b.norm()).item() for a, b in pairs]
    moved = 1 - sum(cosines) / len(cosines)
    assert moved > 1e-6
    assert 1 - record.metrics["moe/cosine"] == pytest.approx(moved, rel=0.2)  # its rounding is that of float32
    assert record.metrics["val_at/100"] == pytest.approx(record.metrics["val/loss"], rel=1e-6)
    assert record.metrics["train/tokens"] == record.metrics["val/tokens"] == 2 * 32 * 128


def _logged(runs: Path) -> dict[str, set[str]]:
    """What a dense net, a trained mixture and a check log."""
    kinds = {"dense": "dense", "trained": "e8g8t8_10", "check": "step0_e8g8t8"}
    return {kind: set(_record(runs, ablation).metrics) for kind, ablation in kinds.items()}


def _kind(ablation: str) -> str:
    return "check" if ablation.startswith("step0") else "dense" if ablation.startswith("dense") else "trained"


def _reached(metric: str, ablation: str, data: str, profile: str) -> bool | None:
    """Whether a point of a curve comes up in training under a profile; None for other metrics."""
    head, _, tail = metric.partition("/")
    if head not in ("val_at", "purity", "coverage"):
        return None
    budget = resolve(CellKey(SPEC.key, ablation, data, 0, profile)).config["budget"]
    if head == "val_at":
        epochs = budget["max_epochs"]
        return tail in {f"{round(100 * (e + 1) / epochs):03d}" for e in range(epochs)}
    return int(tail) in STEPS and int(tail) < budget["max_epochs"] * -(-budget["train_samples"] // budget["batch_size"])


def test_every_metric_that_a_claim_reads_is_logged_by_its_cells(runs: Path) -> None:
    logged = _logged(runs)
    for claim in SPEC.claims:
        for operand in claim.operands:
            for ablation in operand.ablations:
                for metric in (operand.metric, *claim.match):
                    curve = _reached(metric, ablation, operand.data, "small")
                    assert curve if curve is not None else metric in logged[_kind(ablation)], (claim.id, metric)


def test_every_point_of_a_curve_that_a_claim_reads_comes_up_in_training() -> None:
    for profile in ("small", "paper"):
        for claim in SPEC.in_profile(profile).claims_of(profile):
            for operand in claim.operands:
                reached = _reached(operand.metric, operand.ablation or "", operand.data, profile)
                assert reached in (None, True), (claim.id, profile)
    assert _reached("val_at/025", "e8g1t1_50", "python_stdlib", "small") is False
    assert _reached("purity/00500", "e8g8t8_10", "python_stdlib", "small") is False


def test_every_column_and_figure_shows_what_its_rows_log(runs: Path) -> None:
    logged = _logged(runs)
    for table in SPEC.tables:
        for column in table.columns:
            having = [row for row in table.rows if column.metric in logged[_kind(row)]]
            assert having == list(table.rows) or column.metric == "train/tokens", (table.id, column.metric)
    for figure in SPEC.figures:
        needed = {"forest": figure.metric, "survival": "purity/00000", "advantage": "val_at/100"}.get(figure.kind)
        for row in figure.rows:
            assert needed is None or needed in logged[_kind(row)], (figure.id, row)
            if figure.kind == "load":
                assert _kind(row) == "trained"
    for ablation in ("e8g1t1_10", "e8g8t8_10"):
        kept = json.loads((runs / _cell(ablation).signature / "expert_load.json").read_text())
        assert [len(layer) for layer in kept["epochs"][-1]] == [8 if ablation == "e8g1t1_10" else 64] * 3


def test_every_metric_that_is_logged_has_a_name_for_people(runs: Path) -> None:
    for metrics in _logged(runs).values():
        for name in metrics:
            if not name.startswith(("moe/layer", "cost/")):
                assert SPEC.metric(name).label


def test_the_same_cell_elsewhere_ends_with_the_same_weights(runs: Path, tmp_path: Path) -> None:
    cell = _cell("e8g1t1_10")
    shutil.copytree(runs / cell.parent.signature, tmp_path / cell.parent.signature)  # type: ignore[union-attr]
    assert run_cell(cell, tmp_path).done["weights_sha256"] == _record(runs, "e8g1t1_10").done["weights_sha256"]
    other = replace(cell.key, seed=1)
    assert resolve(other).parent.signature != cell.parent.signature  # type: ignore[union-attr]
