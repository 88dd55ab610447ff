"""Search spaces: every one of the suite holds together, and faulty ones are refused by name before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.errors import UserError
from sweeps.samplers import combinations, examples
from sweeps.space import SPACES, Space, load, parse, spaces
from tests.sweeps.toys import raw, space

ALL = [(f.parent.name, f.stem) for f in sorted(SPACES.glob("*/*.yaml")) if f.stem in spaces(f.parent.name)]


@pytest.mark.parametrize(("paper", "name"), ALL, ids=lambda v: str(v))
def test_every_space_of_the_suite_loads_and_its_values_resolve(paper: str, name: str) -> None:
    for profile in ("smoke", "small"):
        made = load(paper, name, profile)
        cells = {made.cell(values, made.seeds[0]).config["seed"] for values in examples(made)}
        assert cells == {made.seeds[0]}
        assert not set(made.seeds) & set(made.report.seeds)
        for arm in made.arms:
            assert made.cell(made.arms[arm].fix, 0) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objectives": [{"metric": "test/acc", "direction": "higher"}]}, "never test data; got 'test/acc'"),
        ({"objectives": [{"metric": "noise/sp_10/acc", "direction": "higher"}]}, "never test data"),
        ({"objectives": []}, "nothing to search by"),
        ({"objectives": [{"metric": "val/acc", "direction": "highest"}]}, r"'highest' .nearest valid: 'higher'"),
        ({"seeds": [0, 1000]}, r"seeds \[0\] are the report's too"),
        ({"seeds": [1000, 1000]}, "different numbers"),
        ({"sampler": {"name": "tpee"}}, r"unknown name 'tpee' .nearest valid: 'tpe'"),
        ({"sampler": {"name": "tpe", "startup": 3}}, r"no option 'startup'"),
        ({"pruner": {"name": "wilcox"}}, "nearest valid: 'wilcoxon'"),
        ({"sampler": {"name": "grid"}}, "rate is a range without step"),
        ({"constraints": [{"metric": "val/acc", "at_most": 1}]}, "is not a cost"),
        ({"constraints": [{"metric": "cost/params"}]}, "neither at_most nor at_least"),
        ({"arms": {"other": {"fix": {"widht": 4}}}}, r"unknown parameter 'widht' .nearest valid: 'width'"),
        ({"arms": {"other": {"fix": {"width": 5}}}}, "5 is not among them"),
        ({"arms": {"winner": {}}}, "'winner' is taken"),
        ({"report": {"metric": "test/acc", "direction": "lower"}}, "is better where it is higher"),
        ({"trials": 0}, "at least 1"),
        ({"trails": 3}, r"unknown key 'trails' .nearest valid: 'trials'"),
        ({"profiles": {"smal": {}}}, "nearest valid: 'small'"),
        ({"parameters": {}}, "parameters: expected a mapping"),
        ({"parameters": {"rate": {"low": 0.1, "hihg": 1}}}, "unknown key 'hihg'"),
    ],
)
def test_a_faulty_space_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(raw(**change), "tropical_cnn", "toy", "smoke")


def test_several_objectives_have_no_order_to_cut_by() -> None:
    two = [{"metric": "val/acc", "direction": "higher"}, {"metric": "cost/params", "direction": "lower"}]
    with pytest.raises(UserError, match="no order to cut by"):
        space(objectives=two, pruner={"name": "median"})
    assert space(objectives=two).several


def test_a_space_that_is_none_is_refused_with_the_nearest_and_a_grid_is_told_as_such() -> None:
    with pytest.raises(UserError, match="'routing'"):
        load("moe_upcycling", "routings", "small")
    with pytest.raises(UserError, match=r"a grid: run it by `python -m sweeps\.grid`"):
        load("tropical_cnn", "learning_rate_mnist", "small")


def test_a_profile_changes_what_it_names_and_nothing_else() -> None:
    made = space(profiles={"smoke": {"seeds": [1003], "sampler": {"seed": 9}}, "small": {"trials": 99}})
    assert made.seeds == (1003,)
    assert made.sampler == {"name": "tpe", "n_startup_trials": 4, "seed": 9}
    assert made.trials == 6


def test_a_cell_has_the_values_of_its_trial_and_a_name_of_its_own() -> None:
    cell = space().cell({"rate": 0.05, "width": 8}, 1000)
    assert cell.config["optim"]["optimizer"]["lr"] == 0.05
    assert cell.config["net"]["width"] == 8
    assert cell.key.ablation == "sweep.toy"  # under the ablation's name it would make that look out of date
    assert cell.command == "fivefold sweep tropical_cnn --space toy --profile smoke"
    plain = space().cell(None, 1000, {})
    assert plain.key.ablation == "net1_tuned"
    assert plain.signature != cell.signature


def test_settings_of_trials_are_not_those_of_the_report() -> None:
    made = space(settings={"budget.batch_size": 32}, report={**raw()["report"], "settings": {"budget.batch_size": 16}})
    assert made.cell(None, 1000).config["budget"]["batch_size"] == 32
    assert made.cell(None, 0, made.report.settings).config["budget"]["batch_size"] == 16


def test_the_study_is_named_by_what_is_searched_and_not_by_how_long() -> None:
    base = space()
    assert base.study_name() == space(trials=50, arms={"a": {"fix": {"width": 4}}}).study_name()
    for change in ({"seeds": [1000]}, {"settings": {"budget.batch_size": 32}}, {"sampler": {"name": "random"}}):
        assert space(**change).study_name() != base.study_name()
    assert base.study_name("arm").startswith("tropical_cnn.toy.smoke.arm.")


def test_an_arm_leaves_the_other_parameters_free() -> None:
    made: Space = space(arms={"narrow": {"fix": {"width": 4}, "tuned": True}}).arm("narrow")
    assert list(made.free) == ["rate"]
    assert made.fixed == {"width": 4}


def test_combinations_are_counted_with_their_conditions() -> None:
    parameters = {
        "depth": {"low": 1, "high": 3},
        "second": {"path": "net.init", "choices": ["m", "M"], "when": {"depth": [2, 3]}},
        "width": {"path": "net.width", "choices": [4, 8]},
    }
    made = space(parameters=parameters, sampler={"name": "brute_force"})
    assert combinations(made) == (1 + 2 + 2) * 2
    assert combinations(space()) is None
    for values in examples(made):
        assert ("second" in values) == (values["depth"] > 1)
    assert {v["second"] for v in examples(made) if "second" in v} == {"m", "M"}
