"""Which ways there are to run an operation on N devices: the sharding rules of about 30 families of operations.

The published table is that of HPGO (dot, elementwise, reshape, transpose, broadcast, reduce, gather, scatter, slice, pad,
concat) with convolutions after TePDist; normalisations, attention, embeddings and the loss are single operations here, as
in PyTorch, and have rules of their own. One rule serves four spaces:

=========  ============================================================================================================
strict     what DTensor's tables have (and batch norm by example), no partial sums: a sum over a split dim is all-reduced
           within the operation
paper      strict, and the loss over a split vocabulary, look-ups in tables split by row: what XLA's text of these admits
extended   paper, and convolutions split by input or output channel, which no plan that the paper prints uses
full       extended, with partial sums as placements of their own, which may travel on before they are reduced
=========  ============================================================================================================

A row is ((splits of the inputs), (splits of the outputs)); the first row replicates everything. An operation without a rule
has that row alone, and a `MissingRuleWarning` says so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from datamodules.planning import rules_matrix, rules_pointwise, rules_shape
from datamodules.planning.graph import Graph, Op
from datamodules.planning.rules_base import (
    EXTENDED,
    EXTREME,
    PAPER,
    PARTIAL,
    REPLICATED,
    STRICT,
    Case,
    Family,
    Row,
    Rule,
    RuleError,
)

Space = Literal["strict", "paper", "extended", "full"]
LEVELS: dict[str, int] = {"strict": STRICT, "paper": PAPER, "extended": EXTENDED, "full": EXTENDED}
FAMILIES: dict[str, Family] = {**rules_matrix.FAMILIES, **rules_shape.FAMILIES, **rules_pointwise.FAMILIES}

__all__ = ["FAMILIES", "PARTIAL", "REPLICATED", "MissingRule", "MissingRuleWarning", "Placed", "Row", "RuleError"]
__all__ += ["RuleTable", "Space", "missing_rules", "placed_rows", "rows"]


class MissingRuleWarning(UserWarning):
    """An operation has no sharding rule and is replicated.

    Attributes:
        rule: the missing rule.
    """

    def __init__(self, rule: MissingRule) -> None:
        super().__init__(str(rule))
        self.rule = rule


@dataclass(frozen=True)
class MissingRule:
    """A kind of operation that no rule knows, and the operations of that kind."""

    kind: str
    ops: tuple[str, ...]

    def __str__(self) -> str:
        some = ", ".join(self.ops[:3]) + (f" and {len(self.ops) - 3} more" if len(self.ops) > 3 else "")
        return (
            f"no sharding rule for operations of kind {self.kind!r} ({some}): each device computes them whole on replicated "
            f"operands; add a family to datamodules/planning/rules_*.py to split them"
        )


@dataclass(frozen=True)
class Placed:
    """A row and the communication it hides.

    Attributes:
        row: the splits.
        reduced: which outputs are all-reduced before they appear (never in the full space, but for extremes).
        inner: bytes of statistics that are all-reduced inside the operation.
    """

    row: Row
    reduced: tuple[int, ...] = ()
    inner: int = 0


def rows(op: Op, graph: Graph, devices: int, space: Space = "paper") -> list[Row]:
    """Return the admissible joint placements of an operation's operands, all replicated first, each once.

    Args:
        devices: N; a dim that N does not divide is never split.
        space: see the module.
    Raises:
        ValueError: fewer than one device or no such space.
        RuleError: attributes or operands that do not fit the operation's kind.
    Warns:
        MissingRuleWarning: no rule for this kind.
    """
    return [placed.row for placed in placed_rows(op, graph, devices, space)]


def placed_rows(op: Op, graph: Graph, devices: int, space: Space = "paper") -> list[Placed]:
    """Return what `rows` does, with the collectives that each row implies. Arguments, errors and warnings as there."""
    if op.kind not in FAMILIES:
        warnings.warn(MissingRuleWarning(MissingRule(op.kind, (op.name,))), stacklevel=2)
    return _placed_rows(op, graph, devices, space)


def _placed_rows(op: Op, graph: Graph, devices: int, space: Space) -> list[Placed]:
    check_space(devices, space)
    case = _case(op, graph, devices)
    found: dict[Row, Placed] = {}
    for placed in _candidates(case, space):
        if _fits(placed.row, op, case):
            best = found.setdefault(placed.row, placed)
            if (len(placed.reduced), placed.inner) < (len(best.reduced), best.inner):
                found[placed.row] = placed
    return list(found.values())


def check_space(devices: int, space: str) -> None:
    """Refuse fewer than one device and spaces that there are not, by a ValueError."""
    if devices < 1:
        raise ValueError(f"a plan needs at least one device, got {devices}")
    if space not in get_args(Space):
        raise ValueError(f"no placement space {space!r}; there are {', '.join(get_args(Space))}")


def _candidates(case: Case, space: str) -> Iterator[Placed]:
    whole = (REPLICATED,) * len(case.inputs), (REPLICATED,) * len(case.outputs)
    yield Placed(whole)
    if case.devices == 1:
        return
    family = FAMILIES.get(case.kind)
    for rule in family(case) if family else ():
        if rule.level <= LEVELS[space]:
            yield from _placed(rule, space)


def _placed(rule: Rule, space: str) -> Iterator[Placed]:
    """A rule in a space: partial sums stay in the full one, elsewhere they are reduced at once."""
    if space == "full":
        if EXTREME not in rule.outputs:
            yield Placed((rule.inputs, rule.outputs), (), rule.inner)
            return
        gone = {EXTREME}
    else:
        gone = {EXTREME, PARTIAL}
        if PARTIAL in rule.inputs:
            return
    reduced = tuple(i for i, split in enumerate(rule.outputs) if split in gone)
    outputs = tuple(REPLICATED if split in gone else split for split in rule.outputs)
    yield Placed((rule.inputs, outputs), reduced, rule.inner)


def _fits(row: Row, op: Op, case: Case) -> bool:
    """Whether sizes divide, a tensor that occurs twice lies one way, and shapes have the dims."""
    if (len(row[0]), len(row[1])) != (len(case.inputs), len(case.outputs)):
        raise RuleError(
            f"operation {case.name} ({case.kind}) has {len(case.inputs)} inputs and {len(case.outputs)} outputs; its rule "
            f"gives {len(row[0])} and {len(row[1])}: its attributes ({dict(case.attributes)}) do not fit"
        )
    seen: dict[int, int] = {}
    operands = zip((*op.inputs, *op.outputs), (*row[0], *row[1]), (*case.inputs, *case.outputs), strict=True)
    for tensor, split, shape in operands:
        if seen.setdefault(tensor, split) != split:
            return False
        if split >= 0 and (split >= len(shape) or shape[split] == 0 or shape[split] % case.devices):
            return False
    return True


def _case(op: Op, graph: Graph, devices: int) -> Case:
    shapes = [graph.tensors[t].shape for t in (*op.inputs, *op.outputs)]
    kinds = tuple("float" in graph.tensors[t].dtype for t in (*op.inputs, *op.outputs))
    count = len(op.inputs)
    return Case(op.name, op.kind, tuple(shapes[:count]), tuple(shapes[count:]), op.attributes, devices, kinds)


def missing_rules(graph: Graph) -> tuple[MissingRule, ...]:
    """Return the kinds in a graph that no rule knows, with their operations."""
    unknown: dict[str, list[str]] = {}
    for op in graph.ops:
        if op.kind not in FAMILIES:
            unknown.setdefault(op.kind, []).append(op.name)
    return tuple(MissingRule(kind, tuple(names)) for kind, names in sorted(unknown.items()))


class RuleTable:
    """The rules of many operations, each worked out once for all operations that are alike.

    Args:
        devices, space: as for `rows`.
    """

    def __init__(self, devices: int, space: Space = "paper") -> None:
        check_space(devices, space)
        self.devices, self.space = devices, space
        self._known: dict[tuple, list[Placed]] = {}

    def of(self, op: Op, graph: Graph) -> list[Placed]:
        """Return the placed rows of an operation; errors as for `rows`. Missing rules are left to `missing_rules`."""
        key = self.signature(op, graph)
        if key not in self._known:
            self._known[key] = _placed_rows(op, graph, self.devices, self.space)
        return self._known[key]

    @staticmethod
    def signature(op: Op, graph: Graph) -> tuple:
        """Return what an operation's rows depend on: kind, shapes, dtypes, attributes, and which operands are one tensor."""
        first = {t: i for i, t in reversed(list(enumerate(op.inputs)))}
        tensors = tuple((graph.tensors[t].shape, graph.tensors[t].dtype) for t in (*op.inputs, *op.outputs))
        attributes = json.dumps(dict(op.attributes), sort_keys=True, default=str) if op.attributes else ""
        return op.kind, tuple(first[t] for t in op.inputs), tensors, attributes


def warn_missing(graph: Graph) -> None:
    """Warn once for each kind of operation in a graph that no rule knows."""
    for rule in missing_rules(graph):
        warnings.warn(MissingRuleWarning(rule), stacklevel=3)


def divides(row: Row) -> bool:
    """Return whether a row shares the work out: some operand is split. If none is, each device does the whole of it."""
    return any(split >= 0 for side in row for split in side)


def names_of(splits: Iterable[int]) -> str:
    """Return splits for people: "R", "P" or "S0"."""
    return ", ".join({REPLICATED: "R", PARTIAL: "P"}.get(split, f"S{split}") for split in splits)
