"""The IOPDDL contest's JSON: sharding problems from XLA as nodes with costs and memory, and edges with cost tables.

One strategy is chosen per node; a plan costs the sum of its nodes' and edges' costs, and at no point in time may the memory of
the nodes alive exceed a limit. The public instances (google/iopddl, Apache-2.0) compare searchers beyond this project.

Source: the ASPLOS 2025 / EuroSys 2025 contest's rules and its reference reader: intervals are half-open, an edge's table
is row-major with its last node fastest, all numbers are 64-bit integers whose sums may not fit 64 bits.
"""

from __future__ import annotations

import gzip
import json
import os
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = 2**63 - 1


class IopddlError(ValueError):
    """A file that is no such problem, or a solution that is none of it."""


@dataclass(frozen=True)
class Edge:
    """A table of costs over the strategies of some nodes (usually two; a node may occur twice)."""

    nodes: tuple[int, ...]
    costs: np.ndarray


@dataclass(frozen=True)
class Problem:
    """A problem of N nodes.

    Attributes:
        intervals: (first, last) of each node, half-open; empty means that it never uses memory.
        costs, usages: of each node, one int64 number a strategy.
        usage_limit: memory at any time; None for no limit.
    """

    name: str
    intervals: tuple[tuple[int, int], ...]
    costs: tuple[np.ndarray, ...]
    usages: tuple[np.ndarray, ...]
    edges: tuple[Edge, ...]
    usage_limit: int | None = None

    def __post_init__(self) -> None:
        validate(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of strategies of each node."""
        return tuple(len(costs) for costs in self.costs)


@dataclass(frozen=True)
class Evaluation:
    """What a solution costs: an exact whole number; its highest memory and when; whether it is within the limit."""

    cost: int
    peak: int
    peak_time: int
    feasible: bool


def validate(problem: Problem) -> None:
    """Refuse what is no problem.

    Raises:
        IopddlError: counts that differ, a node without strategies, numbers below 0 where none can be, tables of another size.
    """
    counts = {len(problem.intervals), len(problem.costs), len(problem.usages)}
    if len(counts) > 1:
        raise IopddlError(f"intervals, costs and usages are of {sorted(counts)} nodes")
    for n, (interval, costs, usages) in enumerate(zip(problem.intervals, problem.costs, problem.usages, strict=True)):
        if not len(costs) or len(costs) != len(usages):
            raise IopddlError(
                f"node {n} has {len(costs)} costs and {len(usages)} usages; it needs one of each per strategy"
            )
        if len(interval) != 2 or interval[0] < 0 or interval[1] < interval[0]:
            raise IopddlError(f"node {n} is alive over {list(interval)}; wanted [first, last] with 0 <= first <= last")
        if usages.min() < 0:
            raise IopddlError(f"node {n} uses {usages.min()} of memory")
    sizes = problem.sizes
    for e, edge in enumerate(problem.edges):
        if not edge.nodes or not all(0 <= n < len(sizes) for n in edge.nodes):
            raise IopddlError(f"edge {e} is of nodes {list(edge.nodes)}; there are nodes 0 to {len(sizes) - 1}")
        wanted = prod(sizes[n] for n in edge.nodes)
        if len(edge.costs) != wanted:
            raise IopddlError(f"edge {e} of nodes {list(edge.nodes)} has {len(edge.costs)} costs, wanted {wanted}")
    if problem.usage_limit is not None and problem.usage_limit < 0:
        raise IopddlError(f"usage_limit is {problem.usage_limit}")


def evaluate(problem: Problem, solution: Sequence[int]) -> Evaluation:
    """Return the cost and memory of a choice of one strategy per node, exactly.

    Raises:
        IopddlError: not one strategy of each node.
    """
    sizes = problem.sizes
    if len(solution) != len(sizes):
        raise IopddlError(f"a solution of {len(solution)} strategies for {len(sizes)} nodes")
    for n, (chosen, count) in enumerate(zip(solution, sizes, strict=True)):
        if not 0 <= chosen < count:
            raise IopddlError(f"node {n} has no strategy {chosen}; it has {count}")
    cost = sum(int(costs[s]) for costs, s in zip(problem.costs, solution, strict=True))
    cost += sum(int(edge.costs[edge_index(edge, sizes, solution)]) for edge in problem.edges)
    peak, when = peak_usage(problem, solution)
    return Evaluation(cost, peak, when, problem.usage_limit is None or peak <= problem.usage_limit)


def edge_index(edge: Edge, sizes: Sequence[int], solution: Sequence[int]) -> int:
    """Where an edge's table holds the cost of a solution."""
    index = 0
    for node in edge.nodes:
        index = index * sizes[node] + solution[node]
    return index


def peak_usage(problem: Problem, solution: Sequence[int]) -> tuple[int, int]:
    """Highest memory over time and the first time of it, by events, exact beyond 64 bits; (0, 0) if nothing is alive."""
    events: list[tuple[int, int]] = []
    for (first, last), usages, chosen in zip(problem.intervals, problem.usages, solution, strict=True):
        if first < last:
            events += [(first, int(usages[chosen])), (last, -int(usages[chosen]))]
    events.sort()
    steps = [(time, sum(change for _, change in group)) for time, group in groupby(events, key=lambda e: e[0])]
    levels = accumulate(change for _, change in steps)
    best = max(((level, -time) for level, (time, _) in zip(levels, steps, strict=True)), default=(0, 0))
    return best[0], -best[1]


def read(path: Path | str) -> Problem:
    """Read a problem, gzipped or not.

    Raises:
        IopddlError: not such a file; what is wrong with it.
        FileNotFoundError: no such file.
    """
    packed = Path(path).read_bytes()
    try:
        value = json.loads(gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise IopddlError(f"{path} is not JSON: {error}") from error
    try:
        return from_json(value)
    except IopddlError as error:
        raise IopddlError(f"{path}: {error}") from error


def from_json(value: Any) -> Problem:
    """A problem from the contest's JSON.

    Raises:
        IopddlError: a key that is missing, numbers that are not whole or do not fit 64 bits, and what `validate` refuses.
    """
    try:
        problem = value["problem"]
        nodes, edges = problem["nodes"], problem["edges"]
        pairs = zip(edges["nodes"], edges["costs"], strict=True)
        return Problem(
            name=str(problem["name"]),
            intervals=tuple(tuple(_whole(x) for x in row) for row in nodes["intervals"]),  # type: ignore[misc]
            costs=tuple(_array(row) for row in nodes["costs"]),
            usages=tuple(_array(row) for row in nodes["usages"]),
            edges=tuple(Edge(tuple(_whole(n) for n in row), _array(costs)) for row, costs in pairs),
            usage_limit=_whole(problem["usage_limit"]) if "usage_limit" in problem else None,
        )
    except KeyError as error:
        raise IopddlError(f"key {error} is missing") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, IopddlError):
            raise
        raise IopddlError(f"not a problem: {error}") from error


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST:
        raise IopddlError(f"{value!r} is not a whole number of 64 bits")
    return value


def _array(row: Sequence[Any]) -> np.ndarray:
    return np.array([_whole(x) for x in row], dtype=np.int64)


def to_json(problem: Problem) -> dict[str, Any]:
    """Undo `from_json`."""
    inner: dict[str, Any] = {
        "name": problem.name,
        "nodes": {
            "intervals": [list(interval) for interval in problem.intervals],
            "costs": [costs.tolist() for costs in problem.costs],
            "usages": [usages.tolist() for usages in problem.usages],
        },
        "edges": {"nodes": [list(e.nodes) for e in problem.edges], "costs": [e.costs.tolist() for e in problem.edges]},
    }
    if problem.usage_limit is not None:
        inner["usage_limit"] = problem.usage_limit
    return {"problem": inner}


def write(problem: Problem, path: Path | str) -> None:
    """Write a problem, gzipped if the name ends in .gz; the file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(to_json(problem), separators=(",", ":")).encode()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(gzip.compress(content, 6, mtime=0) if path.suffix == ".gz" else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
