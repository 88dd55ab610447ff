"""The cell logs every number that its docstring promises, and only those."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

import lit_modules.auto_map_checks as checks
from lit_modules.auto_map_checks import PlansForReal
from lit_modules.execution.measure import Report, Timed
from tests.lit_modules.execution.test_calibrate import whole_machine


def _report(*_: Any) -> Report:
    times = {"dp": 4.0, "tp": 2.0, "mixed": 1.0}
    plans = tuple(Timed(w, name, t, (t, t), t / 2) for w in ("mlp_64", "vgg_8") for name, t in times.items())
    return Report(plans, whole_machine(), 1e-15, 0.1, 3.0, (0.5, 2.0))


def test_logged_names_are_those_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, float] = {}
    module = PlansForReal(nn.Identity(), workloads=["mlp_64", "vgg_8"])
    monkeypatch.setattr(checks, "measure", _report)
    monkeypatch.setattr(module, "log", lambda name, value: logged.__setitem__(name, value))
    module.on_test_epoch_end()
    assert checks.__doc__ is not None
    table = checks.__doc__.partition("explained in that module:\n")[2].partition("\n\nWorkload names")[0]
    heads = [re.split(r" {2,}", line)[0] for line in table.splitlines() if line and not line.startswith(" ")]
    promised = {name for head in heads for name in head.split(", ")}
    found = {name.removeprefix("test/exec_") for name in logged}
    assert {re.sub("_(mlp_64|vgg_8)$", "_<workload>", name) for name in found} == promised
    assert logged["test/exec_gain_vgg_8"] == 4
    assert logged["test/exec_tp_over_dp_mlp_64"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workloads": ["mlp_63"]}, "unknown workload 'mlp_63'"),
        ({"workloads": []}, "a repeat and a workload"),
        ({"workloads": ["mlp_64"], "ranks": 1}, "2 or more ranks"),
        ({"workloads": ["mlp_64"], "repeats": 0}, "a repeat"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlansForReal(nn.Identity(), **arguments)


def test_nothing_is_trained() -> None:
    with pytest.raises(RuntimeError, match="nothing is trained"):
        PlansForReal(nn.Identity(), workloads=["mlp_64"]).configure_optimizers()
