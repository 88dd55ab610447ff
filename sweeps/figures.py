"""Pictures of a study as SVG, in the style of all other figures; the same study gives the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.claims import PaperSpec
from experiments.figure_style import COLOURS, STYLE, plt
from sweeps.parameters import Parameter
from sweeps.space import Space

DONE, CUT, BEST, OTHER = COLOURS[0], COLOURS[7], COLOURS[1], COLOURS[2]


@dataclass(frozen=True)
class Point:
    """A finished trial: its number, parameters, score per objective, and whether it was cut before its last seed."""

    number: int
    params: Mapping[str, Any]
    scores: tuple[float, ...]
    cut: bool


def draw_all(
    space: Space,
    paper: PaperSpec,
    points: Sequence[Point],
    importance: Mapping[str, Mapping[str, float]],
    marks: Mapping[str, tuple[float, ...]],
) -> dict[str, tuple[str, str]]:
    """Return {name: (title, svg)} of all pictures that the study has enough trials for.

    Args:
        points: trials that ran to their end or were cut.
        importance: {method: {parameter: share}}.
        marks: {name: scores} of other settings to show beside a Pareto front, such as the default.
    """
    whole = [p for p in points if not p.cut]
    kinds: dict[str, tuple[str, Callable[[], Any]]] = {
        "history": ("Scores in the order of the trials", lambda: _history(space, paper, points)),
        "importance": ("How much each parameter matters", lambda: _importance(importance)),
        "slice": ("Scores by parameter", lambda: _slices(space, paper, points)),
        "parallel": ("Trials across all parameters", lambda: _parallel(space, whole)),
    }
    if space.several:
        kinds["pareto"] = ("Pareto front", lambda: _pareto(space, paper, whole, marks))
    found = {}
    with plt.rc_context(STYLE):
        for name, (title, kind) in kinds.items():
            canvas = kind() if whole else None
            if canvas is not None:
                found[name] = (f"{title}: {space.title}", _svg(canvas))
    return found


def _svg(canvas: Any) -> str:
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", pad_inches=0.05)
    plt.close(canvas)
    # Places to a hundredth of a point, which no eye can tell: files of half the size.
    rounded = re.sub(r' (?:d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m.group(0)), out.getvalue())
    return "\n".join(line.rstrip() for line in rounded.splitlines()) + "\n"


def _label(space: Space, paper: PaperSpec, index: int) -> str:
    """The metric's short name and unit: many small axes have no room for more."""
    metric = paper.metric(space.objectives[index].metric)
    unit = "%" if metric.unit == "points" else metric.unit
    return metric.unit if metric.unit.startswith(metric.label) else f"{metric.name} ({unit})"


def _better(space: Space, index: int, a: float, b: float) -> bool:
    return a > b if space.objectives[index].direction == "higher" else a < b


