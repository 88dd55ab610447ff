"""Parameters: what may be written, what is drawn, what templates become, and where settings go."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.errors import UserError
from sweeps.parameters import Parameter, check_parameters, draw_all, filled, put


class _Low:
    """Draws the first choice and the low end."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return choices[0]

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return low

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return low


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "either choices, or options, or low and high"),
        ({"choices": [1], "low": 0, "high": 1}, "either choices"),
        ({"low": 2, "high": 1}, "low first"),
        ({"low": 1}, "low first"),
        ({"low": 0.0, "high": 1.0, "log": True}, "above 0"),
        ({"low": 0.1, "high": 1.0, "log": True, "step": 0.1}, "either log or step"),
        ({"low": 1, "high": 2.5, "kind": "int"}, "integer ends"),
        ({"choices": [[1, 2]]}, "use options"),
        ({"choices": [1, 1]}, "twice"),
        ({"choices": [1], "log": True}, "of a range"),
        ({"options": {"a": {"net.width": 4}}, "path": "net.width"}, "no path beside them"),
    ],
)
def test_an_impossible_parameter_is_refused(body: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Parameter("p", **body)


def test_true_and_one_are_two_choices() -> None:
    assert Parameter("p", "x", choices=[True, 1]).values == (True, 1)


def test_an_integer_range_is_one_where_both_ends_are() -> None:
    assert Parameter("p", "x", low=1, high=4).is_integer
    assert not Parameter("p", "x", low=1, high=4.0).is_integer
    assert not Parameter("p", "x", low=1, high=4, kind="float").is_integer


def test_conditional_parameters_exist_only_where_they_should() -> None:
    parameters = {
        "depth": Parameter("depth", low=1, high=2),
        "second": Parameter("second", choices=["m", "M"], when={"depth": [2]}),
        "third": Parameter("third", "x", choices=[1], when={"second": "M"}),
    }
    templates = {"net.spec": "L{depth} {second}8"}
    check_parameters(parameters, templates)
    assert draw_all(parameters, {}, _Low()) == {"depth": 1}
    assert draw_all(parameters, {"depth": 2}, _Low()) == {"depth": 2, "second": "m"}
    assert draw_all(parameters, {"depth": 2, "second": "M"}, _Low()) == {"depth": 2, "second": "M", "third": 1}


@pytest.mark.parametrize(
    ("parameters", "templates", "words"),
    [
        ([Parameter("a", "x", choices=[1], when={"b": [1]}), Parameter("b", "y", choices=[1])], {}, "comes before"),
        ([Parameter("a", "x", choices=[1]), Parameter("b", "y", choices=[1], when={"a": [2]})], {}, "2 is not among"),
        ([Parameter("a", "x", choices=[1])], {"p": "{wdith}"}, "unknown parameter 'wdith'"),
        ([Parameter("a", choices=[1])], {}, "no path"),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(parameters: list, templates: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_parameters({p.name: p for p in parameters}, templates)


def test_a_template_leaves_out_words_of_absent_parameters_and_keeps_types() -> None:
    spec = "{a}{width} {b}{width} {last}10"
    assert filled(spec, {"a": "L", "width": 64, "last": "L"}) == "L64 L10"
    assert filled(spec, {"a": "L", "b": "m", "width": 8, "last": "M"}) == "L8 m8 M10"
    assert filled("{width}", {"width": 8}) == 8
    assert filled(3, {}) == 3
    assert filled("normal:{sigma}", {}) == filled("{sigma}", {}) == ""  # nothing to say: the ablation's own stays


def test_options_set_several_paths_at_once() -> None:
    options = {"coarse": {"g": 1, "k": 1}, "fine": {"g": 8, "k": 8}}
    assert Parameter("p", options=options).settings("fine") == {"g": 8, "k": 8}
    assert Parameter("p", "net.width", choices=[4]).settings(4) == {"net.width": 4}
    assert Parameter("p", choices=[4]).settings(4) == {}


def test_a_setting_goes_to_its_place_or_is_refused_with_the_nearest() -> None:
    config: dict[str, Any] = {
        "net": {"_target_": "x.Y", "width": 4},
        "budget": {"max_epochs": 1},
        "trainer": {"devices": 1},
    }
    put(config, "net.width", 8, "o")
    put(config, "net.init", "zeros", "o")  # an argument that the target may have
    assert config["net"] == {"_target_": "x.Y", "width": 8, "init": "zeros"}
    with pytest.raises(UserError, match=r"no key 'budget\.max_epoch'.*max_epochs"):
        put(config, "budget.max_epoch", 2, "o")
    with pytest.raises(UserError, match="no key 'trainer'"):  # where a cell runs is no setting of it
        put(config, "trainer.devices", 2, "o")
