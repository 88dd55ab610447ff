"""Configurations compose, are refused when wrong, and give signatures that change exactly when the experiment does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from experiments import sources_digest
from experiments.cell import CONF, PROBES, _changes, _resolved, ablations, canonical, flatten, profiles, resolve
from experiments.claims import PROFILES, available_papers, load_paper
from experiments.records import CellKey
from experiments.schema import ConfigError, Data, check_targets, validate

NET1 = CellKey("tropical_cnn", "net1", "mnist", 0, "small")
EVERY = [(paper, ablation) for paper in available_papers().values() for ablation in ablations(paper)]


def _data_of(paper: str, ablation: str) -> list[str]:
    """The data sets that the small profile has budgets for in an ablation's family. Paper 1's budgets are the same for every
    corpus, which has a test of its own; one corpus is enough here.
    """
    if paper == "moe_upcycling":
        return ["python_stdlib"]
    if paper == "face_deblur":
        return ["faces", "procedural_faces"]
    if paper == "auto_map":  # a family's budgets are the same for all its graphs: those that claims and tables need
        budgets = yaml.safe_load((CONF / "profile/auto_map/small.yaml").read_text())["budgets"]
        parent = yaml.safe_load((CONF / f"ablation/auto_map/{ablation}.yaml").read_text())
        while "family" not in parent:
            above = next(d for d in parent["defaults"] if isinstance(d, str) and d.startswith("/ablation"))
            parent = yaml.safe_load((CONF / f"{above[1:]}.yaml").read_text())
        known, needed = list(budgets[parent["family"]]), load_paper(paper).required("small")
        return [data for name, data in needed if name == ablation] or known[:1]
    first = "waves_2d" if paper == "min_max_plus" and ablation.startswith(("fit", "sine", "cone", "wave8")) else "mnist"
    config = resolve(CellKey(paper, ablation, first, 0, "small")).config
    return list(config["profile"]["budgets"][config["family"]])


@pytest.mark.parametrize(("paper", "ablation"), EVERY)
def test_every_ablation_composes_on_every_profile(paper: str, ablation: str) -> None:
    for data in _data_of(paper, ablation):
        for profile in profiles(paper):
            cell = resolve(CellKey(paper, ablation, data, 1, profile))
            assert cell.config["seed"] == cell.config["datamodule"]["seed"] == 1
            assert cell.config["budget"] == cell.config["profile"]["budgets"][cell.config["family"]][data]
            check_targets(cell.config, ablation)


FAMILIES = {
    "parent": "dense",
    "short": "e8g1t1_10",
    "short_half": "e8g1t1_10_batch_half",
    "short_x8": "e8g1t1_10_batch_x8",
    "long": "e8g1t1_50",
    "step0": "step0_e8g1t1",
}


@pytest.mark.parametrize("profile", PROFILES)
def test_paper_1_trains_as_much_on_every_corpus_that_a_profile_knows(profile: str) -> None:
    budgets = resolve(CellKey("moe_upcycling", "dense", "python_stdlib", 0, profile)).config["profile"]["budgets"]
    assert set(budgets) == set(FAMILIES)
    for family in FAMILIES:
        by_corpus = budgets[family]
        assert by_corpus.keys() == budgets["parent"].keys()
        assert all(budget == by_corpus["python_stdlib"] for budget in by_corpus.values())
    for corpus in budgets["parent"]:
        cell = resolve(CellKey("moe_upcycling", FAMILIES["short"], corpus, 3, profile))
        assert (cell.config["family"], cell.config["data"]["name"]) == ("short", corpus)
        assert cell.config["net"]["vocab"] == cell.config["data"]["vocab"]
        assert cell.config["datamodule"]["context"] == cell.config["data"]["context"]
        assert cell.parent is not None
        assert cell.parent.key == replace(cell.key, ablation="dense")
        assert cell.parent.config["datamodule"]["stream"] != cell.config["datamodule"]["stream"]


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({"channels": 1, "image_size": 28, "classes": 10}, (1, 28, 28)),
        ({"channels": 3, "image_size": 64}, (3, 64, 64)),
        ({"dims": 3}, (3,)),
        ({"context": 128, "vocab": 256}, (128,)),
        ({"observation": 40}, (40,)),
    ],
)
def test_data_are_images_or_a_function_or_text(given: dict, shape: tuple) -> None:
    assert Data(name="x", **given).input_shape == shape
    for name in given:
        with pytest.raises(ValidationError):
            Data(name="x", **{**given, name: 0})
        if len(given) > 1 and name != "classes":  # without classes, images are to be restored
            with pytest.raises(ValidationError, match="text needs context and vocab"):
                Data(name="x", **{key: value for key, value in given.items() if key != name})
    for other in ({"dims": 2}, {"context": 8, "vocab": 9}, {"classes": 3}):
        if not other.keys() & given.keys() and {*other, *given} != {"channels", "image_size", "classes"}:
            with pytest.raises(ValidationError, match="images need channels and image_size"):
                Data(name="x", **given, **other)


def test_data_of_no_kind_are_refused() -> None:
    with pytest.raises(ValidationError, match="a function needs dims alone"):
        Data(name="x")


@pytest.mark.parametrize("file", sorted((CONF / "ablation").glob("*/*.yaml")), ids=lambda f: f.stem)
def test_an_ablation_file_is_a_short_difference_with_a_header(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 30
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")


@pytest.mark.parametrize(("paper", "ablation"), EVERY)
def test_a_header_says_what_it_feeds_and_what_it_costs(paper: str, ablation: str) -> None:
    lines = (CONF / "ablation" / paper / f"{ablation}.yaml").read_text().splitlines()[1:]
    header = " ".join(line[2:] for line in lines if line.startswith("# "))
    (said,) = re.findall(r"Feeds (no claim|\S+(?:, \S+)*)\.", header)
    claims = load_paper(paper).claims
    fed = {claim.id for claim in claims if any(ablation in operand.ablations for operand in claim.operands)}
    patterns = [] if said == "no claim" else said.split(", ")
    named = {claim.id: [p for p in patterns if fnmatchcase(claim.id, p)] for claim in claims}
    assert {name for name, by in named.items() if by} == fed
    assert all(any(pattern in by for by in named.values()) for pattern in patterns)
    number = r"[\d.]+(?: \([^)]*\))?"
    assert re.search(rf"Minutes per cell: smoke {number}, small {number}, paper (?:{number}|hours)\.?", header)


@pytest.mark.parametrize(("paper", "ablation"), EVERY)
def test_a_seed_put_into_the_resolved_configuration_is_the_full_resolution(paper: str, ablation: str) -> None:
    data = _data_of(paper, ablation)[0]
    for seed in (0, 5):
        key = CellKey(paper, ablation, data, seed, "small")
        config = resolve(key).config
        assert config == _resolved(key, CONF, "cpu", seed)
        assert canonical(config) == canonical(_resolved(key, CONF, "cpu", seed))
        config["datamodule"]["seed"] = "spoilt"
        assert resolve(key).config["datamodule"]["seed"] == seed


def test_where_the_seed_is_part_of_a_value_every_seed_is_resolved_in_full(tmp_path: Path) -> None:
    conf = _conf(tmp_path, "odd", 'module: {noise_seed: "9${seed}"}\n')
    for seed in (3, 4):
        assert resolve(replace(NET1, ablation="odd", seed=seed), conf).config["module"]["noise_seed"] == f"9{seed}"


def test_changes_are_the_places_of_the_probes_and_nothing_else() -> None:
    first, second = PROBES
    assert _changes({"a": [1, first], "b": 2}, {"a": [1, second], "b": 2}) == [("a", 1)]
    assert _changes({"a": first}, {"a": second + 1}) is None
    assert _changes({"a": [first]}, {"a": [second, 1]}) is None
    assert _changes({"a": 1}, {"a": True}) is None


def test_the_trainer_is_chosen_by_name_and_stays_out_of_the_signature() -> None:
    cells = {name: resolve(NET1, trainer=name) for name in ("cpu", "gpu", "ddp")}
    assert {name: cell.config["trainer"]["accelerator"] for name, cell in cells.items()} == {
        "cpu": "cpu",
        "gpu": "gpu",
        "ddp": "gpu",
    }
    assert cells["ddp"].config["trainer"]["strategy"] == "ddp"
    assert len({cell.signature for cell in cells.values()}) == 1
    assert resolve(NET1).config == cells["cpu"].config
    with pytest.raises(ConfigError, match=r"unknown trainer 'gpuu' \(nearest valid: 'gpu'\)"):
        resolve(NET1, trainer="gpuu")


def test_a_signature_of_images_does_not_load_torch() -> None:
    code = (
        "import sys; from experiments.cell import resolve; from experiments.records import CellKey; import experiments.stats; "
        "resolve(CellKey('tropical_cnn', 'net1', 'mnist', 0, 'small')).signature; "
        "print([m for m in ('torch', 'scipy.stats') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONF.parent, check=True)
    assert done.stdout.strip() == "[]"


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
        ({"parent": {"ablation": "net0"}}, ["parent.inherit", "missing"]),
        (
            {"parent": {"ablatoin": "net0", "inherit": {"_target_": "x.y"}}},
            ["parent.ablatoin", "unknown key", "'ablation'"],
        ),
        ({"parent": {"ablation": "net0", "inherit": {"scale": 2}}}, ["parent.inherit._target_", "missing"]),
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
        ({"module": {"noise_seed": "abc"}}, ["module.noise_seed", "an integer", "'abc'", "left out, it is 0"]),
        ({"module": {"noise_seed": True}}, ["module.noise_seed", "an integer", "True"]),
        ({"net": {"ties": "frist"}}, ["net.ties", "'frist'", "nearest valid: 'first'"]),
        ({"net": {"padding_value": "zero"}}, ["net.padding_value", "a number or 'neutral' or 'replicate'", "'zero'"]),
        ({"net": {"width": 4.5}}, ["net.width", "4.5"]),
        ({"optim": {"optimizer": {"amsgrad": "yes"}}}, ["optim.optimizer.amsgrad", "true or false"]),
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
    conf = _conf(tmp_path, "typo", "bugdet: {max_epochs: 1}\n")
    with pytest.raises(ConfigError, match=r"bugdet: unknown key \(nearest valid: 'budget'\)"):
        resolve(replace(NET1, ablation="typo"), conf)


def test_a_family_without_a_budget_is_named_with_the_nearest(tmp_path: Path) -> None:
    conf = _conf(tmp_path, "typo", "family: lenett\n")
    with pytest.raises(
        ConfigError, match=r"family: 'lenett' names no budget of the profile \(nearest valid: 'lenet'\)"
    ):
        resolve(replace(NET1, ablation="typo"), conf)


def test_another_interpolation_that_leads_nowhere_names_its_key(tmp_path: Path) -> None:
    conf = _conf(tmp_path, "typo", "net: {width: '${data.chanels}'}\n")
    with pytest.raises(ConfigError, match=r"net\.width: .*data\.chanels"):
        resolve(replace(NET1, ablation="typo"), conf)


def test_a_file_that_is_not_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    conf = _conf(tmp_path, "broken", "net: {width: 8\nfamily: lenet\n")
    with pytest.raises(
        ConfigError, match=r"ablation/tropical_cnn/broken\.yaml, line \d+, column \d+: this is not YAML"
    ):
        resolve(replace(NET1, ablation="broken"), conf)


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


def _conf(folder: Path, name: str, body: str) -> Path:
    """A copy of the configuration with one more ablation, a difference from net1."""
    conf = shutil.copytree(CONF, folder / "conf")
    head = "# @package _global_\n# a test\ndefaults:\n  - /ablation/tropical_cnn/net1\n  - _self_\n"
    (conf / f"ablation/tropical_cnn/{name}.yaml").write_text(head + body)
    return conf


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
