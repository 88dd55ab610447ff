"""The cost model of one stage as arrays: rules with their seconds, seconds of every move, memory events.

Built once for a graph, a mesh and a set of operations; then any placement of the stage's tensors is priced by compiled loops.
Legend: N operations, T tensors, V variables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.planning import _price_numba
from datamodules.planning.collectives import Group, bucketed, groups_of, slowest
from datamodules.planning.graph import Graph, Op
from datamodules.planning.placement import REPLICATED, Placed, RowsOf, full_rows, signature_of
from datamodules.planning.plan import StagePlan
from datamodules.planning.roofline import op_seconds
from datamodules.planning.slot_table import in_rows
from datamodules.planning.topology import Topology
from datamodules.planning.vocabulary import VIEWS

kernels: Any = _price_numba  # numba's dispatchers have no static signature
MOVES = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all")


@dataclass(frozen=True)
class Tables:
    """One stage, ready to be priced. `ops` are the stage's operations (indices into the graph), in order."""

    graph: Graph
    topology: Topology
    ops: tuple[int, ...]
    devices: int  # columns of the mesh, which splits span
    inner: tuple[Group, ...]
    outer: tuple[Group, ...]
    rules: tuple[tuple[Placed, ...], ...]  # of each distinct operation
    table_of_N: np.ndarray
    row_ptr: np.ndarray
    row_seconds: np.ndarray
    code_ptr: np.ndarray
    codes: np.ndarray
    operand_ptr: np.ndarray
    operands: np.ndarray  # -1: an input that occurs again
    inputs_N: np.ndarray
    moves_T4: np.ndarray
    backward_N: np.ndarray
    variables: tuple[int, ...]  # positions in graph.parameters, by the operation that makes the gradient
    variable_V: np.ndarray
    gradient_V: np.ndarray  # -1 where the loss does not depend on it
    maker_V: np.ndarray  # index into ops
    sums_V4: np.ndarray  # seconds of moving each gradient over the columns, in buckets
    across_V2: np.ndarray  # seconds to sum over rows of the mesh: replicated, split
    buffers: tuple[int, ...]
    size_T: np.ndarray
    memory: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # alloc_ptr, allocs, free_ptr, frees

    @property
    def row_arrays(self) -> tuple[np.ndarray, ...]:
        """What `best_row` reads behind the placements."""
        return (
            *(self.operand_ptr, self.operands, self.inputs_N, self.table_of_N),
            *(self.row_ptr, self.row_seconds, self.code_ptr, self.codes, self.moves_T4),
        )

    def price_ops(self, place_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds (N,) and the cheapest rule (N,) of every operation."""
        cost_N, chosen_N = np.zeros(len(self.ops)), np.zeros(len(self.ops), dtype=np.int32)
        every = np.arange(len(self.ops))
        kernels.price_ops(every, place_T, *self.row_arrays, cost_N, chosen_N)
        return cost_N, chosen_N

    def sync(self, place_T: np.ndarray) -> np.ndarray:
        """Seconds (V,) to make each gradient whole where its variable lies."""
        return kernels.sync_seconds(place_T, self.gradient_V, self.variable_V, self.sums_V4, self.across_V2)

    def finish(self, cost_N: np.ndarray, sync_V: np.ndarray, overlap: bool) -> tuple[float, float, float, float]:
        """Forward, backward, gradient sums, and how much of these nothing hides, in seconds."""
        return kernels.finish(cost_N, self.backward_N, self.maker_V, sync_V, overlap)

    def variable_bytes(self, place_T: np.ndarray) -> float:
        """Bytes of the stage's variables on one device."""
        size_V = self.size_T[self.variable_V]
        return float(np.where(place_T[self.variable_V] >= 0, size_V / self.devices, size_V).sum())

    def touching(self) -> tuple[np.ndarray, np.ndarray]:
        """For each tensor the positions of the operations that read or make it: starts (T + 1,), positions."""
        found: list[list[int]] = [[] for _ in self.graph.tensors]
        for position, i in enumerate(self.ops):
            op = self.graph.ops[i]
            for tensor in {*op.inputs, *op.outputs}:
                found[tensor].append(position)
        return in_rows(found)

    def live(self, place_T: np.ndarray) -> tuple[float, float]:
        """Peak of live activations, and what the backward pass finds, bytes on one device for one micro-batch."""
        return kernels.live_bytes(place_T, self.size_T, self.devices, *self.memory, self.backward_N)


def build(
    graph: Graph, ops: Sequence[int], stage: StagePlan, topology: Topology, rows_of: RowsOf = full_rows
) -> Tables:
    """The arrays for a stage's operations; `graph` has the batch of one mesh row and one micro-batch already."""
    k = stage.ways
    lines = [stage.devices[i * k : (i + 1) * k] for i in range(stage.data)]
    inner = groups_of(topology, lines)
    outer = groups_of(topology, [stage.devices[i::k] for i in range(k)])
    size_T = np.array([info.bytes for info in graph.tensors], dtype=np.float64)
    ptr, operands, inputs_N = _operands(graph, ops)
    variables, makers = _variables(graph, ops)
    chosen = [graph.parameters[v] for v in variables]
    tensor_V, here = np.array([p.tensor for p in chosen], dtype=np.int64), set(ops)
    return Tables(
        graph=graph,
        topology=topology,
        ops=tuple(ops),
        devices=k,
        inner=inner,
        outer=outer,
        **_rules(graph, ops, k, inner, topology, rows_of),
        operand_ptr=ptr,
        operands=operands,
        inputs_N=inputs_N,
        moves_T4=_moves(size_T, inner, topology, slowest),
        backward_N=np.array([graph.ops[i].phase == "backward" for i in ops], dtype=np.bool_),
        variables=tuple(variables),
        variable_V=tensor_V,
        gradient_V=np.array([-1 if p.gradient is None else p.gradient for p in chosen], dtype=np.int64),
        maker_V=np.array(makers, dtype=np.int64),
        sums_V4=_moves(size_T[tensor_V], inner, topology, bucketed),
        across_V2=_across(size_T[tensor_V], k, outer, topology),
        buffers=tuple(b for b in graph.buffers if not here.isdisjoint(graph.consumers(b))),
        size_T=size_T,
        memory=_memory(graph, ops),
    )


def _operands(graph: Graph, ops: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operands of all operations in a row; -1 where an input occurs again, so that it is moved once."""
    flat = []
    for i in ops:
        inputs = graph.ops[i].inputs
        flat.append([*(-1 if t in inputs[:at] else t for at, t in enumerate(inputs)), *graph.ops[i].outputs])
    ptr = np.concatenate([[0], np.cumsum([len(part) for part in flat])]).astype(np.int64)
    inputs_N = np.array([len(graph.ops[i].inputs) for i in ops], dtype=np.int64)
    return ptr, np.array([t for part in flat for t in part], dtype=np.int64), inputs_N


def _rules(
    graph: Graph, ops: Sequence[int], k: int, groups: Sequence[Group], topology: Topology, rows_of: RowsOf
) -> dict[str, Any]:
    """Rules and their seconds, equal operations sharing one table; the fields of Tables of these names."""
    rules: list[tuple[Placed, ...]] = []
    number: dict[tuple, int] = {}
    times: list[float] = []
    codes: list[int] = []
    row_ptr, code_ptr = [0], [0]
    table_of = np.zeros(len(ops), dtype=np.int64)
    for position, i in enumerate(ops):
        op = graph.ops[i]
        key = signature_of(op, graph)
        if key not in number:
            number[key] = len(rules)
            found = _admissible(rows_of(op, graph, k) if k > 1 else (), len(op.inputs), len(op.outputs))
            rules.append(found)
            for placed in found:
                times.append(
                    op_seconds(op, graph, placed.row, k, topology) + hidden(placed, op, graph, groups, topology)
                )
                codes += [*placed.row[0], *placed.row[1]]
            row_ptr.append(len(times))
            code_ptr.append(len(codes))
        table_of[position] = number[key]
    return {
        "rules": tuple(rules),
        "table_of_N": table_of,
        "row_ptr": np.array(row_ptr, dtype=np.int64),
        "row_seconds": np.array(times),
        "code_ptr": np.array(code_ptr, dtype=np.int64),
        "codes": np.array(codes, dtype=np.int8),
    }


def hidden(placed: Placed, op: Op, graph: Graph, groups: Sequence[Group], topology: Topology) -> float:
    """Seconds of all-reduces within an operation: of statistics, and of outputs that are no sums (maxima, say)."""
    sizes = [placed.inner] if placed.inner else []
    sizes += [graph.tensors[op.outputs[i]].bytes for i in placed.reduced]
    return sum(slowest("all_reduce", size, groups, topology) for size in sizes)


def _admissible(found: Sequence[Placed], inputs: int, outputs: int) -> tuple[Placed, ...]:
    """The rules, among which doing everything everywhere always is."""
    plain = Placed(((REPLICATED,) * inputs, (REPLICATED,) * outputs))
    return (plain, *(placed for placed in found if placed.row != plain.row))


def _moves(sizes: np.ndarray, groups: Sequence[Group], topology: Topology, how: Callable[..., float]) -> np.ndarray:
    """Seconds of each kind of move for tensors of these sizes, (len(sizes), 4)."""
    known: dict[float, list[float]] = {}
    for size in sizes.tolist():
        if size not in known:
            known[size] = [how(kind, size, groups, topology) for kind in MOVES]
    return np.array([known[size] for size in sizes.tolist()]).reshape(-1, len(MOVES))


def _across(size_V: np.ndarray, k: int, groups: Sequence[Group], topology: Topology) -> np.ndarray:
    return np.array(
        [[bucketed("all_reduce", size / part, groups, topology) for part in (1, k)] for size in size_V.tolist()]
    ).reshape(-1, 2)


def _variables(graph: Graph, ops: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions of variables that the stage reads, and which of its operations makes the gradient, in that order."""
    here, found = {op: position for position, op in enumerate(ops)}, []
    for v, parameter in enumerate(graph.parameters):
        if any(user in here for user in graph.consumers(parameter.tensor)):
            maker = None if parameter.gradient is None else graph.producer(parameter.gradient)
            found.append((here.get(maker, len(ops) - 1) if maker is not None else len(ops) - 1, v))
    found.sort()
    return [v for _, v in found], [maker for maker, _ in found]


def _memory(graph: Graph, ops: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """When activations come and go. A view has no storage of its own and keeps alive what it looks at.

    Variables, buffers and gradients of variables are counted elsewhere.
    """
    apart = {p.tensor for p in graph.parameters} | {p.gradient for p in graph.parameters} | set(graph.buffers)
    base: dict[int, int] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, i in enumerate(ops):
        op = graph.ops[i]
        for tensor in op.inputs:
            root = base.setdefault(tensor, tensor)
            first.setdefault(root, position)
            last[root] = position
        for tensor in op.outputs:
            root = base[op.inputs[0]] if op.kind in VIEWS and op.inputs else tensor
            base[tensor] = root
            first.setdefault(root, position)
            last[root] = position
    here, asked = set(ops), set(graph.outputs)
    for tensor, root in base.items():
        if any(user not in here for user in graph.consumers(tensor)) or tensor in asked:
            last[root] = len(ops) - 1 if graph.producer(tensor) in here else last[root]
    apart_roots = {base.get(tensor, tensor) for tensor in apart if tensor is not None}
    kept = {root for root in first if root not in apart_roots}
    return (*_events(first, kept, len(ops)), *_events(last, kept, len(ops)))


def _events(when: dict[int, int], kept: set[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    ordered = sorted((position, tensor) for tensor, position in when.items() if tensor in kept)
    ptr = np.searchsorted([position for position, _ in ordered], np.arange(count + 1), side="left")
    return ptr.astype(np.int64), np.array([tensor for _, tensor in ordered], dtype=np.int64)
