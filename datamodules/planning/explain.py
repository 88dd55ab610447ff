"""A plan in words: what it does to each block of the model, what each part of its cost is, and which moves cost most."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan, PlanError, pure_data_parallel, stage_of_ops
from datamodules.planning.price import Breakdown, Evaluator, Move
from datamodules.planning.rules import PARTIAL, REPLICATED, missing_rules
from datamodules.planning.topology import Topology

CAUSES = {
    "compute_s": "operations: arithmetic or memory traffic, whichever is longer, and starting them",
    "update_s": "Adam's step on each device's share of the variables",
    "all_gather": "split operands made whole, where the next operation needs them so",
    "all_reduce": "partial sums added up on every device",
    "reduce_scatter": "partial sums added up, each device keeping a part",
    "all_to_all": "tensors cut along one dim cut along another instead",
    "gradient_sum": "gradients of variables added up over devices that saw different examples",
    "tied_sum": "gradients of variables that two stages share, sent between them",
    "overlap_s": "gradient sums that run while the backward pass still computes",
    "bubble_s": "waiting for other stages, sends on the hops included",
}
Key = tuple[str, int]  # a block and its stage
PARTS = ("variables", "gradients", "optimiser", "activations", "buffers")


@dataclass(frozen=True)
class Variable:
    """One variable of a block, or as many alike: short name, shape and split."""

    name: str
    shape: tuple[int, ...]
    split: int
    bytes: int


@dataclass(frozen=True)
class Block:
    """Consecutive blocks of the model that lie alike: layers first to last, their stage, and how their tensors lie.

    `seconds` is the time of a step that their operations take with their communication, `moved` the communication's part.
    `lying` counts the bytes of what they compute by how it lies.
    """

    first: str
    last: str
    count: int
    stage: int
    seconds: float
    moved: float
    variables: tuple[Variable, ...]
    lying: Mapping[str, int]

    @property
    def name(self) -> str:
        if self.count == 1:
            return self.first
        number = re.findall(r"\d+", self.last)
        return f"{self.first} to {number[-1]}" if number else f"{self.first} x {self.count}"


def word(split: int, shape: Sequence[int] = (), ways: int = 1) -> str:
    """How a tensor lies, for people."""
    if split == REPLICATED or ways == 1:
        return "whole"
    if split == PARTIAL:
        return "partial sums"
    return f"dim {split} in {ways}" + (f" ({shape[split]} -> {shape[split] // ways})" if shape else "")


def block_of(layer: str) -> str:
    """The block that a layer belongs to: its path up to the first number, or its first two parts."""
    parts = layer.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:2])


def blocks(graph: Graph, topology: Topology, plan: Plan, evaluator: Evaluator | None = None) -> list[Block]:
    """The model as a short list of blocks, alike neighbours folded into one."""
    evaluator = evaluator or Evaluator(graph, topology)
    stage_at = stage_of_ops(graph, plan.stages)
    seconds, moved, lying = _times(graph, plan, stage_at, evaluator)
    found = {
        (block_of(op.layer), at): None for op, at in zip(graph.ops, stage_at, strict=True) if op.phase == "forward"
    }
    found |= dict.fromkeys(seconds)
    variables = _variables(graph, plan, stage_at, evaluator)
    single = [
        Block(*(key[0], key[0], 1, key[1]), seconds[key], moved[key], variables.get(key, ()), lying.get(key, {}))
        for key in sorted(found, key=lambda key: key[1])
    ]
    return [_fold(list(group)) for _, group in groupby(single, key=_alike)]


def _alike(block: Block) -> tuple:
    shape = re.sub(r"\d+", "#", block.first)
    return shape if shape != block.first else block.first, block.stage, block.variables, bool(block.lying.get("split"))


def _fold(group: Sequence[Block]) -> Block:
    first, last = group[0], group[-1]
    lying: Counter[str] = Counter()
    for block in group:
        lying.update(block.lying)
    return Block(
        first.first,
        last.first,
        len(group),
        first.stage,
        sum(block.seconds for block in group),
        sum(block.moved for block in group),
        first.variables,
        lying,
    )


def _times(
    graph: Graph, plan: Plan, stage_at: Sequence[int], evaluator: Evaluator
) -> tuple[dict[Key, float], dict[Key, float], dict[Key, Counter[str]]]:
    """Per block: seconds of a step, seconds of its moves, bytes of its results by how they lie."""
    seconds: dict[Key, float] = defaultdict(float)
    moved: dict[Key, float] = defaultdict(float)
    lying: dict[Key, Counter[str]] = {}
    cost = evaluator.price(plan)
    for s, stage in enumerate(plan.stages):
        ops = tuple(i for i, at in enumerate(stage_at) if at == s)
        tables, place = evaluator.tables(stage, ops, plan.micro_batches), evaluator.places(stage, plan.micro_batches)
        for i, spent in zip(ops, tables.price_ops(place)[0], strict=True):
            name = block_of(graph.ops[i].layer), s
            seconds[name] += float(spent) * plan.micro_batches
            for tensor in graph.ops[i].outputs:
                how = {REPLICATED: "whole", PARTIAL: "partial"}.get(int(place[tensor]), "split")
                lying.setdefault(name, Counter())[how] += graph.tensors[tensor].bytes
        for move in cost.stages[s].moves:
            if move.kind != "gradient_sum":
                moved[block_of(graph.ops[move.op].layer), s] += move.seconds
    return seconds, moved, lying


def _variables(
    graph: Graph, plan: Plan, stage_at: Sequence[int], evaluator: Evaluator
) -> dict[Key, tuple[Variable, ...]]:
    """Variables of each block with their splits, under names without the block's own."""
    places = [evaluator.places(stage, plan.micro_batches) for stage in plan.stages]
    found: dict[Key, list[Variable]] = {}
    for parameter in graph.parameters:
        users = graph.consumers(parameter.tensor)
        if not users:
            continue
        block = block_of(graph.ops[users[0]].layer)
        info = graph.tensors[parameter.tensor]
        short = parameter.name.removeprefix(block).lstrip(".")
        at = stage_at[users[0]]
        split = int(places[at][parameter.tensor])
        found.setdefault((block, at), []).append(Variable(short, info.shape, split, info.bytes))
    return {block: tuple(variables) for block, variables in found.items()}


