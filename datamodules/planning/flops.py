"""How much arithmetic and how much memory traffic an operation is, by its kind and shapes.

Legend: B batch, H heads, S queries, T keys, k head width.

A multiplication and an addition are two operations. Products are counted in full: causal attention is not halved. The
attention backward is counted as flash attention does it, five products against the forward's two (scores are made again).
Other kinds cost a fixed small number per element; they are bound by memory, so only the order of magnitude matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datamodules.planning.graph import Graph, Op
from datamodules.planning.vocabulary import CONSTANTS, REDUCTIONS, VIEWS

Shape = tuple[int, ...]
PER_INPUT = {
    **{"softmax": 5, "log_softmax": 5, "softmax_backward": 4, "log_softmax_backward": 4},
    **{"layer_norm": 7, "layer_norm_backward": 14, "rms_norm": 5, "rms_norm_backward": 10},
    **{"batch_norm": 7, "batch_norm_backward": 14, "group_norm": 7, "group_norm_backward": 14},
    **{"cumsum": 1, "max_pool_backward": 1, "avg_pool_backward": 1, "embedding_backward": 1},
    **{"gelu": 10, "gelu_backward": 15, "erf": 8, "exp": 4, "tanh": 8, "silu": 6, "silu_backward": 8},
}
NO_ARITHMETIC = (
    VIEWS
    | CONSTANTS
    | {"embedding", "cat", "stack", "pad", "clone", "cast", "gather", "index_select", "index", "slice_backward"}
    | {"select_backward", "fill", "roll", "flip", "repeat", "scatter", "unbind", "split", "tril", "triu"}
)


def flops_of(kind: str, inputs: Sequence[Shape], outputs: Sequence[Shape], attributes: Mapping[str, Any]) -> int:
    """Return the floating-point operations of one operation on whole, unsplit shapes."""
    if kind in NO_ARITHMETIC or not outputs:
        return 0
    out = math.prod(outputs[0])
    if kind in ("mm", "bmm"):
        return 2 * out * inputs[0][-1]
    if kind == "dot_general":
        return 2 * out * math.prod(inputs[0][dim] for dim in attributes["contract"][0])
    if kind == "grouped_mm":  # 2-D by 3-D: rows times matrices; 2-D by 2-D: the gradient of the matrices
        return 2 * math.prod(inputs[0]) * inputs[1][-1]
    if kind == "convolution":
        return convolution_flops(inputs[0], inputs[1], outputs[0], attributes)
    if kind == "convolution_backward":
        each = convolution_flops(inputs[1], inputs[2], inputs[0], attributes)
        bias = math.prod(inputs[0])
        return sum(cost for cost, asked in zip((each, each, bias), attributes["wanted"], strict=True) if asked)
    if kind in ("sdpa", "sdpa_backward"):
        return attention_flops(kind, inputs)
    if kind in ("max_pool", "avg_pool"):
        return out * math.prod(attributes.get("kernel", (1,)))
    if kind in PER_INPUT:
        return PER_INPUT[kind] * max(math.prod(shape) for shape in inputs)
    if kind in REDUCTIONS:
        return math.prod(inputs[0])
    return max(out, max((math.prod(shape) for shape in inputs), default=0)) if kind in ("topk", "sort") else out


def convolution_flops(x: Shape, weight: Shape, out: Shape, attributes: Mapping[str, Any]) -> int:
    """Twice the multiplications of a convolution: each output sums over input features of its group and the kernel.

    A transposed convolution is the gradient of one by its input, so that x and out change places.
    """
    positions = math.prod(x) if attributes.get("transposed") else math.prod(out)
    return 2 * positions * math.prod(weight[1:])


def attention_flops(kind: str, inputs: Sequence[Shape]) -> int:
    """Two products of 2 B H S T k each forward, five backward."""
    query, key, value = inputs[:3] if kind == "sdpa" else inputs[1:4]
    rows = math.prod(query[:-1]) * key[-2]
    scores, values = 2 * rows * query[-1], 2 * rows * value[-1]
    return scores + values if kind == "sdpa" else 3 * scores + 2 * values


def bytes_moved(op: Op, graph: Graph) -> int:
    """Bytes that an unsplit operation reads and writes: each operand once; views none; a lookup only the rows it takes."""
    if op.kind in VIEWS:
        return 0
    written = sum(graph.tensors[t].bytes for t in op.outputs)
    if op.kind in ("embedding", "index_select", "gather", "index"):
        return 2 * written + sum(graph.tensors[t].bytes for t in op.inputs[1:])
    return written + sum(graph.tensors[t].bytes for t in dict.fromkeys(op.inputs))
