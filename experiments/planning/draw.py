"""A plan as one picture: the model coloured by stage and by how its variables lie, the timeline of its stages, its cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from datamodules.planning.explain import Block, blocks, causes
from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan
from datamodules.planning.price import Breakdown, Evaluator
from datamodules.planning.topology import Topology
from experiments.figure_style import COLOURS, STYLE, plt

STAGES = ("#9ECAE9", "#FFCF9C", "#A5D9B4", "#E8B7D4", "#F2E394", "#C9C3E6", "#D3D3D3", "#F4A9A0")
WHOLE = "#FFFFFF"
SPLITS = ("#009E73", "#CC79A7", "#F0E442", "#000000")  # by dim; none of them the colours of times
MOST_BLOCKS = 26
MOST_VARIABLES = 18
FORWARD, BACKWARD, HOP, TAIL = "#56B4E9", "#0072B2", "#E69F00", "#CC79A7"
PART_COLOURS = {
    "compute": "#0072B2",
    "update": "#56B4E9",
    "all_gather": "#E69F00",
    "all_reduce": "#D55E00",
    "reduce_scatter": "#F0C05A",
    "all_to_all": "#8C510A",
    "gradient_sum": "#CC79A7",
    "tied_sum": "#882255",
    "bubble": "#CFCFCF",
}
MEMORY_COLOURS = dict(zip(("variables", "gradients", "optimiser", "activations", "buffers"), COLOURS, strict=False))


def draw(graph: Graph, topology: Topology, plan: Plan, target: Path, overlap: bool = True) -> None:
    """Write the picture, as SVG or whatever else matplotlib makes of the file's ending."""
    evaluator = Evaluator(graph, topology, overlap)
    cost = evaluator.price(plan)
    found = blocks(graph, topology, plan, evaluator)
    height = max(5.4, 1.3 + 0.25 * min(len(found), MOST_BLOCKS))
    with plt.rc_context({**STYLE, "axes.grid": False}):
        canvas = plt.figure(figsize=(10.5, height))
        halves: Any = canvas.subfigures(1, 2, width_ratios=[1.15, 1])
        left, right = halves
        draw_blocks(left.subplots(), found, plan)
        rows: Any = right.subfigures(3, 1, height_ratios=[max(1.5, 0.5 * len(plan.stages) + 0.9), 1.3, 1.0])
        draw_timeline(rows[0].subplots(), plan, cost)
        draw_cost(rows[1].subplots(), cost)
        draw_memory(rows[2].subplots(), cost, topology)
        fits = "" if cost.feasible else ", DOES NOT FIT INTO MEMORY"
        canvas.suptitle(
            f"{graph.name} on {topology.name}: {cost.step_s * 1e3:,.2f} ms a step, {cost.throughput:,.0f} examples/s{fits}",
            fontsize=10,
            x=0.01,
            ha="left",
        )
        svg = target.suffix == ".svg"
        canvas.savefig(target, dpi=150, metadata={"Date": None} if svg else None)  # no date: same plan, same file
        plt.close(canvas)