def causes(cost: Breakdown) -> list[tuple[str, float, str]]:
    """(name, seconds, explanation) of each part of a step, zero parts left out; they add up to the step."""
    parts = {"compute_s": cost.compute_s, "update_s": cost.update_s, **cost.collective_s}
    parts |= {"overlap_s": -cost.overlap_s, "bubble_s": cost.bubble_s}
    return [(name.removesuffix("_s"), seconds, CAUSES[name]) for name, seconds in parts.items() if seconds]


def explain(graph: Graph, topology: Topology, plan: Plan, overlap: bool = True) -> str:
    """The whole explanation as text of at most 128 columns.

    Raises:
        PlanError: a plan of another graph or for devices that the machine lacks.
    """
    evaluator = Evaluator(graph, topology, overlap)
    cost = evaluator.price(plan)
    lines = [*_head(graph, topology, plan, cost), "", *_against(graph, topology, cost, evaluator), ""]
    lines += [*_costs(cost), "", *_memory(cost, topology), "", *_stages(graph, plan, cost), ""]
    lines += [*_blocks(blocks(graph, topology, plan, evaluator), plan), "", *_moves(graph, cost)]
    lines += ["", *(f"note: {rule}" for rule in missing_rules(graph))]
    return "\n".join(lines).rstrip() + "\n"


def _head(graph: Graph, topology: Topology, plan: Plan, cost: Breakdown) -> Iterator[str]:
    yield f"{graph.name}: {len(graph.ops):,} operations, {len(graph.parameters):,} variables"
    yield f"on {topology.name}: {' + '.join(map(str, topology.sizes))} devices"
    count = len(plan.stages)
    stages = "one stage" if count == 1 else f"{count} stages, {plan.schedule}"
    yield f"plan: {stages}, {plan.micro_batches} micro-batch{'es' if plan.micro_batches > 1 else ''}"
    yield f"step {_ms(cost.step_s)}, {cost.throughput:,.1f} examples/s of batch {cost.batch}"
    yield from (f"DOES NOT FIT: {violation}" for violation in cost.violations)


