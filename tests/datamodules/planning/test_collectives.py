"""Collectives: the closed forms, a slow simulation of the ring, and how times move with every argument."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.planning.collectives import (
    KINDS,
    Group,
    bucketed,
    collective,
    group_of,
    groups_of,
    send,
    slowest,
    transfer,
)
from datamodules.planning.topology import Link, load_topology

ONE, TWO = load_topology("v100_1x8"), load_topology("v100_2x8")
SIZES = st.floats(0, 1e10)


def ring_simulation(size: float, counts: tuple[int, ...], machine, rounds: int) -> float:
    """`rounds` steps in which every rank hands a chunk of size / n to the next one, each over its own link."""
    nodes = [node for node, count in enumerate(counts) for _ in range(count)]
    clock = [0.0] * len(nodes)
    for _ in range(rounds):
        arrived = list(clock)
        for rank in range(len(nodes)):
            other = (rank + 1) % len(nodes)
            link = machine.inside if nodes[rank] == nodes[other] else machine.between
            arrived[other] = max(clock[rank], clock[other]) + link.latency_s + size / len(nodes) / link.bytes_per_s
        clock = arrived
    return max(clock)


@pytest.mark.parametrize("counts", [(2,), (8,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("size", [0.0, 4096.0, 1e8])
def test_a_ring_takes_as_long_as_its_rounds(counts: tuple[int, ...], size: float) -> None:
    n, group = sum(counts), Group(counts)
    expected = ring_simulation(size, counts, TWO, 2 * (n - 1))
    assert collective("all_reduce", size, group, TWO, "ring") == pytest.approx(expected)
    assert collective("all_gather", size, group, TWO, "ring") == pytest.approx(expected / 2)


def test_a_ring_across_nodes_goes_at_the_pace_of_the_outer_link() -> None:
    group = Group((8, 8))
    expected = 2 * 15 * TWO.between.latency_s + 2 * 15 / 16 * 1e9 / TWO.between.bytes_per_s
    assert collective("all_reduce", 1e9, group, TWO, "ring") == pytest.approx(expected)
    assert ring_simulation(1e9, (8, 8), TWO, 30) <= expected


def test_all_reduce_is_reduce_scatter_and_all_gather() -> None:
    for group in (Group((8,)), Group((4, 4))):
        for algorithm in ("ring", "hierarchical") if group.spans else ("ring",):
            parts = [collective(kind, 1e8, group, TWO, algorithm) for kind in ("reduce_scatter", "all_gather")]
            assert collective("all_reduce", 1e8, group, TWO, algorithm) == pytest.approx(sum(parts))


def test_two_storeys_save_messages_but_not_bytes_on_the_outer_link() -> None:
    group = Group((8, 8))
    small = [collective("all_reduce", 1e3, group, TWO, name) for name in ("hierarchical", "ring")]
    assert small[0] < small[1]
    large = collective("all_reduce", 1e9, group, TWO, "hierarchical")
    assert large > 2 * 1 / 2 * 1e9 / TWO.between.bytes_per_s
    assert collective("all_reduce", 1e9, group, TWO) <= large


@given(SIZES, SIZES)
def test_more_bytes_never_take_less(a: float, b: float) -> None:
    a, b = sorted((a, b))
    for group in (Group((2,)), Group((8,)), Group((8, 8)), Group((2, 1))):
        for kind in KINDS:
            assert collective(kind, a, group, TWO) <= collective(kind, b, group, TWO)
            assert bucketed(kind, a, [group], TWO) <= bucketed(kind, b, [group], TWO) * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.0, 1e3, 1e6, 1e9])
def test_better_links_never_take_more(kind, size: float) -> None:
    for group in (Group((8,)), Group((8, 8)), Group((1, 1)), Group((2, 1))):
        before = collective(kind, size, group, TWO)
        for side in ("inside", "between"):
            link = getattr(TWO, side)
            for better in (Link(link.latency_s / 2, link.bytes_per_s), Link(link.latency_s, link.bytes_per_s * 2)):
                assert collective(kind, size, group, replace(TWO, **{side: better})) <= before


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_more_ranks_and_more_sharers_never_take_less(kind) -> None:
    times = [collective(kind, 1e7, Group((n,)), ONE) for n in range(1, 9)]
    assert times[0] == 0
    assert all(a <= b for a, b in pairwise(times))
    shared = [collective(kind, 1e7, Group((4, 4), sharing), TWO) for sharing in (1, 2, 4)]
    assert all(a < b for a, b in pairwise(shared))
    assert collective(kind, 1e7, Group((4, 4)), TWO) >= collective(kind, 1e7, Group((8,)), TWO)


def test_all_to_all_moves_less_than_a_gather() -> None:
    group, size = Group((8,)), 1e9
    assert collective("all_to_all", size, group, ONE) == pytest.approx(
        ONE.inside.latency_s + 7 / 64 * size / ONE.inside.bytes_per_s
    )
    assert collective("all_to_all", size, group, ONE) < collective("all_gather", size, group, ONE)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        collective("all_reduce", -1, Group((2,)), ONE)
    with pytest.raises(ValueError, match="unknown collective 'shout'"):
        collective("shout", 1, Group((2,)), ONE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two storeys"):
        collective("all_reduce", 1, Group((2, 1)), TWO, "hierarchical")
    with pytest.raises(ValueError, match="needs 1 or more"):
        Group(())


def test_groups_know_how_many_share_the_outer_link() -> None:
    columns = [[i, i + 8] for i in range(8)]
    assert groups_of(TWO, columns) == (Group((1, 1), 8),)
    rows = [list(range(8)), list(range(8, 16))]
    assert groups_of(TWO, rows) == (Group((8,)),)
    assert slowest("all_reduce", 1e8, groups_of(TWO, columns), TWO) > slowest(
        "all_reduce", 1e8, [group_of(TWO, [0, 8])], TWO
    )


def test_sending_and_handing_over() -> None:
    assert send(1e6, TWO, 3, 3) == 0
    assert send(1e6, TWO, 0, 1) == pytest.approx(TWO.stream_inside.latency_s + 1e6 / TWO.stream_inside.bytes_per_s)
    assert send(1e6, TWO, 0, 8) == pytest.approx(TWO.stream_between.latency_s + 1e6 / TWO.stream_between.bytes_per_s)
    assert transfer(1e6, TWO, [0], [8]) == pytest.approx(send(1e6, TWO, 0, 8))
    one, eight = transfer(1e9, TWO, [0], [8]), transfer(1e9, TWO, range(8), range(8, 16))
    assert eight < one
    assert eight >= 1e9 / TWO.between.bytes_per_s
    assert transfer(1e9, TWO, range(4), range(4, 8)) < eight
    straddling = transfer(1e9, TWO, range(4), range(4, 12))
    assert transfer(1e9, TWO, range(4), range(4, 8)) < straddling < eight
