"""What all figures share: fonts, colours that colour-blind people can tell apart, and how nets and verdicts are marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from experiments.claims import Figure
from experiments.records import Record
from experiments.verdict import VERDICTS, EstimateRow

__all__ = ["plt"]

Estimates = dict[tuple[str, str, str], EstimateRow]

# Okabe and Ito's colours, which people with any common colour blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VERDICT_STYLE = dict(
    zip(VERDICTS, (("#0072B2", "o"), ("#D55E00", "s"), ("#7F7F7F", "D"), ("#BBBBBB", "x")), strict=True)
)
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "svg.hashsalt": "fivefold",
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
}


def half_widths(rows: Sequence[EstimateRow]) -> list[float]:
    """Return half the interval of each row; 0 where there is none."""
    return [(row.ci_high - row.mean) if row.ci_high is not None else 0.0 for row in rows]


def series_style(names: Sequence[str], name: str) -> dict[str, Any]:
    """Return colour and marker of a series, by its place among all."""
    index = list(names).index(name) % len(COLOURS)
    return {"color": COLOURS[index], "marker": MARKERS[index]}


def side_style(figure: Figure, name: str) -> dict[str, Any]:
    """Nets without the paper's method are black squares, those with it orange circles."""
    return {"fmt": "s", "color": "#000000"} if name in figure.plain else {"fmt": "o", "color": "#D55E00"}


def legend_of_sides(canvas: Canvas, figure: Figure) -> None:
    """Say below a figure what squares and circles are."""
    sides = [("s", "#000000"), ("o", "#D55E00")]
    keys = [Line2D([], [], marker=marker, color=colour, linestyle="") for marker, colour in sides]
    canvas.legend(keys, figure.sides, loc="outside lower center", ncols=2, frameon=False, handletextpad=0.2)


def paired_gaps(records: Sequence[Record], a: str, b: str, data: str, metric: str) -> list[float]:
    """a minus b for every seed that has both."""
    values: dict[str, dict[int, float]] = {a: {}, b: {}}
    for record in records:
        if record.key.ablation in values and record.key.data == data and metric in record.metrics:
            values[record.key.ablation][record.key.seed] = record.metrics[metric]
    return [values[a][seed] - values[b][seed] for seed in sorted(values[a].keys() & values[b].keys())]
