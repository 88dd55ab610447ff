"""Deeper models without tracing them: the graph of a few equal blocks, with the second one written out as often as wanted.

A block's operations follow one another, and the next block's are the same ones at a fixed distance: behind it in the forward
pass, before it in the backward pass. What they read lies in the block, in one beside it, or before all blocks. Copy 0 of the
second block is the block itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from datamodules.planning.graph import Graph, Op, Parameter, TensorInfo

Copied = tuple[
    int, int
]  # an operation or a tensor of the small graph, and which copy of the second block it belongs to


def repeated(graph: Graph, blocks: int, prefix: str = "layers.") -> Graph:
    """Return the graph with `blocks` blocks.

    Args:
        graph: of 4 equal blocks, whose parameters and operations are of layers "layers.0" to "layers.3".
        blocks: 4 or more.
    Raises:
        ValueError: fewer blocks, or a graph that is not so.
    """
    if blocks < 4:
        raise ValueError(f"{graph.name}: 4 blocks are written out as 4 or more, not as {blocks}")
    return _Repeater(graph, blocks - 4, re.compile(re.escape(prefix) + r"(\d+)(?=\.|$)")).graph()


@dataclass
class _Repeater:
    """The small graph and how many copies of its second block it is given."""

    small: Graph
    copies: int
    block_name: re.Pattern[str]

    def __post_init__(self) -> None:
        self.numbers: dict[Copied, int] = {}  # tensors of the large graph
        self.tensors: list[TensorInfo] = []

    def block(self, name: str) -> int:
        """The block that a layer or parameter belongs to, -1 for none."""
        found = self.block_name.match(name)
        return int(found[1]) if found else -1

    @cached_property
    def windows(self) -> dict[str, tuple[int, int]]:
        """Where the second block's operations start and end, by phase."""
        found, ops = {}, self.small.ops
        for phase, step in (("forward", 1), ("backward", -1)):
            first: dict[int, int] = {}
            for i, op in enumerate(ops):
                if op.phase == phase:
                    first.setdefault(self.block(op.layer), i)
            if set(first) - {-1} != set(range(4)):
                raise ValueError(f"{self.small.name} has not 4 blocks that are named as such")
            before, start, end = first[1 - step], first[1], first[1 + step]
            kinds = [[op.kind for op in ops[a:b]] for a, b in ((before, start), (start, end))]
            if kinds[0] != kinds[1] or not kinds[0]:
                raise ValueError(f"{self.small.name}: the {phase} operations of its blocks are not the same")
            found[phase] = start, end
        return found

    def order(self) -> Iterator[Copied]:
        """The operations of the large graph."""
        (start, end), (back, last) = self.windows["forward"], self.windows["backward"]
        yield from ((i, 0) for i in range(end))
        yield from ((i, copy) for copy in range(1, self.copies + 1) for i in range(start, end))
        yield from ((i, 0) for i in range(end, back))
        yield from ((i, copy) for copy in range(self.copies, 0, -1) for i in range(back, last))
        yield from ((i, 0) for i in range(back, len(self.small.ops)))

    def read(self, tensor: int, reader: int, copy: int) -> Copied:
        """What a copy of an operation reads where the operation itself reads `tensor`."""
        maker, ops = self.small.producer(tensor), self.small.ops
        if maker is None:
            return tensor, copy if self.block(self.small.tensors[tensor].name) == 1 else 0
        (start, end), (back, last) = self.windows["forward"], self.windows["backward"]
        inside = start <= reader < end or back <= reader < last
        first, final = self.windows[ops[maker].phase]
        away = (maker - first) // (final - first)  # windows behind the second block's
        if abs(away) > 1 or (away and not inside) or not (inside or end <= reader < back):
            return tensor, 0
        wanted = copy + (away if ops[maker].phase == "forward" else -away) if inside else self.copies
        if not 0 <= wanted <= self.copies:
            return tensor, 0
        twin = ops[maker - away * (final - first)]
        return twin.outputs[ops[maker].outputs.index(tensor)], wanted

    def renamed(self, name: str, copy: int) -> str:
        """A layer's or parameter's name in the large graph."""
        block, found = self.block(name), self.block_name.match(name)
        if found is None or block == 0:
            return name
        moved = block + (copy if block == 1 else self.copies)
        return f"{name[: found.start(1)]}{moved}{name[found.end(1) :]}"

    def add(self, tensor: int, copy: int, name: str) -> int:
        """Number a tensor of the large graph."""
        self.numbers[tensor, copy] = len(self.tensors)
        self.tensors.append(replace(self.small.tensors[tensor], name=name))
        return len(self.tensors) - 1

    def op(self, i: int, copy: int, at: int) -> Op:
        """An operation of the large graph, the `at`-th."""
        op = self.small.ops[i]
        name = f"{op.kind}_{at}"
        inputs = tuple(self.numbers[self.read(t, i, copy)] for t in op.inputs)
        outputs = tuple(self.add(t, copy, f"{name}.{n}" if n else name) for n, t in enumerate(op.outputs))
        return replace(op, name=name, inputs=inputs, outputs=outputs, layer=self.renamed(op.layer, copy))

    def graph(self) -> Graph:
        """The large graph, tensors in the order of `assemble`."""
        small, back = self.small, self.windows["backward"][0]
        second = [p for p in small.parameters if self.block(p.name) == 1]
        place = small.parameters.index(second[-1]) + 1
        front, rest = small.parameters[:place], small.parameters[place:]
        copied = [(p, copy) for copy in range(1, self.copies + 1) for p in second]
        parameters = [*((p, 0) for p in front), *copied, *((p, 0) for p in rest)]
        for p, copy in parameters:
            self.add(p.tensor, copy, self.renamed(p.name, copy))
        for tensor in (*small.inputs, *small.buffers):
            self.add(tensor, 0, small.tensors[tensor].name)
        ops = tuple(self.op(i, copy, at) for at, (i, copy) in enumerate(self.order()))
        found = [
            Parameter(
                self.renamed(p.name, copy),
                self.numbers[p.tensor, copy],
                None if p.gradient is None else self.numbers[self.read(p.gradient, back if copy else 0, copy)],
            )
            for p, copy in parameters
        ]
        return Graph(
            name=f"{small.name}, {self.copies + 4} blocks",
            tensors=tuple(self.tensors),
            ops=ops,
            parameters=tuple(found),
            inputs=tuple(self.numbers[t, 0] for t in small.inputs),
            outputs=(
                self.numbers[small.outputs[0], 0],
                *dict.fromkeys(p.gradient for p in found if p.gradient is not None),
            ),
            buffers=tuple(self.numbers[t, 0] for t in small.buffers),
            batch_dims=tuple((self.numbers[t, 0], dim) for t, dim in small.batch_dims),
        )
