"""Contracts of the rule tables: spaces, sizes, refusals, missing rules, and which dims of a view carry a split."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.planning.graph import Graph, Op, TensorInfo
from datamodules.planning.rules import (
    PARTIAL,
    REPLICATED,
    MissingRuleWarning,
    RuleError,
    RuleTable,
    divides,
    missing_rules,
    names_of,
    placed_rows,
    rows,
)
from datamodules.planning.rules_shape import leading_pairs
from tests.datamodules.planning.test_rules_numeric import EXAMPLES

SPACES = "strict", "paper", "extended"


def one(kind: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], **attributes) -> Graph:
    tensors = tuple(TensorInfo(f"t{i}", shape, "float32") for i, shape in enumerate([*inputs, *outputs]))
    first, last = tuple(range(len(inputs))), tuple(range(len(inputs), len(tensors)))
    return Graph("one", tensors, (Op("it", kind, first, last, attributes),), (), first, last)


def test_rows_of_a_product_are_those_of_the_published_table():
    graph = one("mm", [(16, 32), (32, 8)], [(16, 8)])
    op, R, P = graph.ops[0], REPLICATED, PARTIAL
    assert rows(op, graph, 8) == [((R, R), (R,)), ((0, R), (0,)), ((R, 1), (1,)), ((1, 0), (R,))]
    assert set(rows(op, graph, 8, "full")) - set(rows(op, graph, 8)) == {
        ((1, 0), (P,)),
        ((P, R), (P,)),
        ((R, P), (P,)),
    }
    assert [p.reduced for p in placed_rows(op, graph, 8)] == [(), (), (), (0,)]
    assert rows(op, graph, 16) == [((R, R), (R,)), ((0, R), (0,)), ((1, 0), (R,))]  # 16 does not divide 8
    assert rows(op, graph, 1, "full") == [((R, R), (R,))]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"{e.kind}-{e.label}")
def test_spaces_grow_and_nothing_uneven_or_partial_slips_in(example):
    graph = example.graph(example.whole())
    op = graph.ops[0]
    found = {space: set(rows(op, graph, 2, space)) for space in (*SPACES, "full")}
    assert found["strict"] <= found["paper"] <= found["extended"]
    assert not any(PARTIAL in (*row[0], *row[1]) for row in found["extended"])
    reduced = {(i, tuple(REPLICATED if s == PARTIAL else s for s in o)) for i, o in found["full"] if PARTIAL not in i}
    assert reduced == found["extended"]
    for row in found["full"]:
        for tensor, split in zip((*op.inputs, *op.outputs), (*row[0], *row[1]), strict=True):
            assert split < 0 or graph.tensors[tensor].shape[split] % 2 == 0


def test_channel_split_convolutions_are_an_extension():
    graph = one("convolution", [(8, 16, 4, 4), (32, 16, 3, 3)], [(8, 32, 4, 4)], groups=1)
    R = REPLICATED
    assert rows(graph.ops[0], graph, 8) == [((R, R), (R,)), ((0, R), (0,))]
    assert set(rows(graph.ops[0], graph, 8, "extended")) == {
        ((R, R), (R,)),
        ((0, R), (0,)),
        ((R, 0), (1,)),
        ((1, 1), (R,)),
    }


def test_a_loss_over_a_split_vocabulary_declares_its_inner_sums():
    graph = one("log_softmax", [(6, 8)], [(6, 8)], dim=1)
    inner = {p.row: p.inner for p in placed_rows(graph.ops[0], graph, 2)}
    assert inner == {((-1,), (-1,)): 0, ((0,), (0,)): 0, ((1,), (1,)): 2 * 6 * 4}
    assert ((1,), (1,)) not in rows(graph.ops[0], graph, 2, "strict")


def test_a_tensor_that_occurs_twice_lies_one_way():
    graph = one("mm", [(8, 8), (8, 8)], [(8, 8)])
    twice = replace(graph.ops[0], inputs=(0, 0))
    assert rows(twice, graph, 2, "full") == [((REPLICATED, REPLICATED), (REPLICATED,))]


def test_an_unknown_operation_is_replicated_with_a_warning_that_names_it():
    graph = one("mystery", [(8, 8)], [(8, 8)])
    with pytest.warns(MissingRuleWarning, match=r"no sharding rule for operations of kind 'mystery' \(it\)") as caught:
        assert rows(graph.ops[0], graph, 2, "full") == [((REPLICATED,), (REPLICATED,))]
    assert caught[0].message.rule.kind == "mystery"
    assert [(m.kind, m.ops) for m in missing_rules(graph)] == [("mystery", ("it",))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(RuleTable(2).of(graph.ops[0], graph)) == 1


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (one("permute", [(4, 8)], [(8, 4)]), "no attribute 'dims'"),
        (one("view", [(4, 8)], [(4, 4)]), r"32 and 16 elements"),
        (one("mm", [(4, 8)], [(4, 4)]), "1 tensor inputs; its rule knows 2 to 2"),
        (one("sdpa", [(4, 8, 2)] * 3, [(4, 8, 2)]), "queries of shape"),
        (one("layer_norm_backward", [(4, 8)] * 6, [(4, 8)], normalized=1, wanted=[True] * 3), "do not fit"),
    ],
)
def test_operations_that_do_not_fit_their_kind_are_refused(graph, message):
    with pytest.raises(RuleError, match=message):
        rows(graph.ops[0], graph, 2, "full")


def test_device_counts_and_spaces_that_do_not_exist_are_refused():
    graph = one("mm", [(16, 32), (32, 8)], [(16, 8)])
    with pytest.raises(ValueError, match="at least one device, got 0"):
        rows(graph.ops[0], graph, 0)
    with pytest.raises(ValueError, match="no placement space 'big'; there are strict, paper, extended, full"):
        rows(graph.ops[0], graph, 2, "big")


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, st.randoms(use_true_random=False))
def test_a_view_carries_a_split_exactly_where_parts_of_one_are_parts_of_the_other(left, right, random):
    numbers = [f for size in left for f in {1: [], 2: [2], 3: [3], 4: [2, 2], 6: [2, 3]}[size]]
    random.shuffle(numbers)
    target: list[int] = [1] * len(right)
    for number in numbers:
        target[random.randrange(len(target))] *= number
    x = torch.arange(float(torch.Size(left).numel())).view(left)
    even = [
        (a, b)
        for a, b in product(range(len(left)), range(len(target)))
        if left[a] % 2 == target[b] % 2 == 0
        and all(
            torch.equal(p.reshape(-1), q.reshape(-1))
            for p, q in zip(x.chunk(2, a), x.view(target).chunk(2, b), strict=True)
        )
    ]
    found = [(a, b) for a, b in leading_pairs(tuple(left), tuple(target)) if left[a] % 2 == target[b] % 2 == 0]
    assert found == even


def test_words_for_rows():
    assert names_of((0, REPLICATED, PARTIAL)) == "S0, R, P"
    assert divides(((0, -1), (0,)))
    assert not divides(((PARTIAL, -1), (PARTIAL,)))
