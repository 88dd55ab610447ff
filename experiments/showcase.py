"""What a newcomer meets in the tracker: descriptions, saved views, results in words, and pictures on the runs they are of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from experiments import figures, report, tables, tracking_views
from experiments.cell import CONF, flatten
from experiments.claims import Figure, Metric, PaperSpec
from experiments.records import Record
from experiments.tracking import GROUP, PARENT, Store
from experiments.tracking_views import View
from experiments.verdict import EstimateRow, Verdict, estimates

# Figures that say something of one ablation alone; the others compare several and belong to the paper.
OF_ONE = ("noise", "curves", "survival", "load", "strength", "gallery", "blur", "plan", "plans")
OF_A_SEED = ("load", "gallery", "plan", "plans")  # drawn from the files of a single run
HEADLINES = 4  # metrics that a view shows
PICTURES = "pictures"
Group = tuple[str, ...]  # paper, ablation, data, scale


def describe(spec: PaperSpec) -> str:
    """Return the Markdown that the tracker shows above a paper's runs."""
    first = headline(spec)[0] if headline(spec) else None
    better = {"higher": ", higher is better", "lower": ", lower is better"}.get(first.direction, "") if first else ""
    shown = f"`{first.name}` is {first.label} ({first.unit}{better})." if first else ""
    return (
        f"**Paper {spec.number}: {spec.title}** (arXiv {spec.arxiv}). Start with **Views** at the top right:\n\n"
        "- **Means over seeds**: a row for each ablation on each data set; its mean and half its 95 % interval in words, "
        "the ends of the interval as metrics `.ci_low` and `.ci_high`. The chart symbol above the table draws them.\n"
        "- **Seeds, grouped by ablation**: the seeds themselves; unfold a group to see each, the chart symbol draws their "
        "training.\n"
        "- **Every seed, a row each**, with those that were made again since: tick some and press *Compare* for all that "
        "differs between them.\n"
        "- **Report and pictures**: the verdicts on the paper's claims and all figures, under *Artifacts* of that run.\n\n"
        f"{shown} Pictures of a single ablation are in its run under *Artifacts*, `{PICTURES}/`. "
        "`fivefold compare A B` shows the same differences in a terminal; `fivefold explain CLAIM` says how a verdict came "
        "about.\n"
    )


def headline(spec: PaperSpec) -> list[Metric]:
    """Return the metrics that matter most: those that the most claims weigh, costs left out; equals in the tables' order."""
    weighed = Counter(name for claim in spec.claims for name in {o.metric for o in claim.operands})
    shown = dict.fromkeys(column.metric for table in spec.tables for column in table.columns)
    order = {name: at for at, name in enumerate([*shown, *sorted(weighed)])}
    measured = [name for name in order if not name.startswith("cost/")]
    return [spec.metric(name) for name in sorted(measured, key=lambda name: (-weighed[name], order[name]))[:HEADLINES]]


def views(spec: PaperSpec) -> list[View]:
    """Return the saved views of a paper's experiment."""
    metrics = headline(spec)
    axes = ("params.`ablation`", "params.`data`")
    names = tuple(metric.name for metric in metrics)
    numbers, words = (
        tuple(f"metrics.`{name}`" for name in names),
        tuple(f"tags.`{_word(metric)}`" for metric in metrics),
    )
    # Ordered by a metric and not by age, the UI shows what the filter finds and adds no parents to it.
    order = View("", "", order_by=numbers[0], ascending=metrics[0].direction == "lower") if metrics else View("", "")
    parents = f"tags.`{GROUP}` != '' AND tags.`ablation` != ''"
    children = f"tags.`{PARENT}` != '' AND tags.`ablation` != ''"
    latest = f"tags.`{tracking_views.CURRENT}` = 'yes'"  # not those that were made again since
    seeds = replace(order, search=children, columns=(*axes, "params.`profile`", "params.`seed`", *numbers))
    return [
        replace(
            order,
            key="means",
            name="Means over seeds",
            search=parents,
            columns=(*numbers[:1], *axes, *words),
            bars=names,
        ),
        replace(seeds, key="seeds", name="Seeds, grouped by ablation", search=latest, group_by=("ablation", "data")),
        replace(seeds, key="all", name="Every seed, a row each"),
        View("report", "Report and pictures", f"tags.`{tracking_views.REPORT}` != ''", columns=("tags.`profile`",)),
    ]


def _word(metric: Metric) -> str:
    """The tag under which a parent says a metric's mean and interval in words."""
    return tracking_views.tag_name(f"{metric.label}: {metric.unit}")


