"""The full placement space as arrays: ways to run each operation, and the moves between where a tensor is made and where used.

What solvers outside this package read (an export to the IOPDDL format, a cost-function network): nodes with strategies, edges
with a matrix of moves. Sources (variables, inputs, buffers) are nodes too. A variable's gradient has an edge back to its
variable, where the update needs it as the variable lies: replicated gradients that arrive partial are all-reduced there.

Legend: K strategies of a node, J operands of it, P strategies of an edge's maker, C of its user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from datamodules.planning.graph import Graph
from datamodules.planning.rules import PARTIAL, REPLICATED, RuleTable, divides, names_of

SOURCE = -1
SplitArray = np.ndarray  # int8


class Move(IntEnum):
    """What brings a tensor from one placement to another."""

    NONE = 0
    SLICE = 1  # each device keeps its part; nothing is sent
    ALL_GATHER = 2
    REDUCE_SCATTER = 3
    ALL_REDUCE = 4
    ALL_TO_ALL = 5
    FORBIDDEN = 6  # a partial sum out of something whole: never of use


def move(before: int, after: int) -> Move:
    """Return what brings a tensor from one placement to another.

    Raises:
        ValueError: a placement that is neither a dim, REPLICATED nor PARTIAL.
    """
    if min(before, after) < PARTIAL:
        raise ValueError(f"no placement {min(before, after)}; there are dims, {REPLICATED} and {PARTIAL}")
    if before == after:
        return Move.NONE
    if after == PARTIAL:
        return Move.FORBIDDEN
    if before == PARTIAL:
        return Move.ALL_REDUCE if after == REPLICATED else Move.REDUCE_SCATTER
    if before == REPLICATED:
        return Move.SLICE
    return Move.ALL_GATHER if after == REPLICATED else Move.ALL_TO_ALL


@dataclass(frozen=True)
class Node:
    """An operation or a source, with the ways it can be.

    Attributes:
        name: of the operation or tensor.
        op: index of the operation; SOURCE for a variable, an input or a buffer.
        operands: tensors (J,), inputs before outputs; of a source, its tensor.
        inputs: how many of them are inputs.
        strategies: splits (K, J), the replicated strategy first.
        divided: whether each strategy shares the work out (K,).
        inner: bytes all-reduced inside the operation (K,), int64.
        reduced: bytes of outputs that are all-reduced before they appear (K,), int64: extremes, which have no partial form.
    """

    name: str
    op: int
    operands: tuple[int, ...]
    inputs: int
    strategies: SplitArray
    divided: np.ndarray
    inner: np.ndarray
    reduced: np.ndarray

    def label(self, strategy: int) -> str:
        """Return a strategy for people: "S0, R -> S0"."""
        row = self.strategies[strategy].tolist()
        return f"{names_of(row[: self.inputs])} -> {names_of(row[self.inputs :])}".removeprefix(" -> ")


@dataclass(frozen=True)
class Edge:
    """A tensor between two nodes, by the column of each node's strategies; `tie` from a gradient back to its variable."""

    maker: int
    made: int
    user: int
    used: int
    tensor: int
    tie: bool = False


