"""Figures for papers: SVG, colour-blind safe, every mean with its interval. The same inputs give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure as Canvas

from experiments.claims import Figure, PaperSpec
from experiments.figure_style import (
    STYLE,
    VERDICT_STYLE,
    Estimates,
    half_widths,
    legend_of_sides,
    paired_gaps,
    plt,
    series_style,
    side_style,
)
from experiments.figures_convergence import curves, gains, rate
from experiments.figures_deblur import blur, gallery, strength
from experiments.figures_experts import advantage, load, survival
from experiments.figures_plans import anytime, plan, pruning
from experiments.records import Record
from experiments.stats import t_estimate
from experiments.verdict import EstimateRow, Verdict

NOISE_TITLES = {
    "gaussian": ("Gaussian", "standard deviation"),
    "salt_pepper": ("salt and pepper", "share of pixels"),
    "salt": ("salt", "share of pixels"),
    "pepper": ("pepper", "share of pixels"),
    "speckle": ("speckle", "standard deviation"),
    "uniform": ("uniform", "half width"),
}


def draw(
    spec: PaperSpec,
    figure: Figure,
    rows: Sequence[EstimateRow],
    verdicts: Sequence[Verdict],
    records: Sequence[Record] = (),
    text_as_paths: bool = True,
) -> str | None:
    """Return a figure as SVG, or None where none of its numbers has been measured.

    Text as paths looks the same everywhere; as text it is a third of the size and needs a reader with a sans-serif font.
    """
    kinds: dict[str, Callable[..., Canvas | None]] = {
        "forest": _forest,
        "noise": _noise,
        "pareto": _pareto,
        "difference": _difference,
        "verdicts": _verdicts,
        "gains": gains,
        "curves": curves,
        "rate": rate,
        "advantage": advantage,
        "survival": survival,
        "load": load,
        "blur": blur,
        "gallery": gallery,
        "strength": strength,
        "anytime": anytime,
        "pruning": pruning,
        "plan": plan,
    }
    estimates = {(row.ablation, row.data, row.metric): row for row in rows}
    with plt.rc_context({**STYLE, "svg.fonttype": "path" if text_as_paths else "none"}):
        extra = records if figure.kind in ("difference", "gains", "advantage", "load", "gallery", "plan") else verdicts
        canvas = kinds[figure.kind](spec, figure, estimates, extra)
        if canvas is None:
            return None
        out = io.StringIO()
        canvas.savefig(
            out, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", pad_inches=0.05
        )
        plt.close(canvas)
    return "\n".join(line.rstrip() for line in _rounded(out.getvalue()).splitlines()) + "\n"


def _rounded(svg: str) -> str:
    """Paths and places to a hundredth of a point, which no eye can tell: files of half the size."""
    return re.sub(r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match.group(0)), svg)


def _forest(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """Each net's test score with its interval, the baseline's as a band."""
    rows = [r for name in figure.rows if (r := estimates.get((name, figure.data, figure.metric)))]
    if not rows:
        return None
    canvas, axes = plt.subplots(figsize=(3.5, 0.8 + 0.24 * len(rows)))
    base = estimates.get((figure.baseline or "", figure.data, figure.metric))
    if base is not None and base.ci_low is not None and base.ci_high is not None:
        axes.axvspan(base.ci_low, base.ci_high, color="#0072B2", alpha=0.15, linewidth=0)
    accuracy = figure.metric == "test/acc"
    for at, (row, half) in enumerate(zip(rows, half_widths(rows), strict=True)):
        axes.errorbar(row.mean, at, xerr=half, **side_style(figure, row.ablation))
        axes.annotate(
            f"{row.mean:{'.2f' if accuracy else '.4f'}}",
            (row.mean, at),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
        )
    axes.set_yticks(range(len(rows)), [row.ablation for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.grid(axis="y", visible=False)
    metric = spec.metric(figure.metric)
    label = "test accuracy (%)" if accuracy else f"{metric.label} ({metric.unit})"
    axes.set_xlabel(f"{label}, mean and 95% interval")
    axes.set_title(figure.title)
    legend_of_sides(canvas, figure)
    return canvas


def _noise(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """Accuracy against noise level, one panel a kind, level 0 being the clean test."""
    levels = _noise_levels(estimates, figure.data)
    if not levels:
        return None
    canvas, grid = plt.subplots(2, 3, figsize=(7.0, 4.0), sharey=True)
    for axes, (kind, values) in zip(grid.flat, levels.items(), strict=False):
        for name in figure.rows:
            points = [(0.0, estimates.get((name, figure.data, "test/acc")))]
            points += [(v, estimates.get((name, figure.data, f"noise/{kind}_{v:g}/acc"))) for v in values]
            known = [(v, row) for v, row in points if row is not None]
            if known:
                at, rows = zip(*known, strict=True)
                axes.errorbar(
                    at, [r.mean for r in rows], yerr=half_widths(rows), label=name, **series_style(figure.rows, name)
                )
        title, unit = NOISE_TITLES.get(kind, (kind.replace("_", " "), "level"))
        axes.set_title(title)
        axes.set_xlabel(unit)
        axes.set_xticks([0, *values], ["0", *(f"{v:g}" for v in values)])
        axes.set_ylim(max(0.0, axes.get_ylim()[0]), min(100.0, axes.get_ylim()[1]))
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy (%)")
    for axes in list(grid.flat)[len(levels) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return canvas


def _noise_levels(estimates: Estimates, data: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {kind: [] for kind in NOISE_TITLES}
    for _, name, metric in estimates:
        if name == data and metric.startswith("noise/"):
            kind, _, level = metric.split("/")[1].rpartition("_")
            found.setdefault(kind, []).append(float(level))
    return {kind: sorted(set(levels)) for kind, levels in found.items() if levels}


def _pareto(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """Accuracy against multiplications, and the front that no other net beats in both."""
    points = []
    for name in figure.rows:
        accuracy = estimates.get((name, figure.data, "test/acc"))
        cost = estimates.get((name, figure.data, "cost/multiplications"))
        if accuracy is not None and cost is not None:
            points.append((cost.mean, accuracy))
    if not points:
        return None
    canvas, axes = plt.subplots(figsize=(3.5, 2.95) if len(points) <= 8 else (5.2, 3.4))
    front: list[tuple[float, float]] = []
    for x, row in sorted(points, key=lambda p: (p[0], -p[1].mean)):
        if not front or row.mean > front[-1][1]:
            front.append((x, row.mean))
    steps = [*front, (max(x for x, _ in points) * 1.25, front[-1][1])]
    axes.step(*zip(*steps, strict=True), where="post", color="#BBBBBB", zorder=1, label="Pareto front")
    for x, row in points:
        axes.errorbar(x, row.mean, yerr=half_widths([row]), **side_style(figure, row.ablation))
    axes.set_xscale("log")
    _label_apart(axes, [(x, row.mean, row.ablation) for x, row in points])
    costs = sorted({x for x, _ in points})
    axes.set_xlim(costs[0] / 1.5, costs[-1] * 2.4)
    round_costs = [m * 10**e for e in range(9) for m in (1, 2, 5) if costs[0] / 1.5 <= m * 10**e <= costs[-1] * 1.5]
    ticks = costs if len(costs) <= 4 else round_costs
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("multiplications per image (log scale)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(figure.title)
    legend_of_sides(canvas, figure)
    return canvas


def _label_apart(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names right of their points, pushed apart where several stand in about the same place of the axis."""
    low, high = axes.get_ylim()
    apart = 0.05 * (high - low)
    waiting = sorted(points)
    while waiting:
        column = [p for p in waiting if p[0] <= 1.3 * waiting[0][0]]
        waiting = waiting[len(column) :]
        right, height = max(x for x, _, _ in column), -math.inf
        for x, y, name in sorted(column, key=lambda p: (p[1], p[0], p[2])):
            height = max(y, height + apart)
            axes.annotate(
                name, (x, y), xytext=(right * 1.09, height), va="center", fontsize=6.5,
                arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "#999999", "shrinkA": 0, "shrinkB": 2},
            )  # fmt: skip


