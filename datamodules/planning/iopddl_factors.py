"""An IOPDDL problem condensed, with the same cost and the same feasibility of every solution: what searches and proofs read.

Parallel edges become one table, edges of one node and loops part of its own cost, and of all points in time only those are kept
at which memory can be short and the set of nodes alive is not part of another such set.

Legend: N nodes, K strategies of a node, M moments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from datamodules.planning.iopddl import Edge, IopddlError, Problem, peak_usage

SAFE = 2**62  # sums below it are kept in int64, larger ones as Python's whole numbers


@dataclass(frozen=True)
class Pair:
    """All edges between two nodes, `first` < `second`: their summed costs (K, K)."""

    first: int
    second: int
    table: np.ndarray


@dataclass(frozen=True)
class Wide:
    """An edge of three or more nodes, all different: its costs, an axis a node."""

    nodes: tuple[int, ...]
    table: np.ndarray


@dataclass(frozen=True)
class Factors:
    """What a solution costs, and what it must not exceed.

    Attributes:
        own: of each node, the cost of each strategy (K,), edges of that node alone included.
        usages: of each node, the memory of each strategy (K,).
        alive: of each node, its moments [first, last) out of `moments`; empty where it can never make memory short.
        limit: memory at each moment; no number where there is no moment.
    """

    own: tuple[np.ndarray, ...]
    pairs: tuple[Pair, ...]
    wides: tuple[Wide, ...]
    usages: tuple[np.ndarray, ...]
    alive: tuple[tuple[int, int], ...]
    moments: int
    limit: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of strategies of each node."""
        return tuple(len(own) for own in self.own)

    def neighbours(self) -> tuple[tuple[tuple[int, np.ndarray], ...], ...]:
        """Return of each node its pairs as (other node, table with this node's strategies down)."""
        found: list[list[tuple[int, np.ndarray]]] = [[] for _ in self.own]
        for pair in self.pairs:
            found[pair.first].append((pair.second, pair.table))
            found[pair.second].append((pair.first, pair.table.T))
        return tuple(map(tuple, found))

    def wides_of(self) -> tuple[tuple[Wide, ...], ...]:
        """Return of each node the wide edges that it is in."""
        found: list[list[Wide]] = [[] for _ in self.own]
        for wide in self.wides:
            for node in wide.nodes:
                found[node].append(wide)
        return tuple(map(tuple, found))

    def held(self, solution: Sequence[int]) -> np.ndarray:
        """Return the memory at each moment (M,)."""
        most = sum(int(usages.max()) for usages in self.usages)
        change = np.zeros(self.moments + 1, dtype=np.int64 if most < SAFE else object)
        for (first, last), usages, chosen in zip(self.alive, self.usages, solution, strict=True):
            if first < last:
                change[first] += usages.item(chosen)
                change[last] -= usages.item(chosen)
        return np.cumsum(change[:-1])

    def least(self) -> tuple[int, ...]:
        """Return of each node the strategy of least memory, the cheapest such: no solution needs less at any time."""
        lows = [np.flatnonzero(usages == usages.min()) for usages in self.usages]
        return tuple(int(low[np.argmin(own[low])]) for low, own in zip(lows, self.own, strict=True))


def condense(problem: Problem) -> Factors:
    """Return the same problem, condensed.

    Raises:
        IopddlError: no solution is within the limit; by how many bytes the smallest exceeds it, and when.
    """
    own = list(problem.costs)
    tables: dict[tuple[int, ...], np.ndarray] = {}
    for edge in problem.edges:
        nodes, table = _distinct(edge, problem.sizes)
        if len(nodes) == 1:
            own[nodes[0]] = _sum(own[nodes[0]], table)
        else:
            tables[nodes] = _sum(tables[nodes], table) if nodes in tables else table
    alive, moments = _moments(problem)
    _refuse_too_large(problem)
    return Factors(
        own=tuple(own),
        pairs=tuple(Pair(*nodes, table) for nodes, table in tables.items() if len(nodes) == 2),
        wides=tuple(Wide(nodes, table) for nodes, table in tables.items() if len(nodes) > 2),
        usages=problem.usages,
        alive=alive,
        moments=moments,
        limit=problem.usage_limit or 0,
    )


