"""From what a front end has read to a Graph.

Chains of views are shortened, dead operations and unread tensors left out, and the rest is numbered anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from datamodules.planning.graph import Graph, Op, Parameter, TensorInfo
from datamodules.planning.simplify import simplify


def assemble(
    name: str,
    tensors: Sequence[TensorInfo],
    ops: Sequence[Op],
    parameters: Sequence[Parameter],
    inputs: Sequence[int],
    outputs: Sequence[int],
    buffers: Sequence[int] = (),
    batch_dims: Sequence[tuple[int, int]] = (),
) -> Graph:
    """Return the graph of what the outputs depend on. Parameters and inputs stay even if nothing reads them; buffers do not.

    Raises:
        GraphError: what remains contradicts itself.
    """
    asked = [*outputs, *(p.gradient for p in parameters if p.gradient is not None)]
    shorter, found = simplify(tensors, ops, asked)
    moved = dict(zip(asked, found, strict=True))
    outputs = [moved[t] for t in outputs]
    parameters = [replace(p, gradient=None if p.gradient is None else moved[p.gradient]) for p in parameters]
    kept = live_ops(shorter, found)
    read = {t for op in kept for t in op.inputs} | set(outputs)
    held = [b for b in buffers if b in read]
    order = [*(p.tensor for p in parameters), *inputs, *held, *(t for op in kept for t in op.outputs)]
    rank = {tensor: i for i, tensor in enumerate(dict.fromkeys(order))}

    def new(numbers: Iterable[int]) -> tuple[int, ...]:
        return tuple(rank[t] for t in numbers)

    return Graph(
        name=name,
        tensors=tuple(tensors[t] for t in rank),
        ops=tuple(replace(op, inputs=new(op.inputs), outputs=new(op.outputs)) for op in kept),
        parameters=tuple(
            Parameter(p.name, rank[p.tensor], None if p.gradient is None else rank[p.gradient]) for p in parameters
        ),
        inputs=new(inputs),
        outputs=new(outputs),
        buffers=new(held),
        batch_dims=tuple((rank[t], dim) for t, dim in batch_dims),
    )


def live_ops(ops: Sequence[Op], wanted: Iterable[int]) -> list[Op]:
    """The operations that the wanted tensors depend on, in their order."""
    needed, kept = set(wanted), []
    for op in reversed(ops):
        if any(t in needed for t in op.outputs):
            kept.append(op)
            needed.update(op.inputs)
    return kept[::-1]
