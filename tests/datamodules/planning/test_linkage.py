"""Linkage groups of real models: the counts of the pilot, the published plans among them, ties that change nothing."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest

from datamodules.planning.graph import Graph
from datamodules.planning.linkage import CONFLICT, Decisions, decisions, roles
from datamodules.planning.propagate import Conflict
from datamodules.planning.trace import trace
from datamodules.planning.workloads import build_step


@cache
def model(name: str, **arguments: int) -> Graph:
    return trace(lambda: build_step(name, **arguments), name)


def vgg() -> Graph:
    return model("vgg19", batch=16)


def bert(layers: int = 2) -> Graph:
    return model("bert-2", batch=16, length=128, layers=layers)


def tiny(layers: int = 3) -> Graph:
    return model("bert-tiny", layers=layers)


def counts(found: Decisions) -> tuple[int, int, int]:
    return found.count("indivisible"), found.count("conflict"), found.count("feasible")


def named(found: Decisions) -> list[set[str]]:
    return [{found.names[slot] for slot in family} for family in found.families]


def test_vgg_without_loss_parallelism_has_the_two_exclusive_groups_of_the_pilot():
    found = decisions(vgg(), 8, space="strict")
    assert (len(found.members), len(found.slots)) == (38, 89)
    assert counts(found) == (33, 50, 6)
    assert named(found) == [
        {"fc1.weight[0]", "fc1.bias[0]", "fc2.weight[1]"},
        {"fc2.weight[0]", "fc2.bias[0]", "predictions.weight[1]"},
    ]
    assert found.exclusions == ((0, 1),)


def test_vgg_has_the_published_plan_as_the_one_that_splits_most():
    found = decisions(vgg(), 8)
    assert counts(found) == (33, 48, 8)
    best = max(_allowed(found), key=lambda families: sum(len(found.families[f]) for f in families))
    assert {found.names[s] for f in best for s in found.families[f]} == {
        *("fc1.weight[0]", "fc1.bias[0]", "fc2.weight[1]", "predictions.weight[0]", "predictions.bias[0]")
    }


def _allowed(found: Decisions) -> list[tuple[int, ...]]:
    every = [tuple(f for f, on in enumerate(bits) if on) for bits in product((0, 1), repeat=len(found.families))]
    return [fs for fs in every if not any(a in fs and b in fs for a, b in found.exclusions)]


def test_channel_split_convolutions_open_a_chain_of_groups():
    found = decisions(vgg(), 8, space="extended")
    assert counts(found) == (33, 0, 56)
    assert found.exclusions == tuple((i, i + 1) for i in range(len(found.families) - 1))


def test_bert_has_the_four_groups_of_the_pilot():
    found = decisions(bert(), 8, tie=False, space="strict")
    assert len(found.slots) == 58
    assert counts(found) == (3, 35, 20)
    assert sorted(len(f) for f in found.families) == [3, 3, 7, 7]
    layer = "layers.0.attention."
    attention = {f"{layer}{p}.{kind}[0]" for p in ("query", "key", "value") for kind in ("weight", "bias")}
    assert attention | {f"{layer}output.weight[1]"} in named(found)
    assert {f"layers.1.mlp.{p}[{d}]" for p, d in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1))} in named(found)
    assert found.exclusions == ()


def test_bert_gains_the_position_table_by_row_where_look_ups_may_be_masked():
    found = decisions(bert(), 8, tie=False)
    assert counts(found) == (3, 34, 21)
    assert {"places.weight[0]"} in named(found)


def test_t5_has_every_row_of_the_published_table():
    found = decisions(model("t5-tiny-paper"), 8)
    families = named(found)
    assert {"words.weight[0]"} in families
    for stack in ("encoder", "decoder"):
        assert {f"{stack}.layers.0.mlp.{n}" for n in ("up.weight[0]", "up.bias[0]", "down.weight[1]")} in families
        heads = {f"{stack}.layers.0.attention.{p}.weight[0]" for p in ("query", "key", "value")}
        whole = {f"{stack}.layers.0.attention.output.weight[1]", *heads}
        assert any(whole <= family for family in families)
    split = set().union(*families)
    assert not any("norm" in n or "down.bias" in n for n in split)


@pytest.mark.parametrize("name", ["bert-tiny", "gpt2-tiny", "t5-tiny", "vgg19-tiny", "resnet50-tiny"])
def test_data_parallelism_finds_the_batch_dim_of_every_input_and_nothing_else(name):
    graph = model(name)
    found = decisions(graph, 4, over="inputs")
    split = {(found.slots[s].variable, found.slots[s].dim) for s in found.feasible}
    assert split == set(graph.batch_dims)
    assert len(found.families) == 1


def test_groups_say_what_propagation_says():
    found = decisions(bert(), 8, tie=False)
    for slot in found.feasible:
        for action in (0, 1):
            state = found.apply(found.root, slot, action)
            assert not isinstance(state, Conflict)
            assert found.assignments(state) == {slot: action, **dict(found.groups[slot, action])}
    for slot in set(range(len(found.slots))) - set(found.feasible):
        assert found.groups[slot, 1] is CONFLICT
        assert found.groups[slot, 0] == ()
        assert found.reach[slot] == 0
        assert str(found.reasons[slot])


def test_slots_of_largest_reach_come_first():
    found = decisions(bert(), 8, tie=False)
    reach = [found.reach[slot] for slot in found.order]
    assert reach == sorted(reach, reverse=True)
    assert sorted(found.order) == list(range(len(found.slots)))
    assert reach[0] > 0


@pytest.mark.parametrize("graph", [vgg, tiny], ids=["vgg", "bert"])
def test_exclusions_of_pairs_are_all_there_is(graph):
    found = decisions(graph(), 8)
    allowed = set(_allowed(found))
    for bits in product((0, 1), repeat=len(found.families)):
        families = tuple(f for f, on in enumerate(bits) if on)
        state: np.ndarray | Conflict = found.root
        for f in families:
            if not isinstance(state, Conflict):
                state = found.apply(state, found.families[f][0], 1)
        assert isinstance(state, Conflict) == (families not in allowed)
        if not isinstance(state, Conflict):
            assert found.propagator.complete(state) is not None


def test_tying_blocks_changes_no_status_and_no_family():
    graph = tiny()
    apart, tied = decisions(graph, 8, tie=False), decisions(graph, 8)
    assert len(tied.slots) < len(apart.slots)
    assert counts(tied) == counts(apart)
    status = {(slot.variable, slot.dim): s for slot, s in zip(apart.slots, apart.status, strict=True)}
    for slot, v, s in zip(tied.slots, tied.variable, tied.status, strict=True):
        assert {status[tensor, slot.dim] for tensor in tied.members[v]} == {s}
    assert [f for f in named(apart) if not any(".1." in n or ".2." in n for n in f)] == named(tied)
    assert sum(tied.copies_V) == len(graph.parameters)


def test_only_equal_blocks_are_tied():
    graph = vgg()
    tensors = [p.tensor for p in graph.parameters]
    assert roles(graph, tensors, tie=False) == tuple((t,) for t in tensors)
    for group in roles(graph, tensors):
        assert len({graph.tensors[t].shape for t in group}) == 1
    shared = roles(tiny(), [p.tensor for p in tiny().parameters])
    assert max(len(group) for group in shared) == 3


def test_one_device_and_odd_choices():
    found = decisions(tiny(), 1)
    assert found.feasible == ()
    with pytest.raises(ValueError, match="'variables' or 'inputs', not 'both'"):
        decisions(tiny(), 8, over="both")
    with pytest.raises(ValueError, match="at least one device"):
        decisions(tiny(), 0)