def _history(space: Space, paper: PaperSpec, points: Sequence[Point]) -> Any:
    canvas, axes = plt.subplots(figsize=(3.5, 2.2))
    ordered = sorted(points, key=lambda p: p.number)
    best, steps = None, []
    for point in ordered:
        if not point.cut and (best is None or _better(space, 0, point.scores[0], best)):
            best = point.scores[0]
        if best is not None:
            steps.append((point.number, best))
    _dots(axes, ordered, [p.number for p in ordered])
    axes.step(*zip(*steps, strict=True), where="post", color=BEST, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(_label(space, paper, 0))
    _legend_below(canvas, axes)
    return canvas


def _dots(axes: Any, points: Sequence[Point], places: Sequence[float]) -> None:
    """Trials as dots, those that were cut as crosses at the mean of the seeds that they had."""
    for cut, style in ((False, {"marker": "o", "color": DONE}), (True, {"marker": "x", "color": CUT})):
        own = [(place, p.scores[0]) for place, p in zip(places, points, strict=True) if p.cut == cut]
        if own:
            label = "cut early" if cut else "all seeds"
            axes.plot(*zip(*own, strict=True), linestyle="", markersize=3.5, alpha=0.85, label=label, **style)


def _legend_below(canvas: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, handletextpad=0.3)


def _importance(importance: Mapping[str, Mapping[str, float]]) -> Any:
    methods = [name for name, shares in importance.items() if shares]
    names = list(dict.fromkeys(n for method in methods for n in importance[method]))
    if not names:
        return None
    names.sort(key=lambda n: -max(importance[m].get(n, 0.0) for m in methods))
    canvas, axes = plt.subplots(figsize=(3.5, 0.7 + 0.3 * len(names)))
    height = 0.8 / len(methods)
    for i, method in enumerate(methods):
        at = [k + (i - (len(methods) - 1) / 2) * height for k, n in enumerate(names) if n in importance[method]]
        shares = [importance[method][n] for n in names if n in importance[method]]
        axes.barh(at, shares, height=height * 0.9, color=COLOURS[i], label=method)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("share of importance")
    axes.grid(axis="y", visible=False)
    _legend_below(canvas, axes)
    return canvas


def _place(parameter: Parameter, value: Any) -> float:
    """Where a value stands on its axis: choices in the order of the file."""
    return float(parameter.values.index(value)) if parameter.values is not None else float(value)


def _slices(space: Space, paper: PaperSpec, points: Sequence[Point]) -> Any:
    free = [(n, p) for n, p in space.free.items() if any(n in point.params for point in points)]
    if not free:
        return None
    columns = min(3, len(free))
    rows = -(-len(free) // columns)
    canvas, grid = plt.subplots(rows, columns, figsize=(2.35 * columns, 2.0 * rows), sharey=True, squeeze=False)
    flat = [axes for row in grid for axes in row]
    for axes, (name, parameter) in zip(flat, free, strict=False):
        own = [p for p in points if name in p.params]
        spread = [_place(parameter, p.params[name]) for p in own]
        if parameter.values is not None:  # side by side where many trials share a choice
            spread = [x + 0.3 * ((p.number * 0.618) % 1 - 0.5) for x, p in zip(spread, own, strict=True)]
            _choices(axes.xaxis, parameter)
        elif parameter.log:
            axes.set_xscale("log")
        _dots(axes, own, spread)
        axes.set_xlabel(name)
    for axes in flat[len(free) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(_label(space, paper, 0))
    _legend_below(canvas, flat[0])
    return canvas


def _choices(axis: Any, parameter: Parameter) -> None:
    assert parameter.values is not None
    words = [str(v) for v in parameter.values]
    turned = max(map(len, words)) * len(words) > 18
    axis.set_ticks(
        range(len(words)), words, rotation=40 if turned else 0, ha="right" if turned else "center", fontsize=6.5
    )
    axis.axes.set_xlim(-0.5, len(words) - 0.5)


def _parallel(space: Space, points: Sequence[Point]) -> Any:
    """Every trial as a line through its parameters to its score, the better the bluer."""
    free = {n: p for n, p in space.free.items() if any(n in point.params for point in points)}
    if len(free) < 2 or len(points) < 3:
        return None
    canvas, axes = plt.subplots(figsize=(1.0 * (len(free) + 1) + 1.2, 2.6))
    ranked = sorted(points, key=lambda p: p.scores[0], reverse=space.objectives[0].direction == "lower")
    scores = [p.scores[0] for p in points]
    low, high = min(scores), max(scores)
    for rank, point in enumerate(ranked):  # the best last, on top
        share = rank / max(1, len(ranked) - 1)
        xs = [i for i, n in enumerate(free) if n in point.params]
        ys = [_share(free[n], point.params[n]) for n in free if n in point.params]
        xs.append(len(free))
        ys.append((point.scores[0] - low) / (high - low) if high > low else 0.5)
        colour = plt.get_cmap("cividis_r")(share) if rank < len(ranked) - 1 else BEST
        axes.plot(xs, ys, color=colour, alpha=0.35 + 0.6 * share, linewidth=1.0 + 1.2 * (rank == len(ranked) - 1))
    for i, parameter in enumerate(free.values()):
        axes.axvline(i, color="#888888", linewidth=0.6, zorder=0)
        ends = (
            [(k / max(1, len(parameter.values) - 1), str(v)) for k, v in enumerate(parameter.values)]
            if (parameter.values is not None)
            else [(0.0, f"{parameter.low:g}"), (1.0, f"{parameter.high:g}")]
        )
        for at, text in ends:
            axes.annotate(text, (i, at), xytext=(2, 2), textcoords="offset points", fontsize=5.5, color="#333333")
    axes.axvline(len(free), color="#888888", linewidth=0.6, zorder=0)
    for at, score in ((0.0, low), (1.0, high)):
        axes.annotate(
            f"{score:.4g}", (len(free), at), xytext=(3, 0), textcoords="offset points", fontsize=6, va="center"
        )
    axes.set_xticks(range(len(free) + 1), [*free, space.objectives[0].metric], rotation=20, ha="right")
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    return canvas


def _share(parameter: Parameter, value: Any) -> float:
    """Where a value stands between the ends of its axis, 0 to 1."""
    if parameter.values is not None:
        return parameter.values.index(value) / max(1, len(parameter.values) - 1)
    import math

    scale: Callable[[float], float] = math.log if parameter.log else float
    assert parameter.low is not None
    assert parameter.high is not None
    low, high = scale(parameter.low), scale(parameter.high)
    return (scale(value) - low) / (high - low) if high > low else 0.5


def front(space: Space, points: Sequence[Point]) -> list[Point]:
    """Return the trials that no other one beats in one objective without losing in another, by the second objective."""

    def beats(a: Point, b: Point) -> bool:
        no_worse = all(not _better(space, i, y, x) for i, (x, y) in enumerate(zip(a.scores, b.scores, strict=True)))
        return no_worse and a.scores != b.scores

    found = [p for p in points if not any(beats(q, p) for q in points)]
    single = {p.scores: p for p in sorted(found, key=lambda p: -p.number)}  # of equal ones the first
    return sorted(single.values(), key=lambda p: (p.scores[1], p.number))


def _pareto(space: Space, paper: PaperSpec, points: Sequence[Point], marks: Mapping[str, tuple[float, ...]]) -> Any:
    canvas, axes = plt.subplots(figsize=(3.5, 2.6))
    axes.plot(
        [p.scores[1] for p in points],
        [p.scores[0] for p in points],
        "o",
        color=CUT,
        markersize=3,
        alpha=0.7,
        label="trials",
    )
    best = front(space, points)
    axes.step([p.scores[1] for p in best], [p.scores[0] for p in best], where="post", color=BEST, linewidth=0.9)
    axes.plot([p.scores[1] for p in best], [p.scores[0] for p in best], "s", color=BEST, markersize=4, label="front")
    for i, (name, scores) in enumerate(marks.items()):
        colour = (OTHER, DONE, COLOURS[3])[i % 3]
        axes.plot(scores[1], scores[0], "D", color=colour, markersize=4.5, label=name)
    for constraint in space.constraints:
        if constraint.metric == space.objectives[1].metric and constraint.at_most and constraint.of is None:
            axes.axvline(constraint.at_most, color="#555555", linestyle=":", linewidth=0.9, label="budget")
    values = [p.scores[1] for p in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_xscale("log")
    axes.set_xlabel(_label(space, paper, 1))
    axes.set_ylabel(_label(space, paper, 0))
    _legend_below(canvas, axes)
    return canvas
