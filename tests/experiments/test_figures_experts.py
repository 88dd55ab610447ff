"""Figures of paper 1: what is drawn is what was measured, and where nothing was, nothing is drawn."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from factory import paper, record

from experiments import figures
from experiments.claims import Figure, Metric, PaperSpec
from experiments.figures_experts import advantage, load, survival
from experiments.records import Record
from experiments.stats import t_estimate
from experiments.verdict import estimates

EXTRA = {
    "purity/*": Metric("purity/*", "higher", "points", "tokens with every shard, after * updates"),
    "val_at/*": Metric("val_at/*", "lower", "nats per token", "validation loss after *"),
}
SPEC: PaperSpec = dataclasses.replace(paper(), metrics={**paper().metrics, **EXTRA})
ADVANTAGE = Figure("adv", "advantage", "Who is ahead", "mnist", ("a", "b", "c", "b"))
SURVIVAL = Figure("sur", "survival", "Groups survive", "mnist", ("a", "b"))
LOAD = Figure("load", "load", "Who carries the load", "mnist", ("a", "b"))
FOREST = Figure(
    "for", "forest", "Losses", "mnist", ("a", "b"), "b", metric="test/loss", plain=("b",), sides=("dense", "MoE")
)
UPDATES = (0, 5, 100)


def _loads(seed: int, layers: int, experts: int) -> list:
    rng = np.random.default_rng(seed)
    return (rng.dirichlet(np.ones(experts), (3, layers)) * experts).round(4).tolist()


def _records(tmp_path: Path) -> list[Record]:
    found = []
    for name, base, layers in (("a", 1.0, [0, 2]), ("b", 1.1, [2]), ("c", 1.2, [2])):
        for seed in (1, 0):
            folder = tmp_path / f"{name}{seed}"
            folder.mkdir(exist_ok=True)
            content = {"layers": layers, "epochs": _loads(seed, len(layers), 4)}
            (folder / "expert_load.json").write_text(json.dumps(content))
            values = {f"val_at/{p:03d}": base * (1 + 1 / p) + 0.01 * seed * base**2 for p in (20, 60, 100)}
            values |= {f"purity/{u:05d}": 100 / (1 + u / 10) - seed for u in UPDATES}
            found.append(record(name, seed, values | {"test/loss": base + 0.02 * seed}, path=folder))
    return found


@pytest.fixture
def made(tmp_path: Path) -> list[Record]:
    return _records(tmp_path)


def _by_cell(found: list[Record]) -> dict:
    return {(row.ablation, row.data, row.metric): row for row in estimates(SPEC, found)}


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        (ADVANTAGE, ["a against b", "c against b", "training done (%)", "lower validation loss by (%)"]),
        (SURVIVAL, ["a", "b", "100", "updates done (log scale)", "tokens with every shard (%)"]),
        (LOAD, ["a, layer 0", "a, layer 2", "b, layer 2", "expert", "load (fair shares)", "≥ 8"]),
        (FOREST, ["a", "b", "1.0100", "test loss (nats), mean and 95% interval", "dense", "MoE"]),
    ],
    ids=lambda value: value.kind if isinstance(value, Figure) else "",
)
def test_a_figure_says_what_it_shows_and_is_the_same_every_time(figure: Figure, words: list[str], made) -> None:
    rows = estimates(SPEC, made)
    svg = figures.draw(SPEC, figure, rows, [], made, text_as_paths=False)
    assert svg is not None
    for word in [figure.title, *words]:
        assert f">{word}<" in svg, word
    assert figures.draw(SPEC, figure, rows, [], made[::-1], text_as_paths=False) == svg
    paths = figures.draw(SPEC, figure, rows, [], made)
    assert paths == figures.draw(SPEC, figure, rows, [], made)
    assert paths is not None
    assert f">{figure.title}<" not in paths  # the report's figures need no font


@pytest.mark.parametrize("figure", [ADVANTAGE, SURVIVAL, LOAD, FOREST], ids=lambda figure: figure.kind)
def test_nothing_is_drawn_of_nothing(figure: Figure, made: list[Record], tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(figure, data="cifar10")
    failed = [record(r.key.ablation, r.key.seed, {}, state="failed", error="E", path=r.path) for r in made]
    bare = [record(r.key.ablation, r.key.seed, {"test/acc": 1.0}, path=tmp_path / "empty") for r in made]
    assert figures.draw(SPEC, figure, [], [], []) is None
    assert figures.draw(SPEC, elsewhere, estimates(SPEC, made), [], made) is None
    for found in (failed, bare):
        assert figures.draw(SPEC, figure, estimates(SPEC, found), [], found) is None


def test_the_advantage_is_the_mean_over_pairs_of_one_seed_in_percent(made: list[Record]) -> None:
    canvas = advantage(SPEC, ADVANTAGE, {}, made)
    assert canvas is not None
    losses = {(r.key.ablation, r.key.seed): r.metrics for r in made}
    for line, band, (a, b) in zip(
        canvas.axes[0].lines, canvas.axes[0].collections, (("a", "b"), ("c", "b")), strict=False
    ):
        assert list(line.get_xdata()) == [20, 60, 100]
        for at, percent in enumerate((20, 60, 100)):
            name = f"val_at/{percent:03d}"
            gaps = [100 * math.log(losses[b, seed][name] / losses[a, seed][name]) for seed in (0, 1)]
            expected = t_estimate(gaps)
            assert line.get_ydata()[at] == pytest.approx(expected.mean)
            (path,) = band.get_paths()
            heights = path.vertices[path.vertices[:, 0] == percent, 1]
            assert (heights.min(), heights.max()) == pytest.approx((expected.ci_low, expected.ci_high))
    ahead, behind = (line.get_ydata()[-1] for line in canvas.axes[0].lines[:2])
    assert ahead > 0 > behind  # a has the lower loss, c the higher one


def test_a_run_that_failed_takes_only_its_own_seed_out_of_the_advantage(made: list[Record]) -> None:
    (lost,) = [r for r in made if (r.key.ablation, r.key.seed) == ("a", 1)]
    found = [r for r in made if r is not lost] + [record("a", 1, {}, state="failed", error="E")]
    canvas = advantage(SPEC, ADVANTAGE, {}, found)
    assert canvas is not None
    one, two = canvas.axes[0].lines[:2]
    losses = {(r.key.ablation, r.key.seed): r.metrics for r in made}
    expected = 100 * math.log(losses["b", 0]["val_at/100"] / losses["a", 0]["val_at/100"])
    assert one.get_ydata()[-1] == pytest.approx(expected)
    assert len(two.get_xdata()) == 3
    alone = [r for r in found if (r.key.ablation, r.key.seed) not in (("b", 0), ("c", 1))]
    left = advantage(SPEC, ADVANTAGE, {}, alone)
    assert left is None  # a has seed 0 only, b seed 1 only, c seed 0 only


def test_survival_is_the_mean_purity_after_so_many_updates(made: list[Record]) -> None:
    canvas = survival(SPEC, SURVIVAL, _by_cell(made), [])
    assert canvas is not None
    (axes,) = canvas.axes
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "5", "100"]
    for container in axes.containers:
        line = container[0]
        assert list(line.get_xdata()) == [1, 6, 101]  # shifted by one, so that the start can be shown
        assert list(line.get_ydata()) == pytest.approx([100 / (1 + u / 10) - 0.5 for u in UPDATES])
    assert [c.get_label() for c in axes.containers] == ["a", "b"]


def test_the_heat_map_is_the_first_seeds_load_of_every_expert_over_the_epochs(made: list[Record]) -> None:
    canvas = load(SPEC, LOAD, {}, made)
    assert canvas is not None
    panels = {axes.get_title(): axes.images[0] for axes in canvas.axes if axes.images and axes.get_title()}
    assert set(panels) == {"a, layer 0", "a, layer 2", "b, layer 2"}
    for title, layer in (("a, layer 0", 0), ("a, layer 2", 1), ("b, layer 2", 0)):
        epochs = np.array(_loads(0, 2 if title.startswith("a") else 1, 4))  # seed 0, although seed 1 came first
        expected = np.log2(np.maximum(epochs[:, layer].T, 1 / 16))  # experts down, epochs across
        assert panels[title].get_array().shape == (4, 3)
        np.testing.assert_allclose(panels[title].get_array(), expected)
        assert panels[title].get_clim() == (-3, 3)
    only = dataclasses.replace(LOAD, rows=("b", "nowhere"))
    assert load(SPEC, only, {}, made) is not None


def test_a_forest_of_another_metric_has_that_metrics_numbers_and_the_baselines_band(made: list[Record]) -> None:
    canvas = figures._forest(SPEC, FOREST, _by_cell(made), [])
    assert canvas is not None
    (axes,) = canvas.axes
    middles = [container[0].get_xdata()[0] for container in axes.containers]
    assert middles == pytest.approx([1.01, 1.11])
    base = _by_cell(made)["b", "mnist", "test/loss"]
    (band,) = axes.patches
    assert band.get_x() == pytest.approx(base.ci_low)
    assert band.get_width() == pytest.approx(base.ci_high - base.ci_low)  # type: ignore[operator]
    accuracy = dataclasses.replace(FOREST, metric="test/acc")
    assert figures.draw(SPEC, accuracy, estimates(SPEC, made), [], made) is None
