"""Claims in percent of the loss, and claims that no profile can put to the test."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from factory import claim, operand, paper, record, records

from experiments.records import Record
from experiments.verdict import judge

UP = [3.0, 3.1, 2.9, 3.05, 2.95, 3.0]
LEVEL = [0.02, -0.01, 0.0, 0.01, -0.02, 0.0]
LOSS = (operand("a", "test/loss"), operand("b", "test/loss"))


def _one(found: list[Record], *claims, profile: str = "small"):
    return judge(paper(*(claims or (claim(),))), found, profile)[0]


def _losses(**values: list[float]) -> list[Record]:
    return records(values, metric="test/loss")


def test_a_relative_difference_is_percent_of_the_loss_and_so_is_its_margin() -> None:
    """Two per cent below, in logarithms, whatever the height of the loss of a seed."""
    b = [1.0, 2.0, 4.0, 1.5, 3.0, 2.5]
    gains = [0.019, 0.021, 0.02, 0.0205, 0.0195, 0.02]
    a = [loss * math.exp(-gain) for loss, gain in zip(b, gains, strict=True)]
    relative = claim(operands=LOSS, relative=True)
    verdict = _one(_losses(a=a, b=b), relative)
    assert verdict.verdict == "reproduced"
    assert verdict.estimate == pytest.approx(2.0)
    assert verdict.ci is not None
    assert verdict.ci[0] == pytest.approx(2 - 2.5706 * np.std(gains, ddof=1) * 100 / math.sqrt(6), rel=1e-3)
    assert verdict.unit == "%"
    assert f"+2 %, 95% interval {verdict.ci[0]:+.2f} to {verdict.ci[1]:+.2f}" in verdict.reason
    assert _one(_losses(a=a, b=b), claim(operands=LOSS, relative=True, margin=1.5)).verdict == "reproduced"
    assert _one(_losses(a=a, b=b), claim(operands=LOSS, relative=True, margin=2.5)).verdict == "not reproduced"
    plain = _one(_losses(a=a, b=b), claim(operands=LOSS))
    assert plain.estimate == pytest.approx(sum(y - x for x, y in zip(a, b, strict=True)) / 6)
    assert plain.unit == "nats"
    assert _one(_losses(a=b, b=a), relative).verdict == "not reproduced"
    higher = claim(relative=True)  # of accuracies: a has exp(0.02) times as much
    assert _one(records({"a": b, "b": a}), higher).estimate == pytest.approx(2.0)


@pytest.mark.parametrize("wrong", [0.0, -1.0])
def test_what_is_not_above_zero_has_no_relative_difference(wrong: float) -> None:
    for found in (_losses(a=[*UP[:5], wrong], b=UP), _losses(a=UP, b=[wrong, *UP[1:]])):
        verdict = _one(found, claim(operands=LOSS, relative=True))
        assert verdict.verdict == "not assessable"
        assert "above 0" in verdict.reason
        assert _one(found, claim(operands=LOSS)).verdict != "not assessable"


def test_orderings_and_trends_are_relative_too() -> None:
    wobble = np.array([0.0, 1e-4, -1e-4, 2e-4, -2e-4, 0.0])
    arms = {"c": (3.0, 0), "b": (3.0 * math.exp(0.01), 1), "a": (3.0 * math.exp(0.03), 4)}  # height, and how unsteady
    found = _losses(**{name: (height * np.exp(wobble * times)).tolist() for name, (height, times) in arms.items()})
    c, b, a = (operand(name, "test/loss") for name in "cba")
    trend = _one(found, claim(kind="trend", operands=(a, b, c), relative=True))
    assert (trend.verdict, trend.unit) == ("reproduced", "%")
    assert trend.estimate == pytest.approx(1.5, abs=0.01)  # 3 % over two steps
    best = _one(found, claim(kind="ordering", operands=(c, b, a), relative=True))
    assert best.estimate == pytest.approx(2.0, abs=0.05)  # the weakest is b against a
    each = claim(kind="ordering", pattern="each", operands=(c, b, b, a), relative=True)
    assert _one(found, each).estimate == pytest.approx(2.0, abs=0.05)  # less certain than c against b
    assert _one(found, dataclasses.replace(each, margin=1.5)).verdict == "not reproduced"
    either = _one(found, dataclasses.replace(each, pattern="mixed", margin=0.5))
    assert either.verdict == "not reproduced"  # the second side wins nowhere
    assert either.estimate == pytest.approx(-2.0, abs=0.05)  # where it loses least clearly, that is a against b
    same = claim(kind="ordering", pattern="each", operands=(c, b, b, c), relative=True)
    assert _one(found, dataclasses.replace(same, margin=-1.5)).verdict == "reproduced"  # within 1.5 % either way
    assert _one(found, dataclasses.replace(same, margin=-0.5)).verdict == "not reproduced"


@pytest.mark.parametrize("profile", ["smoke", "small", "paper"])
@pytest.mark.parametrize("found", [[], records({"a": UP}), records({"a": UP, "b": LEVEL})], ids=["none", "some", "all"])
def test_what_is_beyond_every_profile_is_never_assessable_and_says_why(profile: str, found: list[Record]) -> None:
    broken = [record("a", 0, {}, state="failed", error="E"), *found[1:]]
    beyond = claim(beyond="it takes a cluster", reported=4.1)
    for records_ in (found, broken):
        verdict = _one(records_, beyond, profile=profile)
        assert (verdict.verdict, verdict.reason) == ("not assessable", "it takes a cluster")
        assert (verdict.estimate, verdict.p, verdict.n, verdict.reported) == (None, None, 0, 4.1)


def test_what_is_beyond_does_not_count_among_the_tested_claims() -> None:
    found = records({"a": [1.0, 0.2, 0.9, 0.1, 0.8, 0.6], "b": [0.0] * 6})
    crowd = [claim()] + [claim(str(i), beyond="too large") for i in range(20)]
    verdict = judge(paper(*crowd), found, "small")[0]
    assert (verdict.verdict, verdict.p_adjusted) == ("reproduced", verdict.p)
