"""Paper 1's sizes of net: the shapes that they say, the profiles that use them, and results that are kept apart."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from experiments.cell import CONF, ablations, models, origin_of, resolve
from experiments.claims import load_paper
from experiments.graph import Selection, keys_for
from experiments.prices import Cost, _check_and_price, check_processes
from experiments.records import CellKey
from experiments.reproduce import Places, Reproduction
from experiments.schema import ConfigError
from experiments.store import Index, key_of, write_json
from lit_modules.nets.pricing import SIZES, Shape

SPEC = load_paper("moe_upcycling")
KEY = CellKey("moe_upcycling", "dense", "python_stdlib", 0, "small")
WATCHED = {name for name in SPEC.metrics if name.startswith("val/")}


def _cost(key: CellKey) -> Cost:
    return _check_and_price(resolve(key).config, WATCHED, origin_of(key))


@pytest.mark.parametrize("name", models("moe_upcycling"))
def test_a_file_says_the_shape_that_it_is_named_for(name: str) -> None:
    config = resolve(replace(KEY, model=name)).config
    shape = Shape(**{key: value for key, value in config["net"].items() if key != "_target_"})
    known = SIZES[name] if name != "base" else replace(SIZES["base"], vocab=16_384)  # with a tokeniser of our own
    assert asdict(shape) == asdict(known)
    tokenizer = config["datamodule"].get("tokenizer", "bytes")
    assert config["data"]["vocab"] == (256 if tokenizer == "bytes" else int(tokenizer.removeprefix("bpe:")))


@pytest.mark.parametrize(("name", "billions", "as_e8"), [("gpt_2b", 2.25, 7.87), ("nemotron_15b", 15.63, 83.28)])
def test_the_papers_nets_have_the_parameters_that_are_public(name: str, billions: float, as_e8: float) -> None:
    dense, sparse = (
        _cost(replace(KEY, ablation=ablation, model=name, profile="paper")) for ablation in ("dense", "e8g1t1_10")
    )
    assert dense.params == pytest.approx(billions * 1e9, rel=2e-3)
    assert sparse.params == pytest.approx(as_e8 * 1e9, rel=2e-3)
    assert dense.active == dense.params
    assert sparse.training_flops == pytest.approx(dense.training_flops, rel=2e-3)  # E8G1T1: one expert for one MLP


def test_another_model_is_another_experiment_of_another_name() -> None:
    own, other = resolve(KEY), resolve(replace(KEY, model="micro"))
    assert own.signature != other.signature
    assert own.signature != resolve(replace(KEY, ablation="e8g1t1_10")).signature
    assert other.parent is None
    child = resolve(replace(KEY, ablation="e8g1t1_10", model="micro"))
    assert child.parent is not None
    assert child.parent.signature == other.signature
    assert child.command.endswith("--profile small --model micro")
    assert str(other.key) == "moe_upcycling/dense on python_stdlib, seed 0 (small+micro)"
    same = resolve(replace(KEY, model="nano"))  # the profile's own, by name
    assert same.signature == own.signature


def test_runs_of_another_model_are_not_taken_for_earlier_ones_of_the_profiles(tmp_path: Path) -> None:
    for key, signature in ((KEY, "old"), (replace(KEY, model="micro"), "other")):
        write_json(tmp_path / signature / "manifest.json", {**vars(key), "signature": signature})
        write_json(tmp_path / signature / "done.json", {"seconds": 1.0})
    index = Index.scan(tmp_path)
    assert index.record(KEY, "new").signature == "old"
    assert index.record(replace(KEY, model="micro"), "new").signature == "other"
    assert index.record(replace(KEY, model="base"), "new").state == "not run"
    before = {name: value for name, value in vars(KEY).items() if name != "model"}  # as manifests were written once
    assert key_of(before) == KEY


def test_results_of_another_model_go_to_a_folder_of_their_own(tmp_path: Path) -> None:
    places = Places(tmp_path / "runs", tmp_path / "results")

    def results(selection: Selection) -> Path:
        return Reproduction(SPEC, selection, places, Console()).results

    assert results(Selection("small")) == places.results
    assert results(Selection("small", model="micro")) == places.runs / "results-small+micro"
    assert results(Selection("small", seeds=2, model="micro")) == places.runs / "results-small+micro-2-seeds"
    keys = keys_for(SPEC, Selection("small", seed=(0,), only=("e8g1t1_10",), model="micro"))
    assert [(key.ablation, key.model) for key in keys] == [("dense", "micro"), ("e8g1t1_10", "micro")]


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "strategy", "devices"), [("gpu", "auto", 1), ("paper", "fsdp", 8)])
def test_every_arm_of_a_profile_for_gpus_can_be_built_and_fits_80_gb(profile: str, strategy: str, devices: int) -> None:
    costs = {}
    for ablation in ablations("moe_upcycling"):
        cell = resolve(replace(KEY, ablation=ablation, data="wikitext", profile=profile), trainer="gpu")
        check_processes(cell, devices)
        costs[ablation] = _check_and_price(cell.config, WATCHED, ablation)
        memory = costs[ablation].memory(cell.config["budget"], strategy, devices)
        assert memory is not None
        assert memory < 75e9, ablation  # 5 GB for workspace and for the block that is being gathered
    assert {cost.params for cost in costs.values()} > {costs["dense"].params}
    budgets = resolve(replace(KEY, data="wikitext", profile=profile)).config["profile"]["budgets"]
    tokens = {family: b["wikitext"]["max_epochs"] * b["wikitext"]["train_samples"] for family, b in budgets.items()}
    assert tokens["short"] == pytest.approx(tokens["parent"] / 10, rel=0.01)  # as in the paper
    assert tokens["long"] == pytest.approx(tokens["parent"] / 2, rel=0.01)


def test_the_paper_profile_has_the_papers_tokens_and_batches() -> None:
    config = resolve(replace(KEY, data="wikitext", profile="paper")).config
    budgets = {family: by["wikitext"] for family, by in config["profile"]["budgets"].items()}
    tokens = {f: b["max_epochs"] * b["train_samples"] * config["data"]["context"] for f, b in budgets.items()}
    assert tokens["parent"] == pytest.approx(1.1e12, rel=1e-3)
    assert tokens["short"] == pytest.approx(0.11e12, rel=1e-3)
    assert [budgets[f]["batch_size"] for f in ("short_half", "short", "short_x8")] == [512, 1024, 8192]


def test_several_processes_are_refused_where_they_would_compute_something_else() -> None:
    images = resolve(CellKey("tropical_cnn", "net0", "mnist", 0, "smoke"), trainer="ddp")
    check_processes(images, 1)
    with pytest.raises(ConfigError, match="2 processes would each take a whole batch of tropical_cnn"):
        check_processes(images, 2)
    text = resolve(replace(KEY, profile="smoke"), trainer="fsdp")
    check_processes(text, 2)
    with pytest.raises(ConfigError, match=r"budget\.batch_size: 8 cannot be dealt evenly to 3 processes"):
        check_processes(text, 3)


def test_every_size_can_be_chosen_for_every_profile() -> None:
    for profile in (file.stem for file in (CONF / "profile" / "moe_upcycling").glob("*.yaml")):
        for name in models("moe_upcycling"):
            resolve(replace(KEY, profile=profile, model=name))
