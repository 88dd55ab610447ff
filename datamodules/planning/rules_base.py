"""What the sharding rules are written with.

A rule is one way to run one operation on N devices: for each input and each output how it lies on them. Rules name dims
without regard to sizes; `rules.rows` drops those whose sizes N does not divide.

Legend: a split is a dim >= 0 (that dim cut into N equal parts), REPLICATED (whole on each device) or PARTIAL (each device
has a summand of the whole shape).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REPLICATED = -1
PARTIAL = -2
EXTREME = -3  # like PARTIAL under max, min, product, and, or: only where the reduction follows at once, never in a row

STRICT = 0  # rules that DTensor's tables have too
PAPER = 1  # rules of reductions that XLA's text spells out: the loss over a split vocabulary, masked look-ups
EXTENDED = 2  # convolutions split by channel, which the paper's published plans do not use

Row = tuple[tuple[int, ...], tuple[int, ...]]
Shape = tuple[int, ...]


class RuleError(ValueError):
    """An operation whose attributes or operands do not fit its kind."""


@dataclass(frozen=True)
class Rule:
    """One way to run an operation.

    Attributes:
        inputs, outputs: splits in the order of the operation's operands.
        level: STRICT, PAPER or EXTENDED: the smallest space that has it.
        inner: bytes all-reduced inside the operation (statistics of a split softmax), besides its outputs.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    level: int = STRICT
    inner: int = 0


@dataclass(frozen=True)
class Case:
    """An operation as its rule sees it: kind, shapes, attributes, device count."""

    name: str
    kind: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    attributes: Mapping[str, Any]
    devices: int
    floating: tuple[bool, ...] = ()

    def get(self, attribute: str) -> Any:
        """Return an attribute.

        Raises:
            RuleError: it is not there.
        """
        if attribute not in self.attributes:
            raise RuleError(
                f"operation {self.name} ({self.kind}) has no attribute {attribute!r}, which its sharding rule reads; it has: "
                f"{', '.join(sorted(self.attributes)) or 'none'}"
            )
        return self.attributes[attribute]

    def expect(self, low: int, high: int | None = None) -> int:
        """Return the number of inputs, which must lie between low and high.

        Raises:
            RuleError: it does not.
        """
        count, high = len(self.inputs), low if high is None else high
        if not low <= count <= high:
            raise RuleError(
                f"operation {self.name} ({self.kind}) has {count} tensor inputs; its rule knows {low} to {high}"
            )
        return count

    def flags(self, attribute: str, count: int) -> tuple[bool, ...]:
        """Return an attribute of `count` flags, all true where it is absent."""
        value = self.attributes.get(attribute)
        return (True,) * count if value is None else tuple(bool(v) for v in value)


Family = Callable[[Case], Iterator[Rule]]


def same(case: Case, inputs: tuple[int, ...], level: int = STRICT, inner: int = 0) -> Rule:
    """Return the rule whose outputs all lie like the first input."""
    return Rule(inputs, (inputs[0],) * len(case.outputs), level, inner)


def aligned(shape: Shape, out: Shape, dim: int) -> int:
    """Return how an operand lies when the output it is broadcast to is split along `dim`: split too, or replicated."""
    own = dim - (len(out) - len(shape))
    return own if own >= 0 and shape[own] == out[dim] else REPLICATED


def carried(case: Case, pairs: Iterator[tuple[int, int]] | list[tuple[int, int]], partial: bool) -> Iterator[Rule]:
    """Yield the rules of a one-input operation that maps input dim a onto output dim b for each pair (a, b)."""
    for a, b in pairs:
        yield Rule((a,), (b,) * len(case.outputs))
    if partial:
        yield Rule((PARTIAL,), (PARTIAL,) * len(case.outputs))