def _difference(spec: PaperSpec, figure: Figure, estimates: Estimates, records: Sequence[Record]) -> Canvas | None:
    """Differences to both baselines under each noise condition, seed by seed, with their paired intervals."""
    name = figure.rows[0]
    conditions = [("test/acc", "clean")]
    for kind, levels in _noise_levels(estimates, figure.data).items():
        conditions += [(f"noise/{kind}_{v:g}/acc", f"{NOISE_TITLES.get(kind, (kind, ''))[0]} {v:g}") for v in levels]
    baselines = [
        b for b in dict.fromkeys([figure.baseline or "", "net0_relu"]) if (b, figure.data, "test/acc") in estimates
    ]
    if (name, figure.data, "test/acc") not in estimates or not baselines:
        return None
    canvas, grid = plt.subplots(
        1, len(baselines), figsize=(7.0, 0.6 + 0.19 * len(conditions)), sharey=True, squeeze=False
    )
    for axes, baseline in zip(grid.flat, baselines, strict=True):
        for at, (metric, _) in enumerate(conditions):
            gaps = paired_gaps(records, name, baseline, figure.data, metric)
            if len(gaps) < 2:
                continue
            e = t_estimate(gaps)
            low, high = e.ci_low or 0.0, e.ci_high or 0.0
            colour, marker = ("#0072B2", "^") if low > 0 else ("#D55E00", "v") if high < 0 else ("#7F7F7F", "o")
            axes.errorbar(e.mean, at, xerr=high - e.mean, fmt=marker, color=colour)
        axes.axvline(0, color="#000000", linewidth=0.8)
        axes.set_title(f"{name} minus {baseline}")
        axes.set_xlabel("points of test accuracy (▲ wins, ▼ loses)")
        axes.grid(axis="y", visible=False)
    grid[0, 0].set_yticks(range(len(conditions)), [label for _, label in conditions])
    grid[0, 0].set_ylim(len(conditions) - 0.4, -0.6)
    return canvas


