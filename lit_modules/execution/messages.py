"""What DTensor sends between the columns of a stage: one collective at each border of a styled module that needs one.

The cost model lets every operation fetch its operands as it wants them, so that a gradient which three operations of a
backward pass read whole is priced three times. Torch's styles fetch it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from datamodules.planning.collectives import Kind, groups_of, slowest
from datamodules.planning.graph import Graph
from datamodules.planning.placement import settle
from datamodules.planning.plan import StagePlan
from datamodules.planning.topology import Topology
from lit_modules.execution.layouts import WHOLE, Use, last_forward, uses_of

PARTIAL = -2
ROWS, LAST = 0, 1  # how an activation is cut: along rows, or along features


@dataclass(frozen=True)
class Message:
    """One collective: bytes of the full tensor of one mesh row and one micro-batch."""

    kind: Kind
    size_bytes: float
    backward: bool


def messages_of(graph: Graph, stage: StagePlan, net: nn.Module, micro_batches: int = 1) -> list[Message]:
    """Return the collectives of one micro-batch, in no order.

    Args:
        net: the whole net, whose parameters are named as in the graph.
    Raises:
        PlanError: a stage whose splits contradict its graph.
    """
    if stage.ways == 1:
        return []
    places, modules = settle(graph, stage.ways, stage.splits, stage.placements), dict(net.named_modules())
    uses = uses_of(net, graph, stage, places)
    ends = stage.last_op >= last_forward(graph)
    found, shared = [], set[tuple[str, int]]()
    for use in uses:
        is_linear = isinstance(modules[use.path], nn.Linear)
        by_columns = use.weight == (0 if is_linear else 1)
        key = use.path.rpartition(".")[0], use.source
        again = key in shared  # siblings on one input: their gradients are added first, and summed over columns once
        if by_columns and _lies(graph, use.x, use.x_split) == WHOLE:
            shared.add(key)
        for kind, tensor, backward in _of(graph, use, is_linear, by_columns, again, ends and use is uses[-1]):
            size = graph.tensors[tensor].bytes / stage.data / micro_batches
            found.append(Message(kind, size, backward))
    return found


def seconds_of(message: Message, stage: StagePlan, topology: Topology) -> float:
    """Seconds of a message in the slowest row of the stage's mesh."""
    lines = [stage.devices[i * stage.ways : (i + 1) * stage.ways] for i in range(stage.data)]
    return slowest(message.kind, message.size_bytes, groups_of(topology, lines), topology)


def _of(
    graph: Graph, use: Use, is_linear: bool, by_columns: bool, again: bool, is_last: bool
) -> Iterator[tuple[Kind, int, bool]]:
    """Collectives at the border of one module: (kind, tensor, whether of its gradient)."""
    x, y = _lies(graph, use.x, use.x_split), _lies(graph, use.y, use.y_split)
    if is_last and y == LAST:
        y = WHOLE  # the loss is taken of whole rows
    if use.weight == WHOLE:
        if x == LAST:
            yield "all_gather", use.x, False
        return
    wants = WHOLE if by_columns or not is_linear else LAST  # tokens are whole for every part of a table
    makes = LAST if by_columns else PARTIAL
    if kind := _kind(x, wants):
        yield kind, use.x, False
    if kind := _kind(makes, y):
        yield kind, use.y, False
    if kind := _kind(y, LAST if by_columns else WHOLE):
        yield kind, use.y, True
    # Where the whole input went in, every column's gradient of it is a part of the sum.
    if use.source not in graph.inputs and not again and (kind := _kind(PARTIAL if wants == WHOLE else LAST, x)):
        yield kind, use.x, True


def _kind(before: int, after: int) -> Kind | None:
    """The collective between two placements of an activation."""
    if before in (after, WHOLE):
        return None
    if before == PARTIAL:
        return "all_reduce" if after == WHOLE else "reduce_scatter"
    return "all_gather" if after == WHOLE else "all_to_all"


def _lies(graph: Graph, tensor: int, split: int) -> int:
    """A split as rows, features or whole."""
    if split == WHOLE:
        return WHOLE
    return LAST if split == len(graph.tensors[tensor].shape) - 1 else ROWS
