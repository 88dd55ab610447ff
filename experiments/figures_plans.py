"""Figures about searches for plans: gaps at any time, decisions that pruning saves, and plans as they were found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from matplotlib.figure import Figure as Canvas

from experiments.claims import Figure, PaperSpec
from experiments.figure_style import COLOURS, Estimates, half_widths, plt, series_style
from experiments.records import Record

PLAN = "plan.json"


def anytime(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """Gap of the best plan so far to the proven optimum: against decisions on the left, against seconds on the right."""
    known = [name for name in figure.rows if (name, figure.data, "search/gap") in estimates]
    if not known:
        return None
    canvas, panels = plt.subplots(1, 2, figsize=(7.0, 3.4), sharey=True)
    for axes, unit in zip(panels, ("steps", "seconds"), strict=True):
        for name in known:
            at, rows = _marks(estimates, name, figure.data, unit)
            if at:
                style = series_style(figure.rows, name)
                axes.errorbar(at, [row.mean for row in rows], yerr=half_widths(rows), label=name, **style)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")
    panels[0].set_xlabel("decisions (log scale)")
    panels[1].set_xlabel("seconds on one core (log scale)")
    panels[0].set_ylabel("gap to the proven optimum (%)")
    panels[0].set_title(figure.title)
    handles, labels = panels[0].get_legend_handles_labels()
    more, names = panels[1].get_legend_handles_labels()
    every = dict(zip(labels + names, handles + more, strict=True))
    canvas.legend(every.values(), every.keys(), loc="outside lower center", ncols=4, frameon=False)
    return canvas


def _marks(estimates: Estimates, name: str, data: str, unit: str) -> tuple[list[float], list[Any]]:
    """The marks that a searcher was measured at, in order, and where it ended."""
    head = f"gap_at/{unit}_"
    found = {
        float(metric.removeprefix(head)): row
        for (ablation, on, metric), row in estimates.items()
        if (ablation, on) == (name, data) and metric.startswith(head)
    }
    spent = estimates.get((name, data, f"search/spent_{unit}"))
    if spent is not None and spent.mean > max(found, default=0.0):
        found[spent.mean] = estimates[(name, data, "search/gap")]
    return sorted(found), [found[mark] for mark in sorted(found)]


def pruning(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """A bar for each ablation: a number of decisions, on a log scale; hatched where the optimum was not always reached."""
    shown = [(name, row) for name in figure.rows if (row := estimates.get((name, figure.data, figure.metric)))]
    if not shown:
        return None
    canvas, axes = plt.subplots(figsize=(3.5, 0.9 + 0.26 * len(shown)))
    for place, (name, row) in enumerate(shown):
        reached = estimates.get((name, figure.data, "search/reached"))
        always = reached is None or reached.mean >= 100
        colour = COLOURS[0] if name == figure.rows[0] else COLOURS[5]
        axes.barh(
            place, row.mean, xerr=half_widths([row]), color=colour, hatch="" if always else "///", edgecolor="white"
        )
        note = f"{row.mean:,.0f}" + ("" if always else f", reached in {reached.mean:.0f} %" if reached else "")
        end = row.mean if row.ci_high is None else max(row.mean, row.ci_high)  # beyond the error bar
        axes.annotate(note, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=6.5)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 4)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"{spec.metric(figure.metric).label} (log scale)")
    axes.set_title(figure.title)
    return canvas


def plan(spec: PaperSpec, figure: Figure, estimates: Estimates, records: Sequence[Record]) -> Canvas | None:
    """The plan that the first seed of the first row found: blocks of the model with their variables, and what it costs."""
    mine = [r for r in records if (r.key.ablation, r.key.data) == (figure.rows[0], figure.data) and r.state == "done"]
    for record in sorted(mine, key=lambda r: r.key.seed)[:1]:
        if (record.path / PLAN).exists():
            return _drawn(record, figure.title)
    return None


def _drawn(record: Record, title: str) -> Canvas:
    from hydra.utils import instantiate

    from datamodules.planning.explain import blocks
    from datamodules.planning.plan import Plan
    from datamodules.planning.price import Evaluator
    from experiments.planning.draw import draw_blocks, draw_cost, draw_memory

    data = instantiate(yaml.safe_load((record.path / "config.yaml").read_text())["datamodule"])
    graph, found = data.source.graph, Plan.load(record.path / PLAN)
    evaluator = Evaluator(graph, data.topology)
    cost = evaluator.price(found)
    with plt.rc_context({"axes.grid": False}):
        canvas = plt.figure(figsize=(10.5, 5.2))
        halves: Any = canvas.subfigures(1, 2, width_ratios=[1.3, 1])
        draw_blocks(halves[0].subplots(), blocks(graph, data.topology, found, evaluator), found)
        rows: Any = halves[1].subfigures(2, 1, height_ratios=[1, 1])
        draw_cost(rows[0].subplots(), cost)
        draw_memory(rows[1].subplots(), cost, data.topology)
    canvas.suptitle(f"{title}: {graph.name} on {data.topology.name}", fontsize=9, x=0.01, ha="left")
    return canvas
