"""Where every tensor of a stage lies, from what a plan decides: the batch, the variables, and what follows from them.

A placement is a dim (split over the columns of the stage's mesh), REPLICATED or PARTIAL (the sum over columns is the value).
Placements never depend on what the machine can do, so that a faster link can only make a plan faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from datamodules.planning.graph import Graph, Op, TensorInfo
from datamodules.planning.plan import PlanError, batch_dims
from datamodules.planning.rules import (
    PARTIAL,
    REPLICATED,
    MissingRuleWarning,
    Placed,
    Row,
    RuleTable,
    placed_rows,
)

RowsOf = Callable[[Op, Graph, int], Sequence[Placed]]
Spread = tuple[tuple[int, int], ...]


def full_rows(op: Op, graph: Graph, devices: int) -> Sequence[Placed]:
    """The rules of an operation with partial sums as placements; one without rules is replicated, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingRuleWarning)
        return placed_rows(op, graph, devices, "full")


def signature_of(op: Op, graph: Graph) -> tuple:
    """What the rules and the cost of an operation depend on: equal for the same operation of repeated blocks."""
    return (*RuleTable.signature(op, graph), op.flops)


def cached(rows_of: RowsOf) -> RowsOf:
    """The same rules, computed once for equal operations."""
    known: dict[tuple, Sequence[Placed]] = {}

    def lookup(op: Op, graph: Graph, devices: int) -> Sequence[Placed]:
        key = (devices, *signature_of(op, graph))
        if key not in known:
            known[key] = rows_of(op, graph, devices)
        return known[key]

    return lookup


def moved(before: int, after: int, size: float, devices: int) -> float:
    """Bytes that each device sends, ring-wise, to bring a tensor of `size` bytes from one placement to another."""
    if before in (after, REPLICATED):
        return 0.0
    part = (devices - 1) / devices * size
    if before == PARTIAL:
        return 2 * part if after == REPLICATED else part
    return part if after < 0 else part / devices


def deduce(graph: Graph, devices: int, given: Mapping[int, int], rows_of: RowsOf = full_rows) -> list[int]:
    """A placement for every tensor, forwards: each operation takes its inputs as they are where a rule allows it.

    Args:
        given: placements of variables, inputs and buffers; those left out are replicated.
    Returns:
        One placement a tensor. Where no rule fits, the rule is taken that moves the fewest bytes; among equals the one that
        leaves most operands as they are.
    """
    found = [REPLICATED] * len(graph.tensors)
    for tensor, split in given.items():
        found[tensor] = split
    if all(split == REPLICATED for split in given.values()):
        return found
    rows_of, free = cached(rows_of), set[int]()
    for op in graph.ops:
        have = tuple(found[t] for t in op.inputs)
        if all(split == REPLICATED for split in have):
            if not op.inputs or free.intersection(op.inputs):
                free.update(op.outputs)
            continue
        best = min(rows_of(op, graph, devices), key=lambda placed: _effort(graph, op, have, placed, devices, free))
        for tensor, split in zip(op.outputs, best.row[1], strict=True):
            found[tensor] = split
        for tensor, split in zip(op.inputs, best.row[0], strict=True):
            if tensor in free and split >= 0:
                _bind(graph, devices, tensor, split, found, free, rows_of)
    return found


def _bind(
    graph: Graph, devices: int, tensor: int, split: int, found: list[int], free: set[int], rows_of: RowsOf
) -> None:
    """Place what depends on constants, and on nothing that is split, as its first reader wants it (a gradient of ones)."""
    free.discard(tensor)
    found[tensor] = split
    maker = graph.producer(tensor)
    op = graph.ops[maker] if maker is not None else None
    if op is None or not op.inputs:
        return
    for placed in rows_of(op, graph, devices):
        wanted = dict(zip(op.inputs, placed.row[0], strict=True))
        if placed.row[1][op.outputs.index(tensor)] == split and all(
            t in free or found[t] == s for t, s in wanted.items()
        ):
            for other, place in wanted.items():
                if other in free and place >= 0:
                    _bind(graph, devices, other, place, found, free, rows_of)
            return


def _effort(
    graph: Graph, op: Op, have: Sequence[int], placed: Placed, devices: int, free: set[int]
) -> tuple[float, int, int]:
    """Bytes that each device sends, operands that change, and (negative) results that are split; constants cost nothing."""
    row: Row = placed.row
    volume, changed = moved(PARTIAL, REPLICATED, placed.inner, devices), 0
    volume += sum(moved(PARTIAL, REPLICATED, graph.tensors[op.outputs[i]].bytes, devices) for i in placed.reduced)
    for tensor, before, after in zip(op.inputs, have, row[0], strict=True):
        if tensor not in free or after == PARTIAL:
            volume += moved(before, after, graph.tensors[tensor].bytes, devices)
            changed += before != after
    return volume, changed, -sum(split >= 0 for split in row[1])


