"""What the tracker shows beside runs: saved views, notes, one run for a paper's report, and addresses that open on a view."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from experiments import tracking
from experiments.tracking import Store

VIEW_TAG = "mlflow.sharedViewState."  # on experiments; the UI's menu "Views" lists them
REPORT = "fivefold.report"  # on the one run that holds a paper's figures and verdicts: paper/profile
CURRENT = "current"  # on seeds: yes, or no where a later run of the same cell has taken its place in the report
NOTE = "mlflow.note.content"
# The columns that the UI always has, and those of a view, in pixels.
FIRST_COLUMNS = {"0": 73, "attributes.`Run Name`": 270, "runDateAndNestInfo": 130, "duration": 80}
WIDTHS = {"metrics.": 110, "params.": 120, "tags.": 150}
TAG_CHARS = 4900  # MLflow's limit is 5000


@dataclass(frozen=True)
class View:
    """A saved view of an experiment's runs table.

    Attributes:
        key: of the address; a later view with the same key takes its place.
        name: as the menu "Views" shows it.
        search: MLflow's filter expression.
        order_by: a column such as "metrics.`test/acc`"; ascending or not.
        columns: the columns shown, in order, such as "params.`ablation`".
        group_by: params whose runs are averaged together; empty: a row for each run.
        bars: metrics drawn first, as bars, where the view is shown as charts.
    """

    key: str
    name: str
    search: str = ""
    order_by: str = "attributes.start_time"
    ascending: bool = False
    columns: tuple[str, ...] = ()
    group_by: tuple[str, ...] = ()
    bars: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """Return what the UI keeps of a view."""
        groups = [{"mode": "param", "groupByData": name} for name in self.group_by]
        section = {"uuid": "fivefold", "name": "What the paper's tables show", "display": True, "isReordered": False}
        drawn = {
            "sections": [{**section, "deleted": False, "isGenerated": False}],
            "charts": list(map(_bar, self.bars)),
        }
        charts = {f"compareRun{name.title()}": parts for name, parts in drawn.items()} if self.bars else {}
        shown = [*FIRST_COLUMNS, *self.columns] if self.columns else []
        return charts | {
            "columnOrder": shown,
            "columnWidths": {name: FIRST_COLUMNS.get(name) or WIDTHS[name.partition("`")[0]] for name in shown},
            "searchFilter": self.search,
            "orderByKey": self.order_by,
            "orderByAsc": self.ascending,
            "selectedColumns": list(self.columns),
            "groupBy": {"aggregateFunction": "average", "groupByKeys": groups} if groups else None,
            "isAccordionReordered": bool(self.bars),  # or the UI would sort the sections of charts by name
            "useGroupedValuesInCharts": True,
            "runsHiddenMode": "FIRST_20_RUNS",
        }


def _bar(metric: str) -> dict[str, Any]:
    name = {"uuid": f"bar-{metric}", "metricKey": metric, "displayName": metric, "metricSectionId": "fivefold"}
    return {"type": "BAR", "runsCountToCompare": 20, "deleted": False, "isGenerated": False, **name}


def save_views(store: Store, experiment_id: str, views: Sequence[View]) -> None:
    """Have an experiment offer views; one that is there as it should be is not touched, so that its age stays.

    Raises:
        ValueError: a view is longer than the tracker keeps.
    """
    client = tracking._client(store)
    with store.database.lock:
        there = client.get_experiment(experiment_id).tags
        for at, view in enumerate(views):
            state = json.dumps(view.state(), separators=(",", ":"))
            # The menu lists the newest first; the order given here is kept, whenever they are written.
            age = len(views) - at
            value = json.dumps({"name": view.name, "createdAt": age, "updatedAt": age, "state": state})
            if len(value) > TAG_CHARS:
                raise ValueError(f"the view '{view.key}' takes {len(value)} characters, the tracker keeps {TAG_CHARS}")
            if there.get(VIEW_TAG + view.key) != value:
                client.set_experiment_tag(experiment_id, VIEW_TAG + view.key, value)


def annotate(
    store: Store,
    run_id: str,
    note: str = "",
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
) -> None:
    """Give a run a description (Markdown), tags and params; tags that are there are replaced, params stay as they are."""
    from mlflow.entities import RunTag

    client = tracking._client(store)
    named = {tag_name(name): str(value)[:TAG_CHARS] for name, value in (tags or {}).items()}
    named |= {NOTE: note[:TAG_CHARS]} if note else {}
    with store.database.lock:  # another command may be reporting the same runs
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in named.items()])
        tracking._log_params(client, run_id, params or {})


def tag_name(label: str) -> str:
    """Return words as a tag's name that the tracker takes and a column can show."""
    return re.sub(r"[^\w/.: -]+", " ", label, flags=re.ASCII)[:100].strip()