@dataclass(frozen=True)
class ShardingSpace:
    """All nodes and edges of a graph on N devices; nodes are sources first, then operations in order."""

    graph: Graph
    devices: int
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    @property
    def sizes(self) -> np.ndarray:
        """Number of strategies of each node, int64."""
        return np.array([len(node.strategies) for node in self.nodes], dtype=np.int64)

    def moves(self, edge: Edge) -> np.ndarray:
        """Return the Move of each pair of strategies (P, C), int8."""
        made = self.nodes[edge.maker].strategies[:, edge.made]
        used = self.nodes[edge.user].strategies[:, edge.used]
        return _MOVES[made[:, None] - PARTIAL, used[None, :] - PARTIAL]

    def edge_costs(self, edge: Edge, seconds: Callable[[Move, int], float]) -> np.ndarray:
        """Return the cost of each pair of strategies (P, C), float64; infinite where no move exists.

        Args:
            seconds: (move, bytes of the whole tensor) -> cost; asked for each kind of move once.
        """
        size = self.graph.tensors[edge.tensor].bytes
        table = np.array([0.0 if m == Move.NONE else np.inf if m == Move.FORBIDDEN else seconds(m, size) for m in Move])
        return table[self.moves(edge)]

    def total(
        self,
        choice: Sequence[int],
        node_costs: Sequence[np.ndarray],
        seconds: Callable[[Move, int], float],
    ) -> float:
        """Return the cost of a choice of one strategy per node: the nodes' own, and every edge's move.

        Raises:
            ValueError: not one strategy of each node.
        """
        if len(choice) != len(self.nodes) or any(not 0 <= c < k for c, k in zip(choice, self.sizes, strict=True)):
            raise ValueError(f"a choice names one strategy of each of {len(self.nodes)} nodes")
        own = sum(float(costs[c]) for costs, c in zip(node_costs, choice, strict=True))
        return own + sum(float(self.edge_costs(e, seconds)[choice[e.maker], choice[e.user]]) for e in self.edges)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the space as flat arrays, for compiled solvers.

        Keys: strategies (all rows one after another, int8, padded with -128 to the widest), node_start (row of each node's
        first strategy, one more at the end), edges (E, 5): maker, column, user, column, tensor; moves (of each edge, row by
        row, int8) and move_start.
        """
        widest = max((node.strategies.shape[1] for node in self.nodes), default=0)
        rows = np.full((int(self.sizes.sum()), widest), -128, dtype=np.int8)
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        for node, start in zip(self.nodes, starts[:-1], strict=True):
            rows[start : start + len(node.strategies), : node.strategies.shape[1]] = node.strategies
        moves = [self.moves(edge).ravel() for edge in self.edges]
        return {
            "strategies": rows,
            "node_start": starts.astype(np.int64),
            "edges": np.array([[e.maker, e.made, e.user, e.used, e.tensor] for e in self.edges], np.int64).reshape(
                -1, 5
            ),
            "moves": np.concatenate(moves) if moves else np.zeros(0, dtype=np.int8),
            "move_start": np.concatenate([[0], np.cumsum([len(m) for m in moves])]).astype(np.int64),
        }


_RANKS = 32
_MOVES = np.array([[move(a, b) for b in range(PARTIAL, _RANKS)] for a in range(PARTIAL, _RANKS)], dtype=np.int8)


def sharding_space(graph: Graph, devices: int) -> ShardingSpace:
    """Return the placement space of a graph on N devices.

    Raises:
        ValueError: fewer than one device.
        RuleError: an operation that does not fit its kind.
    """
    table = RuleTable(devices, "full")
    sources = [*(p.tensor for p in graph.parameters), *graph.inputs, *graph.buffers]
    nodes = [_source(graph, tensor, devices) for tensor in sources]
    known: dict[tuple, tuple[np.ndarray, ...]] = {}
    for index, op in enumerate(graph.ops):
        key = table.signature(op, graph)
        if key not in known:
            known[key] = _strategies(table, graph, index)
        operands = (*op.inputs, *op.outputs)
        nodes.append(Node(op.name, index, operands, len(op.inputs), *known[key]))
    return ShardingSpace(graph, devices, tuple(nodes), tuple(_edges(graph, nodes, sources)))


def _source(graph: Graph, tensor: int, devices: int) -> Node:
    info = graph.tensors[tensor]
    dims = [d for d, size in enumerate(info.shape) if devices > 1 and size and size % devices == 0]
    strategies = np.array([[REPLICATED], *([d] for d in dims)], dtype=np.int8)
    none = np.zeros(len(strategies), dtype=np.int64)
    return Node(info.name, SOURCE, (tensor,), 0, strategies, none.astype(bool), none, none)


def _strategies(table: RuleTable, graph: Graph, index: int) -> tuple[np.ndarray, ...]:
    op = graph.ops[index]
    placed = table.of(op, graph)
    strategies = np.array([[*p.row[0], *p.row[1]] for p in placed], dtype=np.int8).reshape(len(placed), -1)
    divided = np.array([divides(p.row) for p in placed])
    inner = np.array([p.inner for p in placed], dtype=np.int64)
    reduced = [sum(graph.tensors[op.outputs[i]].bytes for i in p.reduced) for p in placed]
    return strategies, divided, inner, np.array(reduced, dtype=np.int64)


def _edges(graph: Graph, nodes: Sequence[Node], sources: Sequence[int]) -> list[Edge]:
    makers = {tensor: (node, 0) for node, tensor in enumerate(sources)}
    edges = []
    for number, node in enumerate(nodes):
        if node.op == SOURCE:
            continue
        first: dict[int, int] = {}
        for column, tensor in enumerate(node.operands[: node.inputs]):
            if first.setdefault(tensor, column) == column:  # a tensor that is read twice is moved once
                edges.append(Edge(*makers[tensor], number, column, tensor))
        for column, tensor in enumerate(node.operands[node.inputs :], node.inputs):
            makers[tensor] = number, column
    for p in graph.parameters:
        if p.gradient is not None and p.gradient != p.tensor:
            edges.append(Edge(*makers[p.gradient], *makers[p.tensor], p.gradient, tie=True))
    return edges
