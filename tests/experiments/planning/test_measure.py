"""The tool's tables and refusals; the measurement itself is tested under lit_modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rich.console import Console

from datamodules.planning.topology import Topology
from experiments.errors import UserError
from experiments.planning.measure import calibrate_machine, fits_table, measure_plans, plans_table
from lit_modules.execution.measure import Report, Timed
from tests.lit_modules.execution.test_calibrate import made_up_points


def _console() -> Console:
    return Console(width=200, record=True, file=open("/dev/null", "w"))


def test_plans_are_listed_by_prediction_and_compared_with_data_parallelism() -> None:
    from lit_modules.execution.calibrate import calibration

    plans = (Timed("a", "dp", 2.0, (4.0,)), Timed("a", "tp", 1.0, (2.0,)))
    report = Report(plans, calibration(made_up_points(), 2), 0.0, 0.0, 1.0)
    console = _console()
    console.print(plans_table(report))
    console.print(fits_table(report.machine))
    text = console.export_text()
    assert text.index("│ tp ") < text.index("│ dp ")
    assert "2.00 x" in text
    assert "20.0 GFLOP/s" in text


def test_bad_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    taken = tmp_path / "machine.yaml"
    taken.write_text("mine")
    with pytest.raises(UserError, match=r"machine\.yaml exists"):
        calibrate_machine(_console(), 2, taken)
    with pytest.raises(UserError, match="2 or more ranks, got 1"):
        measure_plans(_console(), ["mlp_tiny"], 1)
    with pytest.raises(UserError, match="unknown workload 'nothing'"):
        measure_plans(_console(), ["nothing"])
    assert taken.read_text() == "mine"


@pytest.mark.slow
def test_a_calibrated_machine_can_be_read_back(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    calibrate_machine(_console(), 2, target)
    made = Topology.from_dict(yaml.safe_load(target.read_text()))
    assert made.name == "mine"
    assert made.devices == 2
    assert made.inside.bytes_per_s > 1e6
