"""Plans that torch's engines can run, by name: what is timed, and among which the calibrated cost model chooses.

dp         pure data parallelism
tp         every pair of Linears that can be: the first by columns, the second by rows (Megatron's)
tp_<part>  the same in attention alone, in MLPs alone
mixed      the batch cut over columns, and tp: weights that are whole see their own rows, split ones see all (Krizhevsky's "one
           weird trick", arXiv 1404.5997)
gpipe_M, 1f1b_M   as many stages as ranks, M micro-batches
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan, PlanError, Schedule, StagePlan, batch_dims, batch_of

FIRST = {"attention": ("q", "k", "v"), "mlp": ("up", "fc1")}  # split in dim 0; each ends in one of
SECOND = {"attention": ("o",), "mlp": ("down", "fc2")}  # split in dim 1
MICRO_BATCHES = (2, 4)


def executable_plans(graph: Graph, ranks: int, topology: str) -> dict[str, Plan]:
    """Return the plans of the module's table that a graph has on one row of `ranks` devices.

    Raises:
        PlanError: `ranks` does not divide the batch.
    """
    batch, everything = batch_of(graph), tuple(range(ranks))
    if batch % ranks:
        raise PlanError(
            f"{graph.name}: a batch of {batch} cannot be cut into {ranks}; take a batch that {ranks} divides"
        )
    last = len(graph.ops) - 1

    def one(splits: Mapping[int, int], data: int = 1) -> Plan:
        return Plan(graph.digest, topology, (StagePlan(0, last, everything, data, splits),))

    found = {"dp": one({}, data=ranks)}
    parts = {part: _pairs(graph, ranks, part) for part in FIRST}
    parts = {part: splits for part, splits in parts.items() if splits}
    both = {tensor: split for splits in parts.values() for tensor, split in splits.items()}
    if both:
        found["tp"] = one(both)
        found["mixed"] = one({**both, **{t: d for t, d in batch_dims(graph).items() if d == 0}})
    if len(parts) > 1:
        found.update((f"tp_{part}", one(splits)) for part, splits in parts.items())
    for micro in MICRO_BATCHES:
        if batch % micro == 0 and len(children(graph)) >= ranks:
            found[f"gpipe_{micro}"] = pipeline(graph, ranks, topology, micro, "gpipe")
            if micro >= ranks:
                found[f"1f1b_{micro}"] = pipeline(graph, ranks, topology, micro, "1f1b")
    return found


def combined(graph: Graph, topology: str, rows: int = 2, ways: int = 2) -> dict[str, Plan]:
    """Return plans of two kinds at once: data x tensor ("dp_tp"), and pipelines of data-parallel and of tensor-parallel stages
    ("gpipe_dp", "1f1b_tp") where the graph has two blocks.
    """
    splits = {t: s for part in FIRST for t, s in _pairs(graph, ways, part).items()}
    stage = StagePlan(0, len(graph.ops) - 1, tuple(range(rows * ways)), rows, splits)
    found = {"dp_tp": Plan(graph.digest, topology, (stage,))} if splits else {}
    line = pipeline(graph, 2, topology, 2, "gpipe")
    kinds: tuple[tuple[str, Schedule, int], ...] = (("gpipe_dp", "gpipe", 2), ("1f1b_tp", "1f1b", 1))
    for name, schedule, data in kinds:
        stages = tuple(
            replace(s, devices=(2 * i, 2 * i + 1), data=data, splits={} if data > 1 else _within(graph, s, splits))
            for i, s in enumerate(line.stages)
        )
        found[name] = replace(line, stages=stages, schedule=schedule)
    return found


def pipeline(graph: Graph, stages: int, topology: str, micro_batches: int, schedule: Schedule) -> Plan:
    """Return the plan whose fullest stage has the fewest operations, cut between children of the net, a device for each.

    Raises:
        PlanError: fewer children than stages.
    """
    names = list(children(graph))
    if len(names) < stages:
        raise PlanError(f"{graph.name} has {len(names)} blocks and cannot be cut into {stages} stages")
    work = [sum(op.flops for op in graph.ops if op.layer.split(".")[0] == name) for name in names]
    ends = [children(graph)[name] for name in names]
    cuts = _balanced(work, stages)
    firsts = [0, *(ends[cut - 1] + 1 for cut in cuts)]
    lasts = [*(first - 1 for first in firsts[1:]), len(graph.ops) - 1]
    made = tuple(StagePlan(a, b, (i,)) for i, (a, b) in enumerate(zip(firsts, lasts, strict=True)))
    return Plan(graph.digest, topology, made, micro_batches, schedule)


def aligned(graph: Graph, plan: Plan) -> Plan:
    """Return a plan whose cuts are moved to the nearest end of a child of the net, where a pipeline of modules can be cut.

    Raises:
        PlanError: two cuts fall together.
    """
    ends = list(children(graph).values())[:-1]
    cuts = [min(ends, key=lambda end: abs(end - stage.last_op)) for stage in plan.stages[:-1]] if ends else []
    if len(set(cuts)) < len(plan.stages) - 1:
        raise PlanError(f"{graph.name} has too few blocks for the cuts of this plan: they fall together")
    firsts, lasts = [0, *(cut + 1 for cut in cuts)], [*cuts, plan.stages[-1].last_op]
    stages = (replace(s, first_op=a, last_op=b) for s, a, b in zip(plan.stages, firsts, lasts, strict=True))
    return replace(plan, stages=tuple(stages))


def children(graph: Graph) -> dict[str, int]:
    """Child of the net -> its last forward operation, in order."""
    forward = [(i, op.layer.split(".")[0]) for i, op in enumerate(graph.ops) if op.phase == "forward" and op.layer]
    return {name: i for i, name in forward}


def _pairs(graph: Graph, ways: int, part: str) -> dict[int, int]:
    found = {}
    for parameter in graph.parameters:
        module, _, kind = parameter.name.rpartition(".")
        leaf, shape = module.rpartition(".")[2], graph.tensors[parameter.tensor].shape
        split = 0 if leaf in FIRST[part] else 1 if leaf in SECOND[part] and kind == "weight" else None
        if split is not None:
            if shape[split] % ways:
                return {}
            found[parameter.tensor] = split
    return found


def _within(graph: Graph, stage: StagePlan, splits: Mapping[int, int]) -> dict[int, int]:
    """The splits of what a stage holds."""
    layers = {op.layer for op in graph.ops[stage.first_op : stage.last_op + 1] if op.phase == "forward"}
    names = {p.tensor: p.name.rpartition(".")[0] for p in graph.parameters}
    return {tensor: split for tensor, split in splits.items() if names[tensor] in layers}


def _balanced(work: Sequence[int], stages: int) -> list[int]:
    """Where to cut a list so that the largest part is least: indices of the first item of every part but the first."""
    best: list[tuple[float, list[int]]] = [(sum(work[:n]), []) for n in range(len(work) + 1)]
    for parts in range(2, stages + 1):
        best = [
            min(
                ((max(best[k][0], sum(work[k:n])), [*best[k][1], k]) for k in range(parts - 1, n)),
                default=(float("inf"), []),
            )
            for n in range(len(work) + 1)
        ]
    return best[-1][1]