def _verdicts(spec: PaperSpec, figure: Figure, _: Estimates, verdicts: Sequence[Verdict]) -> Canvas | None:
    """Each tested claim's estimate, interval and margin, marked by its verdict; a panel for every unit."""
    tested = [v for v in verdicts if v.estimate is not None and v.ci is not None and v.kind != "identity"]
    panels = [[v for v in tested if v.unit == unit] for unit in dict.fromkeys(v.unit for v in tested)]
    if not panels:
        return None
    heights = [len(panel) + 1.4 for panel in panels]
    canvas, grid = plt.subplots(
        len(panels), figsize=(5.4, 0.24 * sum(heights) + 0.4 * len(panels)), height_ratios=heights, squeeze=False
    )
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _verdict_panel(axes, panel)
    grid[0, 0].set_title(figure.title)
    return canvas


def _verdict_panel(axes: Any, panel: Sequence[Verdict]) -> None:
    for at, verdict in enumerate(panel):
        colour, marker = VERDICT_STYLE.get(verdict.verdict, ("#BBBBBB", "x"))
        low, high = verdict.ci or (0.0, 0.0)
        middle = verdict.estimate or 0.0
        axes.errorbar(middle, at, xerr=[[middle - low], [high - middle]], fmt=marker, color=colour)
        axes.plot([verdict.margin, verdict.margin], [at - 0.32, at + 0.32], color="#000000", linewidth=1.2)
        axes.annotate(
            verdict.verdict, (1.01, at), xycoords=("axes fraction", "data"), va="center", fontsize=7, annotation_clip=False
        )  # fmt: skip
    sizes = sorted(abs(verdict.estimate or 0.0) for verdict in panel)
    if sizes[-1] > 40 * sizes[len(sizes) // 2] > 0:  # one giant would leave the others no room
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(0, color="#999999", linewidth=0.6)
    axes.set_yticks(range(len(panel)), [v.id for v in panel])
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"estimate in {panel[0].unit}, positive as the claim says; black bar: margin to clear")
