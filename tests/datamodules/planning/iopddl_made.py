"""IOPDDL instances at random, small enough to look at every solution."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import numpy as np

from datamodules.planning.iopddl import Edge, Problem, evaluate


@cache
def made(seed: int, nodes: int = 6, share: float | None = 0.4, largest: int = 50, scale: int = 1) -> Problem:
    """An instance at random, with parallel edges, a loop, an edge of one node and one of three, nodes without memory and nodes
    without a choice. `share`: where the limit lies between the least peak and that of the largest; None for no limit.
    """
    rng = np.random.default_rng(seed)
    sizes = [int(k) for k in rng.integers(1, 4, nodes)]
    starts = rng.integers(0, 8, nodes)
    intervals = tuple((int(a), int(a + rng.integers(0, 6))) for a in starts)
    costs = tuple(rng.integers(0, largest, k) * scale for k in sizes)
    usages = tuple(rng.integers(0, 20, k) for k in sizes)
    ends = [tuple(int(n) for n in rng.choice(nodes, 2, replace=False)) for _ in range(nodes + 2)]
    ends += [ends[0], ends[0][::-1], (1, 1), (2,), (0, 3, 1)]
    edges = tuple(Edge(e, rng.integers(0, largest, math.prod(sizes[n] for n in e)) * scale) for e in ends)
    free = Problem(f"made {seed}", intervals, costs, usages, edges)
    if share is None:
        return free
    least, most = (evaluate(free, [int(choose(u)) for u in usages]).peak for choose in (np.argmin, np.argmax))
    return replace(free, usage_limit=int(least + share * (most - least)))


def solutions(source: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(k) for k in source.sizes)))


@cache
def best_of(source_seed: int, share: float | None) -> int:
    source = made(source_seed, share=share)
    found = [evaluate(source, s) for s in solutions(source)]
    return min(f.cost for f in found if f.feasible)
