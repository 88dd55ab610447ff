"""Figures about mixtures of experts: who is ahead as training goes on, whether virtual groups survive, who carries the load."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.claims import Figure, PaperSpec
from experiments.figure_style import Estimates, half_widths, plt, series_style
from experiments.records import Record
from experiments.stats import t_estimate

LOAD_FILE = "expert_load.json"


def advantage(spec: PaperSpec, figure: Figure, estimates: Estimates, records: Sequence[Record]) -> Canvas | None:
    """Rows in pairs: by how many percent the first's validation loss is below the second's, over the training."""
    values: dict[str, dict[int, dict[int, float]]] = {}
    for record in records:
        if record.key.ablation in figure.rows and record.key.data == figure.data:
            losses = {int(k.split("/")[1]): v for k, v in record.metrics.items() if k.startswith("val_at/")}
            if losses:  # a run that is not done has none
                values.setdefault(record.key.ablation, {})[record.key.seed] = losses
    both = zip(figure.rows[::2], figure.rows[1::2], strict=True)
    pairs = [(a, b) for a, b in both if values.get(a, {}).keys() & values.get(b, {}).keys()]
    if not pairs:
        return None
    canvas, axes = plt.subplots(figsize=(3.5, 3.1))
    names = [f"{a} against {b}" for a, b in pairs]
    for name, (a, b) in zip(names, pairs, strict=True):
        seeds = sorted(values[a].keys() & values[b].keys())
        percents = sorted(set.intersection(*(set(values[x][s]) for x in (a, b) for s in seeds)))
        found = [t_estimate([100 * math.log(values[b][s][p] / values[a][s][p]) for s in seeds]) for p in percents]
        style = series_style(names, name)
        axes.plot(percents, [e.mean for e in found], label=name, **style)
        low, high = ([getattr(e, end) or e.mean for e in found] for end in ("ci_low", "ci_high"))
        axes.fill_between(percents, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.axhline(0, color="#000000", linewidth=0.8)
    axes.set_xlabel("training done (%)")
    axes.set_ylabel("lower validation loss by (%)")
    axes.set_title(figure.title)
    canvas.legend(loc="outside lower center", ncols=1, frameon=False)
    return canvas


def survival(spec: PaperSpec, figure: Figure, estimates: Estimates, _: Any) -> Canvas | None:
    """Percent of tokens whose picks still hold every shard equally often, against updates done."""
    mine = [m for name, d, m in estimates if d == figure.data and name in figure.rows and m.startswith("purity/")]
    updates = sorted({int(metric.split("/")[1]) for metric in mine})
    canvas, axes = plt.subplots(figsize=(3.5, 2.9))
    drawn = False
    for name in figure.rows:
        known = [(u, row) for u in updates if (row := estimates.get((name, figure.data, f"purity/{u:05d}")))]
        if known:
            drawn = True
            at, rows = zip(*known, strict=True)
            axes.errorbar(
                [u + 1 for u in at], [r.mean for r in rows], yerr=half_widths(rows), label=name,
                **series_style(figure.rows, name),
            )  # fmt: skip
    if not drawn:
        plt.close(canvas)
        return None
    axes.set_xscale("log")
    axes.set_xticks([u + 1 for u in updates], [f"{u:g}" for u in updates])
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.set_xlabel("updates done (log scale)")
    axes.set_ylabel("tokens with every shard (%)")
    axes.set_title(figure.title)
    canvas.legend(loc="outside lower center", ncols=2, frameon=False)
    return canvas


def load(spec: PaperSpec, figure: Figure, estimates: Estimates, records: Sequence[Record]) -> Canvas | None:
    """A heat map for every row and layer: each expert's load on validation data after every epoch, of the first seed."""
    shown: list[tuple[str, list[int], np.ndarray]] = []
    for name in figure.rows:
        mine = [r for r in records if (r.key.ablation, r.key.data) == (name, figure.data) and r.state == "done"]
        files = [record.path / LOAD_FILE for record in sorted(mine, key=lambda r: r.key.seed)]
        if files and files[0].exists():
            read = json.loads(files[0].read_text())
            shown.append((name, read["layers"], np.array(read["epochs"])))  # (epochs, layers, experts)
    shown = [row for row in shown if row[2].size]
    if not shown:
        return None
    columns = max(len(layers) for _, layers, _ in shown)
    canvas, grid = plt.subplots(
        len(shown), columns, figsize=(6.8, 0.6 + 1.25 * len(shown)), squeeze=False, sharey="row"
    )
    image = None
    for row, (name, layers, loads) in zip(grid, shown, strict=True):
        for axes, layer, at in zip(row, layers, range(columns), strict=False):
            heat_NE = np.log2(np.maximum(loads[:, at].T, 2.0**-4))
            image = axes.imshow(
                heat_NE, aspect="auto", cmap="PuOr_r", vmin=-3, vmax=3, interpolation="nearest",
                extent=(0, 100, len(heat_NE) - 0.5, -0.5),
            )  # fmt: skip
            axes.grid(visible=False)
            axes.set_title(f"{name}, layer {layer}", fontsize=7.5)
        row[0].set_ylabel("expert")
    for axes in grid[-1]:
        axes.set_xlabel("training done (%)")
    assert image is not None
    bar = canvas.colorbar(image, ax=grid.ravel().tolist(), ticks=range(-3, 4), shrink=0.9)
    bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    bar.set_label("load (fair shares)")
    canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=9)
    return canvas
