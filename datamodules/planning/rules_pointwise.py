"""Sharding rules of elementwise operations, reductions, normalisations, pooling and the loss.

Sources: elementwise and reduce after HPGO's derivation tables, partial sums after DTensor's; the loss over a split
vocabulary as Megatron computes it, which XLA's text of a softmax admits by its reductions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from datamodules.planning.rules_base import (
    EXTREME,
    PAPER,
    PARTIAL,
    REPLICATED,
    Case,
    Family,
    Rule,
    RuleError,
    Shape,
    aligned,
    same,
)
from datamodules.planning.vocabulary import CONSTANTS, POINTWISE, REDUCTIONS

R, P = REPLICATED, PARTIAL
STATISTIC_BYTES = 4  # statistics are float32
WHOLE = frozenset({"sum", "mean"})
EXTREMES = frozenset({"amax", "amin", "prod", "any", "all", "logsumexp"})


def pointwise(case: Case) -> Iterator[Rule]:
    """The same dim everywhere, operands that are broadcast along it whole; partial sums where the function is linear."""
    out = case.outputs[0]
    for dim in range(len(out)):
        yield Rule(tuple(aligned(shape, out, dim) for shape in case.inputs), (dim,) * len(case.outputs))
    yield from (Rule(row, (P,) * len(case.outputs)) for row in _partial_rows(case))


def _partial_rows(case: Case) -> Iterator[tuple[int, ...]]:
    count, kind = len(case.inputs), case.kind
    if kind in ("neg", "clone", "alias") or (kind in ("add", "sub") and count == 2):  # a number would be added N times
        yield (P,) * count
    elif kind == "cast" and all(case.floating):
        yield (P,)
    elif kind == "mul":
        yield from (tuple(P if i == j else R for j in range(count)) for i in range(count))
    elif kind == "div" and not case.attributes.get("rounding_mode"):
        yield (P, R)[:count]
    elif kind.endswith("_backward"):  # linear in the gradient, their first operand
        yield (P, *(R,) * (count - 1))


def sum_to(case: Case) -> Iterator[Rule]:
    """A sum over the dims that broadcasting had added or grown."""
    case.expect(1)
    (source,), (target,) = case.inputs, case.outputs
    for dim in range(len(source)):
        own = aligned(target, source, dim)
        yield Rule((dim,), (own if own != R else P,))
    yield Rule((P,), (P,))


def reduction(case: Case) -> Iterator[Rule]:
    """A kept dim shifts; a reduced one leaves a partial sum, or an extreme that is reduced at once."""
    case.expect(1)
    rank = len(case.inputs[0])
    reduced, keep = set(case.get("dims")), bool(case.attributes.get("keepdim", False))
    for dim in range(rank):
        if dim not in reduced:
            yield same_out(case, (dim,), dim if keep else dim - sum(r < dim for r in reduced))
        elif case.kind in WHOLE or case.kind in EXTREMES:
            yield same_out(case, (dim,), P if case.kind in WHOLE else EXTREME)
    if case.kind in WHOLE:
        yield same_out(case, (P,), P)


def same_out(case: Case, inputs: tuple[int, ...], out: int) -> Rule:
    """Return the rule with every output alike."""
    return Rule(inputs, (out,) * len(case.outputs))


def softmax(case: Case) -> Iterator[Rule]:
    """Every dim but the normalised one; that one too (PAPER) by all-reducing the maximum and the sum of each row."""
    count, dim = len(case.inputs), case.get("dim")
    shape = case.inputs[0]
    yield from (same(case, (d,) * count) for d in range(len(shape)) if d != dim)
    rows = math.prod(shape) // max(shape[dim], 1)
    statistics = 1 if case.kind.endswith("_backward") else 2
    yield same(case, (dim,) * count, PAPER, statistics * rows * STATISTIC_BYTES)


def norm(case: Case) -> Iterator[Rule]:
    """Layer and RMS norm: every dim but the normalised ones; weight and bias whole."""
    count = case.expect(1, 3)
    for dim in range(len(case.inputs[0]) - _normalized(case)):
        yield Rule((dim, *(R,) * (count - 1)), (dim,) * len(case.outputs))


def norm_backward(case: Case) -> Iterator[Rule]:
    """(grad, x, statistics, weight...): the gradients of weight and bias become partial sums."""
    statistics = 2 if case.kind == "layer_norm_backward" else 1
    count = case.expect(2 + statistics, 4 + statistics)
    wanted = case.flags("wanted", len(case.outputs))
    for dim in range(len(case.inputs[0]) - _normalized(case)):
        outputs = tuple(o for o, want in zip((dim, P, P), wanted, strict=False) if want)
        yield Rule((*(dim,) * (2 + statistics), *(R,) * (count - 2 - statistics)), outputs)


def _normalized(case: Case) -> int:
    value = case.attributes.get("normalized", 1)
    return len(value) if isinstance(value, list | tuple) else int(value)


def batch_norm(case: Case) -> Iterator[Rule]:
    """By channel; by example with the statistics all-reduced, so that they are those of the whole batch."""
    count, others = case.expect(1, 5), len(case.outputs) - 1
    sized = tuple(0 if shape[0] else R for shape in case.outputs[1:])  # without training, statistics are empty
    yield Rule((1, *(0,) * (count - 1)), (1, *sized))
    yield Rule((0, *(R,) * (count - 1)), (0, *(R,) * others), inner=_statistics(case))


def batch_norm_backward(case: Case) -> Iterator[Rule]:
    """(grad, x, [weight,] mean, invstd): as `batch_norm`; dx needs two all-reduced sums per channel."""
    count = case.expect(4, 7)
    wanted = case.flags("wanted", len(case.outputs))

    def rule(first: int, rest: int, outputs: tuple[int, ...], inner: int) -> Rule:
        kept = tuple(o for o, want in zip(outputs, wanted, strict=False) if want)
        return Rule((first, first, *(rest,) * (count - 2)), kept, inner=inner)

    yield rule(1, 0, (1, 0, 0), 0)
    yield rule(0, R, (0, P, P), _statistics(case))


def _statistics(case: Case) -> int:
    return 2 * case.inputs[0][1] * STATISTIC_BYTES if case.attributes.get("training", True) else 0


def group_norm(case: Case) -> Iterator[Rule]:
    """By example only: channels of a group belong together."""
    count = case.expect(1, 3)
    yield Rule((0, *(R,) * (count - 1)), (0,) * len(case.outputs))


def pool(case: Case) -> Iterator[Rule]:
    """By example and by channel."""
    count = len(case.inputs)
    yield from (same(case, (dim,) * count) for dim in (0, 1))
    if case.kind == "avg_pool":
        yield same(case, (P,))
    elif case.kind.endswith("_backward"):
        yield same(case, (P, *(R,) * (count - 1)))


def nll_loss(case: Case) -> Iterator[Rule]:
    """(logprob, target[, weight]) -> loss, total: by example, the total all-reduced; by class, foreign targets give zeros."""
    count = case.expect(2, 3)
    logprob, outputs, none = case.inputs[0], len(case.outputs), _reduction_of(case) == "none"
    for dim, own in _example_dims(logprob):
        total = 0 if none else STATISTIC_BYTES
        yield Rule((dim, own, R)[:count], (own if none else P, P)[:outputs], inner=total)
    yield Rule((_class_dim(logprob), R, R)[:count], (P, R)[:outputs], PAPER)


def nll_loss_backward(case: Case) -> Iterator[Rule]:
    """(grad, logprob, target[, weight], total): each device the part it has; nothing is communicated."""
    rest = (R,) * (case.expect(4, 5) - 3)
    none, logprob = _reduction_of(case) == "none", case.inputs[1]
    yield from (Rule((own if none else R, dim, own, *rest), (dim,)) for dim, own in _example_dims(logprob))
    yield Rule((R, _class_dim(logprob), R, *rest), (_class_dim(logprob),), PAPER)
    yield Rule((P, R, R, *rest), (P,))


def _reduction_of(case: Case) -> str:
    value = case.attributes.get("reduction", "mean")
    return {0: "none", 1: "mean", 2: "sum"}.get(value, str(value))  # torch writes numbers


def _class_dim(logprob: Shape) -> int:
    if not logprob:
        raise RuleError("log-probabilities need a dim for the classes")
    return min(1, len(logprob) - 1)


def _example_dims(logprob: Shape) -> list[tuple[int, int]]:
    return [(dim, max(dim - 1, 0)) for dim in range(len(logprob)) if dim != _class_dim(logprob)]


def constant(case: Case) -> Iterator[Rule]:
    """Made in place: each device makes its part."""
    yield from (Rule((), (dim,) * len(case.outputs)) for dim in range(len(case.outputs[0])))


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(POINTWISE | {"alias"}, pointwise),
    "sum_to": sum_to,
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("softmax", "log_softmax", "softmax_backward", "log_softmax_backward"), softmax),
    **dict.fromkeys(("layer_norm", "rms_norm"), norm),
    **dict.fromkeys(("layer_norm_backward", "rms_norm_backward"), norm_backward),
    "batch_norm": batch_norm,
    "batch_norm_backward": batch_norm_backward,
    "group_norm": group_norm,
    **dict.fromkeys(("max_pool", "avg_pool", "max_pool_backward", "avg_pool_backward"), pool),
    "nll_loss": nll_loss,
    "nll_loss_backward": nll_loss_backward,
    **dict.fromkeys(CONSTANTS, constant),
}
