"""What follows from splitting a tensor: propagation of placements through the whole step.

A domain is the set of splits that a tensor may still have. Propagation takes from each domain what no row of an operation
supports any more, until nothing changes; a variable and its gradient lie alike. The result does not depend on the order of
work, and each thing it removes is impossible; HPGO's original passes on only domains that are down to one split, so that this
one finds the same and now and then more. No partial sums: a sum over a split dim is reduced at once.

Legend: T tensors, O operations and ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.planning.graph import Graph
from datamodules.planning.rules import REPLICATED, RuleTable, Space, names_of, warn_missing

NO_OP = -1
Domains = np.ndarray  # (T,) uint32, bit split + 1
NO_DOMAINS, NO_LOG = np.zeros(0, dtype=np.uint32), np.zeros((0, 3), dtype=np.int64)


@dataclass(frozen=True)
class Conflict:
    """Why a placement is impossible.

    Attributes:
        op: index of the operation that no rule lets run; NO_OP where none is at fault (a size, a variable and its gradient).
        reason: for people.
    """

    op: int
    reason: str

    def __str__(self) -> str:
        return self.reason


class Propagator:
    """Propagation over one graph and device count, with all rules as integers.

    Args:
        graph: the step.
        devices: N.
        space: "strict", "paper" or "extended", see `rules`.
    Raises:
        ValueError: the full space, whose partial sums are priced, not propagated.
    Warns:
        MissingRuleWarning: once for each kind without a rule.
    """

    def __init__(self, graph: Graph, devices: int, space: Space = "paper") -> None:
        if space == "full":
            raise ValueError("propagation knows no partial sums; take the space 'strict', 'paper' or 'extended'")
        warn_missing(graph)
        self.graph, self.devices, self.space = graph, devices, space
        self.ties = [(p.tensor, p.gradient) for p in graph.parameters if p.gradient not in (None, p.tensor)]
        self._build(RuleTable(devices, space))
        self._open = np.array([self._bits_of(t.shape) for t in graph.tensors], dtype=np.uint32)  # by sizes alone
        self._root: Domains | None = None
        self._alone: dict[tuple[int, int], Conflict | None] = {}

    def _build(self, table: RuleTable) -> None:
        graph = self.graph
        blocks: dict[tuple, tuple[int, int]] = {}
        bits: list[int] = []
        operands: list[list[int]] = []
        placing: list[tuple[int, int]] = []
        for op in graph.ops:
            tensors = list(dict.fromkeys((*op.inputs, *op.outputs)))
            key = table.signature(op, graph)
            if key not in blocks:
                own = [(*p.row[0], *p.row[1]) for p in table.of(op, graph)]
                blocks[key] = len(bits), len(own)
                firsts = [(*op.inputs, *op.outputs).index(t) for t in tensors]
                bits += [1 << (row[i] + 1) for row in own for i in firsts]
            operands.append(tensors)
            placing.append(blocks[key])
        for variable, gradient in self.ties:
            assert gradient is not None
            rank = len(graph.tensors[variable].shape)
            placing.append((len(bits), rank + 1))
            bits += [1 << b for b in range(rank + 1) for _ in range(2)]
            operands.append([variable, gradient])
        widths = np.array([len(t) for t in operands], dtype=np.int32)
        if widths.size and widths.max() > 256:
            raise ValueError(f"operation {graph.ops[int(widths.argmax())].name} has more than 256 operands")
        tensors_, users = (
            np.array([t for ts in operands for t in ts], dtype=np.int32),
            np.repeat(range(len(widths)), widths),
        )
        order = np.argsort(tensors_, kind="stable")
        user_starts = np.searchsorted(tensors_[order], np.arange(len(graph.tensors) + 1)).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(np.int32) if widths.size else widths
        block, rows = np.array(placing, dtype=np.int32).reshape(-1, 2).T.copy()
        self._users, self._user_starts = users[order].astype(np.int32), user_starts
        self._arrays = widths, starts, tensors_, rows, block, np.array(bits, dtype=np.uint32), user_starts, self._users
        self._queue, self._queued = np.zeros(len(widths) + 1, dtype=np.int32), np.zeros(len(widths), dtype=np.bool_)

    @property
    def root(self) -> Domains:
        """The domains before any decision (T,); everything replicated is always among them."""
        if self._root is None:
            domains = self._open.copy()
            if self._close(domains, range(len(self._queued))) >= 0:
                raise AssertionError("every rule table replicates, so the root has no conflict")
            self._root = domains
        return self._root.copy()

    def _bits_of(self, shape: tuple[int, ...]) -> int:
        return 1 + sum(
            2 << d for d, size in enumerate(shape) if size > 0 and size % self.devices == 0 and self.devices > 1
        )

    def _close(self, domains: Domains, ops: Iterable[int]) -> int:
        failed, _ = self.close(domains, np.fromiter(ops, dtype=np.int32), NO_LOG, NO_DOMAINS)
        return failed

    def close(self, domains: Domains, ops: np.ndarray, log: np.ndarray, known: Domains) -> tuple[int, int]:
        """Propagate in place from these operations; see `_propagate_numba.close`."""
        from datamodules.planning import _propagate_numba

        self._queued[:] = False
        self._queue[: ops.size] = ops
        self._queued[ops] = True
        kernels: Any = _propagate_numba  # numba's dispatchers have no static signature
        return kernels.close(domains, self._queue, self._queued, ops.size, self._arrays, log, known)

    def users(self, tensor: int) -> np.ndarray:
        """Return the operations and ties that a tensor takes part in."""
        return self._users[self._user_starts[tensor] : self._user_starts[tensor + 1]]

    def restrict(self, domains: Domains, seeds: Mapping[int, int]) -> Domains | Conflict:
        """Narrow some domains and propagate.

        Args:
            domains: the state before (T,); it is left as it is.
            seeds: tensor -> bit set of splits that remain, bit split + 1.
        Returns:
            The new domains, or the conflict.
        """
        after = domains.copy()
        touched: list[int] = []
        for tensor, bits in seeds.items():
            left = int(after[tensor]) & bits
            if left == 0:
                return self._no_choice(tensor, int(domains[tensor]), bits)
            if left != after[tensor]:
                after[tensor] = left
                touched.append(tensor)
        if not touched:
            return after
        parts = [self.users(t) for t in touched]
        failed = self._close(after, np.unique(np.concatenate(parts)) if len(parts) > 1 else parts[0])
        return after if failed < 0 else self._explain(failed, after)

    def _no_choice(self, tensor: int, have: int, want: int) -> Conflict:
        info = self.graph.tensors[tensor]
        what = f"{info.name} {list(info.shape)}"
        odd = [s for s in splits_of(want) if s >= 0 and (s >= len(info.shape) or info.shape[s] % self.devices)]
        if odd and odd[0] >= len(info.shape):
            return Conflict(NO_OP, f"{what} has no dim {odd[0]}")
        if odd:
            return Conflict(NO_OP, f"{self.devices} devices do not divide dim {odd[0]} of {what}: {info.shape[odd[0]]}")
        if (tensor, want) not in self._alone:
            self._alone[tensor, want] = self._impossible(tensor, want)
        other = Conflict(
            NO_OP, f"{what} must be {' or '.join(_each(have))}, so it cannot be {' or '.join(_each(want))}"
        )
        return self._alone[tensor, want] or other

    def _impossible(self, tensor: int, bits: int) -> Conflict | None:
        """Which operation cannot have a placement, whatever else is decided; None if it depends."""
        alone = self._open.copy()
        alone[tensor] &= bits
        failed = self._close(alone, self.users(tensor))
        return self._explain(failed, alone) if failed >= 0 else None

    def _explain(self, failed: int, domains: Domains) -> Conflict:
        if failed >= len(self.graph.ops):
            variable, gradient = self.ties[failed - len(self.graph.ops)]
            assert gradient is not None
            return Conflict(
                NO_OP,
                f"variable {self._words(variable, domains)} must lie as its gradient {self._words(gradient, domains)}",
            )
        op = self.graph.ops[failed]
        operands = ", ".join(self._words(t, domains) for t in dict.fromkeys((*op.inputs, *op.outputs)))
        where = f" in {op.layer}" if op.layer else ""
        return Conflict(failed, f"no rule of {op.kind} runs {op.name}{where} with {operands}")

    def _words(self, tensor: int, domains: Domains) -> str:
        info = self.graph.tensors[tensor]
        return f"{info.name} {list(info.shape)} as {' or '.join(_each(int(domains[tensor])))}"

    def complete(self, domains: Domains, prefer: Iterable[int] | None = None) -> dict[int, int] | None:
        """Return a placement of every tensor within the domains that keeps every rule, or None where there is none.

        Tensors are fixed one by one, each replicated if it may be, with a way back; `prefer` is tried first.
        """
        order = [*(prefer or ()), *range(len(domains))]
        stack: list[tuple[int, Domains, Iterator[int]]] = []
        position = 0
        while True:
            while position < len(order) and _single(int(domains[order[position]])):
                position += 1
            if position == len(order):
                return {t: splits_of(int(bits))[0] for t, bits in enumerate(domains)}
            choices = iter([1 << b for b in range(32) if int(domains[order[position]]) >> b & 1])
            stack.append((position, domains, choices))
            while stack:
                position, before, choices = stack[-1]
                bit = next(choices, None)
                if bit is None:
                    stack.pop()
                    continue
                after = self.restrict(before, {order[position]: bit})
                if not isinstance(after, Conflict):
                    domains = after
                    break
            if not stack:
                return None


def splits_of(bits: int) -> list[int]:
    """Return the splits in a bit set, replicated first."""
    return [b - 1 for b in range(32) if bits >> b & 1]


def bit_of(split: int) -> int:
    """Return the bit set that holds one split."""
    return 1 << (split + 1)


def _each(bits: int) -> list[str]:
    return [names_of([s]) for s in splits_of(bits)]


def _single(bits: int) -> bool:
    return bits & (bits - 1) == 0


def determined(domains: Domains) -> dict[int, int]:
    """Return the tensors whose domain is down to one split, with it."""
    single = np.flatnonzero((domains & (domains - np.uint32(1))) == 0)
    return {int(t): int(domains[t]).bit_length() - 2 for t in single}


def propagator_of(graph: Graph, devices: int, space: Space = "paper") -> Propagator:
    """Return the graph's propagator, built on first use and kept with the graph, as its other cached properties are."""
    kept = graph.__dict__.setdefault("_propagators", {})
    if (devices, space) not in kept:
        kept[devices, space] = Propagator(graph, devices, space)
    return kept[devices, space]


def propagate(
    graph: Graph, devices: int, seeds: Mapping[int, int], space: Space = "paper"
) -> Mapping[int, int] | Conflict:
    """Return what follows from placing some tensors.

    Args:
        seeds: tensor -> split, a dim or REPLICATED.
    Returns:
        Tensor -> split for every tensor that is left one choice, the seeds among them; or the conflict.
    Raises:
        ValueError: a seed that is no tensor, or a split that is neither a dim nor REPLICATED.
    """
    for tensor, split in seeds.items():
        if not 0 <= tensor < len(graph.tensors) or split < REPLICATED or split > 30:
            raise ValueError(
                f"cannot place tensor {tensor} as {split}: {graph.name} has {len(graph.tensors)} tensors, and a split is a dim "
                f"or {REPLICATED}"
            )
    engine = propagator_of(graph, devices, space)
    found = engine.restrict(engine.root, {tensor: bit_of(split) for tensor, split in seeds.items()})
    return found if isinstance(found, Conflict) else determined(found)