def report_run(store: Store, experiment_id: str, paper: str, profile: str, name: str) -> str:
    """Return the id of the run that holds a paper's figures and verdicts under a profile, made if need be, FINISHED."""
    client, identity = tracking._client(store), f"{paper}/{profile}"
    with store.database.lock:
        query = f"tags.`{REPORT}` = {tracking._quoted(identity)}"
        found = client.search_runs([experiment_id], query, max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {"paper": paper, "profile": profile, REPORT: identity, "mlflow.source.name": "fivefold"}
        run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
    client.set_terminated(run_id, "FINISHED")
    return run_id


def mark_current(store: Store, experiment_id: str, parent_run_id: str, run_ids: Set[str]) -> None:
    """Tell the seeds that a report is made from apart from those that were made again since."""
    client = tracking._client(store)
    query = f"tags.`{tracking.PARENT}` = {tracking._quoted(parent_run_id)}"
    token: str | None = ""
    while token is not None:
        page = client.search_runs([experiment_id], query, page_token=token or None)
        for run in page:
            word = "yes" if run.info.run_id in run_ids else "no"
            if run.data.tags.get(CURRENT) != word:
                annotate(store, run.info.run_id, tags={CURRENT: word})
        token = page.token or None


def log_pictures(store: Store, run_id: str, pictures: Mapping[str, str], folder: str = "pictures") -> None:
    """Attach drawings and texts, {file name: content}; the UI previews what ends in .svg, .md or .csv."""
    client = tracking._client(store)
    for name, content in pictures.items():
        client.log_text(run_id, content, f"{folder}/{name}")


def has_artifacts(store: Store, run_id: str, folder: str) -> bool:
    """Whether a run has anything under a folder."""
    return bool(tracking._client(store).list_artifacts(run_id, folder))


def doors(store: Store, address: str) -> list[str]:
    """Return, for each experiment that has views, a line with its name and the address that opens its first view."""
    lines = []
    for experiment in sorted(tracking._client(store).search_experiments(), key=lambda e: e.name):
        keys = [name.removeprefix(VIEW_TAG) for name in experiment.tags if name.startswith(VIEW_TAG)]
        if keys:
            key = "means" if "means" in keys else sorted(keys)[0]
            lines.append(f"  {experiment.name}: {view_address(address, experiment.experiment_id, key)}")
    return ["Compare ablations:", *lines] if lines else []


def view_address(server: str, experiment_id: str, key: str, charts: bool = False) -> str:
    """Return the address of a saved view; `charts`: as charts instead of a table."""
    mode = "&compareRunsMode=CHART" if charts else ""
    return f"{server}/#/experiments/{experiment_id}/runs?viewStateShareKey={key}&workflowType=machine_learning{mode}"


def experiment_of(store: Store, paper: str) -> str | None:
    """Return the id of a paper's experiment, or None where there is none."""
    found = tracking._client(store).search_experiments(filter_string=f"tags.paper = {tracking._quoted(paper)}")
    return str(found[0].experiment_id) if found else None
