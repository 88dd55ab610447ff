"""Linkage groups: what each decision about a variable brings with it, and which decisions are possible at all.

A slot is one dim of one variable (operator partitioning) or of one input (data parallelism); a decision splits it over all
devices, or not. For each slot and decision the propagation runs once; what it says of the other slots is the decision's
linkage group. Slots that cannot be split are closed first, so that groups say nothing of them.

Repeated blocks (the layers of a transformer) can be tied: a slot then stands for that dim of the variable in every block.

Legend: N slots, V variables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from datamodules.planning.graph import Graph
from datamodules.planning.propagate import (
    Conflict,
    Domains,
    Propagator,
    bit_of,
    propagate,
    propagator_of,
)
from datamodules.planning.rules import Space

__all__ = ["CONFLICT", "Conflict", "Decisions", "Slot", "decisions", "propagate", "roles"]

CONFLICT = None
REPLICATE, PARTITION = 0, 1
Assignments = tuple[tuple[int, int], ...]  # (slot, REPLICATE or PARTITION)
Status = Literal["indivisible", "conflict", "feasible"]


@dataclass(frozen=True)
class Slot:
    """One decision point: a dim of a tensor, which is a trainable variable or an input."""

    variable: int
    dim: int


@dataclass(frozen=True)
class Decisions:
    """All decision points of a graph and what decisions bring with them.

    Attributes:
        slots: the points, variable by variable; `variable` is the tensor of the first block where blocks are tied.
        members: per variable, its tensors: one, or one for each tied block.
        names: per slot, such as "encoder.0.q.weight[0]".
        variable: per slot, the variable it belongs to, 0 to V - 1.
        bytes_V: bytes of one tensor of each variable.
        groups: (slot, decision) -> what follows for other slots, or CONFLICT; slots that are closed do not occur.
        status: per slot.
        reasons: slot -> why it cannot be split.
        reach: per slot, how many tensors splitting it determines; 0 where it cannot be.
        order: slots, those of largest reach first.
        root: domains with the closed slots taken out.
    """

    slots: tuple[Slot, ...]
    members: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    variable: tuple[int, ...]
    bytes_V: tuple[int, ...]
    groups: Mapping[tuple[int, int], Assignments | None]
    status: tuple[Status, ...]
    reasons: Mapping[int, Conflict]
    reach: tuple[int, ...]
    order: tuple[int, ...]
    root: Domains = field(repr=False, compare=False)
    propagator: Propagator = field(repr=False, compare=False)

    @property
    def copies_V(self) -> tuple[int, ...]:
        """How many tensors each variable stands for."""
        return tuple(len(tensors) for tensors in self.members)

    @property
    def feasible(self) -> tuple[int, ...]:
        """The slots that can be split, in their order."""
        return tuple(i for i, status in enumerate(self.status) if status == "feasible")

    def count(self, status: Status) -> int:
        """Return how many (variable, dim) pairs of the model have a status; tied ones count once per block."""
        return sum(len(self.members[v]) for v, s in zip(self.variable, self.status, strict=True) if s == status)

    @cached_property
    def families(self) -> tuple[tuple[int, ...], ...]:
        """Sets of slots that are split together: whoever splits one splits all of them. Each slot is in one, in order."""
        split = {
            slot: frozenset({slot, *(s for s, value in self.groups[slot, PARTITION] or () if value == PARTITION)})
            for slot in self.feasible
        }
        found = {frozenset(o for o in group if slot in split[o]) for slot, group in split.items()}
        return tuple(sorted(tuple(sorted(group)) for group in found))

    @cached_property
    def exclusions(self) -> tuple[tuple[int, int], ...]:
        """Pairs of families, of which at most one can be split."""
        pairs = []
        for a, first in enumerate(self.families):
            closed = {s for s, value in self.groups[first[0], PARTITION] or () if value == REPLICATE}
            pairs += [(a, b) for b in range(a + 1, len(self.families)) if closed & set(self.families[b])]
        return tuple(pairs)

    @cached_property
    def implications(self) -> tuple[tuple[int, int], ...]:
        """Pairs of families (a, b), where who splits a must split b as well, though not the other way round."""
        pairs = []
        for a, first in enumerate(self.families):
            split = {s for s, value in self.groups[first[0], PARTITION] or () if value == PARTITION}
            pairs += [(a, b) for b in range(len(self.families)) if b != a and self.families[b][0] in split]
        return tuple(pairs)

    def apply(self, state: Domains, slot: int, action: int) -> Domains | Conflict:
        """Return the state after a decision, by propagation and not by groups: exact at any depth of a search."""
        return self.propagator.restrict(state, self._layout.seeds(slot, action))

    def assignments(self, state: Domains) -> dict[int, int]:
        """Return which slots a state has decided."""
        return self._layout.decided(state, self.root)

    @cached_property
    def _layout(self) -> _Layout:
        return _Layout(self.slots, self.members, self.variable)


def _seeds(tensors: Sequence[int], dim: int, action: int) -> dict[int, int]:
    bits = bit_of(dim) if action == PARTITION else 0xFFFFFFFF ^ bit_of(dim)
    return dict.fromkeys(tensors, bits)


@dataclass(frozen=True)
class _Layout:
    """Slots as arrays: the tensors of each, one after another, with the bit of its dim."""

    slots: tuple[Slot, ...]
    members: tuple[tuple[int, ...], ...]
    variable: tuple[int, ...]

    @cached_property
    def flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tensors, bits, and where each slot starts."""
        groups = [self.members[v] for v in self.variable]
        bits = [bit_of(slot.dim) for slot, group in zip(self.slots, groups, strict=True) for _ in group]
        starts = np.concatenate([[0], np.cumsum([len(group) for group in groups])])[:-1]
        return (
            np.array([t for group in groups for t in group], np.int64),
            np.array(bits, np.uint32),
            starts.astype(np.int64),
        )

    def decided(self, state: Domains, root: Domains) -> dict[int, int]:
        """Slots whose tensors all are split there, or none of which can be, and which the root had left open."""
        if not self.slots:
            return {}
        tensors, bits, starts = self.flat
        possible = np.logical_or.reduceat((state[tensors] & bits) != 0, starts)
        certain = np.logical_and.reduceat(state[tensors] == bits, starts)
        was_open = np.logical_or.reduceat((root[tensors] & bits) != 0, starts)
        was_certain = np.logical_and.reduceat(root[tensors] == bits, starts)
        new = was_open & ~was_certain & (certain | ~possible)
        return {int(i): PARTITION if certain[i] else REPLICATE for i in np.flatnonzero(new)}

    def seeds(self, slot: int, action: int) -> dict[int, int]:
        """The domains that a decision leaves to the slot's tensors."""
        return _seeds(self.members[self.variable[slot]], self.slots[slot].dim, action)