def draw_blocks(axes: Axes, found: Sequence[Block], plan: Plan) -> None:
    """One row a block: its name on its stage's colour, a square for each variable by how it lies, a bar for its time."""
    shown, hidden = list(found[:MOST_BLOCKS]), found[MOST_BLOCKS:]
    longest = max(block.seconds for block in found) or 1.0
    squares = min(MOST_VARIABLES, max(len(block.variables) for block in found))
    start, bar = 3.1, 3.3 + 0.16 * squares
    for row, block in enumerate(shown):
        axes.add_patch(Rectangle((0, row - 0.44), 3.0, 0.88, facecolor=_stage_colour(block.stage), edgecolor="white"))
        label = block.name or "(outside blocks)"
        axes.text(0.06, row, label if len(label) < 34 else label[:31] + "...", va="center", fontsize=7)
        for i, variable in enumerate(block.variables[:MOST_VARIABLES]):
            place = (start + 0.16 * i, row - 0.28)
            axes.add_patch(
                Rectangle(place, 0.13, 0.56, facecolor=_split_colour(variable.split), edgecolor="#555555", lw=0.5)
            )
        if len(block.variables) > MOST_VARIABLES:
            axes.text(start + 0.16 * MOST_VARIABLES, row, "+", va="center", fontsize=7)
        scale = 1.8 / longest
        computed = max(block.seconds - block.moved, 0.0)
        axes.add_patch(Rectangle((bar, row - 0.3), computed * scale, 0.6, facecolor="#0072B2"))
        axes.add_patch(Rectangle((bar + computed * scale, row - 0.3), block.moved * scale, 0.6, facecolor="#E69F00"))
        axes.text(bar + block.seconds * scale + 0.05, row, _ms(block.seconds), va="center", fontsize=6.5)
    if hidden:
        axes.text(0.06, len(shown), f"and {len(hidden)} more blocks", va="center", fontsize=7, style="italic")
    axes.set_xlim(0, bar + 2.5)
    axes.set_ylim(len(shown) + (0.6 if hidden else -0.4), -0.6)
    axes.set_axis_off()
    axes.set_title("Blocks in order: variables as they lie, time of a step")
    dims = sorted({v.split for block in found for v in block.variables if v.split >= 0})
    keys = [Patch(facecolor=WHOLE, edgecolor="#555555", label="whole")]
    keys += [Patch(facecolor=_split_colour(dim), edgecolor="#555555", label=f"split, dim {dim}") for dim in dims]
    keys += [Patch(color="#0072B2", label="computing"), Patch(color="#E69F00", label="communicating")]
    if len(plan.stages) > 1:
        keys += [Patch(color=_stage_colour(s), label=f"stage {s}") for s in range(min(len(plan.stages), len(STAGES)))]
    _legend(axes, keys, 4)


def draw_timeline(axes: Axes, plan: Plan, cost: Breakdown) -> None:
    """One row a stage: forwards and backwards of each micro-batch, numbered where there is room, and what follows the last."""
    count = len(cost.stages)
    for s, stage in enumerate(cost.stages):
        if cost.line is None:
            starts = [(m, m * (stage.forward_s + stage.backward_s)) for m in range(plan.micro_batches)]
            tasks = [(m, at, stage.forward_s, FORWARD) for m, at in starts]
            tasks += [(m, at + stage.forward_s, stage.backward_s, BACKWARD) for m, at in starts]
        else:
            x, m_all = 2 * s, range(plan.micro_batches)
            tasks = [(m, cost.line.start_f[m, x], cost.line.forward_X[x], FORWARD) for m in m_all]
            tasks += [(m, cost.line.start_b[m, x], cost.line.backward_X[x], BACKWARD) for m in m_all]
        for m, at, long, colour in tasks:
            axes.add_patch(
                Rectangle((at * 1e3, s - 0.38), long * 1e3, 0.76, facecolor=colour, edgecolor="white", lw=0.4)
            )
            if long > 0.025 * cost.step_s and plan.micro_batches > 1:
                axes.text((at + long / 2) * 1e3, s, str(m), ha="center", va="center", fontsize=6, color="white")
        end = max(at + long for _, at, long, _ in tasks)
        axes.add_patch(
            Rectangle((end * 1e3, s - 0.38), stage.tail_s * 1e3, 0.76, facecolor=TAIL, edgecolor="white", lw=0.4)
        )
    if cost.line is not None:
        _draw_hops(axes, cost)
    axes.set_xlim(0, cost.step_s * 1e3 * 1.005)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(range(count), [f"stage {s}\n{len(st.devices)} devices" for s, st in enumerate(cost.stages)])
    axes.set_xlabel("ms")
    axes.set_title("Timeline" + (f": {plan.micro_batches} micro-batches, {plan.schedule}" if count > 1 else ""))
    names = {"forward": FORWARD, "backward": BACKWARD, "sums and update": TAIL} | ({"hop": HOP} if count > 1 else {})
    _legend(axes, [Patch(color=c, label=n) for n, c in names.items()], len(names))


