"""Our rule tables beside those of PyTorch's DTensor, for the torch that is installed.

DTensor's tables are private and move; where they are not found the tests are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from datamodules.planning.rules import PARTIAL, REPLICATED, Row, rows
from tests.datamodules.planning.rule_examples import A, Example, name
from tests.datamodules.planning.test_rules_numeric import EXAMPLES

# Arguments of torch's operator before and after the operands: {kind: (operator, operands -> arguments)}.
CALLS: dict[str, tuple[Any, Any]] = {
    "mm": (A.mm.default, lambda *t: t),
    "bmm": (A.bmm.default, lambda *t: t),
    "add": (A.add.Tensor, lambda *t: t if len(t) == 2 else (*t, 1.0)),
    "sub": (A.sub.Tensor, lambda *t: t),
    "mul": (A.mul.Tensor, lambda *t: t if len(t) == 2 else (*t, 3.0)),
    "div": (A.div.Tensor, lambda *t: t),
    "neg": (A.neg.default, lambda *t: t),
    "cast": (A._to_copy.default, lambda *t: t),
    "gelu": (A.gelu.default, lambda *t: t),
    "gelu_backward": (A.gelu_backward.default, lambda *t: t),
    "threshold_backward": (A.threshold_backward.default, lambda *t: (*t, 0)),
    "where": (A.where.self, lambda *t: t),
    "embedding": (A.embedding.default, lambda *t: t),
    "embedding_backward": (A.embedding_dense_backward.default, lambda *t: (*t, 6, -1, False)),
    "layer_norm": (A.native_layer_norm.default, lambda x, w, b: (x, [8], w, b, 1e-5)),
    "layer_norm_backward": (
        A.native_layer_norm_backward.default,
        lambda g, x, m, r, w, b: (g, x, [8], m, r, w, b, [True] * 3),
    ),
    "softmax": (A._softmax.default, lambda x: (x, 1, False)),
    "log_softmax": (A._log_softmax.default, lambda x: (x, 1, False)),
    "softmax_backward": (A._softmax_backward_data.default, lambda g, y: (g, y, 1, torch.float64)),
    "nll_loss_backward": (A.nll_loss_backward.default, lambda g, x, t, n: (g, x, t, None, 1, -100, n)),
    "cat": (A.cat.default, lambda *t: (list(t), 1)),
    "split": (A.split.Tensor, lambda x: (x, 2, 1)),
    "slice": (A.slice.Tensor, lambda x: (x, 1, 1, 5, 2)),
    "select": (A.select.int, lambda x: (x, 1, 2)),
    "pad": (A.constant_pad_nd.default, lambda x: (x, [0, 0, 1, 2])),
    "cumsum": (A.cumsum.default, lambda x: (x, 1)),
    "topk": (A.topk.default, lambda x: (x, 2, 1)),
    "gather": (A.gather.default, lambda x, i: (x, 1, i)),
    "scatter_add": (A.scatter_add.default, lambda x, i, s: (x, 1, i, s)),
    "index_select": (A.index_select.default, lambda x, i: (x, 1, i)),
    "max_pool": (A.max_pool2d_with_indices.default, lambda x: (x, [3, 3], [1, 1], [1, 1])),
    "avg_pool": (A.avg_pool2d.default, lambda x: (x, [3, 3], [1, 1], [1, 1])),
    "batch_norm": (A.native_batch_norm.default, lambda x, w, b: (x, w, b, None, None, True, 0.1, 1e-5)),
}
BOTH = [x for x in EXAMPLES if x.kind in CALLS]
# Kinds whose tables are equal, row by row; elsewhere ours has more rows, each of which is computed in test_rules_numeric.
EQUAL = {"mm", "bmm", "add", "sub", "mul", "div", "neg", "cast", "gelu", "where", "layer_norm", "layer_norm_backward"}
EQUAL |= {"cat", "split", "slice", "select", "pad", "cumsum", "topk", "max_pool", "avg_pool"}


def theirs(example: Example) -> set[Row]:
    """DTensor's rows of an operation on two devices, without those of averages and extremes."""
    try:
        from torch.distributed.tensor import DTensor, Partial, Replicate
        from torch.distributed.tensor._dtensor_spec import TensorMeta

        table = DTensor._op_dispatcher.sharding_propagator.op_single_dim_strategy_funcs
        operator, arrange = CALLS[example.kind]
        function = table[operator].func
    except (ImportError, AttributeError, KeyError) as error:
        pytest.skip(f"this torch keeps DTensor's table of {example.kind} elsewhere: {error!r}")

    def meta(value: Any) -> Any:
        if isinstance(value, list):
            return [meta(v) for v in value]
        return TensorMeta(value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value

    def split(placement: Any, made: bool) -> int | None:
        if isinstance(placement, Replicate):
            return REPLICATED
        if isinstance(placement, Partial):
            if (
                type(placement) is not Partial
            ):  # the mask of a table split by row: on the ids it says only that there is one
                return PARTIAL if made else REPLICATED
            return PARTIAL if placement.reduce_op == "sum" else None
        return placement.dim

    whole = example.whole()
    shapes = [t.shape for t in (*example.inputs, *whole)]
    found = set()
    for row in function(operator, tuple(meta(a) for a in arrange(*example.inputs)), {}):
        splits = [split(p, i < len(whole)) for i, p in enumerate(p for p in row if p is not None)]
        if None in splits or len(splits) != len(shapes):
            continue
        outputs, inputs = tuple(splits[: len(whole)]), tuple(splits[len(whole) :])
        if all(s < 0 or shape[s] % 2 == 0 for s, shape in zip((*inputs, *outputs), shapes, strict=True)):
            found.add((inputs, outputs))
    return found


@pytest.mark.parametrize("example", BOTH, ids=name)
def test_every_rule_of_dtensor_is_ours_too(example):
    graph = example.graph(example.whole())
    ours, other = set(rows(graph.ops[0], graph, 2, "full")), theirs(example)
    assert other, "an empty table compares nothing"
    assert other <= ours
    if example.kind in EQUAL:
        whole = ((REPLICATED,) * len(example.inputs), (REPLICATED,) * (len(graph.tensors) - len(example.inputs)))
        assert ours - other <= {whole}


@pytest.mark.parametrize("example", BOTH, ids=name)
def test_the_strict_space_has_nothing_that_dtensor_lacks(example):
    if example.kind == "batch_norm":
        pytest.skip("by example with summed statistics is ours alone, and said to be")
    graph = example.graph(example.whole())
    other = {(i, tuple(REPLICATED if s == PARTIAL else s for s in o)) for i, o in theirs(example)}
    extra = [row for row in rows(graph.ops[0], graph, 2, "strict") if row not in other]
    assert all({*i, *o} == {REPLICATED} for i, o in extra)
