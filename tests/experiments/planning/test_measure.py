"""The tool's tables and refusals; the measurement itself is tested under lit_modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from datamodules.planning.topology import Topology, load_topology
from experiments.errors import UserError
from experiments.planning.cli import app
from experiments.planning.measure import WORDS, calibrate_machine, measure_plans, plans_table, summary, terms_table
from lit_modules.execution.launch import RanksFailed
from lit_modules.execution.measure import Report, Timed
from tests.lit_modules.execution.test_calibrate import whole_machine


def _console() -> Console:
    return Console(width=200, record=True, file=open("/dev/null", "w"))


def _report() -> Report:
    times = {"dp": (2.0, 4.0, 3.0), "tp": (1.0, 2.0, 4.0), "mixed": (3.0, 9.0, 1.0)}
    plans = tuple(Timed(w, name, p, (m, m), bare) for w in "ab" for name, (p, m, bare) in times.items())
    return Report(plans, whole_machine(), 1e-15, 0.02, 1.0, (0.5, 2.5))


def test_plans_are_listed_by_prediction_and_compared_with_data_parallelism() -> None:
    console = _console()
    console.print(plans_table(_report()))
    text = console.export_text()
    assert text.index("│ tp ") < text.index("│ dp ")
    assert "2.00 x" in text


def test_each_term_is_listed() -> None:
    console = _console()
    console.print(terms_table(whole_machine()))
    text = console.export_text()
    for word in WORDS.values():
        assert word in text
    assert "20.0 GFLOP/s" in text
    assert "1000.0" in text  # us of a styled module


def test_the_summary_says_tau_both_ways_and_what_the_best_plan_gains() -> None:
    text = summary(_report())
    assert "among plans of one workload: 1.00 (95 % 1.00 to 1.00); by the cost model alone -1.00" in text
    assert "b: predicted best tp, 2000.0 ms measured, 2.00 times as fast as pure data parallelism" in text
    assert "load 0.5 before, 2.5 after" in text


def test_bad_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    taken = tmp_path / "machine.yaml"
    taken.write_text("mine")
    with pytest.raises(UserError, match=r"machine\.yaml exists"):
        calibrate_machine(_console(), 2, taken)
    with pytest.raises(UserError, match="2 or more ranks, got 1"):
        measure_plans(_console(), ["mlp_tiny"], 1)
    with pytest.raises(UserError, match=r"unknown workload 'mlp_46' \(nearest valid: 'mlp_64'\)"):
        measure_plans(_console(), ["mlp_64", "mlp_46"])
    with pytest.raises(UserError, match="2 or more ranks, got 0"):
        calibrate_machine(_console(), 0)
    assert taken.read_text() == "mine"


def test_more_ranks_than_cores_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_modules.execution.launch.launch", _refuse_to_run)
    monkeypatch.setattr("experiments.planning.measure._cores", lambda: 2)
    for ranks, warned in ((3, True), (2, False)):
        console = _console()
        with pytest.raises(UserError, match="could not be calibrated: not here"):
            calibrate_machine(console, ranks)
        assert ("3 ranks share 2 cores" in console.export_text()) is warned


def _refuse_to_run(*_: object, **__: object) -> None:
    raise RanksFailed("not here")


def test_commands_are_registered() -> None:
    runner = CliRunner()
    for command, option in (("calibrate-machine", "--out"), ("measure-plans", "--workload")):
        shown = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert shown.exit_code == 0
        assert option in shown.output
        assert "--ranks" in shown.output
    refused = runner.invoke(app, ["measure-plans", "--ranks", "1"])
    assert isinstance(refused.exception, UserError)


@pytest.mark.slow
def test_a_calibrated_machine_can_be_read_back(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    calibrate_machine(_console(), 2, target)
    made = Topology.from_dict(yaml.safe_load(target.read_text()))
    assert made.name == "mine"
    assert made.devices == 2
    assert made.inside.bytes_per_s > 1e6
    assert load_topology(target) == made
    assert "# styled_s: " in target.read_text()
