"""What would fail in training fails while planning, under the key that is wrong, with the way out; correct cells are priced."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from datamodules.images import IMAGE_SETS
from datamodules.sources import DATASETS, DataUnavailable, load_images
from experiments import graph, prices
from experiments.cell import CONF, resolve
from experiments.claims import load_paper
from experiments.graph import Selection, plan
from experiments.schema import ConfigError

SPEC = load_paper("tropical_cnn")


def _planned(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, data: str = "mnist") -> graph.Plan:
    """Plan one ablation that differs from net1 by `body`."""
    conf = shutil.copytree(CONF, folder / "conf")
    head = "# @package _global_\n# a test\ndefaults:\n  - /ablation/tropical_cnn/net1\n  - _self_\n"
    (conf / "ablation/tropical_cnn/odd.yaml").write_text(head + body)
    monkeypatch.setattr(graph, "resolve", partial(resolve, conf=conf))
    monkeypatch.setattr(graph, "ablations", lambda paper: ["odd"])
    return plan(SPEC, Selection("small", seeds=2, only=("odd",), data=(data,)), folder / "runs")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("net: {ties: all}", ["net.ties", "'all'", "'first' or 'split'"]),
        ("net: {padding_value: zero}", ["net.padding_value", "'zero'", "'neutral'"]),
        ("net: {in_channels: 3}", ["net.in_channels", "3", "mnist has 1"]),
        ("net: {num_classes: 7}", ["net.num_classes", "7", "mnist has 10"]),
        ("net: {init: uniform}", ["net.init", "'uniform'", "nearest: 'uniform01'"]),
        ("net: {layer1: MinPS}", ["net.layer1", "'MinPS'", "nearest: 'MinP-S'"]),
        ("net: {width: 0}", ["net.width", "0", "at least 1"]),
        ("optim: {schedule: {gamma: 2}}", ["optim.schedule.gamma", "2", "(0, 1]"]),
        ("optim: {optimizer: {betas: [2, 3]}}", ["optim.optimizer.betas", "[2, 3]", "left out, it is (0.9, 0.999)"]),
        ("budget: {val_samples: 60000}", ["budget.val_samples", "60000", "between 1 and 59999"]),
        ("budget: {train_samples: 58000}", ["budget.train_samples", "58000", "between 1 and 55000"]),
        ("budget: {test_samples: 20000}", ["budget.test_samples", "20000", "between 1 and 10000"]),
        ("datamodule: {val_samples: 60000}", ["datamodule.val_samples", "60000", "between 1 and 59999"]),
        ("datamodule: {eval_batch_size: 0}", ["datamodule.eval_batch_size", "0", "at least 1"]),
        ("module: {noise_seed: abc}", ["module.noise_seed", "'abc'", "an integer"]),
        ("data: {channels: 3}", ["data.channels", "3", "mnist has 1"]),
        ("data: {image_size: 32}", ["data.image_size", "32", "mnist has 28"]),
        ("data: {classes: 100}", ["data.classes", "100", "mnist has 10"]),
        ("selection: {monitor: val/ac}", ["selection.monitor", "'val/ac'", "nearest valid: 'val/acc'"]),
    ],
)
def test_a_bad_value_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        _planned(tmp_path, monkeypatch, body + "\n")
    assert str(error.value).startswith("odd on mnist (small): ")
    for word in words:
        assert word in str(error.value)


def test_split_sizes_are_those_of_each_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"budget\.val_samples must lie between 1 and 49999, got 50000"):
        _planned(tmp_path, monkeypatch, "budget: {val_samples: 50000}\n", "cifar10")


@pytest.mark.parametrize("body", ["", "selection: {monitor: val/loss, mode: min}\n", "optim: {schedule: null}\n"])
def test_a_correct_cell_is_priced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    nodes = _planned(tmp_path, monkeypatch, body).nodes
    assert [node.cell.key.seed for node in nodes] == [0, 1]
    assert {node.params for node in nodes} == {2_150}
    assert all(node.seconds and node.operations_per_sample for node in nodes)


def test_parts_are_built_once_for_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    checked = prices._dry_build
    monkeypatch.setattr(prices, "_dry_build", lambda config: built.append(config["seed"]) or checked(config))
    _planned(tmp_path, monkeypatch, "")
    assert built == [0]


def test_the_trainer_reaches_every_cell(tmp_path: Path) -> None:
    def of(name: str) -> list[graph.Node]:
        asked = Selection("smoke", seeds=2, only=("net0",), data=("mnist",), trainer=name)
        return plan(SPEC, asked, tmp_path / "runs").nodes

    assert {node.cell.config["trainer"]["accelerator"] for node in of("gpu")} == {"gpu"}
    assert [node.cell.signature for node in of("gpu")] == [node.cell.signature for node in of("cpu")]
    with pytest.raises(ConfigError, match="unknown trainer 'gpuu'"):
        of("gpuu")


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_known_of_a_data_set_is_what_it_holds(name: str) -> None:
    facts = IMAGE_SETS[name]
    assert facts.train + facts.test == DATASETS[name].n
    try:
        arrays = load_images(name, fetch=False)
    except DataUnavailable:
        pytest.skip(f"{name} is not on this machine")
    assert arrays.train_images.shape == (facts.train, facts.image_size, facts.image_size, facts.channels)
    assert len(arrays.test_labels) == facts.test
    assert int(arrays.train_labels.max()) + 1 == facts.classes


def test_seeds_start_where_the_profile_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = shutil.copytree(CONF, tmp_path / "conf")
    profile = conf / "profile/tropical_cnn/smoke.yaml"
    profile.write_text(profile.read_text() + "\nfirst_seed: 7\n")
    monkeypatch.setattr(graph, "resolve", partial(resolve, conf=conf))
    asked = Selection("smoke", only=("net0",), data=("mnist",))
    assert [key.seed for key in graph.keys_for(SPEC, asked)] == [7, 8]
    assert [key.seed for key in graph.keys_for(SPEC, replace(asked, seeds=3))] == [7, 8, 9]
    assert [key.seed for key in graph.keys_for(SPEC, replace(asked, seed=(1,)))] == [1]