def batch_places(graph: Graph, rows_of: RowsOf = full_rows) -> dict[int, int]:
    """Tensor -> dim along which it grows with the batch; tensors that do not grow are left out.

    Found by splitting the inputs' batch dims in the smallest way and deducing.
    """
    dims = {t: d for t, d in batch_dims(graph).items() if graph.tensors[t].shape[d] > 1}
    sizes = {graph.tensors[t].shape[d] for t, d in dims.items()}
    if not dims:
        return {}
    ways = next((n for n in range(2, min(sizes) + 1) if all(size % n == 0 for size in sizes)), 0)
    if not ways:
        raise PlanError(f"{graph.name}: batch sizes {sorted(sizes)} have no common factor, so the batch cannot be cut")
    return {t: split for t, split in enumerate(deduce(graph, ways, dims, rows_of)) if split >= 0}


def shrink(graph: Graph, ways: int, rows_of: RowsOf = full_rows) -> Graph:
    """The step on 1/ways of the batch: smaller activations, fewer operations, the same variables.

    Raises:
        PlanError: `ways` does not divide the batch.
    """
    if ways == 1:
        return graph
    for tensor, dim in batch_dims(graph).items():
        if graph.tensors[tensor].shape[dim] % ways:
            info = graph.tensors[tensor]
            raise PlanError(
                f"{graph.name}: the batch, dim {dim} of input {info.name} {list(info.shape)}, cannot be cut into {ways} equal "
                f"parts; take a batch that {ways} divides, or fewer devices or micro-batches"
            )
    places = batch_places(graph, rows_of)
    tensors = list(graph.tensors)
    for tensor, dim in places.items():
        info = tensors[tensor]
        if info.shape[dim] % ways == 0:
            shape = (*info.shape[:dim], info.shape[dim] // ways, *info.shape[dim + 1 :])
            tensors[tensor] = TensorInfo(info.name, shape, info.dtype)
    ops = tuple(
        replace(op, flops=op.flops // ways) if op.flops and any(t in places for t in (*op.inputs, *op.outputs)) else op
        for op in graph.ops
    )
    return replace(graph, name=f"{graph.name} / {ways}", tensors=tuple(tensors), ops=ops)


def spread(graph: Graph, devices: int, tensor: int, split: int) -> Spread:
    """What else is split once a variable is: (tensor, dim) pairs by the paper's propagation, the variable itself first.

    Tensors that propagation replicates are left out: they stay as the batch has them. Where the decision contradicts itself
    the variable alone is split, with its gradient.
    """
    from datamodules.planning.waves import waves_of

    return waves_of(graph, devices).spread(tensor, split)


def settle(
    graph: Graph,
    devices: int,
    splits: Mapping[int, int],
    placements: Mapping[int, int] | None = None,
    rows_of: RowsOf = full_rows,
    spread_of: Callable[[Graph, int, int, int], Spread] = spread,
) -> list[int]:
    """A placement for every tensor of a stage with `devices` columns.

    First the batch: inputs as `splits` has them and what follows. Over it the split variables with all that they take along,
    earlier variables first. Over that `placements`.

    Raises:
        PlanError: a split of a tensor that is neither variable nor input, of a dim it lacks or that `devices` does not divide.
    """
    variables = [p.tensor for p in graph.parameters]
    for tensor, split in {**splits, **(placements or {})}.items():
        _check(graph, devices, tensor, split, tensor in splits, {*variables, *graph.inputs})
    if devices == 1:
        return [REPLICATED] * len(graph.tensors)
    complete = placements is not None and len(placements) == len(graph.tensors)
    if complete:
        assert placements is not None
        return [placements[t] for t in range(len(graph.tensors))]
    inputs = {t: s for t, s in splits.items() if t in set(graph.inputs)}
    found, taken = deduce(graph, devices, inputs, rows_of), set()
    for variable in variables:
        if splits.get(variable, REPLICATED) >= 0:
            for tensor, split in spread_of(graph, devices, variable, splits[variable]):
                if tensor not in taken:
                    found[tensor] = split
                    taken.add(tensor)
    for tensor, split in (placements or {}).items():
        found[tensor] = split
    return found


def _check(graph: Graph, devices: int, tensor: int, split: int, seed: bool, seeds: set[int]) -> None:
    if not 0 <= tensor < len(graph.tensors):
        raise PlanError(f"the plan places tensor {tensor}; {graph.name} has {len(graph.tensors)}")
    info = graph.tensors[tensor]
    if seed and tensor not in seeds:
        raise PlanError(f"the plan splits {info.name}, which is neither variable nor input of {graph.name}")
    if split < PARTIAL or (seed and split == PARTIAL) or split >= len(info.shape):
        raise PlanError(f"{info.name} {list(info.shape)} cannot be placed as {split}")
    if split >= 0 and info.shape[split] % devices:
        raise PlanError(
            f"dim {split} of {info.name} {list(info.shape)} cannot be split over {devices} devices: {devices} does not divide "
            f"{info.shape[split]}; replicate it (-1) or take a number of devices that does"
        )
