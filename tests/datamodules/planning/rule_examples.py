"""Small operations of every rule family, computed whole and in parts; what the numerical tests of the rules share.

An example computes an operation for all ranks at once from their parts. Ranks see nothing of each other but sums and maxima
of statistics, which stand for the collectives that a row declares as inner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from datamodules.planning.graph import Graph, Op, TensorInfo
from datamodules.planning.rules import PARTIAL, REPLICATED, Row

A = torch.ops.aten
Parts = list[list[Tensor]]  # [rank][operand]


@dataclass(frozen=True)
class Context:
    """What a rank may know: the row, the number of ranks, the whole operation's shapes."""

    row: Row
    devices: int
    shapes: tuple[tuple[int, ...], ...]
    attributes: dict[str, Any]

    def local(self, output: int = 0) -> tuple[int, ...]:
        """Shape of this rank's part of an output."""
        shape, split = list(self.shapes[output]), self.row[1][output]
        if split >= 0:
            shape[split] //= self.devices
        return tuple(shape)


@dataclass(frozen=True)
class Example:
    """One operation with operands and a way to compute it in parts."""

    kind: str
    inputs: Sequence[Tensor]
    each: Callable[..., Any] | None = None  # (inputs of one rank..., context, rank) -> outputs
    together: Callable[[Parts, Context], Parts] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    plain: bool = True  # whether `each` is the operation itself, so that rows can be found by trying

    def run(self, parts: Parts, context: Context) -> Parts:
        """Return the outputs of every rank."""
        if self.together is not None:
            return self.together(parts, context)
        assert self.each is not None
        return [_list(self.each(*inputs, context, rank)) for rank, inputs in enumerate(parts)]

    def whole(self) -> list[Tensor]:
        """Return the outputs of the unsplit operation."""
        row = ((REPLICATED,) * len(self.inputs), (REPLICATED,) * 4)
        return self.run([list(self.inputs)], Context(row, 1, (), self.attributes))[0]

    def graph(self, outputs: Sequence[Tensor]) -> Graph:
        """Return a graph of this operation alone."""
        tensors = [
            TensorInfo(f"t{i}", tuple(t.shape), str(t.dtype).split(".")[1])
            for i, t in enumerate([*self.inputs, *outputs])
        ]
        first, last = tuple(range(len(self.inputs))), tuple(range(len(self.inputs), len(tensors)))
        return Graph("one", tuple(tensors), (Op(self.kind, self.kind, first, last, self.attributes),), (), first, last)


def name(example: Example) -> str:
    """Return what the test of an example is called."""
    return f"{example.kind}-{example.label}" if example.label else example.kind


def _list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple | list) else [value]


def place(x: Tensor, split: int, devices: int, generator: torch.Generator) -> list[Tensor]:
    """Return what each rank holds of a tensor; partial sums are random summands."""
    if split == REPLICATED:
        return [x] * devices
    if split == PARTIAL:
        parts = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(devices - 1)]
        return [*parts, x - sum(parts)]
    return [part.contiguous() for part in x.chunk(devices, split)]  # some kernels read statistics as if they were


def agrees(whole: Tensor, parts: list[Tensor], split: int, extreme: bool = False) -> bool:
    """Return whether the ranks' parts make up the whole under a placement."""
    if split == REPLICATED:
        return all(p.shape == whole.shape and torch.allclose(p, whole, atol=1e-9) for p in parts)
    if split == PARTIAL:
        if not all(p.shape == whole.shape for p in parts):
            return False
        stacked = torch.stack(list(parts))
        joined = stacked.amax(0) if extreme else stacked.sum(0)
    else:
        joined = torch.cat(list(parts), split)
    return joined.shape == whole.shape and torch.allclose(joined, whole, atol=1e-9)


# Operations that are not simply themselves on parts.


def view_part(x: Tensor, c: Context, rank: int) -> Tensor:
    """A view to the local shape."""
    return x.reshape(c.attributes["to"] if c.devices == 1 else c.local())


def expand_part(x: Tensor, c: Context, rank: int) -> Tensor:
    """An expansion to the local shape."""
    return x.expand(c.attributes["to"] if c.devices == 1 else c.local())


def constant_part(c: Context, rank: int) -> Tensor:
    """A rank's part of 0, 1, 2, ..."""
    whole = torch.arange(8.0, dtype=torch.float64).view(4, 2)
    return whole if c.devices == 1 or c.row[1][0] < 0 else whole.chunk(c.devices, c.row[1][0])[rank]


def mean_part(x: Tensor, c: Context, rank: int) -> Tensor:
    """A mean by the number of elements of the whole operand."""
    dims = c.attributes["dims"]
    whole = math.prod(c.attributes["shape"][d] for d in dims)
    return x.sum(dims) / whole


