"""Fewer operations for the same graph: chains of views become one view, transposes of transposes vanish.

A third of what autograd records is such: a product reads weight.t(), its backward pass weight.t().t(). Shorter chains also
split better, for an intermediate shape that merges dims need not be split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from datamodules.planning.graph import Op, TensorInfo


def simplify(tensors: Sequence[TensorInfo], ops: Sequence[Op], outputs: Sequence[int]) -> tuple[list[Op], list[int]]:
    """Return operations and outputs with views of views looked through; what nothing reads any more is still there.

    Args:
        outputs: tensors asked for; the returned ones are where their values are now.
    """
    same: dict[int, int] = {}  # tensor -> the one that holds the same value
    source: dict[int, Op] = {}  # tensor -> the view or permute that made it
    kept: list[Op] = []
    for op in ops:
        op = replace(op, inputs=tuple(same.get(t, t) for t in op.inputs))
        if op.kind in ("view", "permute"):
            op = _through(op, source.get(op.inputs[0]))
            if _is_identity(tensors, op):
                same[op.outputs[0]] = op.inputs[0]
                continue
            source[op.outputs[0]] = op
        kept.append(op)
    return kept, [same.get(t, t) for t in outputs]


def _through(op: Op, before: Op | None) -> Op:
    """The same view, taken from what the view before was taken from."""
    if before is None or before.kind != op.kind:
        return op
    if op.kind == "view":
        return replace(op, inputs=before.inputs)
    inner = before.attributes["dims"]
    return replace(op, inputs=before.inputs, attributes={"dims": [inner[d] for d in op.attributes["dims"]]})


def _is_identity(tensors: Sequence[TensorInfo], op: Op) -> bool:
    if op.kind == "permute":
        return list(op.attributes["dims"]) == list(range(len(op.attributes["dims"])))
    before, after = tensors[op.inputs[0]], tensors[op.outputs[0]]
    return before.shape == after.shape and before.dtype == after.dtype
