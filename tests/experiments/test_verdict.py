"""Every branch of the verdict, and its honesty by simulation: false "reproduced" at or below alpha."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from factory import claim, operand, paper, record, records

from experiments.claims import Design, Operand
from experiments.records import Record
from experiments.stats import t_estimate
from experiments.verdict import RUN_STATES, VERDICTS, estimates, judge

UP = [3.0, 3.1, 2.9, 3.05, 2.95, 3.0]
LEVEL = [0.02, -0.01, 0.0, 0.01, -0.02, 0.0]


def _one(found: list[Record], *claims, profile: str = "small"):
    return judge(paper(*(claims or (claim(),))), found, profile)[0]


def test_a_clear_gain_is_reproduced_with_its_numbers_and_runs() -> None:
    verdict = _one(records({"a": UP, "b": LEVEL}))
    assert verdict.verdict == "reproduced"
    assert verdict.estimate == pytest.approx(3.0)
    assert verdict.ci is not None
    assert verdict.ci[0] > 0
    assert verdict.n == 6
    assert len(verdict.runs) == 12
    assert "+3.00 points" in verdict.reason


def test_a_clear_loss_is_not_reproduced_and_noise_is_inconclusive() -> None:
    assert _one(records({"a": LEVEL, "b": UP})).verdict == "not reproduced"
    noisy = [3.0, -2.0, 4.0, -3.0, 2.0, -1.0]
    assert _one(records({"a": noisy, "b": LEVEL})).verdict == "inconclusive"


def test_a_gain_below_the_margin_is_not_reproduced() -> None:
    assert _one(records({"a": UP, "b": LEVEL}), claim(margin=3.5)).verdict == "not reproduced"
    assert _one(records({"a": LEVEL, "b": UP}), claim(margin=-4.0)).verdict == "reproduced"


def test_lower_is_better_is_turned_round() -> None:
    spec = claim(operands=(operand("a", "test/loss"), operand("b", "test/loss")))
    verdict = _one(records({"a": LEVEL, "b": UP}, metric="test/loss"), spec)
    assert verdict.verdict == "reproduced"
    assert verdict.estimate == pytest.approx(3.0)


def test_equal_values_do_not_beat_each_other() -> None:
    assert _one(records({"a": [5.0] * 6, "b": [5.0] * 6})).verdict == "not reproduced"


@pytest.mark.parametrize("state", RUN_STATES)
def test_unfinished_runs_give_a_run_state_and_never_a_verdict(state: str) -> None:
    found = records({"a": UP, "b": LEVEL})
    found[0] = record("a", 0, {}, state=state, error="ValueError: x" if state == "failed" else None)
    verdict = _one(found)
    assert verdict.verdict == state
    assert verdict.estimate is None
    assert state != "failed" or "ValueError: x" in verdict.reason


def test_a_cell_that_was_never_planned_is_not_run() -> None:
    assert _one(records({"a": UP})).verdict == "not run"


def test_smoke_decides_nothing() -> None:
    for values in ({"a": UP, "b": LEVEL}, {"a": LEVEL, "b": UP}):
        assert _one(records(values, profile="smoke"), profile="smoke").verdict == "not assessable"


def test_fewer_seeds_than_the_design_asks_for_cannot_reproduce() -> None:
    verdict = _one(records({"a": UP[:5], "b": LEVEL[:5]}))
    assert verdict.verdict == "inconclusive"
    assert "5 of the 6 seeds" in verdict.reason


def test_a_design_that_cannot_reach_alpha_is_refused() -> None:
    three = claim(design=Design(seeds=3, test="sign_flip"))
    verdict = _one(records({"a": UP[:3], "b": LEVEL[:3]}), three)
    assert verdict.verdict == "inconclusive"
    assert "cannot reach alpha" in verdict.reason
    six = [claim(str(i), design=Design(seeds=6, test="sign_flip")) for i in range(2)]
    found = records({"a": UP, "b": LEVEL})
    assert [v.verdict for v in judge(paper(six[0]), found, "small")] == ["reproduced"]  # 1/64 is below 0.025
    assert {v.verdict for v in judge(paper(*six), found, "small")} == {"inconclusive"}  # two claims: 2/64 is not


def test_holm_counts_all_tested_claims_of_the_paper() -> None:
    found = records({"a": [1.0, 0.2, 0.9, 0.1, 0.8, 0.6], "b": [0.0] * 6})
    alone = judge(paper(claim()), found, "small")[0]
    crowd = judge(paper(*(claim(str(i)) for i in range(20))), found, "small")
    assert alone.verdict == "reproduced"
    assert crowd[0].p == alone.p
    assert crowd[0].p_adjusted == pytest.approx(20 * alone.p)
    assert crowd[0].verdict == "inconclusive"


def test_a_broken_premise_is_not_assessable_and_says_by_how_much() -> None:
    found = [
        record(name, seed, {"test/acc": v, "cost/params": params})
        for name, row, params in (("a", UP, 200.0), ("b", LEVEL, 100.0))
        for seed, v in enumerate(row)
    ]
    verdict = _one(found, claim(match={"cost/params": 0.05}))
    assert verdict.verdict == "not assessable"
    assert "50.0%" in verdict.reason
    assert _one(found, claim(match={"cost/params": 0.6})).verdict == "reproduced"


def test_a_missing_metric_is_not_assessable() -> None:
    found = [*records({"a": UP}), *records({"b": LEVEL}, metric="val/acc")]
    verdict = _one(found)
    assert verdict.verdict == "not assessable"
    assert "test/acc was not measured for b" in verdict.reason


def test_identity_is_exact_and_refuses_what_varies() -> None:
    spec = claim(kind="identity", operands=(operand("a", "cost/multiplications"), operand("b", "cost/multiplications")))
    fewer = records({"a": [10.0] * 2, "b": [40.0] * 2}, metric="cost/multiplications")
    assert _one(fewer, spec).verdict == "reproduced"
    assert _one(fewer, spec).estimate == 0.25
    more = records({"a": [40.0] * 2, "b": [10.0] * 2}, metric="cost/multiplications")
    assert _one(more, spec).verdict == "not reproduced"
    varying = records({"a": [10.0, 11.0], "b": [40.0] * 2}, metric="cost/multiplications")
    assert _one(varying, spec).verdict == "not assessable"


def test_ordering_all_is_as_strong_as_its_weakest_pair() -> None:
    spec = claim(kind="ordering", operands=(operand("a"), operand("c"), operand("b")))
    good = records({"a": UP, "c": [v + 1 for v in UP], "b": LEVEL})
    assert _one(good, spec).verdict == "reproduced"
    assert _one(good, spec).estimate == pytest.approx(3.0)
    one_bad = records({"a": UP, "c": [v - 1 for v in LEVEL], "b": LEVEL})
    verdict = _one(one_bad, spec)
    assert verdict.verdict == "not reproduced"
    assert "not better: c" in verdict.reason


def _mixed(n: int):
    names = [f"noise/k_{i}/acc" for i in range(n)]
    operands = tuple(Operand(m, "mnist", name) for m in names for name in ("a", "b"))
    return names, claim(kind="ordering", pattern="mixed", operands=operands, margin=1.0)


def test_mixed_ordering_needs_a_win_on_each_side() -> None:
    names, spec = _mixed(4)

    def found(effects: list[float]) -> list[Record]:
        rng = np.random.default_rng(0)
        return [
            record(
                side,
                seed,
                {m: (e if side == "a" else 0.0) + rng.normal(0, 0.1) for m, e in zip(names, effects, strict=True)},
            )
            for side in ("a", "b")
            for seed in range(6)
        ]

    both = _one(found([4.0, 0.0, 0.0, -4.0]), spec)
    assert both.verdict == "reproduced"
    assert "a clearly wins 1 and b 1" in both.reason
    assert _one(found([4.0, 3.0, 2.0, 3.0]), spec).verdict == "not reproduced"


def _pairs(pattern: str, n: int):
    names = [(f"a{i}", f"b{i}") for i in range(n)]
    return names, claim(kind="ordering", pattern=pattern, operands=tuple(operand(x) for pair in names for x in pair))


def _effects(effects: list[float], rng: np.random.Generator, sd: float = 0.1) -> list[Record]:
    values = {f"a{i}": [e + rng.normal(0, sd) for _ in range(6)] for i, e in enumerate(effects)}
    values |= {f"b{i}": [rng.normal(0, sd) for _ in range(6)] for i in range(len(effects))}
    return records(values)


def test_each_needs_every_pair_and_any_needs_one() -> None:
    rng = np.random.default_rng(7)
    every, some, none = _effects([3.0] * 3, rng), _effects([3.0, 0.0, -3.0], rng), _effects([-3.0] * 3, rng)
    (_, each), (_, any_) = _pairs("each", 3), _pairs("any", 3)
    assert [_one(found, each).verdict for found in (every, some, none)] == [
        "reproduced",
        "not reproduced",
        "not reproduced",
    ]
    assert [_one(found, any_).verdict for found in (every, some, none)] == [
        "reproduced",
        "reproduced",
        "not reproduced",
    ]
    assert "a0 against b0" in _one(some, any_).reason
    assert "clearly ahead in 1 and clearly not in 1" in _one(some, any_).reason


def test_premises_of_pairs_are_checked_within_each_pair() -> None:
    names, spec = _pairs("each", 2)
    spec = dataclasses.replace(spec, match={"cost/params": 0.05})
    sizes = dict(zip([x for pair in names for x in pair], (100.0, 101.0, 900.0, 905.0), strict=True))

    def sized(sizes: dict[str, float]) -> list[Record]:
        return [
            record(name, seed, {"test/acc": (name[0] == "a") + 0.01 * seed, "cost/params": size})
            for name, size in sizes.items()
            for seed in range(6)
        ]

    assert _one(sized(sizes), spec).verdict != "not assessable"
    assert _one(sized(sizes | {"b1": 700.0}), spec).verdict == "not assessable"


def test_false_any_stays_below_alpha() -> None:
    """No pair has an effect: the chance that the best of eight is called one stays below alpha."""
    rng = np.random.default_rng(8)
    _, spec = _pairs("any", 8)
    wrong = sum(_one(_effects([0.0] * 8, rng, sd=1.0), spec).verdict == "reproduced" for _ in range(600))
    assert wrong / 600 <= 0.025 + 4 * math.sqrt(0.025 * 0.975 / 600)


def test_a_comparison_with_a_number_turns_by_the_metrics_direction() -> None:
    low = claim(operands=(operand("a", "test/loss"),), against=0.5)
    assert _one(records({"a": [0.1, 0.2, 0.15, 0.12, 0.18, 0.11]}, "test/loss"), low).verdict == "reproduced"
    assert _one(records({"a": [0.6, 0.7, 0.65, 0.62, 0.68, 0.61]}, "test/loss"), low).verdict == "not reproduced"
    high = claim(operands=(operand("a"),), against=90.0)
    assert _one(records({"a": [89.0, 91.0, 88.0, 92.0, 90.5, 89.5]}), high).verdict == "inconclusive"


def test_an_exact_statement_is_checked_in_every_run_and_not_tested() -> None:
    pairs = (operand("a", "test/loss"), operand("b", "test/loss"), operand("c", "test/loss"), operand("d", "test/loss"))
    spec = claim(kind="identity", pattern="each", operands=pairs)
    values = {"a": [1.0, 9.0, 2.0], "b": [1.5, 9.0, 80.0], "c": [0.1] * 3, "d": [0.2] * 3}
    held = _one(records(values, "test/loss"), spec)
    assert (held.verdict, held.p, held.estimate) == ("reproduced", None, 0.0)
    assert "in every one of 6 runs" in held.reason
    broken = _one(records(values | {"c": [0.1, 0.25, 0.1]}, "test/loss"), spec)
    assert broken.verdict == "not reproduced"
    assert "not in 1" in broken.reason
    against = claim(kind="identity", operands=(operand("a"),), against=90.0)
    assert _one(records({"a": [90.0, 99.0]}), against).verdict == "reproduced"
    assert _one(records({"a": [89.9, 99.0]}), against).verdict == "not reproduced"


def test_trend_and_value() -> None:
    rising = claim(kind="trend", operands=(operand("a"), operand("b"), operand("c")))
    up = records({"a": LEVEL, "b": [v + 1 for v in LEVEL], "c": [v + 2 for v in LEVEL]})
    assert _one(up, rising).verdict == "reproduced"
    assert _one(up, claim(kind="trend", operands=rising.operands[::-1])).verdict == "not reproduced"
    single = {"kind": "value", "operands": (operand("a"),)}
    found = records({"a": UP})
    assert _one(found, claim(**single)).verdict == "not assessable"
    assert _one(found, claim(**single, reported=3.02, margin=0.5)).verdict == "reproduced"
    assert _one(found, claim(**single, reported=9.0, margin=0.5)).verdict == "not reproduced"
    assert _one(found, claim(**single, reported=3.02)).verdict == "inconclusive"
    assert _one(found, claim(**single, reported=9.0)).verdict == "not reproduced"


def test_best_of_is_chosen_on_validation() -> None:
    side = Operand("test/acc", "mnist", None, ("a", "c"), "val/acc")
    found = [record("a", s, {"test/acc": 9.0 + 0.01 * s, "val/acc": 1.0}) for s in range(6)]
    found += [record("c", s, {"test/acc": 5.0 + 0.01 * s, "val/acc": 2.0}) for s in range(6)]
    found += records({"b": LEVEL})
    verdict = _one(found, claim(operands=(side, operand("b"))))
    assert "the best on validation is c" in verdict.reason
    assert verdict.estimate == pytest.approx(5.025, abs=0.01)


def test_the_words_are_a_closed_set() -> None:
    assert VERDICTS == ("reproduced", "not reproduced", "inconclusive", "not assessable")
    with pytest.raises(TypeError):
        VERDICTS[0] = "confirmed"  # type: ignore[index]


def test_estimates_skip_unfinished_runs_and_unknown_metrics() -> None:
    found = [*records({"a": UP}), record("a", 6, {"test/acc": 99.0}, state="failed"), record("b", 0, {"odd": 1.0})]
    rows = estimates(paper(claim()), found)
    assert [(r.ablation, r.metric, r.n) for r in rows] == [("a", "test/acc", 6)]
    assert rows[0].runs.split() == [f"run-a-mnist-{s}" for s in range(6)]


@pytest.mark.parametrize("law", ["normal", "uniform", "exponential"])
def test_false_reproduced_stays_below_alpha_for_one_claim(law: str) -> None:
    """True difference exactly at the margin: at most alpha / 2 of the verdicts may be "reproduced"."""
    rng = np.random.default_rng(2)
    draws = {"normal": rng.normal, "uniform": rng.uniform, "exponential": rng.exponential}[law](size=(1500, 2, 6))
    wrong = sum(
        _one(records({"a": (1 + x[0]).tolist(), "b": x[1].tolist()}), claim(margin=1.0)).verdict == "reproduced"
        for x in draws
    )
    assert wrong / 1500 <= 0.025 + 4 * math.sqrt(0.025 * 0.975 / 1500)


def test_false_reproduced_stays_below_alpha_over_a_whole_paper() -> None:
    """Five independent true nulls: the chance of even one "reproduced" stays at or below alpha."""
    rng = np.random.default_rng(3)
    claims = [claim(str(i), operands=(operand(f"a{i}"), operand(f"b{i}"))) for i in range(5)]
    names = [f"{side}{i}" for i in range(5) for side in "ab"]
    any_wrong = 0
    for _ in range(600):
        found = records({name: rng.normal(size=6).tolist() for name in names})
        any_wrong += any(v.verdict == "reproduced" for v in judge(paper(*claims), found, "small"))
    assert any_wrong / 600 <= 0.025 + 4 * math.sqrt(0.025 * 0.975 / 600)


def test_false_mixed_ordering_stays_below_alpha() -> None:
    """The first side truly wins somewhere, the second nowhere beyond the margin: "reproduced" would be wrong."""
    rng = np.random.default_rng(4)
    names, spec = _mixed(5)
    effects = np.array([6.0, 0.0, -1.0, -1.0, -1.0])
    wrong = 0
    for _ in range(500):
        noise = rng.normal(size=(2, 6, 5))
        found = [
            record(side, seed, dict(zip(names, noise[i, seed] + (effects if side == "a" else 0), strict=True)))
            for i, side in enumerate("ab")
            for seed in range(6)
        ]
        wrong += _one(found, spec).verdict == "reproduced"
    assert wrong / 500 <= 0.025 + 4 * math.sqrt(0.025 * 0.975 / 500)


def test_a_large_true_effect_is_found() -> None:
    rng = np.random.default_rng(5)
    found = sum(
        _one(records({"a": (3 + rng.normal(size=6)).tolist(), "b": rng.normal(size=6).tolist()})).verdict
        == "reproduced"
        for _ in range(300)
    )
    assert found / 300 > 0.9


def _with_images(folder: Path, ablation: str, seed: int, values: dict[int, float], measure: str = "acc") -> Record:
    path = folder / f"{ablation}{seed}"
    path.mkdir()
    lines = [f"test,{image},{value}" for image, value in values.items()]
    (path / "images.csv").write_text("\n".join([f"set,index,{measure}", *lines]) + "\n")
    return record(ablation, seed, {"test/acc": float(np.mean(list(values.values())))}, path=path)


def test_a_claim_of_images_counts_them_and_pairs_them(tmp_path: Path) -> None:
    """Three seeds whose means agree: over seeds alone the claim would be certain, over images it is not."""
    rng = np.random.default_rng(0)
    base, gains = rng.normal(70, 5, 40), rng.normal(0, 4, 40)
    gains += 0.3 - gains.mean()
    design = Design(seeds=3, test="crossed")
    runs = [_with_images(tmp_path, "a", s, dict(enumerate(base + gains))) for s in range(3)]
    runs += [_with_images(tmp_path, "b", s, {**dict(enumerate(base)), 99: 0.0}) for s in range(3)]
    spec = paper(claim(operands=(operand("a"), operand("b")), design=design))
    (verdict,) = judge(spec, runs, "small")
    assert verdict.verdict == "inconclusive"
    assert verdict.estimate == pytest.approx(0.3, abs=1e-3)  # on the forty images that both have
    expected = t_estimate(gains)
    assert verdict.ci == pytest.approx((expected.ci_low, expected.ci_high), abs=1e-2)
    (number,) = judge(paper(claim(operands=(operand("a"),), against=60.0, design=design)), runs, "small")
    assert (number.verdict, number.n) == ("reproduced", 3)
    without = [*runs[:3], *(record("b", s, {"test/acc": 1.0}) for s in range(3))]
    (verdict,) = judge(spec, without, "small")
    assert verdict.verdict == "not assessable"
    assert "0 test images have a value of test/acc and test/acc in every run" in verdict.reason


def test_one_seed_of_a_claim_about_several_is_shown_and_decides_nothing(tmp_path: Path) -> None:
    runs = [_with_images(tmp_path, name, 0, dict.fromkeys(range(5), value)) for name, value in (("a", 3.0), ("b", 1.0))]
    for design in (Design(seeds=3, test="crossed"), Design(seeds=3, paired=False, test="welch")):
        (verdict,) = judge(paper(claim(operands=(operand("a"), operand("b")), design=design)), runs, "small")
        assert (verdict.verdict, verdict.estimate, verdict.ci) == ("inconclusive", 2.0, None)
        assert "only 1 of the 3 seeds" in verdict.reason
