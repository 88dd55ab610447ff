"""Sharding rules of products: matrices, convolutions, attention and embeddings, with their backwards.

Sources: dot and gather after HPGO's derivation tables, convolution by channel after TePDist's fast strategy, embeddings and
partial sums after DTensor's tables; attention by batch and head is Megatron's.

Legend: B batch, H heads, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

from datamodules.planning.rules_base import (
    EXTENDED,
    PAPER,
    PARTIAL,
    REPLICATED,
    Case,
    Family,
    Rule,
    RuleError,
    aligned,
)

R, P = REPLICATED, PARTIAL


def dot_general(case: Case) -> Iterator[Rule]:
    """Any contraction: a batch dim jointly, a free dim of either side, a contracted dim of both (a partial sum)."""
    case.expect(2)
    ranks = [len(shape) for shape in case.inputs]
    if case.kind in ("mm", "bmm"):
        batch = ([0], [0]) if case.kind == "bmm" else ([], [])
        contract = ([ranks[0] - 1], [ranks[1] - 2])
    else:
        batch, contract = case.get("batch"), case.get("contract")
    yield from ((Rule((a, b), (i,))) for i, (a, b) in enumerate(zip(*batch, strict=True)))
    out = len(batch[0])
    for side in (0, 1):
        for dim in range(ranks[side]):
            if dim not in batch[side] and dim not in contract[side]:
                yield Rule((dim, R) if side == 0 else (R, dim), (out,))
                out += 1
    yield from (Rule((a, b), (P,)) for a, b in zip(*contract, strict=True))
    yield from (Rule((P, R), (P,)), Rule((R, P), (P,)))


def grouped_mm(case: Case) -> Iterator[Rule]:
    """Rows sorted by expert times one matrix each; split experts leave zero rows for the others' tokens: a partial sum."""
    case.expect(3)
    yield Rule((R, 2, R), (1,))
    yield Rule((1, 1, R), (P,))
    yield Rule((R, 0, R), (P,))
    yield from (Rule((P, R, R), (P,)), Rule((R, P, R), (P,)))


def convolution(case: Case) -> Iterator[Rule]:
    """By example; by output or input channel (EXTENDED). A bias beside split input channels is added once, not N times."""
    count = case.expect(2, 3)
    groups, transposed = case.attributes.get("groups", 1), case.attributes.get("transposed", False)
    w_out, w_in = (1, 0) if transposed else (0, 1)
    bias = (R,) * (count - 2)
    yield Rule((0, R, *bias), (0,))
    if groups == 1:
        yield Rule((R, w_out, *((0,) * (count - 2))), (1,), EXTENDED)
        yield Rule((1, w_in, *bias), (P,), EXTENDED)
    elif groups % case.devices == 0:
        yield Rule((1, 0, *((0,) * (count - 2))), (1,), EXTENDED)
    if not bias:
        yield from (Rule((P, R), (P,)), Rule((R, P), (P,)))


def convolution_backward(case: Case) -> Iterator[Rule]:
    """The gradients of `convolution`'s rules: (grad, x, weight) -> those wanted of dx, dweight, dbias."""
    case.expect(3)
    wanted = case.flags("wanted", 3)
    groups, transposed = case.attributes.get("groups", 1), case.attributes.get("transposed", False)
    w_out, w_in = (1, 0) if transposed else (0, 1)

    def rule(inputs: tuple[int, ...], outputs: tuple[int, ...], level: int = 0) -> Rule:
        return Rule(inputs, tuple(o for o, want in zip(outputs, wanted, strict=True) if want), level)

    yield rule((0, 0, R), (0, P, P))
    if groups == 1:
        yield rule((1, R, w_out), (P, w_out, 0), EXTENDED)
        yield rule((R, 1, w_in), (1, w_in, R), EXTENDED)
    elif groups % case.devices == 0:
        yield rule((1, 1, 0), (1, 0, 0), EXTENDED)
    yield rule((P, R, R), (P, P, P))


def embedding(case: Case) -> Iterator[Rule]:
    """Rows of a table: by width; by any dim of the ids; by vocabulary, where foreign ids give zeros: a partial sum."""
    case.expect(2)
    ids = len(case.inputs[1])
    yield Rule((1, R), (ids,))
    yield from (Rule((R, dim), (dim,)) for dim in range(ids))
    yield Rule((0, R), (P,))
    yield Rule((P, R), (P,))


def embedding_backward(case: Case) -> Iterator[Rule]:
    """Gradient of the table: by width; by any dim of the ids, a partial sum; by vocabulary, each device its own rows."""
    case.expect(2)
    ids = len(case.inputs[1])
    yield Rule((ids, R), (1,))
    yield from (Rule((dim, dim), (P,)) for dim in range(ids))
    yield Rule((R, R), (0,), PAPER)
    yield Rule((P, R), (P,))


def sdpa(case: Case) -> Iterator[Rule]:
    """Attention, (B, H, S, k) each, the mask broadcast: by example or by head; fewer key heads must split as well."""
    count = case.expect(3, 4)
    q_BHSk = case.inputs[0]
    if len(q_BHSk) != 4:
        raise RuleError(
            f"attention {case.name} has queries of shape {q_BHSk}; its rule knows (batch, heads, sequence, width)"
        )
    for dim in (0, 1):
        mask = tuple(aligned(shape, (*q_BHSk[:3], case.inputs[1][2]), dim) for shape in case.inputs[3:count])
        yield Rule((dim, dim, dim, *mask), (dim,) * len(case.outputs))


def sdpa_backward(case: Case) -> Iterator[Rule]:
    """The same splits; a mask's gradient is a partial sum where the mask was broadcast along the split dim."""
    count = case.expect(6, 7)
    scores = (*case.inputs[1][:3], case.inputs[2][2])
    for dim in (0, 1):
        mask = tuple(aligned(shape, scores, dim) for shape in case.inputs[6:count])
        gradient = tuple(P if m == R else m for m in mask)[: len(case.outputs) - 3]
        yield Rule((dim,) * 6 + mask, (dim,) * 3 + gradient)


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("mm", "bmm", "dot_general"), dot_general),
    "grouped_mm": grouped_mm,
    "convolution": convolution,
    "convolution_backward": convolution_backward,
    "embedding": embedding,
    "embedding_backward": embedding_backward,
    "sdpa": sdpa,
    "sdpa_backward": sdpa_backward,
}
