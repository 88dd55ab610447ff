"""XLA's instructions as operations of the graph: the same kinds that PyTorch models become.

Convolutions are turned to torch's layout (batch, features, space) by permutes, which cost nothing. Products of matrices
become mm and bmm, others stay dot_general. A gather of whole rows is an embedding, a scatter that adds rows its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datamodules.planning.flops import flops_of
from datamodules.planning.graph import Op, TensorInfo
from datamodules.planning.hlo_module import HloError, Instruction, Type

RENAMED = {
    **{
        "subtract": "sub",
        "multiply": "mul",
        "divide": "div",
        "negate": "neg",
        "exponential": "exp",
        "logistic": "sigmoid",
    },
    **{"exponential_minus_one": "expm1", "log_plus_one": "log1p", "cosine": "cos", "sine": "sin", "convert": "cast"},
    **{"select": "where", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "not": "bitwise_not"},
    **{"clamp": "clamp_tensor", "copy": "clone", "is_finite": "isfinite", "reshape": "view", "concatenate": "cat"},
    **{"shift_left": "bitwise_left_shift", "shift_right_logical": "bitwise_right_shift", "bitcast_convert": "bitcast"},
    **{
        "shift_right_arithmetic": "bitwise_right_shift",
        "rng": "random",
        "rng_bit_generator": "random",
        "round_nearest_even": "round",
    },
    **{
        "round_nearest_afz": "round",
        "tan": "tan",
        "square": "square",
        "bitcast": "view",
        "sort": "sort",
        "top_k": "topk",
    },
}
REDUCED = {"add": "sum", "maximum": "amax", "minimum": "amin", "multiply": "prod", "or": "any", "and": "all"}
PASSED = frozenset({"optimization_barrier", "opt_barrier", "tuple", "get_tuple_element"})
PASSED_TARGETS = frozenset({"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"})
REFUSED = {
    "while": "a loop: its trip count is not in the shapes; unroll it (jax.lax.scan(..., unroll=True))",
    **dict.fromkeys(("conditional", "case", "if"), "a branch: which one is taken is not in the shapes; use select"),
    **dict.fromkeys(
        ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute", "partition_id"),
        "communication: this program is already partitioned; print it before partitioning",
    ),
}


class Writer:
    """Tensors and operations as they are written; `emit` gives the number of the (first) result."""

    def __init__(self) -> None:
        self.tensors: list[TensorInfo] = []
        self.ops: list[Op] = []

    def tensor(self, name: str, kind: Type) -> int:
        """Number of a new tensor."""
        self.tensors.append(TensorInfo(name, kind.shape, kind.dtype))
        return len(self.tensors) - 1

    def emit(self, kind: str, inputs: Sequence[int], types: Sequence[Type], note: str, **attributes: Any) -> list[int]:
        """Write one operation; returns the numbers of its results."""
        name = f"{kind}_{len(self.ops)}"
        made = [self.tensor(name if i == 0 else f"{name}.{i}", t) for i, t in enumerate(types)]
        read = [self.tensors[t].shape for t in inputs]
        flops = flops_of(kind, read, [t.shape for t in types], attributes)
        phase = "backward" if "transpose(" in note else "forward"
        self.ops.append(Op(name, kind, tuple(inputs), tuple(made), attributes, flops, phase, layer_of(note)))
        return made

    def permute(self, x: int, dims: Sequence[int], note: str) -> int:
        """Transpose, unless nothing moves."""
        info = self.tensors[x]
        if list(dims) == list(range(len(info.shape))):
            return x
        kind = Type(tuple(info.shape[d] for d in dims), info.dtype)
        return self.emit("permute", [x], [kind], note, dims=list(dims))[0]


def layer_of(note: str) -> str:
    """The module path in JAX's name stack: "jit(step)/transpose(jvp(Net))/dense_0/dot_general" is of Net.dense_0."""
    parts = []
    for part in note.split("/")[:-1]:
        inner = part
        while inner.endswith(")") and "(" in inner:
            head, _, rest = inner.partition("(")
            inner = rest[:-1] if head not in ("jit", "pjit") else ""
        if inner:
            parts.append(inner)
    return ".".join(parts)


