"""What computing costs: the larger of arithmetic and memory traffic, plus the start of an operation.

Operations count as they stand in the graph, each reading its operands and writing its results: nothing is fused. Views are
free. Where a machine says so, products cost traffic as well as arithmetic. Units: operations, bytes, seconds.
"""

from __future__ import annotations

from datamodules.planning.graph import Graph, Op
from datamodules.planning.rules import Row
from datamodules.planning.topology import Topology
from datamodules.planning.vocabulary import CONSTANTS, VIEWS

PRODUCTS = frozenset({"mm", "bmm"})
ADAM_PASSES = 7  # reads variable, gradient and two moments, writes variable and moments


def seconds(flops: float, moved_bytes: float, dtype: str, topology: Topology) -> float:
    """Roofline time of one operation; ValueError for negative work."""
    if flops < 0 or moved_bytes < 0:
        raise ValueError(f"an operation of {flops} operations and {moved_bytes} bytes")
    return topology.launch_s + max(flops / topology.rate(dtype), moved_bytes / topology.memory_rate)


def op_seconds(op: Op, graph: Graph, row: Row, devices: int, topology: Topology) -> float:
    """Time of an operation whose operands lie as `row` says over `devices`.

    A split operand is held in part; arithmetic is shared where anything is split. Partial sums are whole on every device.
    """
    if op.kind in VIEWS:
        return 0.0
    operands = (*op.inputs, *op.outputs)
    splits = (*row[0], *row[1])
    if op.kind in CONSTANTS:
        operands, splits = op.outputs, row[1]
    moved = 0.0
    for tensor, split in zip(operands, splits, strict=True):
        moved += graph.tensors[tensor].bytes / (devices if split >= 0 else 1)
    shared = devices if any(split >= 0 for split in splits) else 1
    dtype = dtype_of(op, graph)
    if topology.product_bytes_per_s is not None and op.kind in PRODUCTS:
        return seconds(op.flops / shared, 0.0, dtype, topology) + moved / topology.product_bytes_per_s
    return seconds(op.flops / shared, moved, dtype, topology)


def dtype_of(op: Op, graph: Graph) -> str:
    """The dtype that an operation computes in: its first floating operand's."""
    for tensor in (*op.inputs, *op.outputs):
        if "float" in graph.tensors[tensor].dtype:
            return graph.tensors[tensor].dtype
    return "float32"


def update_seconds(variable_bytes: float, topology: Topology) -> float:
    """Time of Adam's step on variables of that many bytes: memory traffic alone."""
    return ADAM_PASSES * variable_bytes / topology.memory_rate