def _draw_hops(axes: Axes, cost: Breakdown) -> None:
    assert cost.line is not None
    for hop in range(len(cost.stages) - 1):
        x = 2 * hop + 1
        for start, long in ((cost.line.start_f, cost.line.forward_X[x]), (cost.line.start_b, cost.line.backward_X[x])):
            for at in start[:, x]:
                axes.add_patch(
                    Rectangle((at * 1e3, hop + 0.42), long * 1e3, 0.16, facecolor=HOP, edgecolor="white", lw=0.2)
                )


def draw_cost(axes: Axes, cost: Breakdown) -> None:
    """The parts of a step as one bar, and below it what gradient sums hide behind the backward pass."""
    at = 0.0
    parts = [(name, seconds) for name, seconds, _ in causes(cost) if name != "overlap"]
    for name, seconds in parts:
        seconds = seconds - cost.overlap_s if name == "gradient_sum" else seconds
        axes.barh(0, seconds * 1e3, left=at * 1e3, height=0.6, color=PART_COLOURS[name])
        at += seconds
    if cost.overlap_s:
        left = max(cost.compute_s - cost.overlap_s, 0.0)
        axes.barh(
            0.62,
            cost.overlap_s * 1e3,
            left=left * 1e3,
            height=0.3,
            color=PART_COLOURS["gradient_sum"],
            hatch="////",
            alpha=0.6,
        )
    axes.set_ylim(1.0, -0.45)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, max(at, cost.step_s) * 1e3 * 1.005)
    axes.set_xlabel("ms")
    whose = "" if len(cost.stages) == 1 else " (the stage that ends last)"
    axes.set_title(f"Where a step goes{whose}")
    keys = [Patch(color=PART_COLOURS[n], label=f"{n.replace('_', ' ')} {s / cost.step_s:.0%}") for n, s in parts]
    if cost.overlap_s:
        hatched: dict[str, Any] = {"facecolor": PART_COLOURS["gradient_sum"], "hatch": "////", "alpha": 0.6}
        keys.append(Patch(label=f"of it hidden {cost.overlap_s / cost.step_s:.0%}", **hatched))
    _legend(axes, keys, 4)


def draw_memory(axes: Axes, cost: Breakdown, topology: Topology) -> None:
    """Memory of the fullest device by part, against the limit."""
    unit, name = (1e9, "GB") if max(cost.memory_bytes["total"], 1) >= 1e8 else (1e6, "MB")
    at, keys = 0.0, []
    for part, colour in MEMORY_COLOURS.items():
        size = cost.memory_bytes[part] / unit
        if size:
            axes.barh(0, size, left=at, height=0.6, color=colour)
            keys.append(Patch(color=colour, label=part))
            at += size
    limit = topology.memory_limit / unit
    share = cost.memory_bytes["total"] / topology.memory_limit
    if limit < 4 * at:
        axes.axvline(limit, color="black", lw=1.2)
        axes.text(limit, -0.42, "limit ", ha="right", fontsize=6.5)
    axes.set_xlim(0, max(at, limit if limit < 4 * at else 0.0) * 1.02)
    axes.set_ylim(0.4, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(name)
    axes.set_title(f"Memory of the fullest device: {share:.1%} of the limit")
    _legend(axes, keys, 5)


def _legend(axes: Axes, keys: Sequence[Patch], columns: int) -> None:
    """Keys below a panel, which makes room for them."""
    panel: Any = axes.figure
    panel.legend(
        handles=keys, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.0, handlelength=1.2
    )


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.2g} ms"


def _stage_colour(stage: int) -> str:
    return STAGES[stage % len(STAGES)]


def _split_colour(split: int) -> str:
    return WHOLE if split < 0 else SPLITS[split % len(SPLITS)]
