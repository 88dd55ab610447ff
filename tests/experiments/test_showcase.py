"""What the tracker shows a newcomer: views that the UI can read, results in words, notes, pictures, the report's run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from factory import claim, operand, paper, record, table
from tracking_fixtures import child, client_of, joined, make_parent, start, store, template, together

from experiments import showcase, tracking, tracking_views
from experiments.claims import Figure, available_papers, load_paper
from experiments.tracking_views import View
from experiments.verdict import estimates, judge

__all__ = ["store", "template"]
NOISE = [f"noise/gaussian_{level}/acc" for level in (0.1, 0.5)]


def _spec():
    figures = (
        Figure("curves", "noise", "Noise", "mnist", ("a", "b")),
        Figure("all", "forest", "All", "mnist", ("a", "b")),
    )
    return paper(claim("c1"), tables=(table("a", "b", columns=("test/acc", "cost/params")),), figures=figures)


def _records(tmp_path: Path):
    found = []
    for name, base in (("a", 95.0), ("b", 92.0)):
        for seed in range(2):
            folder = tmp_path / "cells" / f"{name}{seed}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "net": {"layer": name, "width": 4}}))
            values = {"test/acc": base + seed, "cost/params": 2150.0} | dict.fromkeys(NOISE, base - 9 - seed)
            found.append(record(name, seed, values, path=folder))
    return found


def test_every_papers_views_fit_and_name_columns_that_it_logs() -> None:
    for key in available_papers().values():
        spec = load_paper(key)
        found = showcase.views(spec)
        assert [view.key for view in found] == ["means", "seeds", "all", "report"]
        for view in found:
            state = view.state()
            assert len(json.dumps({"name": view.name, "state": json.dumps(state)})) < tracking_views.TAG_CHARS
            assert set(state["columnWidths"]) == set(state["columnOrder"])
        for name in [c.split("`")[1] for c in found[1].columns if c.startswith("metrics.")]:
            spec.metric(name)
        assert spec.title in showcase.describe(spec)


def test_views_are_saved_as_the_ui_reads_them_and_once(store: tracking.Store) -> None:
    experiment, _ = make_parent(store)
    views = [
        View("means", "Means", "tags.a != ''", columns=("metrics.`x`",), bars=("x",)),
        View("seeds", "Seeds", group_by=("a",)),
    ]
    tracking_views.save_views(store, experiment, views)
    before = client_of(store).get_experiment(experiment).tags
    tracking_views.save_views(store, experiment, views)
    assert client_of(store).get_experiment(experiment).tags == before
    saved = {name: json.loads(before[tracking_views.VIEW_TAG + name]) for name in ("means", "seeds")}
    assert saved["means"]["name"] == "Means"
    assert saved["means"]["createdAt"] > saved["seeds"]["createdAt"]
    state = json.loads(saved["means"]["state"])
    assert state["searchFilter"] == "tags.a != ''"
    assert state["selectedColumns"] == ["metrics.`x`"]
    assert state["compareRunCharts"][0]["metricSectionId"] == state["compareRunSections"][0]["uuid"]
    grouped = json.loads(saved["seeds"]["state"])["groupBy"]
    assert grouped == {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "a"}]}
    (head, line) = tracking_views.doors(store, "http://127.0.0.1:5000")
    assert head == "Compare ablations:"
    assert f"/#/experiments/{experiment}/runs?viewStateShareKey=means&" in line


def test_a_view_that_the_tracker_would_cut_is_refused(store: tracking.Store) -> None:
    experiment, _ = make_parent(store)
    with pytest.raises(ValueError, match="'wide' takes"):
        tracking_views.save_views(store, experiment, [View("wide", "Wide", "x" * 5000)])


def test_a_finished_paper_is_shown_on_its_parents_and_in_one_report(store: tracking.Store, tmp_path: Path) -> None:
    spec, found = _spec(), _records(tmp_path)
    found = [replace(r, manifest={k: v for k, v in r.manifest.items() if k != "mlflow_run_id"}) for r in found]
    experiment = tracking.experiment_id(store, "toy", "3. A toy", showcase.describe(spec))
    parents = {}
    for name in ("a", "b"):
        axes = {"paper": "toy", "ablation": name, "data": "mnist", "profile": "small"}
        parents[tuple(axes.values())] = (experiment, tracking.parent_run(store, experiment, **axes, params={}))
    verdicts = judge(spec, found, "small")
    for _ in range(2):  # a second report changes nothing and adds nothing
        showcase.show(store, spec, found, verdicts, parents)
    client = client_of(store)
    run = client.get_run(parents["toy", "a", "mnist", "small"][1])
    assert run.data.tags["test accuracy: points"].startswith("95.50 ± ")
    assert run.data.tags["seeds"] == "2"
    assert run.data.params["net.layer"] == "a"
    assert "seed" not in run.data.params
    assert "**c1**" in run.data.tags[tracking_views.NOTE]
    assert [f.path for f in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/curves.svg"]
    (report,) = client.search_runs([experiment], f"tags.`{tracking_views.REPORT}` != ''")
    assert report.info.run_name == "Report and pictures (small)"
    assert report.info.status == "FINISHED"
    assert {f.path for f in client.list_artifacts(report.info.run_id, "figures")} == {
        "figures/curves.svg",
        "figures/all.svg",
    }
    assert "| c1 |" in report.data.tags[tracking_views.NOTE]
    found_by = {v.key: client.search_runs([experiment], v.search) for v in showcase.views(spec)}
    assert {r.info.run_id for r in found_by["means"]} == {run for _, run in parents.values()}
    assert [r.info.run_id for r in found_by["report"]] == [report.info.run_id]


def _annotate(store: tracking.Store, gate: Path, me: int, experiment: str, run: str) -> None:
    tracking_views.experiment_of(store, "toy")  # the imports are over with
    for again in range(5):
        (gate / str(again)).mkdir(exist_ok=True)
        together(gate / str(again), me, 2)
        tracking_views.annotate(
            store, run, f"note {again}", {f"t{again}": "x"}, {f"p{again}.{k}": k for k in range(150)}
        )
        tracking_views.save_views(store, experiment, [View("means", f"Means {again}", bars=("x",))])


def test_two_commands_may_show_the_same_runs_at_once(store: tracking.Store, tmp_path: Path) -> None:
    experiment, run = make_parent(store)
    (tmp_path / "gate").mkdir()
    both = [start(_annotate, store, tmp_path / "gate", me, experiment, run) for me in range(2)]
    assert joined(both) == [0, 0]
    found = client_of(store).get_run(run).data
    assert sum(name.startswith("p") and name[1].isdigit() for name in found.params) == 750
    assert found.tags["t4"] == "x"


def test_seeds_that_were_made_again_are_told_apart(store: tracking.Store) -> None:
    parent = make_parent(store)
    ids = []
    for seed in range(3):
        with child(store, parent, seed) as run:
            ids.append(run.run_id)
    for latest in ({ids[0], ids[1]}, {ids[1], ids[2]}):
        tracking_views.mark_current(store, *parent, latest)
        found = client_of(store).search_runs([parent[0]], f"tags.`{tracking_views.CURRENT}` = 'yes'")
        assert {run.info.run_id for run in found} == latest


def test_the_metrics_that_claims_weigh_come_first() -> None:
    spec = paper(
        claim("c1", operands=(operand("a", "val/acc"), operand("b", "val/acc"))),
        claim("c2", operands=(operand("a", "val/acc"), operand("b", "val/acc"))),
        claim("c3", operands=(operand("a", "test/loss"), operand("b", "test/loss"))),
        tables=(table("a", columns=("test/acc", "cost/params", "test/loss")),),
    )
    assert [metric.name for metric in showcase.headline(spec)] == ["val/acc", "test/loss", "test/acc"]


def test_pictures_are_of_one_ablation_alone(tmp_path: Path) -> None:
    spec, found = _spec(), _records(tmp_path)
    mine = [r for r in found if r.key.ablation == "b"]
    drawn = showcase.pictures(spec, estimates(spec, found), mine, "small")
    assert list(drawn) == ["curves.svg"]
    assert showcase.pictures(spec, estimates(spec, found), mine, "small", ("load",)) == {}


def test_only_settings_that_all_seeds_share_are_a_parents(tmp_path: Path) -> None:
    assert showcase.shared(_records(tmp_path)[:2]) == {"net.layer": "a", "net.width": 4}
    assert showcase.shared([record("a", 0, {})]) == {}


def test_what_an_ablation_is_comes_from_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "ablation" / "toy"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text(
        "# @package _global_\n# Two layers,\n# both tropical. Feeds C1, C2. Minutes per cell: 3.\nnet: x\n"
    )
    assert showcase.about("toy", "a", tmp_path) == "Two layers, both tropical."
    assert showcase.about("toy", "unknown", tmp_path) == "The ablation `unknown`."
    for key in available_papers().values():
        for _, ablation, *_ in [(0, o.ablation) for c in load_paper(key).claims for o in c.operands if o.ablation]:
            said = showcase.about(key, ablation)
            assert "Minutes per" not in said
            assert len(said) > 10


def test_a_note_names_the_claims_that_an_ablation_feeds() -> None:
    spec = paper(claim("c1"), claim("c2", operands=(operand("x"), operand("b"))))
    verdicts = judge(spec, [record("a", 0, {"test/acc": 1.0}), record("b", 0, {"test/acc": 1.0})], "small")
    assert "**c1**" in showcase.note(spec, "a", "mnist", verdicts)
    assert "**c2**" not in showcase.note(spec, "a", "mnist", verdicts)
    assert "**c1**" not in showcase.note(spec, "a", "cifar10", verdicts)