def owned(index: Tensor, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return indices relative to a rank's part of `size`, and which of them are in it."""
    local = index - rank * size
    mine = (local >= 0) & (local < size)
    return torch.where(mine, local, 0), mine


def embedding_part(table: Tensor, ids: Tensor, c: Context, rank: int) -> Tensor:
    """Rows of a table that may be split by row: zeros for foreign ids."""
    if c.row[0][0] != 0:
        return A.embedding(table, ids)
    local, mine = owned(ids, table.shape[0], rank)
    return A.embedding(table, local) * mine[..., None]


def embedding_backward_part(grad: Tensor, ids: Tensor, c: Context, rank: int) -> Tensor:
    """Gradient of a rank's rows of the table."""
    rows = c.attributes["rows"]
    if c.row[1][0] != 0:
        return A.embedding_dense_backward(grad, ids, rows, -1, False)
    local, mine = owned(ids, rows // c.devices, rank)
    return A.embedding_dense_backward(grad * mine[..., None], local, rows // c.devices, -1, False)


def gather_part(x: Tensor, index: Tensor, c: Context, rank: int) -> Tensor:
    """A gather from a part: zeros for foreign indices."""
    dim = c.attributes["dim"]
    if c.row[0][0] != dim:
        return x.gather(dim, index)
    local, mine = owned(index, x.shape[dim], rank)
    return x.gather(dim, local) * mine


def scatter_part(x: Tensor, index: Tensor, source: Tensor, c: Context, rank: int) -> Tensor:
    """A sum into a part: foreign indices add nothing; beside split additions each rank adds its share of x."""
    dim = c.attributes["dim"]
    if c.row[0][0] != dim:
        return _share(x, c).scatter_add(dim, index, source)
    local, mine = owned(index, x.shape[dim], rank)
    return x.scatter_add(dim, local, source * mine)


def _share(x: Tensor, c: Context) -> Tensor:
    return x / c.devices if c.row[0][0] == REPLICATED and c.row[1][0] == PARTIAL else x


def put_part(x: Tensor, index: Tensor, source: Tensor, c: Context, rank: int) -> Tensor:
    """Elements put into a part: foreign ones into a field that is cut off again."""
    dim = c.attributes["dim"]
    if c.row[0][0] != dim:
        return x.scatter(dim, index, source)
    local, mine = owned(index, x.shape[dim], rank)
    wide = torch.cat([x, x[:, :1]], dim)
    return wide.scatter(dim, torch.where(mine, local, x.shape[dim]), source)[:, :-1]


def index_select_part(x: Tensor, index: Tensor, c: Context, rank: int) -> Tensor:
    """Chosen rows of a part: zeros for foreign ones."""
    if c.row[0][0] != c.attributes["dim"]:
        return x.index_select(c.attributes["dim"], index)
    local, mine = owned(index, x.shape[c.attributes["dim"]], rank)
    return x.index_select(c.attributes["dim"], local) * mine.view(
        [-1 if d == c.attributes["dim"] else 1 for d in range(x.ndim)]
    )


def index_add_part(x: Tensor, index: Tensor, source: Tensor, c: Context, rank: int) -> Tensor:
    """The mirror of `index_select_part`."""
    dim = c.attributes["dim"]
    if c.row[0][0] != dim:
        return _share(x, c).index_add(dim, index, source)
    local, mine = owned(index, x.shape[dim], rank)
    return x.index_add(dim, local, source * mine.view([-1 if d == dim else 1 for d in range(x.ndim)]))


def convolution_part(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    """A convolution with this rank's groups; beside split input channels each rank adds its share of the bias."""
    *bias, c, _ = rest
    split = c.row[1][0] == PARTIAL
    groups = c.attributes["groups"]
    if groups > 1 and c.row[0][0] == 1:
        groups //= c.devices
    b = (bias[0] / c.devices if split else bias[0]) if bias else None
    return A.convolution(x, w, b, *settings(c, groups))


def settings(c: Context, groups: int) -> tuple:
    """The arguments of torch's convolution after the bias."""
    transposed = bool(c.attributes.get("transposed"))
    return [1, 1], [1, 1], [1, 1], transposed, [0, 0], groups


def convolution_backward_part(grad: Tensor, x: Tensor, w: Tensor, c: Context, rank: int) -> list[Tensor]:
    """Gradients of a convolution with this rank's groups."""
    groups = c.attributes["groups"]
    if groups > 1 and c.row[0][2] == 0:
        groups //= c.devices
    count = w.shape[1] * groups if c.attributes.get("transposed") else w.shape[0]
    return list(A.convolution_backward(grad, x, w, [count], *settings(c, groups), [True] * 3))


def grouped_part(x: Tensor, w: Tensor, ends: Tensor, c: Context, rank: int) -> Tensor:
    """Rows times the matrix of their group; rows of groups that this rank lacks are zero."""
    first = rank * w.shape[0] if c.row[0][1] == 0 else 0
    out = x.new_zeros(x.shape[0], w.shape[2])
    starts = [0, *ends.tolist()]
    for g in range(w.shape[0]):
        a, b = starts[first + g], starts[first + g + 1]
        out[a:b] = x[a:b] @ w[g]
    return out


def softmax_together(parts: Parts, c: Context) -> Parts:
    """Softmax with the maximum and the sum over all ranks where its dim is split."""
    dim, split = c.attributes["dim"], c.row[0][0] == c.attributes["dim"]
    highest = [x.amax(dim, True) for (x,) in parts]
    if split:
        highest = [torch.stack(highest).amax(0)] * len(parts)
    sums = [(x - h).exp().sum(dim, True) for (x,), h in zip(parts, highest, strict=True)]
    if split:
        sums = [torch.stack(sums).sum(0)] * len(parts)
    return [[(x - h).exp() / s] for (x,), h, s in zip(parts, highest, sums, strict=True)]


def log_softmax_together(parts: Parts, c: Context) -> Parts:
    """The logarithm of `softmax_together`."""
    return [[y.log()] for (y,) in softmax_together(parts, c)]


def softmax_backward_together(parts: Parts, c: Context) -> Parts:
    """dx = y (g - sum of g y over the row)."""
    sums = [(g * y).sum(c.attributes["dim"], True) for g, y in parts]
    if c.row[0][0] == c.attributes["dim"]:
        sums = [torch.stack(sums).sum(0)] * len(parts)
    return [[y * (g - s)] for (g, y), s in zip(parts, sums, strict=True)]


def log_softmax_backward_together(parts: Parts, c: Context) -> Parts:
    """dx = g - exp(y) times the sum of g over the row."""
    sums = [g.sum(c.attributes["dim"], True) for g, _ in parts]
    if c.row[0][0] == c.attributes["dim"]:
        sums = [torch.stack(sums).sum(0)] * len(parts)
    return [[g - y.exp() * s] for (g, y), s in zip(parts, sums, strict=True)]


def nll_together(parts: Parts, c: Context) -> Parts:
    """The mean loss by the number of examples of the whole batch; foreign classes give zeros."""
    out = []
    shared = c.row[0][0] == 0
    total = sum(len(t) for _, t in parts) if shared else len(parts[0][1])
    for rank, (logprob, target) in enumerate(parts):
        local, mine = (
            owned(target, logprob.shape[1], rank) if c.row[0][0] == 1 else (target, torch.ones_like(target, dtype=bool))
        )
        loss = -(logprob.gather(1, local[:, None])[:, 0] * mine).sum() / total
        out.append([loss, torch.tensor(float(len(target)), dtype=torch.float64)])
    return out


def _targets(target: Tensor, logprob: Tensor, rank: int, split: int) -> tuple[Tensor, Tensor]:
    if split == 1:
        return owned(target, logprob.shape[1], rank)
    return target, torch.ones_like(target, dtype=torch.bool)


def nll_backward_part(grad: Tensor, logprob: Tensor, target: Tensor, total: Tensor, c: Context, rank: int) -> Tensor:
    """Minus the gradient over the total at the targets that are this rank's."""
    local, mine = (
        owned(target, logprob.shape[1], rank) if c.row[0][1] == 1 else (target, torch.ones_like(target, dtype=bool))
    )
    return torch.zeros_like(logprob).scatter(1, local[:, None], (-grad / total * mine)[:, None])


def batch_norm_together(parts: Parts, c: Context) -> Parts:
    """Batch norm whose statistics are those of all ranks where the batch is split."""
    means = [x.mean((0, 2, 3)) for x, *_ in parts]
    squares = [(x * x).mean((0, 2, 3)) for x, *_ in parts]
    if c.row[0][0] == 0:
        means = [torch.stack(means).mean(0)] * len(parts)
        squares = [torch.stack(squares).mean(0)] * len(parts)
    out = []
    for (x, w, b), m, s in zip(parts, means, squares, strict=True):
        inv = (s - m * m + 1e-5).rsqrt()
        out.append([(x - _c(m)) * _c(inv) * _c(w) + _c(b), m, inv])
    return out


def batch_norm_backward_together(parts: Parts, c: Context) -> Parts:
    """The gradient with both sums over all ranks where the batch is split."""
    hats = [(x - _c(m)) * _c(inv) for _, x, _, m, inv in parts]
    db = [g.sum((0, 2, 3)) for g, *_ in parts]
    dw = [(g * h).sum((0, 2, 3)) for (g, *_), h in zip(parts, hats, strict=True)]
    split = c.row[0][0] == 0
    count = parts[0][0].numel() // parts[0][0].shape[1] * (len(parts) if split else 1)
    all_b, all_w = ([torch.stack(s).sum(0)] * len(parts) if split else s for s in (db, dw))
    return [
        [_c(w * inv) * (g - _c(b) / count - h * _c(v) / count), dw[i], db[i]]
        for i, ((g, _, w, _, inv), h, b, v) in enumerate(zip(parts, hats, all_b, all_w, strict=True))
    ]


def _c(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def rms_norm(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x over its root mean square, times w; and one over that root."""
    rstd = (x.square().mean(-1, True) + 1e-5).rsqrt()
    return x * rstd * w, rstd


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and w."""
    hat, scaled = x * rstd, grad * w
    dx = rstd * (scaled - hat * (scaled * hat).mean(-1, True))
    return dx, (grad * hat).flatten(0, -2).sum(0)