def show(
    store: Store,
    spec: PaperSpec,
    records: Sequence[Record],
    verdicts: Sequence[Verdict],
    parents: Mapping[Group, tuple[str, str]],
) -> None:
    """Write what the tracker shows of a finished paper: views, notes, results in words, pictures, and the report's run.

    Args:
        parents: (experiment id, parent run id) of each group of seeds.
    """
    if not parents:
        return
    rows, profile = estimates(spec, records), report.profile_of(records)
    experiment = next(iter(parents.values()))[0]
    tracking_views.save_views(store, experiment, views(spec))
    by_group: dict[Group, list[Record]] = {}
    for record in sorted(records, key=lambda r: r.key):
        if record.state == "done":
            by_group.setdefault(group_of(record), []).append(record)
    for group, (_, run) in parents.items():
        mine = by_group.get(group, [])
        if not mine:
            continue
        _, ablation, data, _ = group
        said = note(spec, ablation, data, verdicts)
        tracking_views.annotate(store, run, said, in_words(spec, rows, group), shared(mine))
        tracking_views.log_pictures(store, run, pictures(spec, rows, mine, profile))
        tracking_views.mark_current(store, experiment, run, {record.run_id for record in mine})
        for record in mine:
            _show_seed(store, spec, rows, record, profile)
    name = f"Report and pictures ({records[0].key.scale})"
    run = tracking_views.report_run(store, experiment, spec.key, records[0].key.scale, name)
    tracking_views.annotate(store, run, verdict_note(verdicts))
    drawn = report.drawings(spec, rows, verdicts, records, profile)
    tracking_views.log_pictures(store, run, {f"{name}.svg": svg for name, (_, svg) in drawn.items()}, "figures")
    about = [f"Profile: {records[0].key.scale}."]
    models = [tables.claims(verdicts, about), *report.models(spec, rows, records, profile)]
    tracking_views.log_pictures(store, run, {f"{m.id}.md": tables.markdown(m) for m in models}, "tables")
    tracking_views.log_pictures(store, run, {"estimates.csv": tables.estimates_csv(rows)}, "tables")


def group_of(record: Record) -> Group:
    """Return the group of seeds that a record is of."""
    key = record.key
    return (key.paper, key.ablation, key.data, key.scale)


def shared(records: Sequence[Record]) -> dict[str, Any]:
    """Return the configuration that all seeds of a group have in common, flat: the columns of its parent."""
    known = [flatten(yaml.safe_load(file.read_text())) for r in records if (file := r.path / "config.yaml").is_file()]
    if not known:
        return {}
    first = known[0]
    return {name: first[name] for name in first if all(other.get(name) == first[name] for other in known)}


def in_words(spec: PaperSpec, rows: Iterable[EstimateRow], group: Group) -> dict[str, str]:
    """Return a group's headline results as people say them: mean, half the interval, seeds."""
    found = {row.metric: row for row in rows if (row.paper, row.ablation, row.data, row.profile) == group}
    known = [(metric, found[metric.name]) for metric in headline(spec) if metric.name in found]
    seeds = {"seeds": str(max(row.n for _, row in known))} if known else {}
    return {_word(metric): tables.number(row) for metric, row in known} | seeds


def note(spec: PaperSpec, ablation: str, data: str, verdicts: Sequence[Verdict]) -> str:
    """Return the description of an ablation's run: what it is, and what became of the claims it feeds."""
    fed = {c.id for c in spec.claims for o in c.operands if ablation in o.ablations and o.data == data}
    lines = [f"- **{v.id}** {v.verdict}: {v.text}" for v in verdicts if v.id in fed]
    claims = "\n\nClaims it feeds on this data:\n\n" + "\n".join(lines) if lines else ""
    return f"{about(spec.key, ablation)}{claims}\n"


def about(paper: str, ablation: str, conf: Path = CONF) -> str:
    """Return what an ablation's file says of it in its opening comment, less the lines for the scheduler."""
    file = conf / "ablation" / paper / f"{ablation}.yaml"
    if not file.is_file():
        return f"The ablation `{ablation}`."
    comment = re.match(r"(?:#.*\n)+", file.read_text())
    lines = [line.lstrip("# ") for line in comment.group().splitlines()] if comment else []
    text = " ".join(line for line in lines if not line.startswith("@package"))
    return re.split(r"\s*(?:Feeds |Minutes per\s)", text)[0] or f"The ablation `{ablation}`."


def verdict_note(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts on a paper's claims as a Markdown table."""
    rows = [f"| {v.id} | {v.verdict} | {v.text} |".replace("\n", " ") for v in verdicts]
    return "\n".join(["| claim | verdict | what it says |", "|---|---|---|", *rows])


def pictures(
    spec: PaperSpec, rows: Sequence[EstimateRow], records: Sequence[Record], profile: str, kinds: Sequence[str] = OF_ONE
) -> dict[str, str]:
    """Return {file name: SVG} of the paper's figures that say something of one ablation, drawn of it alone.

    Args:
        records: the seeds of one ablation on one data set; a single one, for its own pictures.
    """
    key, drawn = records[0].key, {}
    for figure in spec.figures:
        if (
            figure.kind in kinds
            and key.ablation in figure.rows
            and figure.data == key.data
            and profile in figure.profiles
        ):
            alone: Figure = replace(figure, rows=(key.ablation,), title=f"{figure.title}: {key.ablation}")
            if svg := figures.draw(spec, alone, rows, (), records):
                drawn[f"{figure.id}.svg"] = svg
    return drawn


def _show_seed(store: Store, spec: PaperSpec, rows: Sequence[EstimateRow], record: Record, profile: str) -> None:
    """Attach to a seed's own run what is drawn from its own files, once."""
    run = record.manifest.get("mlflow_run_id")
    if not run or tracking_views.has_artifacts(store, run, PICTURES):
        return
    if drawn := pictures(spec, rows, [record], profile, OF_A_SEED):
        tracking_views.log_pictures(store, run, drawn)