def _against(graph: Graph, topology: Topology, cost: Breakdown, evaluator: Evaluator) -> Iterator[str]:
    try:
        plain = evaluator.price(pure_data_parallel(graph, topology))
    except PlanError as error:
        yield f"pure data parallelism is not possible here: {error}"
        return
    ratio = plain.step_s / cost.step_s
    fits = "" if plain.feasible else ", and does not fit into memory"
    yield f"pure data parallelism takes {_ms(plain.step_s)}{fits}: this plan is {ratio:.2f} times as fast"


def _costs(cost: Breakdown) -> Iterator[str]:
    whose = "" if len(cost.stages) == 1 else ", of the stage that ends last"
    yield f"where a step goes{whose}:"
    for name, seconds, why in causes(cost):
        bar = "#" * round(24 * abs(seconds) / cost.step_s)
        yield f"  {name:<15}{_ms(seconds):>12} {seconds / cost.step_s:>7.1%}  {bar:<24} {why}"
    if cost.send_s:
        yield f"  (one micro-batch takes {_ms(cost.send_s)} on the hops between stages, there and back)"


def _memory(cost: Breakdown, topology: Topology) -> Iterator[str]:
    total = cost.memory_bytes["total"]
    yield f"memory of the fullest device: {_mb(total)} of {_mb(topology.memory_limit)} ({total / topology.memory_limit:.1%})"
    yield "  " + ", ".join(f"{part} {_mb(cost.memory_bytes[part])}" for part in PARTS if cost.memory_bytes[part])


def _stages(graph: Graph, plan: Plan, cost: Breakdown) -> Iterator[str]:
    yield "stages (forward and backward of one micro-batch):"
    for s, (stage, spent) in enumerate(zip(plan.stages, cost.stages, strict=True)):
        first, last = (
            graph.layer_of(min(op, len(graph.ops) - 1)) or "-" for op in _ends(graph, stage.first_op, stage.last_op)
        )
        mesh = f"{stage.data} x {stage.ways}"
        yield (
            f"  {s}: devices {_span(stage.devices)} as {mesh} (batch x split), {first} ... {last}: "
            f"forward {_ms(spent.forward_s)}, backward {_ms(spent.backward_s)}, then {_ms(spent.tail_s)}; "
            f"{_mb(spent.memory.total)}"
        )


def _ends(graph: Graph, first: int, last: int) -> tuple[int, int]:
    """The first and last forward operation of a range."""
    inside = [i for i in range(first, min(last, len(graph.ops) - 1) + 1) if graph.ops[i].phase == "forward"]
    return (inside[0], inside[-1]) if inside else (first, last)


def _blocks(found: Sequence[Block], plan: Plan) -> Iterator[str]:
    yield "blocks, in order:"
    for block in found:
        ways = plan.stages[block.stage].ways
        stage = f", stage {block.stage}" if len(plan.stages) > 1 else ""
        yield f"  {block.name or '(model)'}{stage}: {_ms(block.seconds)}, of it communication {_ms(block.moved)}"
        split = [v for v in block.variables if v.split != REPLICATED]
        whole = len(block.variables) - len(split)
        for variable in split:
            yield f"      {variable.name} {list(variable.shape)}: {word(variable.split, variable.shape, ways)}"
        if whole:
            yield f"      {whole} variable{'s' if whole > 1 else ''} whole" + (
                " on every device of a row" if ways > 1 else ""
            )


