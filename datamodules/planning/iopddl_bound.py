"""A lower bound on the cost of an IOPDDL problem, and on what is left of it once some nodes are decided. Memory is left aside.

Costs are moved between nodes and edges so that every solution costs what it did, until no more of them can be moved out as a
constant that each solution pays: then that constant, and the least of each node and edge, bound the cost from below.

Source: sequential reweighted message passing (Kolmogorov, 2006 and 2015), here in whole numbers, so that nothing is rounded.
Legend: K strategies of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.planning.iopddl_factors import SAFE, Factors, Pair, Wide

PASSES = 50  # there and back
ENOUGH = 1e-5  # a pass that raises the bound by less of what is missing is the last


@dataclass(frozen=True)
class Relaxed:
    """The same costs as `Factors`, moved: a constant, and beside it nothing that is below 0.

    Costs that no solution worth `ceiling` has are cut off, so sums are those of `Factors` for every solution up to it, and
    above it for every other.
    """

    constant: int
    own: tuple[np.ndarray, ...]
    pairs: tuple[Pair, ...]
    wides: tuple[Wide, ...]


def relax(factors: Factors, order: Sequence[int], ceiling: int, passes: int = PASSES) -> Relaxed:
    """Move costs until the constant, which no solution costs less than, hardly grows.

    Args:
        order: of the nodes, along which costs are moved there and back; they end as early in it as they can.
        ceiling: cost of some solution.
    """
    constant = sum(int(table.min()) for table in _tables(factors))
    cap = max(ceiling - constant, 0) + 1
    dtype = np.int64 if 2 * cap * max(1, len(_tables(factors))) < SAFE else object
    own = [_lowered(table, cap, dtype) for table in factors.own]
    tables = [_lowered(pair.table, cap, dtype) for pair in factors.pairs]
    wides = [Wide(wide.nodes, _lowered(wide.table, cap, dtype)) for wide in factors.wides]
    touching = _touching(factors, order)
    for _ in range(passes):
        before = constant
        constant += _sweep(order, own, tables, touching, ahead=0)
        constant += _sweep(order[::-1], own, tables, touching, ahead=1)
        if constant - before <= ENOUGH * (ceiling - constant):
            break
    for table in tables:
        constant += int(table.min())
        table -= table.min()
    pairs = tuple(Pair(p.first, p.second, table) for p, table in zip(factors.pairs, tables, strict=True))
    return Relaxed(constant, tuple(own), pairs, tuple(wides))


def _tables(factors: Factors) -> list[np.ndarray]:
    return [*factors.own, *(pair.table for pair in factors.pairs), *(wide.table for wide in factors.wides)]


def _lowered(table: np.ndarray, cap: int, dtype: type) -> np.ndarray:
    """A table above its least entry, cut off at `cap`, in a copy of its own."""
    above = table.astype(object) - int(table.min())
    return np.minimum(above, cap).astype(dtype)


Touching = list[tuple[list[tuple[int, bool]], list[tuple[int, bool]]]]


def _touching(factors: Factors, order: Sequence[int]) -> Touching:
    """Of each node its pairs to nodes that are (later, earlier) in the order, and whether it is a pair's first."""
    rank = {node: place for place, node in enumerate(order)}
    found: Touching = [([], []) for _ in factors.own]
    for index, pair in enumerate(factors.pairs):
        for node, other in ((pair.first, pair.second), (pair.second, pair.first)):
            found[node][rank[other] < rank[node]].append((index, node == pair.first))
    return found


def _sweep(
    order: Sequence[int], own: list[np.ndarray], tables: list[np.ndarray], touching: Touching, ahead: int
) -> int:
    """At each node draw what its edges hold into it, take the least of it out, and share the rest out to the edges ahead."""
    out = 0
    for node in order:
        mine = own[node]
        for index, first in (*touching[node][0], *touching[node][1]):
            table = tables[index] if first else tables[index].T
            low = table.min(axis=1)
            mine += low
            table -= low[:, None]
        least = mine.min()
        out += int(least)
        mine -= least
        if touching[node][ahead]:
            share = mine // max(len(touching[node][0]), len(touching[node][1]))
            mine -= share * len(touching[node][ahead])
            for index, first in touching[node][ahead]:
                table = tables[index] if first else tables[index].T
                table += share[:, None]
    return out


class Bound:
    """What no solution costs less than, given the strategies of some nodes, which are decided and taken back one by one.

    Each open node is at its best against the decided ones; edges between open nodes cost their least.
    """

    def __init__(self, relaxed: Relaxed) -> None:
        self._hope = list(relaxed.own)  # of each node, its own costs and its edges to decided ones (K,)
        self._linked: list[list[tuple[int, np.ndarray]]] = [[] for _ in relaxed.own]
        for pair in relaxed.pairs:
            self._linked[pair.first].append((pair.second, pair.table))
            self._linked[pair.second].append((pair.first, pair.table.T))
        self._wides: list[list[Wide]] = [[] for _ in relaxed.own]
        for wide in relaxed.wides:
            for node in wide.nodes:
                self._wides[node].append(wide)
        self._chosen: dict[int, int] = {}
        self._frames: list[tuple[int, int, list[tuple[int, np.ndarray]]]] = []  # node, value before, hopes before
        self.value = relaxed.constant + sum(int(hope.min()) for hope in self._hope)

    def push(self, node: int, strategy: int) -> None:
        """Decide a node."""
        before: list[tuple[int, np.ndarray]] = []
        value, self._chosen[node] = self.value, strategy
        self.value += int(self._hope[node][strategy]) - int(self._hope[node].min())
        for other, table in self._linked[node]:
            if other not in self._chosen:
                self._learn(other, table[strategy], before)
        for wide in self._wides[node]:
            still = [n for n in wide.nodes if n not in self._chosen]
            if len(still) == 1:
                line = tuple(self._chosen.get(n, slice(None)) for n in wide.nodes)
                self._learn(still[0], wide.table[line], before)
        self._frames.append((node, value, before))

    def _learn(self, node: int, costs: np.ndarray, before: list[tuple[int, np.ndarray]]) -> None:
        hope = self._hope[node]
        before.append((node, hope))
        self._hope[node] = hope + costs
        self.value += int(self._hope[node].min()) - int(hope.min())

    def pop(self) -> None:
        """Take the last decision back."""
        node, self.value, before = self._frames.pop()
        for other, hope in reversed(before):
            self._hope[other] = hope
        del self._chosen[node]
