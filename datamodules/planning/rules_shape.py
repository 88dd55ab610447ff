"""Sharding rules of operations that move or choose elements: views, slices, joins, look-ups, scans.

Sources: reshape, transpose, broadcast, slice, pad and concat after HPGO's derivation tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from datamodules.planning.rules_base import (
    PAPER,
    PARTIAL,
    REPLICATED,
    Case,
    Family,
    Rule,
    RuleError,
    Shape,
    aligned,
    carried,
)

R, P = REPLICATED, PARTIAL


def leading_pairs(source: Shape, target: Shape) -> list[tuple[int, int]]:
    """Return which dims of a reshape carry a split onto each other: the leading dims of groups of equal product.

    Dims of size 1 carry nothing. (16, 128, 1024) -> (2048, 1024) gives (0, 0) and (2, 1).

    Raises:
        RuleError: the shapes hold different numbers of elements.
    """
    if math.prod(source) != math.prod(target):
        raise RuleError(
            f"a view cannot turn shape {source} into {target}: {math.prod(source)} and {math.prod(target)} elements"
        )
    if math.prod(source) == 0:
        return []
    pairs: list[tuple[int, int]] = []
    a = b = 0
    while True:
        while a < len(source) and source[a] == 1:
            a += 1
        while b < len(target) and target[b] == 1:
            b += 1
        if a >= len(source) or b >= len(target):
            return pairs
        pairs.append((a, b))
        left, right, a, b = source[a], target[b], a + 1, b + 1
        while left != right:
            if left < right:
                left, a = left * source[a], a + 1
            else:
                right, b = right * target[b], b + 1


def view(case: Case) -> Iterator[Rule]:
    """Any reshape: only the leading dim of a merged or split group carries the split, since parts must stay contiguous."""
    case.expect(1)
    yield from carried(case, leading_pairs(case.inputs[0], case.outputs[0]), True)


def permute(case: Case) -> Iterator[Rule]:
    """The permuted dim."""
    case.expect(1)
    yield from carried(case, [(a, b) for b, a in enumerate(case.get("dims"))], True)


def expand(case: Case) -> Iterator[Rule]:
    """The mapped dim; a dim that is new or grows can be split while the input is whole."""
    case.expect(1)
    (source,), (target,), dims = case.inputs, case.outputs, list(case.get("dims"))
    kept = [(a, b) for a, b in enumerate(dims) if source[a] == target[b]]
    yield from carried(case, kept, True)
    yield from (Rule((R,), (b,)) for b in range(len(target)) if b not in [pair[1] for pair in kept])


def slice_like(case: Case) -> Iterator[Rule]:
    """Slice, select, narrow and their gradients: every dim but the cut one."""
    case.expect(1)
    dim, ranks = case.get("dim"), (len(case.inputs[0]), len(case.outputs[0]))
    if ranks[0] == ranks[1]:
        pairs = [(d, d) for d in range(ranks[0]) if d != dim]
    elif ranks[0] == ranks[1] + 1:
        pairs = [(d, d - (d > dim)) for d in range(ranks[0]) if d != dim]
    else:
        pairs = [(d - (d > dim), d) for d in range(ranks[1]) if d != dim]
    yield from carried(case, pairs, True)


def pad(case: Case) -> Iterator[Rule]:
    """Every dim that nothing is added to; partial sums only beside zeros."""
    case.expect(1)
    low, high = case.get("low"), case.get("high")
    pairs = [(d, d) for d in range(len(case.inputs[0])) if low[d] == high[d] == 0]
    yield from carried(case, pairs, case.attributes.get("value", 0) == 0)


def cat(case: Case) -> Iterator[Rule]:
    """Every dim but the joined one; partial sums jointly."""
    count = len(case.inputs)
    yield from (Rule((d,) * count, (d,)) for d in range(len(case.outputs[0])) if d != case.get("dim"))
    yield Rule((P,) * count, (P,))


def stack(case: Case) -> Iterator[Rule]:
    """Every dim of the parts; partial sums jointly."""
    count, dim = len(case.inputs), case.get("dim")
    yield from (Rule((d,) * count, (d + (d >= dim),)) for d in range(len(case.inputs[0])))
    yield Rule((P,) * count, (P,))


def index(case: Case) -> Iterator[Rule]:
    """x[..., i, j, ...]: dims of x that are not indexed; the indices jointly, by any dim of theirs; x a partial sum.

    "dims" says which dims of x are indexed; the indices' common shape stands where they are, or first where they are apart.
    """
    dims, (x, *indices) = list(case.get("dims")), case.inputs
    common = len(case.outputs[0]) - (len(x) - len(dims))
    together = dims == list(range(dims[0], dims[0] + len(dims))) if dims else True
    start = dims[0] if dims and together else 0
    shape = case.outputs[0][start : start + common]
    for d in range(len(x)):
        if d not in dims:
            rank = sum(other not in dims for other in range(d))
            yield Rule((d, *(R,) * len(indices)), (rank if rank < start else rank + common,))
    for d in range(common):
        yield Rule((R, *(aligned(i, shape, d) for i in indices)), (start + d,))
    yield Rule((P, *(R,) * len(indices)), (P,))


def split(case: Case) -> Iterator[Rule]:
    """Every dim but the cut one."""
    case.expect(1)
    yield from carried(case, [(d, d) for d in range(len(case.inputs[0])) if d != case.get("dim")], True)


def scan(case: Case) -> Iterator[Rule]:
    """Sort, top-k and running sums: every dim but the scanned one."""
    case.expect(1)
    dim = case.get("dim")
    yield from carried(case, [(d, d) for d in range(len(case.inputs[0])) if d != dim], case.kind == "cumsum")


def gather(case: Case) -> Iterator[Rule]:
    """(x, index), elementwise in all dims but one; where that one is split, foreign indices give zeros: a partial sum."""
    case.expect(2)
    dim, (x, index) = case.get("dim"), case.inputs
    yield from (Rule((d, d), (d,)) for d in range(len(x)) if d != dim and x[d] == index[d])
    yield Rule((R, dim), (dim,))
    yield Rule((dim, R), (P,), PAPER)
    yield Rule((P, R), (P,))


def scatter(case: Case) -> Iterator[Rule]:
    """(x, index[, source]): x with elements put in or added; where the dim is split, each device minds its own part.

    Of sums only, `scatter_add`: split additions leave a partial sum, to which x itself is added once.
    """
    count, dim = case.expect(2, 3), case.get("dim")
    x, *others = case.inputs
    yield from (Rule((d,) * count, (d,)) for d in range(len(x)) if d != dim and all(o[d] == x[d] for o in others))
    yield Rule((dim, R, R)[:count], (dim,), PAPER)
    if case.kind == "scatter_add":
        yield Rule((R, dim, dim), (P,), PAPER)
        yield from (Rule((P, dim, dim), (P,)), Rule((P, R, P), (P,)))


def index_select(case: Case) -> Iterator[Rule]:
    """(x, index (n,)): every dim but the chosen one; the chosen ones by the index; a split table gives a partial sum."""
    case.expect(2)
    dim = case.get("dim")
    yield from (Rule((d, R), (d,)) for d in range(len(case.inputs[0])) if d != dim)
    yield Rule((R, 0), (dim,))
    yield Rule((dim, R), (P,), PAPER)
    yield Rule((P, R), (P,))


def index_add(case: Case) -> Iterator[Rule]:
    """(x, index (n,), source): the mirror of `index_select`."""
    case.expect(3)
    dim = case.get("dim")
    yield from (Rule((d, R, d), (d,)) for d in range(len(case.inputs[0])) if d != dim)
    yield Rule((dim, R, R), (dim,), PAPER)
    yield Rule((R, 0, dim), (P,), PAPER)  # x itself is added once
    yield from (Rule((P, 0, dim), (P,)), Rule((P, R, P), (P,)))


FAMILIES: dict[str, Family] = {
    "view": view,
    "permute": permute,
    "expand": expand,
    **dict.fromkeys(
        ("slice", "select", "narrow", "slice_backward", "select_backward", "narrow_backward", "unbind"), slice_like
    ),
    "pad": pad,
    "cat": cat,
    "stack": stack,
    "index": index,
    "split": split,
    **dict.fromkeys(("topk", "sort", "cumsum"), scan),
    "gather": gather,
    "scatter": scatter,
    "scatter_add": scatter,
    "index_select": index_select,
    "index_add": index_add,
}
