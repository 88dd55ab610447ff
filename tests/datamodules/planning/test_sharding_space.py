"""The placement space as arrays: its moves, and that each plan by propagation is a point in it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from datamodules.planning.propagate import Conflict, Propagator, bit_of
from datamodules.planning.rules import PARTIAL, REPLICATED
from datamodules.planning.sharding_space import SOURCE, Move, move, sharding_space
from tests.datamodules.planning.hand_graphs import named, perceptron

GRAPH = perceptron(batch=8, widths=(8, 16, 8))
SPACE = sharding_space(GRAPH, 4)


def test_moves_between_placements():
    assert [move(a, b) for a, b in ((0, 0), (-1, 1), (1, -1), (0, 1), (PARTIAL, -1), (PARTIAL, 0), (0, PARTIAL))] == [
        *(Move.NONE, Move.SLICE, Move.ALL_GATHER, Move.ALL_TO_ALL),
        *(Move.ALL_REDUCE, Move.REDUCE_SCATTER, Move.FORBIDDEN),
    ]
    with pytest.raises(ValueError, match="no placement -3"):
        move(-3, 0)


def test_every_operand_of_every_operation_has_one_edge_and_every_gradient_a_tie():
    plain = [edge for edge in SPACE.edges if not edge.tie]
    assert len(plain) == sum(len(set(op.inputs)) for op in GRAPH.ops)
    assert len(SPACE.edges) - len(plain) == len(GRAPH.parameters)
    for edge in SPACE.edges:
        maker, user = SPACE.nodes[edge.maker], SPACE.nodes[edge.user]
        assert maker.operands[edge.made] == edge.tensor
        assert edge.tie == (user.op == SOURCE)
        assert edge.tie or user.operands[edge.used] == edge.tensor
        moves = SPACE.moves(edge)
        assert moves.shape == (len(maker.strategies), len(user.strategies))
        for i, j in product(range(moves.shape[0]), range(moves.shape[1])):
            assert moves[i, j] == move(int(maker.strategies[i, edge.made]), int(user.strategies[j, edge.used]))


def test_sources_are_never_partial_and_all_nodes_can_be_replicated():
    for node in SPACE.nodes:
        assert set(node.strategies[0].tolist()) <= {REPLICATED}
        assert not node.divided[0]
        assert node.op != SOURCE or node.strategies.min() >= REPLICATED
    assert SPACE.nodes[0].label(1) == "S0"


def test_a_plan_by_propagation_is_a_point_whose_only_moves_are_sums():
    engine = Propagator(GRAPH, 4)
    for tensor, split in ((named(GRAPH, "x"), 0), (named(GRAPH, "w0"), 1), (named(GRAPH, "w1"), 1)):
        state = engine.restrict(engine.root, {tensor: bit_of(split)})
        assert not isinstance(state, Conflict)
        placement = engine.complete(state)
        assert placement is not None
        choice = [_strategy(node, placement) for node in SPACE.nodes]
        moves = {Move(int(SPACE.moves(e)[choice[e.maker], choice[e.user]])) for e in SPACE.edges}
        assert moves <= {Move.NONE, Move.ALL_REDUCE}
        assert Move.ALL_REDUCE in moves
        assert any(SPACE.nodes[n].divided[c] for n, c in enumerate(choice))


def _strategy(node, placement) -> int:
    """The strategy that takes and makes what the placement says, its sums not yet reduced."""
    want = [placement[t] for t in node.operands]
    for i, row in enumerate(node.strategies.tolist()):
        outputs = [REPLICATED if s == PARTIAL else s for s in row[node.inputs :]]
        if row[: node.inputs] == want[: node.inputs] and outputs == want[node.inputs :]:
            return i
    raise AssertionError(node.name)


def test_totals_add_nodes_and_moves():
    zeros = [np.zeros(size) for size in SPACE.sizes]
    replicated = [0] * len(SPACE.nodes)

    def by_bytes(kind: Move, size: int) -> float:
        return float(size) * kind

    assert SPACE.total(replicated, zeros, by_bytes) == 0.0
    source = next(n for n, node in enumerate(SPACE.nodes) if node.operands == (named(GRAPH, "x"),))
    choice = list(replicated)
    choice[source] = 1
    readers = len(GRAPH.consumers(named(GRAPH, "x")))
    size = GRAPH.tensors[named(GRAPH, "x")].bytes
    assert SPACE.total(choice, zeros, by_bytes) == readers * size * Move.ALL_GATHER
    own = [np.arange(size, dtype=float) for size in SPACE.sizes]
    assert SPACE.total(choice, own, by_bytes) == readers * size * Move.ALL_GATHER + 1
    with pytest.raises(ValueError, match="one strategy of each"):
        SPACE.total([0], zeros, by_bytes)


def test_partial_sums_out_of_whole_tensors_cost_infinitely_much():
    edge = next(e for e in SPACE.edges if (SPACE.moves(e) == Move.FORBIDDEN).any())
    costs = SPACE.edge_costs(edge, lambda kind, size: 1.0)
    np.testing.assert_array_equal(np.isinf(costs), SPACE.moves(edge) == Move.FORBIDDEN)


def test_flat_arrays_hold_the_same():
    flat = SPACE.arrays()
    starts = flat["node_start"]
    for n, node in enumerate(SPACE.nodes):
        rows = flat["strategies"][starts[n] : starts[n + 1]]
        np.testing.assert_array_equal(rows[:, : len(node.operands)], node.strategies)
        assert (rows[:, len(node.operands) :] == -128).all()
    for e, edge in enumerate(SPACE.edges):
        own = flat["moves"][flat["move_start"][e] : flat["move_start"][e + 1]]
        np.testing.assert_array_equal(own, SPACE.moves(edge).ravel())
        assert flat["edges"][e].tolist() == [edge.maker, edge.made, edge.user, edge.used, edge.tensor]