def roles(graph: Graph, tensors: Sequence[int], tie: bool = True) -> tuple[tuple[int, ...], ...]:
    """Group variables that are the same one of repeated blocks.

    A block is what shares a prefix and an index in its name ("encoder.layer.3."); blocks are tied when they hold variables
    of the same names and shapes. The outermost index counts. Without `tie`, each variable is alone.
    """
    if not tie:
        return tuple((t,) for t in tensors)
    parsed = {t: re.match(r"(.*?)(?:^|(?<=\.))(\d+)\.(.+)$", graph.tensors[t].name) for t in tensors}
    blocks: dict[tuple[str, str], list[tuple[str, tuple[int, ...], int]]] = {}
    for t, match in parsed.items():
        if match:
            blocks.setdefault((match[1], match[2]), []).append((match[3], graph.tensors[t].shape, t))
    groups: dict[tuple, list[int]] = {}
    for t in tensors:
        match = parsed[t]
        key: tuple = (t,)
        if match:
            block = blocks[match[1], match[2]]
            key = match[1], tuple(sorted((name, shape) for name, shape, _ in block)), match[3]
        groups.setdefault(key, []).append(t)
    return tuple(tuple(group) for group in groups.values())


def decisions(
    graph: Graph,
    devices: int,
    over: Literal["variables", "inputs"] = "variables",
    tie: bool = True,
    space: Space = "paper",
) -> Decisions:
    """Return all decision points of a graph with their linkage groups.

    Args:
        devices: N, over all of which a slot is split.
        over: dims of the trainable variables (operator partitioning), or of the inputs (data parallelism).
        tie: decide repeated blocks once.
        space: "strict", "paper" or "extended", see `rules`.
    Raises:
        ValueError: fewer than one device, or no such choice.
    """
    if over not in ("variables", "inputs"):
        raise ValueError(f"decisions are over 'variables' or 'inputs', not {over!r}")
    engine = propagator_of(graph, devices, space)
    tensors = [p.tensor for p in graph.parameters] if over == "variables" else list(graph.inputs)
    members = roles(graph, tensors, tie and over == "variables")
    slots = tuple(Slot(group[0], dim) for group in members for dim in range(len(graph.tensors[group[0]].shape)))
    owner = {group[0]: v for v, group in enumerate(members)}
    variable = tuple(owner[slot.variable] for slot in slots)
    layout = _Layout(slots, members, variable)
    root, status, reasons = _close_slots(engine, layout)
    groups, reach = _groups(engine, layout, status, root)
    return Decisions(
        slots=slots,
        members=members,
        names=tuple(f"{graph.tensors[slot.variable].name}[{slot.dim}]" for slot in slots),
        variable=variable,
        bytes_V=tuple(graph.tensors[group[0]].bytes for group in members),
        groups=groups,
        status=status,
        reasons=reasons,
        reach=reach,
        order=tuple(sorted(range(len(slots)), key=lambda i: (-reach[i], i))),
        root=root,
        propagator=engine,
    )


