"""The MLflow UI as a newcomer meets it: a real server over a real store, looked at in a real Chromium.

FIVEFOLD_UI_RUNS names a runs/ folder to look at instead of the one that is made here, for screenshots of real runs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import factory
import pytest
import yaml
from browser_fixtures import browser, keep, new_page

from experiments import showcase, tracking, tracking_views
from experiments.claims import Figure
from experiments.records import CellKey, Record
from experiments.verdict import estimates, judge

__all__ = ["browser"]
pytestmark = pytest.mark.slow
NOISE = [f"noise/gaussian_{level}/acc" for level in (0.1, 0.5)]


class Served(NamedTuple):
    """A server's address, and what is looked at there: an experiment, and a run with a picture."""

    address: str
    said: str
    experiment: str
    run: str
    picture: str


def _fill(runs: Path) -> tuple[str, str, str]:
    """Two ablations of two seeds, tracked as a reproduction tracks them. Returns experiment, a parent's id, its picture."""
    spec = factory.paper(
        factory.claim("c1"),
        tables=(factory.table("a", "b", columns=("test/acc", "val/acc", "cost/params")),),
        figures=(
            Figure("curves", "noise", "Noise", "mnist", ("a", "b")),
            Figure("all", "forest", "All", "mnist", ("a", "b")),
        ),
    )
    store = tracking.Store(runs)
    tracking.prepare(store)
    experiment = tracking.experiment_id(store, spec.key, "3. A toy paper", showcase.describe(spec))
    records, parents = [], {}
    for ablation, base in (("a", 95.0), ("b", 92.0)):
        axes = {"paper": spec.key, "ablation": ablation, "data": "mnist", "profile": "small"}
        parent = tracking.parent_run(store, experiment, **axes, params={})
        parents[tuple(axes.values())] = (experiment, parent)
        for seed in range(2):
            values = {"test/acc": base + seed, "val/acc": base - seed, "cost/params": 2150.0}
            records.append(
                _seed(store, runs, experiment, parent, ablation, seed, values | dict.fromkeys(NOISE, base - 9))
            )
    rows = estimates(spec, records)
    for group, (_, parent) in parents.items():
        mine = {r.metric: (r.mean, r.ci_low, r.ci_high, r.n) for r in rows if r.ablation == group[1]}
        tracking.summarise_parent(store, parent, mine, "FINISHED")
    showcase.show(store, spec, records, judge(spec, records, "small"), parents)
    return experiment, parents[spec.key, "a", "mnist", "small"][1], "curves.svg"


def _seed(
    store: Any, runs: Path, experiment: str, parent: str, ablation: str, seed: int, values: dict[str, float]
) -> Record:
    made = factory.record(ablation, seed, values, path=runs / f"{ablation}{seed}")
    made.path.mkdir(parents=True)
    config = {"seed": seed, "net": {"layer": ablation}, "datamodule": {"seed": seed}}
    (made.path / "config.yaml").write_text(yaml.safe_dump(config))
    key = CellKey("toy", ablation, "mnist", seed, "small")
    arguments = (
        store,
        experiment,
        parent,
        key,
        made.signature,
        {"net.layer": ablation},
        "net: 1\n",
        {"command": "fivefold"},
    )
    with tracking.open_child(*arguments, log_system_metrics=False) as child:
        for step in range(5):
            child.logger.log_metrics({"train/loss": 1 / (1 + step)}, step)
        child.logger.log_metrics(values)
    return replace(made, manifest={**made.manifest, "mlflow_run_id": child.run_id})


