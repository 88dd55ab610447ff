"""What torch's engines take of each process beside arithmetic, memory traffic and messages: the cost model's missing part on a
small machine, where a net's step is milliseconds and a DTensor operation a good part of one.

`predict` adds these to a priced plan. The first four are times measured on nets too small to cost anything else
(`engine_points`), times a count read off the plan; two are memory traffic that the cost model leaves out:

styled      a module under one of DTensor's styles, forwards, backwards and in the optimiser, each micro-batch
moved       a collective that DTensor asks for, beside the message itself
reducer     a DistributedDataParallel round a stage, once a step
chunk       a micro-batch in a stage of torch.distributed.pipelining, forwards and backwards
copies      gradients copied into DistributedDataParallel's buckets and back (4 passes)
accumulate  gradients of the second micro-batch and after added to the first's (3 passes), and divided at the end (2)
messages    what DTensor sends (`messages`), in the place of what the cost model lets each operation fetch for itself
exposed     gradient sums that the cost model hides behind the backward pass and a machine without a core to spare does not

FSDP2, which takes DDP's place where rows meet columns or stages, has no term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from datamodules.planning.graph import Graph
from datamodules.planning.pipeline import step_length, timeline
from datamodules.planning.plan import Plan, StagePlan
from datamodules.planning.price import Evaluator, StageCost
from datamodules.planning.tables import MOVES
from datamodules.planning.topology import Topology
from lit_modules.execution.layouts import layout_of
from lit_modules.execution.messages import Message, messages_of, seconds_of

COPIES, ADDS, SCALES = 4, 3, 2  # passes over gradients
TERMS = ("styled", "moved", "reducer", "chunk")
PASSES = (
    "styled",
    "moved",
    "chunk",
    "accumulate",
)  # belong to the passes of micro-batches; all others come once, at the end


@dataclass(frozen=True)
class Engine:
    """Seconds of each term on one machine.

    Attributes:
        seconds: of `TERMS`; those left out are 0.
        overlap: share of what could hide behind a backward pass that does, 0 to 1.
    Raises:
        ValueError: an unknown term or one below zero, a share outside 0 to 1.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    overlap: float = 1.0

    def __post_init__(self) -> None:
        for name, value in self.seconds.items():
            if name not in TERMS or not 0 <= value < math.inf:
                raise ValueError(
                    f"an engine's terms are {', '.join(TERMS)}, 0 or more seconds each; got {name} {value}"
                )
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is a share of 0 to 1, got {self.overlap}")


@dataclass(frozen=True)
class Work:
    """What the engines have to do for one stage.

    Attributes:
        counts: of `TERMS` in a step; styled, moved and chunk grow with the micro-batches.
        messages: of DTensor, of one micro-batch.
        summed_bytes: of gradients that DistributedDataParallel sums, on one device.
        variable_bytes: of variables on one device.
        micro_batches: of the plan.
    """

    counts: Mapping[str, int]
    messages: tuple[Message, ...]
    summed_bytes: float
    variable_bytes: float
    micro_batches: int


@dataclass(frozen=True)
class Predicted:
    """Seconds of a step and their parts, which add up to it. Of several stages, parts of the one that ends last."""

    step_s: float
    parts: Mapping[str, float]


def work_of(graph: Graph, plan: Plan, stage: StagePlan, priced: StageCost, net: nn.Module) -> Work:
    """Count what a stage asks of the engines.

    Args:
        net: the whole net, whose parameters are named as in the graph.
    Raises:
        PlanError: a stage that torch's engines cannot express.
    """
    layout, held = layout_of(net, graph, stage), _held(graph, stage)
    summed = set(held) if stage.data > 1 else layout.summed & held.keys()
    micro = plan.micro_batches
    messages = tuple(messages_of(graph, stage, net, micro))
    counts = {
        "styled": len(layout.styles) * micro,
        "moved": len(messages) * micro,
        "reducer": int(bool(summed)),
        "chunk": micro * (len(plan.stages) > 1),
    }
    return Work(counts, messages, float(sum(held[name] for name in summed)), priced.memory.variables, micro)


