"""What is reported is arithmetic on what was timed, and a real measurement covers every plan."""

from __future__ import annotations

import math
from statistics import geometric_mean

import pytest

from lit_modules.execution.calibrate import Calibration, calibration
from lit_modules.execution.measure import Report, Timed, checks, measure
from lit_modules.execution.plans import executable_plans
from lit_modules.execution.workloads import WORKLOADS
from tests.lit_modules.execution.test_calibrate import made_up_points


def _machine() -> Calibration:
    return calibration(made_up_points(), 2)


def _report(*plans: Timed) -> Report:
    return Report(plans, _machine(), error=1e-15, drift=0.05, seconds=9.0)


def _plan(workload: str, name: str, predicted: float, *measured: float) -> Timed:
    return Timed(workload, name, predicted, measured)


def test_gains_are_of_the_plan_that_was_predicted_to_be_best() -> None:
    report = _report(
        _plan("a", "dp", 4.0, 8.0, 9.0, 100.0),
        _plan("a", "tp", 1.0, 3.0, 3.0, 2.0),
        _plan("a", "mixed", 2.0, 2.0, 2.0, 2.0),
        _plan("b", "dp", 1.0, 1.0, 1.0, 1.0),
        _plan("b", "tp", 5.0, 6.0, 6.0, 6.0),
    )
    found = report.metrics()
    assert found["gain_a"] == pytest.approx(9 / 3)  # the median is not moved by one late repeat
    assert found["gain_b"] == 1
    assert found["gain"] == pytest.approx(geometric_mean([3, 1]))
    assert found["gain_low"] == 1
    assert found["regret"] == pytest.approx(geometric_mean([3 / 2, 1]))
    assert found["tp_over_dp_a"] == pytest.approx(3 / 9)
    assert found["tp_over_dp_b"] == 6
    assert found["pairs"] == 4
    assert found["pairs_right"] == pytest.approx(75)
    assert found["tau_within"] == pytest.approx(0.5)
    assert found["plans"] == 5
    assert found["workloads"] == 2
    assert found["drift"] == pytest.approx(5)


def test_predictions_that_are_measurements_agree_perfectly() -> None:
    plans = [_plan(w, f"p{i}", t, t) for w in "abc" for i, t in enumerate((1.0, 2.0, 4.0, 8.0))]
    found = _report(*plans).metrics()
    for name in ("tau", "spearman", "tau_within", "tau_within_low", "tau_within_high", "factor"):
        assert found[name] == pytest.approx(1), name
    assert found["pairs_right"] == found["pairs_right_low"] == 100


def test_both_predictions_are_held_against_the_same_times() -> None:
    measured, bare = (1.0, 2.0, 4.0, 8.0), (8.0, 4.0, 2.0, 1.0)
    plans = [Timed(w, f"p{i}", m, (m, m), b) for w in "ab" for i, (m, b) in enumerate(zip(measured, bare, strict=True))]
    found = _report(*plans).metrics()
    assert found["tau_within"] == found["tau_within_repeated"] == 1
    assert found["tau_within_bare"] == found["tau_within_bare_low"] == found["tau_within_bare_high"] == -1
    assert found["tau_within_gain"] == found["tau_within_gain_low"] == 2
    assert found["tau_bare"] < 0 < found["tau"]
    assert found["factor_bare"] == pytest.approx(5, abs=3)


def test_repeats_that_disagree_bound_what_a_prediction_can_reach() -> None:
    plans = [_plan("a", f"p{i}", t, t, 1 / t) for i, t in enumerate((1.0, 2.0, 4.0, 8.0))]
    assert _report(*plans).metrics()["tau_within_repeated"] == -1


def test_what_is_not_defined_is_left_out() -> None:
    found = _report(_plan("a", "tp", 1.0, 1.0)).metrics()
    assert not {"tau", "tau_within", "pairs_right", "gain", "gain_a"} & found.keys()
    assert all(math.isfinite(value) for value in found.values())


def test_checks_hold_every_kind_that_is_timed() -> None:
    timed = {kind for workload in WORKLOADS.values() for kind in executable_plans(workload.graph(), 2, "any")}
    assert timed | {"fsdp"} == {case.name for case in checks(2)}


@pytest.mark.slow
def test_a_real_measurement_covers_every_plan() -> None:
    workloads = [WORKLOADS[name] for name in ("mlp_tiny", "vgg_tiny")]
    report = measure(workloads, ranks=2, repeats=3, seed=0, limit_s=500)
    expected = {(w.name, kind) for w in workloads for kind in executable_plans(w.graph(), 2, "any")}
    assert {(plan.workload, plan.plan) for plan in report.plans} == expected
    assert all(len(plan.measured_s) == 3 and min(plan.measured_s) > 0 for plan in report.plans)
    assert report.error < 1e-11
    assert report.machine.topology.devices == 2
    assert {"tau", "gain_mlp_tiny", "fit_all_reduce", "launch_us", "styled_us"} <= report.metrics().keys()
    assert all(plan.predicted_s >= sum(plan.parts.values()) * (1 - 1e-9) for plan in report.plans)
    assert report.machine.intervals.keys() == report.machine.terms.keys()