def _distinct(edge: Edge, sizes: Sequence[int]) -> tuple[tuple[int, ...], np.ndarray]:
    """The nodes of an edge in ascending order, each once, and its costs with an axis for each of them."""
    nodes = tuple(sorted(set(edge.nodes)))
    axes = dict(zip(nodes, np.indices([sizes[n] for n in nodes]), strict=True))
    return nodes, edge.costs.reshape([sizes[n] for n in edge.nodes])[tuple(axes[n] for n in edge.nodes)]


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sum of two tables, exact beyond 64 bits."""
    if max(_largest(a), _largest(b)) < SAFE // 2:
        return a + b
    return a.astype(object) + b.astype(object)


def _largest(table: np.ndarray) -> int:
    return max(abs(int(table.max())), abs(int(table.min())))


def _moments(problem: Problem) -> tuple[tuple[tuple[int, int], ...], int]:
    """Of each node the moments at which it counts, and how many there are.

    Between one end and the next, the nodes alive only become more, so that the last start before an end is the fullest time.
    """
    nothing = ((0, 0),) * len(problem.intervals)
    if problem.usage_limit is None:
        return nothing, 0
    most = [int(usages.max()) for usages in problem.usages]
    events = []  # (time, 0 for an end or 1 for a start, node)
    for node, (first, last) in enumerate(problem.intervals):
        if first < last and most[node]:
            events += [(first, 1, node), (last, 0, node)]
    begun, ended, short = {}, {}, []  # short: whether the limit can be exceeded at each moment
    count, total, grown = 0, 0, False
    for _, group in groupby(sorted(events), key=lambda event: event[0]):
        for _, start, node in group:
            if start:
                begun[node], total, grown = count, total + most[node], True
                continue
            if grown:
                short.append(total > problem.usage_limit)
                count, grown = count + 1, False
            ended[node], total = count, total - most[node]
    kept = np.concatenate([[0], np.cumsum(np.array(short, dtype=np.int64))])
    alive = [(int(kept[begun[n]]), int(kept[ended[n]])) if n in begun else (0, 0) for n in range(len(nothing))]
    return tuple(alive), int(kept[-1])


def _refuse_too_large(problem: Problem) -> None:
    """Each node with its least memory is the smallest solution at every time at once."""
    if problem.usage_limit is None:
        return
    peak, when = peak_usage(problem, [int(usages.argmin()) for usages in problem.usages])
    if peak > problem.usage_limit:
        raise IopddlError(
            f"{problem.name}: no solution fits: with the smallest strategy of each node {peak:,} bytes are used at time "
            f"{when}, {peak - problem.usage_limit:,} more than the limit of {problem.usage_limit:,}"
        )


def connected_order(factors: Factors, intervals: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Return all nodes, each next one with the most neighbours before it; of several the one alive first, then by number."""
    from heapq import heappop, heappush

    linked: dict[int, list[int]] = defaultdict(list)
    for pair in factors.pairs:
        linked[pair.first].append(pair.second)
        linked[pair.second].append(pair.first)
    for wide in factors.wides:
        for node in wide.nodes:
            linked[node] += [other for other in wide.nodes if other != node]
    known = [0] * len(factors.own)
    waiting = sorted((0, intervals[n][0], n) for n in range(len(known)))
    order: list[int] = []
    placed = [False] * len(known)
    while waiting:
        _, _, node = heappop(waiting)
        if placed[node]:
            continue  # it has moved forward since
        placed[node] = True
        order.append(node)
        for other in linked[node]:
            if not placed[other]:
                known[other] += 1
                heappush(waiting, (-known[other], intervals[other][0], other))
    return tuple(order)