def _found(runs: Path) -> tuple[str, str, str]:
    """The same of a runs/ folder that is there: the first run with a picture."""
    store = tracking.Store(runs)
    client = tracking._client(store)
    for experiment in sorted(client.search_experiments(filter_string="tags.paper LIKE '%'"), key=lambda e: e.name):
        for run in client.search_runs([experiment.experiment_id], f"tags.`{tracking.GROUP}` != ''"):
            for picture in client.list_artifacts(run.info.run_id, showcase.PICTURES):
                return experiment.experiment_id, run.info.run_id, Path(picture.path).name
    raise AssertionError(f"{runs} tracks no ablation with a picture")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`fivefold ui` in a process of its own, over a store that is as a reproduction leaves it."""
    given = os.environ.get("FIVEFOLD_UI_RUNS")
    runs = Path(given) if given else tmp_path_factory.mktemp("ui") / "runs"
    looked_at = _found(runs) if given else _fill(runs)
    said = tmp_path_factory.mktemp("said") / "out"
    command = [sys.executable, "-m", "experiments.cli", "ui", "--port", "5850"]
    environment = {**os.environ, "FIVEFOLD_HOME": str(runs.parent), "PYTHONUNBUFFERED": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with open(said, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        deadline = time.monotonic() + 240
        while not (address := re.search(r"MLflow UI: (http://127\.0\.0\.1:\d+)", said.read_text())):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < deadline, f"the server did not start: {said.read_text()}"
            time.sleep(0.3)
        time.sleep(0.5)  # the lines after the address
        yield Served(address.group(1), said.read_text(), *looked_at)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=240)


def _open(browser: Any, address: str) -> tuple[Any, list[str]]:
    page, errors = new_page(browser)
    # The panel that the UI opens beside the runs on a first visit, of no use without a model to talk to.
    page.add_init_script("localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');"
                         "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")  # fmt: skip
    page.goto(address, wait_until="commit")
    return page, errors


def test_the_server_says_where_to_compare_ablations(served: Served) -> None:
    assert "Compare ablations:" in served.said
    expected = tracking_views.view_address(served.address, served.experiment, "means")
    assert expected in served.said


def test_a_newcomer_sees_means_with_their_intervals(browser: Any, served: Served) -> None:
    page, _ = _open(browser, tracking_views.view_address(served.address, served.experiment, "means"))
    page.get_by_role("link", name=re.compile(r".+ on .+ \(")).first.wait_for()
    page.get_by_text(re.compile(r"\d ± \d")).first.wait_for()
    assert page.get_by_role("link", name=re.compile("^seed ")).count() == 0
    page.get_by_text("Start with").first.wait_for()
    page.wait_for_timeout(1500)
    keep(page, "mlflow_means")
    page.context.close()


def test_seeds_are_grouped_by_ablation(browser: Any, served: Served) -> None:
    page, _ = _open(browser, tracking_views.view_address(served.address, served.experiment, "seeds"))
    page.get_by_text(re.compile("^Group: ablation")).first.wait_for()
    page.get_by_role("link", name=re.compile("^seed 0")).first.wait_for()
    assert page.get_by_text(re.compile("^Group: ablation")).count() >= 2
    page.wait_for_timeout(1500)
    keep(page, "mlflow_seeds")
    page.context.close()


def test_views_are_offered_by_name(browser: Any, served: Served) -> None:
    page, _ = _open(browser, f"{served.address}/#/experiments/{served.experiment}/runs?workflowType=machine_learning")
    page.get_by_role("button", name="Views").first.click()
    for name in ("Means over seeds", "Seeds, grouped by ablation", "Report and pictures"):
        page.get_by_text(name, exact=True).first.wait_for()
    page.context.close()


def test_a_chart_compares_ablations(browser: Any, served: Served) -> None:
    page, _ = _open(browser, tracking_views.view_address(served.address, served.experiment, "means", charts=True))
    page.get_by_text("What the paper's tables show").first.wait_for()
    page.locator(".js-plotly-plot .bars path, .js-plotly-plot .barlayer path").first.wait_for(state="attached")
    page.wait_for_timeout(3000)
    keep(page, "mlflow_chart")
    page.context.close()


def test_a_picture_previews(browser: Any, served: Served) -> None:
    artifact = f"artifacts/{showcase.PICTURES}/{served.picture}?workflowType=machine_learning"
    where = f"{served.address}/#/experiments/{served.experiment}/runs/{served.run}/{artifact}"
    page, _ = _open(browser, where)
    picture = page.locator("img[src^='blob:'], img[src*='get-artifact'], img[src^='data:image/svg']").first
    picture.wait_for()
    page.wait_for_function("[...document.images].some(i => i.complete && i.naturalWidth > 100)")
    page.wait_for_timeout(1500)
    keep(page, "mlflow_picture")
    page.context.close()