def predict(evaluator: Evaluator, plan: Plan, net: nn.Module, engine: Engine | None) -> Predicted:
    """Predict a step of a plan as torch's engines run it; with None instead of an engine it is the cost model's own price.

    More seconds of a term never make a step shorter, nor does less overlap.

    Raises:
        PlanError: a plan of another graph, or one that torch's engines cannot express.
    """
    graph, topology = evaluator.graph, evaluator.topology
    cost, micro = evaluator.price(plan), plan.micro_batches
    stages = [_Stage.bare(priced, graph) for priced in cost.stages]
    if engine is not None:
        works = [work_of(graph, plan, s, p, net) for s, p in zip(plan.stages, cost.stages, strict=True)]
        every = zip(stages, works, plan.stages, strict=True)
        stages = [bare.under(engine, work, stage, topology) for bare, work, stage in every]
    forward, backward, tails = ([getattr(s, name) for s in stages] for name in ("forward_s", "backward_s", "tail_s"))
    if cost.line is None:
        return Predicted(micro * (forward[0] + backward[0]) + tails[0], stages[0].shown())
    ahead, back = cost.line.forward_X[1::2].tolist(), cost.line.backward_X[1::2].tolist()
    line = timeline(forward, backward, ahead, back, micro, plan.schedule)
    step = step_length(line, tails)
    ends = [start + b + t for start, b, t in zip(line.start_b[-1, ::2].tolist(), backward, tails, strict=True)]
    shown = stages[ends.index(max(ends))].shown()
    return Predicted(step, {**shown, "bubble": step - sum(shown.values())})


@dataclass(frozen=True)
class _Stage:
    """Seconds of a stage: of a micro-batch forwards and backwards, after the last, and of a step by cause."""

    priced: StageCost
    forward_s: float
    backward_s: float
    tail_s: float
    parts: Mapping[str, float]
    moved_s: tuple[float, float]  # of a step, forwards and backwards, as the cost model has it

    @classmethod
    def bare(cls, priced: StageCost, graph: Graph) -> _Stage:
        """As the cost model has it."""
        own = {"compute": priced.compute_s, "update": priced.update_s, **priced.collective_s}
        moves = [(graph.ops[m.op].phase == "backward", m.seconds) for m in priced.moves if m.kind in MOVES]
        ahead, back = (sum(s for late, s in moves if late is way) for way in (False, True))
        parts = {**own, "overlap": -priced.overlap_s}
        return cls(priced, priced.forward_s, priced.backward_s, priced.tail_s, parts, (ahead, back))

    def under(self, engine: Engine, work: Work, stage: StagePlan, topology: Topology) -> _Stage:
        """As torch's engines run it."""
        micro = work.micro_batches
        sent = [(m.kind, m.backward, seconds_of(m, stage, topology) * micro) for m in work.messages]
        kept = {name: s for name, s in self.parts.items() if name not in MOVES}
        messages = {kind: sum(s for k, _, s in sent if k == kind) for kind in MOVES}
        added = parts_of(work, self.priced, engine, topology)
        passes = sum(added[name] for name in PASSES) / 2
        ahead, back = (sum(s for _, late, s in sent if late is way) for way in (False, True))
        return _Stage(
            self.priced,
            self.forward_s + (passes + ahead - self.moved_s[0]) / micro,
            self.backward_s + (passes + back - self.moved_s[1]) / micro,
            self.tail_s + sum(s for name, s in added.items() if name not in PASSES),
            {**kept, **messages, **added},
            (ahead, back),
        )

    def shown(self) -> dict[str, float]:
        """The parts that are something."""
        return {name: seconds for name, seconds in self.parts.items() if seconds}


def parts_of(work: Work, priced: StageCost, engine: Engine, topology: Topology) -> dict[str, float]:
    """Seconds that the engines add to a step of a stage, by term."""
    passes = ADDS * (work.micro_batches - 1) + SCALES * (work.micro_batches > 1)
    return {
        **{name: engine.seconds.get(name, 0.0) * count for name, count in work.counts.items()},
        "copies": COPIES * work.summed_bytes / topology.memory_rate,
        "accumulate": passes * work.variable_bytes / topology.memory_rate,
        "exposed": (1 - engine.overlap) * priced.overlap_s,
    }


def _held(graph: Graph, stage: StagePlan) -> dict[str, int]:
    """Variables that a stage's forward operations read, with their bytes."""
    found = {}
    for parameter in graph.parameters:
        users = [i for i in graph.consumers(parameter.tensor) if graph.ops[i].phase == "forward"]
        if any(stage.first_op <= i <= stage.last_op for i in users):
            found[parameter.name] = graph.tensors[parameter.tensor].bytes
    return found
