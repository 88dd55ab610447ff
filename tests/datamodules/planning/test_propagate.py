"""Propagation against plain search: it removes only what is impossible, in any order, and says what is at fault."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.planning.graph import Graph, Op
from datamodules.planning.propagate import Conflict, Propagator, bit_of, determined, propagate, splits_of
from datamodules.planning.rules import REPLICATED, MissingRuleWarning, rows
from tests.datamodules.planning.hand_graphs import named, perceptron

GRAPH = perceptron(batch=4, widths=(4, 8, 6, 4))
ENGINE = Propagator(GRAPH, 2, "paper")


def keeps_every_rule(graph: Graph, devices: int, placement: Mapping[int, int]) -> bool:
    """Whether each operation runs by a row, and each gradient lies as its variable."""
    runs = all(
        (tuple(placement[t] for t in op.inputs), tuple(placement[t] for t in op.outputs)) in rows(op, graph, devices)
        for op in graph.ops
    )
    return runs and all(
        placement[p.tensor] == placement[p.gradient] for p in graph.parameters if p.gradient is not None
    )


def solvable(graph: Graph, devices: int, seeds: Mapping[int, int]) -> bool:
    """Whether some placement of all tensors agrees with the seeds: operations one after another, with a way back."""
    tables = [rows(op, graph, devices) for op in graph.ops]
    ties = {p.tensor: p.gradient for p in graph.parameters} | {p.gradient: p.tensor for p in graph.parameters}

    def search(position: int, known: dict[int, int]) -> bool:
        if position == len(graph.ops):
            return True
        op = graph.ops[position]
        for row in tables[position]:
            after = dict(known)
            for tensor, split in zip((*op.inputs, *op.outputs), (*row[0], *row[1]), strict=True):
                if after.setdefault(tensor, split) != split:
                    break
                twin = ties.get(tensor)
                if twin is not None and after.setdefault(twin, split) != split:
                    break
            else:
                if search(position + 1, after):
                    return True
        return False

    known = dict(seeds)
    for tensor, split in seeds.items():
        twin = ties.get(tensor)
        if twin is not None and known.setdefault(twin, split) != split:
            return False
    return search(0, known)


@pytest.mark.parametrize("tensor", range(len(GRAPH.tensors)))
def test_one_seed_is_refused_exactly_where_no_placement_exists(tensor):
    for split in (REPLICATED, *(d for d, s in enumerate(GRAPH.tensors[tensor].shape) if s % 2 == 0)):
        found = ENGINE.restrict(ENGINE.root, {tensor: bit_of(split)})
        possible = solvable(GRAPH, 2, {tensor: split})
        if isinstance(found, Conflict):
            assert not possible
            continue
        complete = ENGINE.complete(found)
        assert (complete is not None) == possible
        if complete is not None:
            assert complete[tensor] == split
            assert keeps_every_rule(GRAPH, 2, complete)
            assert all(complete[t] in splits_of(int(bits)) for t, bits in enumerate(found))


SEEDS = st.dictionaries(st.integers(0, len(GRAPH.tensors) - 1), st.integers(-1, 1), min_size=2, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_decisions_does_not_matter_and_more_of_them_leave_less(seeds, random):
    together = ENGINE.restrict(ENGINE.root, {t: bit_of(s) for t, s in seeds.items()})
    order = list(seeds.items())
    random.shuffle(order)
    state: np.ndarray | Conflict = ENGINE.root
    for tensor, split in order:
        assert isinstance(state, np.ndarray)
        before, state = state, ENGINE.restrict(state, {tensor: bit_of(split)})
        if isinstance(state, Conflict):
            break
        assert np.all((before & state) == state)
    assert isinstance(state, Conflict) == isinstance(together, Conflict)
    if isinstance(together, Conflict):
        assert not solvable(GRAPH, 2, seeds)
    else:
        np.testing.assert_array_equal(state, together)


def test_a_state_is_not_changed_by_what_follows_from_it():
    root = ENGINE.root
    before = root.copy()
    ENGINE.restrict(root, {named(GRAPH, "w0"): bit_of(1)})
    np.testing.assert_array_equal(root, before)
    np.testing.assert_array_equal(ENGINE.root, before)


def test_a_split_column_takes_the_next_matrix_and_both_gradients_along():
    found = propagate(GRAPH, 2, {named(GRAPH, "w0"): 1})
    assert not isinstance(found, Conflict)
    splits = {GRAPH.tensors[t].name: s for t, s in found.items()}
    assert (splits["dw0"], splits["z0"], splits["w1"], splits["dw1"], splits["z1"]) == (1, 1, 0, 0, REPLICATED)
    assert splits["x"] == REPLICATED
    assert found == determined(ENGINE.restrict(ENGINE.root, {named(GRAPH, "w0"): bit_of(1)}))


def test_a_split_batch_replicates_every_variable():
    found = propagate(GRAPH, 2, {named(GRAPH, "x"): 0})
    assert not isinstance(found, Conflict)
    assert all(found[p.tensor] == found[p.gradient] == REPLICATED for p in GRAPH.parameters)
    assert all(found[named(GRAPH, f"z{i}")] == 0 for i in range(3))


def test_conflicts_name_the_operation_or_the_size():
    both = propagate(GRAPH, 2, {named(GRAPH, "x"): 0, named(GRAPH, "w0"): 1})
    assert isinstance(both, Conflict)
    assert GRAPH.ops[both.op].kind in both.reason
    assert "S" in both.reason
    uneven = propagate(GRAPH, 4, {named(GRAPH, "w1"): 1})
    assert str(uneven) == "4 devices do not divide dim 1 of w1 [8, 6]: 6"
    assert str(propagate(GRAPH, 2, {named(GRAPH, "w1"): 2})) == "w1 [8, 6] has no dim 2"


def test_what_is_no_seed_is_refused():
    for seeds in ({999: 0}, {0: -2}):
        with pytest.raises(ValueError, match="cannot place tensor"):
            propagate(GRAPH, 2, seeds)
    with pytest.raises(ValueError, match="no partial sums"):
        Propagator(GRAPH, 2, "full")


def test_an_unknown_operation_warns_once_and_keeps_its_operands_whole():
    middle = named(GRAPH, "z1")
    ops = tuple(Op(o.name, "mystery", o.inputs, o.outputs) if middle in o.outputs else o for o in GRAPH.ops)
    graph = Graph("odd", GRAPH.tensors, ops, GRAPH.parameters, GRAPH.inputs, GRAPH.outputs)
    with pytest.warns(MissingRuleWarning, match="mystery") as caught:
        found = propagate(graph, 2, {})
    assert len(caught) == 1
    assert not isinstance(found, Conflict)
    assert found[middle] == found[named(graph, "w1")] == REPLICATED
    assert isinstance(propagate(graph, 2, {named(graph, "w1"): 0}), Conflict)
