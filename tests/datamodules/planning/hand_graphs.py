"""Graphs small enough to price by hand."""

from __future__ import annotations

import itertools

from datamodules.planning.graph import Graph, Op, Parameter, TensorInfo


class Writer:
    """Collects tensors and operations."""

    def __init__(self) -> None:
        self.tensors: list[TensorInfo] = []
        self.ops: list[Op] = []

    def tensor(self, name: str, *shape: int, dtype: str = "float32") -> int:
        self.tensors.append(TensorInfo(name, shape, dtype))
        return len(self.tensors) - 1

    def op(self, kind: str, inputs: tuple[int, ...], name: str, *shape: int, flops: int = 0, **more) -> int:
        out = self.tensor(name, *shape)
        layer, phase = more.pop("layer", ""), more.pop("phase", "forward")
        self.ops.append(Op(f"{kind}_{len(self.ops)}", kind, inputs, (out,), more, flops, phase, layer))
        return out

    def mm(self, a: int, b: int, name: str, **more) -> int:
        (rows, inner), (_, columns) = self.tensors[a].shape, self.tensors[b].shape
        return self.op("mm", (a, b), name, rows, columns, flops=2 * rows * inner * columns, **more)

    def transpose(self, a: int, name: str, **more) -> int:
        return self.op("permute", (a,), name, *self.tensors[a].shape[::-1], dims=[1, 0], **more)


def perceptron(batch: int = 16, widths: tuple[int, ...] = (8, 32, 8)) -> Graph:
    """Linear layers with relu between, summed to a loss; weights are [in, out], gradients by hand."""
    w = Writer()
    weights = [w.tensor(f"w{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))]
    x = w.tensor("x", batch, widths[0])
    given, values, current = x, [x], x
    for i, weight in enumerate(weights):
        current = w.mm(current, weight, f"z{i}", layer=f"layer{i}")
        if i < len(weights) - 1:
            current = w.op("relu", (current,), f"a{i}", batch, widths[i + 1], layer=f"layer{i}")
            values.append(current)
    loss = w.op("sum", (current,), "loss", dims=[0, 1], keepdim=False)
    gradient = w.op("full", (), "ones", batch, widths[-1], phase="backward")
    gradients: list[int] = [0] * len(weights)
    for i in reversed(range(len(weights))):
        back = {"phase": "backward", "layer": f"layer{i}"}
        gradients[i] = w.mm(w.transpose(values[i], f"xT{i}", **back), gradient, f"dw{i}", **back)
        if i:
            gradient = w.mm(gradient, w.transpose(weights[i], f"wT{i}", **back), f"da{i}", **back)
            mask = w.op("gt", (values[i],), f"mask{i}", batch, widths[i], phase="backward", scalars=[0])
            gradient = w.op("mul", (gradient, mask), f"dz{i}", batch, widths[i], **back)
    return Graph(
        name=f"perceptron {widths}",
        tensors=tuple(w.tensors),
        ops=tuple(w.ops),
        parameters=tuple(Parameter(f"w{i}", t, g) for i, (t, g) in enumerate(zip(weights, gradients, strict=True))),
        inputs=(given,),
        outputs=(loss, *gradients),
        batch_dims=((given, 0),),
    )


def named(graph: Graph, name: str) -> int:
    """Number of the tensor of that name."""
    return next(i for i, tensor in enumerate(graph.tensors) if tensor.name == name)
