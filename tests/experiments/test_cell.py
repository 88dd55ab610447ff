"""Configurations compose, are refused when wrong, and give signatures that change exactly when the experiment does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import sources_digest
from experiments.cell import CONF, ablations, canonical, flatten, resolve
from experiments.records import CellKey
from experiments.schema import ConfigError, check_targets, validate

NET1 = CellKey("tropical_cnn", "net1", "mnist", 0, "small")
ALL = ablations("tropical_cnn")


@pytest.mark.parametrize("ablation", ALL)
@pytest.mark.parametrize("profile", ["smoke", "small", "paper"])
def test_every_ablation_composes_on_every_profile(ablation: str, profile: str) -> None:
    for data in ("mnist", "fashion_mnist", "cifar10"):
        cell = resolve(CellKey("tropical_cnn", ablation, data, 1, profile))
        assert cell.config["seed"] == cell.config["datamodule"]["seed"] == 1
        assert cell.config["budget"] == cell.config["profile"]["budgets"][cell.config["family"]][data]
        check_targets(cell.config, ablation)


@pytest.mark.parametrize("file", sorted((CONF / "ablation").glob("*/*.yaml")), ids=lambda f: f.stem)
def test_an_ablation_file_is_a_short_difference_with_a_header(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 30
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")


def test_signature_ignores_where_a_cell_runs_and_sees_what_it_computes() -> None:
    cell = resolve(NET1)
    elsewhere = resolve(NET1)
    elsewhere.config["trainer"] = {**cell.config["trainer"], "accelerator": "gpu"}
    elsewhere.config["tracking"] = {**cell.config["tracking"], "enabled": False}
    assert elsewhere.signature == cell.signature
    signatures = {resolve(k).signature for k in (NET1, replace(NET1, seed=1), replace(NET1, ablation="net0"))}
    signatures |= {
        resolve(replace(NET1, data="fashion_mnist")).signature,
        resolve(replace(NET1, profile="smoke")).signature,
    }
    assert len(signatures) == 5


def test_canonical_does_not_depend_on_key_order() -> None:
    assert canonical({"b": 1, "a": [1, {"d": None, "c": 0.5}]}) == canonical({"a": [1, {"c": 0.5, "d": None}], "b": 1})


def test_flatten_names_every_leaf() -> None:
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": None}) == {"a.b.0": 1, "a.b.1.c": 2, "d": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": {"batch_size": 0}}, ["budget.batch_size", "got 0"]),
        ({"budget": {"max_epoch": 3}}, ["budget.max_epoch", "unknown key", "'max_epochs'"]),
        ({"optim": {"optimizer": {"lr": -0.1}}}, ["optim.optimizer.lr", "-0.1"]),
        ({"optim": {"optimizer": {"lr": float("nan")}}}, ["optim.optimizer.lr", "nan"]),
        ({"sed": 3}, ["sed", "unknown key", "'seed'"]),
        ({"precision": "17"}, ["precision", "'17'"]),
        ({"seed": -1}, ["seed", "-1"]),
    ],
)
def test_a_wrong_value_names_its_key_and_the_way_out(change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        validate(_merged(resolve(NET1).config, change), "net1")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"net": {"layer_1": "MinP-S"}}, ["net.layer_1", "unknown key", "'layer1'"]),
        ({"net": {"_target_": "lit_modules.nets.tcnn.NoSuchNet"}}, ["net._target_", "NoSuchNet"]),
        ({"optim": {"optimizer": {"momentumm": 0.9}}}, ["optim.optimizer.momentumm", "unknown key"]),
    ],
)
def test_a_wrong_argument_is_found_before_training(change: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_targets(_merged(resolve(NET1).config, change), "net1")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        (replace(NET1, ablation="nett1"), "net1"),
        (replace(NET1, data="mnits"), "mnist"),
        (replace(NET1, profile="smal"), "small"),
        (replace(NET1, paper="tropical_cn"), "tropical_cnn"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(key: CellKey, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"'{nearest}'"):
        resolve(key)


def test_an_ablation_file_with_an_unknown_key_fails(tmp_path: Path) -> None:
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "ablation/tropical_cnn/typo.yaml").write_text(
        "# @package _global_\n# a typo\ndefaults:\n  - tropical_cnn/net1\n  - _self_\nbugdet: {max_epochs: 1}\n"
    )
    with pytest.raises(ConfigError, match=r"bugdet: unknown key \(nearest valid: 'budget'\)"):
        resolve(replace(NET1, ablation="typo"), conf)


def test_the_code_of_plain_nets_does_not_reach_the_tropical_operators() -> None:
    plain = _closure("net0")
    tropical = _closure("net1")
    operators = {"lit_modules/ops/tropical.py", "lit_modules/nets/layers.py", "lit_modules/nets/tcnn.py"}
    assert not plain & operators
    assert operators <= tropical
    assert {"experiments/run.py", "lit_modules/tropical_cnn.py", "datamodules/tropical_cnn.py"} <= plain & tropical
    assert not any(name.startswith("experiments/") for name in plain - {"experiments/run.py"})


def test_digest_sees_code_and_not_comments(tmp_path: Path) -> None:
    package = tmp_path / "lit_modules"
    package.mkdir()
    (package / "__init__.py").write_text("")
    file = package / "op.py"

    def digest_of(source: str) -> str:
        file.write_text(source)
        sources_digest._code.cache_clear()
        return sources_digest.digest([file], tmp_path)

    base = digest_of('"""Doc."""\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert digest_of('"""Other."""\n# a comment\ndef f(x):\n    """Doc, longer."""\n\n    return x + 1\n') == base
    assert digest_of("def f(x):\n    return x + 2\n") != base


def test_closure_follows_imports_through_the_project_only(tmp_path: Path) -> None:
    package = tmp_path / "lit_modules"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from lit_modules.b import g\n    return g\nimport numpy\n")
    (package / "b.py").write_text("from lit_modules import c\ng = c\n")
    (package / "c.py").write_text("")
    (package / "unrelated.py").write_text("")
    found = [file.name for file in sources_digest.closure(["lit_modules.a.f"], tmp_path)]
    assert found == ["a.py", "b.py", "c.py"]


def _closure(ablation: str) -> set[str]:
    from experiments.cell import targets_of

    config = resolve(replace(NET1, ablation=ablation)).hashed
    files = sources_digest.closure(set(targets_of(config)))
    return {file.relative_to(sources_digest.ROOT).as_posix() for file in files}


def _merged(base: dict, change: dict) -> dict:
    merged = dict(base)
    for name, value in change.items():
        merged[name] = (
            _merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        )
    return merged