def _close_slots(engine: Propagator, layout: _Layout) -> tuple[Domains, tuple[Status, ...], dict[int, Conflict]]:
    """Try each slot; take out those that cannot be split, and try again until all others can."""
    root, reasons = engine.root, dict[int, Conflict]()
    status: list[Status] = ["feasible"] * len(layout.slots)
    changed = True
    while changed:
        changed = False
        for i, slot in enumerate(layout.slots):
            if status[i] != "feasible":
                continue
            after = engine.restrict(root, layout.seeds(i, PARTITION))
            if isinstance(after, Conflict):
                size = engine.graph.tensors[slot.variable].shape[slot.dim]
                status[i], reasons[i] = ("indivisible" if size % engine.devices or not size else "conflict"), after
                rest = engine.restrict(root, layout.seeds(i, REPLICATE))
                if isinstance(rest, Conflict):
                    raise AssertionError(f"slot {i} can be neither split nor whole: {rest}")
                changed |= bool((rest != root).any())
                root = rest
    return root, tuple(status), reasons


def _groups(
    engine: Propagator, layout: _Layout, status: Sequence[Status], root: Domains
) -> tuple[dict[tuple[int, int], Assignments | None], tuple[int, ...]]:
    """The linkage group of each slot and decision, and the reach of splitting it."""
    groups: dict[tuple[int, int], Assignments | None] = {}
    reach = [0] * len(layout.slots)
    known = _settled(root)
    for i in range(len(layout.slots)):
        groups[i, PARTITION], groups[i, REPLICATE] = CONFLICT, ()
        if status[i] != "feasible":
            continue
        for action in (REPLICATE, PARTITION):
            after = engine.restrict(root, layout.seeds(i, action))
            if isinstance(after, Conflict):
                groups[i, action] = CONFLICT
                continue
            decided = layout.decided(after, root)
            groups[i, action] = tuple((s, value) for s, value in decided.items() if s != i)
            if action == PARTITION:
                reach[i] = _settled(after) - known
    return groups, tuple(reach)


def _settled(domains: Domains) -> int:
    """How many tensors are left one choice."""
    return int(np.count_nonzero((domains & (domains - np.uint32(1))) == 0))