def refuse(instruction: Instruction) -> None:
    """Refuse what no static graph holds.

    Raises:
        HloError: loops, branches, communication.
    """
    if (why := REFUSED.get(instruction.opcode)) is not None:
        raise HloError(f"{instruction.results[0]} = {instruction.opcode} is {why}")


def write(writer: Writer, instruction: Instruction, inputs: Sequence[int]) -> list[int]:
    """Write what an instruction does; returns the numbers of its results."""
    opcode, note = instruction.opcode, instruction.note
    if opcode in PASSED or instruction.attributes.get("target") in PASSED_TARGETS:
        at = instruction.attributes.get("index")
        return [inputs[at]] if at is not None else list(inputs)
    if (special := SPECIAL.get(opcode)) is not None:
        return special(writer, instruction, inputs)
    kind = RENAMED.get(opcode, opcode)
    if kind in ("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not") and instruction.types[0].dtype == "bool":
        kind = kind.replace("bitwise", "logical")
    attributes = {"dim": instruction.attributes["dim"]} if kind == "cat" else {}
    return writer.emit(kind, inputs, instruction.types, note, **attributes)


def _constant(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    splat = "value" in i.attributes
    return writer.emit("full" if splat else "constant", [], i.types, i.note, **i.attributes)


def _iota(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    return writer.emit("iota", [], i.types, i.note, dim=i.attributes["dim"])


def _transpose(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    return writer.emit("permute", inputs, i.types, i.note, dims=i.attributes["dims"])


def _broadcast(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    return writer.emit("expand", inputs, i.types, i.note, dims=i.attributes["dims"])


def _compare(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    return writer.emit(i.attributes["direction"].lower(), inputs, i.types, i.note)


def _custom(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    target = i.attributes.get("target", "")
    kind = target.removeprefix("mhlo.") if target.startswith("mhlo.") else "custom_call"
    return writer.emit(
        RENAMED.get(kind, kind), inputs, i.types, i.note, **({} if kind in target else {"target": target})
    )


def _dot(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    a, (x, y) = i.attributes, inputs
    contract, batch = [a["lhs_contract"], a["rhs_contract"]], [a["lhs_batch"], a["rhs_batch"]]
    ranks = [len(writer.tensors[t].shape) for t in (x, y)]
    count = len(batch[0])
    plain = len(contract[0]) == 1 and ranks == [2 + count] * 2 and batch in ([[], []], [[0], [0]])
    if not plain:
        return writer.emit("dot_general", inputs, i.types, i.note, contract=contract, batch=batch)
    lead = list(range(count))
    (row,), (column,) = ([d for d in range(count, 2 + count) if d not in c] for c in contract)
    x = writer.permute(x, [*lead, row, contract[0][0]], i.note)
    y = writer.permute(y, [*lead, contract[1][0], column], i.note)
    return writer.emit("bmm" if count else "mm", [x, y], i.types, i.note)


def _reduce(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    data = inputs[: len(inputs) // 2]  # the rest are initial values
    kind = REDUCED.get(i.attributes["applies"] or "", "reduce") if len(data) == 1 else "reduce"
    return writer.emit(kind, data, i.types, i.note, dims=sorted(i.attributes["dims"]), keepdim=False)


def _convolution(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    a = i.attributes
    if a["batch_groups"] != 1:
        return writer.emit("convolution_batch_groups", inputs, i.types, i.note, groups=a["batch_groups"])
    lhs, rhs, out = a["labels"]
    space = [str(d) for d in range(len(lhs) - 2)]
    x = writer.permute(inputs[0], [lhs.index(c) for c in ("b", "f", *space)], i.note)
    weight = writer.permute(inputs[1], [rhs.index(c) for c in ("o", "i", *space)], i.note)
    order = [out.index(c) for c in ("b", "f", *space)]
    kind = Type(tuple(i.types[0].shape[d] for d in order), i.types[0].dtype)
    settings = {"stride": a["stride"], "padding": a["low"], "dilation": a["rhs_dilate"], "groups": a["groups"]}
    if a["low"] != a["high"]:
        settings["padding_high"] = a["high"]
    if any(d != 1 for d in a["lhs_dilate"]):
        settings["lhs_dilation"] = a["lhs_dilate"]
    (y,) = writer.emit("convolution", [x, weight], [kind], i.note, **settings, transposed=False)
    return [writer.permute(y, [order.index(d) for d in range(len(order))], i.note)]


def _rows(writer: Writer, a: Mapping[str, Any], table: int, ids: int) -> bool:
    """Whether an indexing takes whole rows of a matrix, each by one number."""
    shape, where = writer.tensors[table].shape, writer.tensors[ids].shape
    last = a["index_vector_dim"] == len(where) or (a["index_vector_dim"] == len(where) - 1 and where[-1] == 1)
    return len(shape) == 2 and a["collapsed"] == [0] and a["index_map"] == [0] and last


def _ids(writer: Writer, a: Mapping[str, Any], ids: int, note: str) -> int:
    info = writer.tensors[ids]
    if a["index_vector_dim"] == len(info.shape):
        return ids
    return writer.emit("view", [ids], [Type(info.shape[:-1], info.dtype)], note)[0]


def _gather(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    table, ids = inputs
    a, shape = i.attributes, writer.tensors[inputs[0]].shape
    whole = list(a["slice_sizes"]) == [1, *shape[1:]] and a["offset_dims"] == [len(i.types[0].shape) - 1]
    if whole and _rows(writer, a, table, ids):
        return writer.emit("embedding", [table, _ids(writer, a, ids, i.note)], i.types, i.note)
    return writer.emit("gather_nd", inputs, i.types, i.note, **a)


def _scatter(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    a = i.attributes
    if len(inputs) == 3 and a["applies"] == "add" and _rows(writer, a, inputs[0], inputs[1]):
        updates = len(writer.tensors[inputs[2]].shape)
        if a["offset_dims"] == [updates - 1]:
            ids = _ids(writer, a, inputs[1], i.note)
            (rows,) = writer.emit("embedding_backward", [inputs[2], ids], i.types, i.note)
            return writer.emit("add", [inputs[0], rows], i.types, i.note)
    return writer.emit("scatter_nd", inputs, i.types, i.note, **a)


def _slice(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    x, a = inputs[0], i.attributes
    for dim, (start, end, step) in enumerate(zip(a["start"], a["limit"], a["stride"], strict=True)):
        info = writer.tensors[x]
        if (start, end, step) == (0, info.shape[dim], 1):
            continue
        shape = list(info.shape)
        shape[dim] = len(range(start, end, step))
        (x,) = writer.emit(
            "slice", [x], [Type(tuple(shape), info.dtype)], i.note, dim=dim, start=start, end=end, step=step
        )
    return [x]


def _pad(writer: Writer, i: Instruction, inputs: Sequence[int]) -> list[int]:
    a = i.attributes
    extra = {"interior": a["interior"]} if any(a["interior"]) else {}
    return writer.emit("pad", inputs[:1], i.types, i.note, low=a["low"], high=a["high"], **extra)


SPECIAL: dict[str, Callable[[Writer, Instruction, Sequence[int]], list[int]]] = {
    **{"constant": _constant, "iota": _iota, "transpose": _transpose, "broadcast_in_dim": _broadcast},
    **{
        "compare": _compare,
        "custom_call": _custom,
        "dot_general": _dot,
        "reduce": _reduce,
        "convolution": _convolution,
    },
    **{"gather": _gather, "scatter": _scatter, "slice": _slice, "pad": _pad},
}
