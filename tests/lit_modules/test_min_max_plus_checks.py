"""The checks of paper 4 measure what they say, and see what is wrong."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning import LightningDataModule, Trainer

from datamodules.min_max_plus import FunctionData
from lit_modules import min_max_plus_checks as checks
from lit_modules.nets.mmp import MMPNet


def _tested(kind: type, spec: str = "L8 m9 M10 m7 M1", **options: float) -> dict[str, float]:
    torch.manual_seed(0)
    module = kind(MMPNet(spec, 2, init="normal:1.0"), partial(torch.optim.SGD, lr=0.1), 1, task="regression")
    data: LightningDataModule = FunctionData("waves_2d", 32, 0, train_samples=300, val_samples=10, test_samples=40)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return dict(found)


def test_gradients_agree_with_the_formula_also_at_ties() -> None:
    found = _tested(checks.BackwardCheck)
    assert found["check/gap_first"] < 1e-12
    assert found["check/gap_split"] < 1e-12
    assert found["check/ties"] > 5


@pytest.mark.parametrize("rule", ["first", "split"])
def test_a_wrong_tie_rule_is_seen(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.subgradients
    other = {"first": "split", "split": "first"}
    monkeypatch.setattr(checks, "subgradients", lambda *a: right(*a[:-1], other[a[-1]]))
    assert _tested(checks.BackwardCheck)[f"check/gap_{rule}"] > 1e-3


def test_the_normal_form_promises_what_it_does() -> None:
    found = _tested(checks.NormalFormCheck)
    assert found["check/output_change"] < 1e-5
    assert found["check/tight"] == 100
    assert found["check/moved"] > 0.01
    assert found["check/winners_after"] > found["check/winners_before"]


def test_weights_that_are_not_normalised_are_not_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "normalise_", lambda net, samples: 0.0)
    found = _tested(checks.NormalFormCheck)
    assert found["check/tight"] < 60
    assert found["check/winners_after"] == found["check/winners_before"]