def _moves(graph: Graph, cost: Breakdown, most: int = 8) -> Iterator[str]:
    totals: dict[tuple[str, str], list[Move]] = {}
    for stage in cost.stages:
        for move in stage.moves:
            where = re.sub(r"\d+", "#", graph.layer_of(move.op)) or graph.ops[move.op].kind
            totals.setdefault((move.kind, where), []).append(move)
    ordered = sorted(totals.items(), key=lambda item: -sum(move.seconds for move in item[1]))
    if not ordered:
        yield "nothing is communicated"
        return
    yield "costliest communication:"
    for (kind, where), moves in ordered[:most]:
        one = graph.tensors[max(moves, key=lambda move: move.seconds).tensor]
        spent = sum(move.seconds for move in moves)
        yield f"  {_ms(spent):>12}  {kind:<15}{where} ({len(moves)} times), such as {one.name} {list(one.shape)}"
    rest = sum(move.seconds for _, moves in ordered[most:] for move in moves)
    if rest:
        yield f"  {_ms(rest):>12}  the rest"


def differences(graph: Graph, topology: Topology, a: Plan, b: Plan) -> str:
    """What two plans of one graph do differently, and what that changes in the cost."""
    evaluator = Evaluator(graph, topology)
    costs = [evaluator.price(plan) for plan in (a, b)]
    lines = [f"{'':<16}{'A':>14}{'B':>14}{'B - A':>14}"]
    rows = {"step": [c.step_s for c in costs]}
    for name in ("compute_s", "update_s", "overlap_s", "bubble_s"):
        rows[name.removesuffix("_s")] = [getattr(c, name) for c in costs]
    for kind in costs[0].collective_s:
        rows[kind] = [c.collective_s[kind] for c in costs]
    for name, (x, y) in rows.items():
        if x or y:
            lines.append(f"{name:<16}{_ms(x):>14}{_ms(y):>14}{_ms(y - x):>14}")
    x, y = (c.memory_bytes["total"] for c in costs)
    lines.append(f"{'memory':<16}{_mb(x):>14}{_mb(y):>14}{_mb(y - x):>14}")
    lines += ["", *_shapes(a, b), *_splits(graph, evaluator, a, b)]
    return "\n".join(lines).rstrip() + "\n"


def _shapes(a: Plan, b: Plan) -> Iterator[str]:
    for name in ("topology", "micro_batches", "schedule"):
        if getattr(a, name) != getattr(b, name):
            yield f"{name}: {getattr(a, name)} -> {getattr(b, name)}"
    for s in range(max(len(a.stages), len(b.stages))):
        old, new = (plan.stages[s] if s < len(plan.stages) else None for plan in (a, b))
        words = [
            f"operations {st.first_op} to {st.last_op}, devices {_span(st.devices)} as {st.data} x {st.ways}"
            if st
            else "none"
            for st in (old, new)
        ]
        if words[0] != words[1]:
            yield f"stage {s}: {words[0]} -> {words[1]}"


def _splits(graph: Graph, evaluator: Evaluator, a: Plan, b: Plan) -> Iterator[str]:
    known = []
    for plan in (a, b):
        stage_at = stage_of_ops(graph, plan.stages)
        places = [evaluator.places(stage, plan.micro_batches) for stage in plan.stages]
        ways = [stage.ways for stage in plan.stages]
        rows = {}
        for tensor, name in [
            *((p.tensor, p.name) for p in graph.parameters),
            *((t, graph.tensors[t].name) for t in graph.inputs),
        ]:
            users = graph.consumers(tensor)
            at = stage_at[users[0]] if users else 0
            rows[name] = word(int(places[at][tensor]), graph.tensors[tensor].shape, ways[at])
        known.append(rows)
    changed: dict[tuple[str, str, str], list[str]] = {}
    for name, old in known[0].items():
        if old != known[1][name]:
            changed.setdefault((re.sub(r"\d+", "#", name), old, known[1][name]), []).append(name)
    if not changed:
        yield "every variable and input lies alike"
    for (pattern, old, new), names in changed.items():
        which = names[0] if len(names) == 1 else f"{pattern} ({len(names)} of them)"
        yield f"{which}: {old} -> {new}"


def _span(devices: Sequence[int]) -> str:
    if len(devices) > 2 and list(devices) == list(range(devices[0], devices[-1] + 1)):
        return f"{devices[0]}-{devices[-1]}"
    return ",".join(map(str, devices))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms" if abs(seconds) < 1 else f"{seconds:,.3f} s"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if abs(size) < 1e9 else f"{size / 1e9:,.2f} GB"
