"""Figures about training and approximation: gains of a method, loss over training, error against width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.claims import Figure, PaperSpec
from experiments.figure_style import Estimates, half_widths, plt, series_style
from experiments.records import Record
from experiments.stats import t_estimate

LOSS = "train/mean_loss"


def gains(spec: PaperSpec, figure: Figure, estimates: Estimates, records: Sequence[Record]) -> Canvas | None:
    """Rows in pairs, with and without: the ratio of their mean training losses, seed by seed, on a log scale."""
    shown = []
    for with_it, without in zip(figure.rows[::2], figure.rows[1::2], strict=True):
        ratios = _log_ratios(records, with_it, without, figure.data)
        if len(ratios) > 1:
            shown.append((with_it.removesuffix("_on"), t_estimate(ratios)))
    if not shown:
        return None
    canvas, axes = plt.subplots(figsize=(3.5, 0.8 + 0.22 * len(shown)))
    for at, (_, e) in enumerate(shown):
        low, high = e.ci_low or e.mean, e.ci_high or e.mean
        colour, marker = ("#0072B2", "^") if high < 0 else ("#D55E00", "v") if low > 0 else ("#7F7F7F", "o")
        middle = math.exp(e.mean)
        axes.errorbar(
            middle, at, xerr=[[middle - math.exp(low)], [math.exp(high) - middle]], fmt=marker, color=colour
        )  # fmt: skip
    axes.axvline(1, color="#000000", linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in (0.2, 0.3, 0.5, 0.7, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("mean training loss, with over without (▲ faster, ▼ slower)")
    axes.set_title(figure.title)
    return canvas


def _log_ratios(records: Sequence[Record], a: str, b: str, data: str) -> list[float]:
    values: dict[str, dict[int, float]] = {a: {}, b: {}}
    for record in records:
        if record.key.ablation in values and record.key.data == data and LOSS in record.metrics:
            values[record.key.ablation][record.key.seed] = record.metrics[LOSS]
    return [math.log(values[a][seed] / values[b][seed]) for seed in sorted(values[a].keys() & values[b].keys())]


def curves(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """Training loss, the mean of each tenth of the steps, with its interval over seeds."""
    canvas, axes = plt.subplots(figsize=(3.5, 3.1))
    drawn = False
    for name in figure.rows:
        known = [(k, row) for k in range(1, 11) if (row := estimates.get((name, figure.data, f"curve/{k:02d}")))]
        if known:
            drawn = True
            at, rows = zip(*known, strict=True)
            means = np.array([row.mean for row in rows])
            half = np.array(half_widths(rows))
            style = series_style(figure.rows, name)
            axes.plot([10 * k - 5 for k in at], means, label=name, **style)
            lower = np.maximum(means - half, means * 0.1)
            axes.fill_between(
                [10 * k - 5 for k in at], lower, means + half, color=style["color"], alpha=0.15, linewidth=0
            )  # fmt: skip
    if not drawn:
        plt.close(canvas)
        return None
    axes.set_yscale("log")
    axes.set_xlabel("steps done (%)")
    axes.set_ylabel("training loss (log scale)")
    axes.set_title(figure.title)
    canvas.legend(loc="outside lower center", ncols=2, frameon=False)
    return canvas


def rate(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """Largest error of the constructed nets against their number of centres, beside the bound that is proved."""
    names = sorted({data for name, data, metric in estimates if name in figure.rows and metric == "test/bound"})
    if not names:
        return None
    canvas, axes = plt.subplots(figsize=(3.5, 3.0))
    for data in names:
        dims = int(data.rsplit("_", 1)[1].removesuffix("d"))
        points = []
        for name in figure.rows:
            error, bound = (estimates.get((name, data, f"test/{m}")) for m in ("max_error", "bound"))
            if error and bound:
                points.append((int(name.removeprefix("cone")) ** dims, error, bound))
        points.sort(key=lambda point: point[0])
        widths, errors, bounds = zip(*points, strict=True)
        style = series_style(names, data)
        axes.errorbar(
            widths, [e.mean for e in errors], yerr=half_widths(errors), label=f"{data}, measured", linestyle="", **style
        )  # fmt: skip
        slope = f"width$^{{-1/{dims}}}$" if dims > 1 else "1 / width"
        axes.plot(
            widths,
            [b.mean for b in bounds],
            linestyle="--",
            linewidth=0.9,
            color=style["color"],
            label=f"bound, {slope}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("centres, the width of the min-plus layer (log scale)")
    axes.set_ylabel("largest error (log scale)")
    axes.set_title(figure.title)
    canvas.legend(loc="outside lower center", ncols=2, frameon=False)
    return canvas
