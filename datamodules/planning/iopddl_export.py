"""A graph on a machine as an IOPDDL problem: for solvers of others, and for their figures on our models.

Legend: K strategies of a node.

A node for each variable, input, buffer and operation, a strategy for each way to hold or run it on all devices, an edge for
each tensor from where it is made to where it is used. Costs are whole picoseconds, memory whole bytes per device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from datamodules.planning.collectives import Kind, group_of, slowest
from datamodules.planning.graph import Graph
from datamodules.planning.iopddl import Edge, Problem
from datamodules.planning.roofline import op_seconds
from datamodules.planning.sharding_space import SOURCE, Move, Node, ShardingSpace, sharding_space
from datamodules.planning.topology import Topology
from datamodules.planning.vocabulary import VIEWS

UNIT_S = 1e-12
KINDS: dict[Move, Kind] = {
    Move.ALL_GATHER: "all_gather",
    Move.REDUCE_SCATTER: "reduce_scatter",
    Move.ALL_REDUCE: "all_reduce",
    Move.ALL_TO_ALL: "all_to_all",
}
Seconds = Callable[[Move, float], float]
FORBIDDEN = 10**15  # picoseconds: a quarter of an hour, more than any plan costs and far from 64 bits


def export(graph: Graph, topology: Topology, devices: int, usage_limit: int | None = None) -> Problem:
    """Return the problem of sharding a graph over the first `devices` devices of a machine.

    Args:
        usage_limit: bytes per device; None for what the topology lets a plan use.
    Raises:
        ValueError: more devices than the machine has, or none.
    """
    total = topology.nodes * topology.devices_per_node
    if not 1 <= devices <= total:
        raise ValueError(f"topology {topology.name} has {total} devices, asked for {devices}")
    space = sharding_space(graph, devices)
    group = group_of(topology, range(devices))

    def seconds(move: Move, size_bytes: float) -> float:
        if move == Move.SLICE or devices == 1:
            return 0.0
        return slowest(KINDS[move], size_bytes, [group], topology)

    edges = []
    for edge in space.edges:
        table = space.edge_costs(edge, seconds)
        edges.append(Edge((edge.maker, edge.user), _whole(table).ravel()))
    limit = usage_limit if usage_limit is not None else int(topology.memory_bytes * topology.usable_memory)
    return Problem(
        name=f"{graph.name} on {devices} of {topology.name}",
        intervals=intervals(space),
        costs=tuple(_whole(node_seconds(node, graph, devices, topology, seconds)) for node in space.nodes),
        usages=tuple(usages(node, graph, devices) for node in space.nodes),
        edges=tuple(edges),
        usage_limit=limit,
    )


def _whole(values: np.ndarray) -> np.ndarray:
    scaled = np.where(np.isfinite(values), values, 0.0) / UNIT_S
    return np.where(np.isfinite(values), np.rint(scaled), FORBIDDEN).astype(np.int64)


def node_seconds(node: Node, graph: Graph, devices: int, topology: Topology, seconds: Seconds) -> np.ndarray:
    """Seconds of each strategy (K,): the operation itself, and what is all-reduced inside it."""
    costs = np.zeros(len(node.strategies))
    if node.op == SOURCE:
        return costs
    op = graph.ops[node.op]
    for k, row in enumerate(node.strategies.tolist()):
        split = (tuple(row[: node.inputs]), tuple(row[node.inputs :]))
        costs[k] = op_seconds(op, graph, split, devices, topology)
        for size in (int(node.inner[k]), int(node.reduced[k])):
            costs[k] += seconds(Move.ALL_REDUCE, size) if size else 0.0
    return costs


def usages(node: Node, graph: Graph, devices: int) -> np.ndarray:
    """Bytes per device of what a node makes, for each strategy (K,): split tensors are held in part, views not at all."""
    found = []
    for row in node.strategies.tolist():
        made = zip(node.operands[node.inputs :], row[node.inputs :], strict=True)
        found.append(sum(-(-graph.tensors[t].bytes // (devices if split >= 0 else 1)) for t, split in made))
    view = node.op != SOURCE and graph.ops[node.op].kind in VIEWS
    return np.zeros(len(found), dtype=np.int64) if view else np.array(found, dtype=np.int64)


def intervals(space: ShardingSpace) -> tuple[tuple[int, int], ...]:
    """When each node's tensors are held, in operations: sources always, others from their making to their last use.

    What is read through views is used when these are.
    """
    graph, end = space.graph, len(space.graph.ops)
    last = dict.fromkeys(graph.outputs, end)
    for index in reversed(range(end)):
        op = graph.ops[index]
        until = max((last.get(t, index + 1) for t in op.outputs), default=0) if op.kind in VIEWS else index + 1
        for tensor in op.inputs:
            last[tensor] = max(last.get(tensor, 0), until)
    found = []
    for node in space.nodes:
        made = node.operands[node.inputs :]
        until = max((last.get(t, node.op + 1) for t in made), default=node.op + 1)
        found.append((0, end) if node.op == SOURCE else (node.op, until))
    return tuple(found)
