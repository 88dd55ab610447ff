"""The intermediate representation that plans are made on: one training step as a list of tensor operations.

A graph says nothing of the framework it came from: `trace` reads PyTorch models, `hlo` reads StableHLO and HLO text. Tensors
are numbers, an index into `Graph.tensors`. Shapes are static. `vocabulary` lists the kinds of operations and their
attributes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

VERSION = 1
PHASES = ("forward", "backward")
BYTES = {
    **{"bool": 1, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "int16": 2, "uint16": 2, "float16": 2},
    **{"bfloat16": 2, "int32": 4, "uint32": 4, "float32": 4, "int64": 8, "uint64": 8, "float64": 8, "complex64": 8},
    "complex128": 16,
}


class GraphError(ValueError):
    """A graph that contradicts itself, or a file that holds none."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the step: its name, static shape and dtype (torch's names, "float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes of the whole, unsplit tensor."""
        return self.numel * BYTES[self.dtype]


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: unique in its graph.
        kind: what it computes, "mm", "view", "sdpa"; see `vocabulary`.
        inputs, outputs: tensors; an input may occur twice. Scalars and dims are in `attributes`.
        attributes: JSON values only. Dims are never negative.
        flops: floating-point operations of the unsplit operation, a multiplication and an addition being two.
        phase: "forward" or "backward".
        layer: path of the module it belongs to, "encoder.3.attention"; of a backward operation that of its forward one.
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    flops: int = 0
    phase: str = "forward"
    layer: str = ""


@dataclass(frozen=True)
class Parameter:
    """A trainable variable: its name, its tensor and that of its gradient (None if the loss does not depend on it)."""

    name: str
    tensor: int
    gradient: int | None


@dataclass(frozen=True)
class Graph:
    """A training step.

    Attributes:
        name: of the workload, "bert-48 batch 8 length 384".
        tensors: all tensors; the numbers elsewhere are indices into this.
        ops: in topological order, so that each input is a parameter, an input, a buffer or an earlier output.
        parameters: trainable variables, tied to their gradients.
        inputs: what a step is given that is not trained: data, labels, masks.
        outputs: the loss first, and then the gradients.
        buffers: state that is not trained (running statistics, position tables); never split by a batch.
        batch_dims: pairs (input, dim), which dim of each input counts examples, where the front end knows it.
    Raises:
        GraphError: an id out of range, an operand that nothing has made yet, two makers of one tensor, unknown dtypes.
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    ops: tuple[Op, ...]
    parameters: tuple[Parameter, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    buffers: tuple[int, ...] = ()
    batch_dims: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check(self)

    @cached_property
    def digest(self) -> str:
        """Sha256 of the canonical JSON: equal for equal graphs on any machine."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def _producers(self) -> dict[int, int]:
        return {tensor: i for i, op in enumerate(self.ops) for tensor in op.outputs}

    @cached_property
    def _consumers(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, list[int]] = {}
        for i, op in enumerate(self.ops):
            for tensor in dict.fromkeys(op.inputs):
                found.setdefault(tensor, []).append(i)
        return {tensor: tuple(users) for tensor, users in found.items()}

    def producer(self, tensor: int) -> int | None:
        """Index of the operation that makes a tensor; None for parameters, inputs and buffers."""
        return self._producers.get(tensor)

    def consumers(self, tensor: int) -> tuple[int, ...]:
        """Indices of the operations that read a tensor, ascending, each once."""
        return self._consumers.get(tensor, ())

    def layer_of(self, op: int | Op) -> str:
        """Path of the module that an operation (or its index) belongs to; "" for the outermost one."""
        return (self.ops[op] if isinstance(op, int) else op).layer

    @property
    def flops(self) -> int:
        """Floating-point operations of a step."""
        return sum(op.flops for op in self.ops)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all trainable variables, unsplit."""
        return sum(self.tensors[parameter.tensor].bytes for parameter in self.parameters)

    def save(self, path: Path | str) -> None:
        """Write as gzipped JSON; the file is whole or absent, and equal graphs give equal bytes."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = gzip.compress(json.dumps(to_json(self), separators=(",", ":")).encode(), 6, mtime=0)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(packed)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path | str) -> Graph:
        """Read what `save` wrote.

        Raises:
            GraphError: not such a file, one of another version, or a damaged one.
            FileNotFoundError: no such file.
        """
        try:
            return from_json(json.loads(gzip.decompress(Path(path).read_bytes())))
        except (OSError, EOFError, zlib.error, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise GraphError(f"{path} holds no graph: {error}") from error


def check(graph: Graph) -> None:
    """Refuse a graph that contradicts itself; see Graph."""
    count = len(graph.tensors)
    known: set[int] = set()
    for tensor in graph.tensors:
        if tensor.dtype not in BYTES:
            raise GraphError(f"tensor {tensor.name} has dtype {tensor.dtype!r}; known: {', '.join(BYTES)}")
    for tensor_id in (*(p.tensor for p in graph.parameters), *graph.inputs, *graph.buffers):
        _add(graph, known, tensor_id, count, "given")
    for op in graph.ops:
        if op.phase not in PHASES:
            raise GraphError(f"operation {op.name} has phase {op.phase!r}; known: {', '.join(PHASES)}")
        for tensor_id in op.inputs:
            if tensor_id not in known:
                raise GraphError(
                    f"operation {op.name} ({op.kind}) reads tensor {tensor_id}, which nothing before it makes"
                )
        for tensor_id in op.outputs:
            _add(graph, known, tensor_id, count, f"made by {op.name}")
    gradients = [p.gradient for p in graph.parameters if p.gradient is not None]
    for tensor_id in (*graph.outputs, *gradients):
        if tensor_id not in known:
            raise GraphError(f"tensor {tensor_id} is asked for, but nothing makes it")


def _add(graph: Graph, known: set[int], tensor_id: int, count: int, how: str) -> None:
    if not 0 <= tensor_id < count:
        raise GraphError(f"tensor {tensor_id} ({how}) is out of range: there are {count} tensors")
    if tensor_id in known:
        raise GraphError(f"tensor {tensor_id} ({graph.tensors[tensor_id].name}) is {how}, but was there before")
    known.add(tensor_id)


def to_json(graph: Graph) -> dict[str, Any]:
    """Plain lists and numbers, compact: ops are rows, layers a table."""
    layers = list(dict.fromkeys(op.layer for op in graph.ops))
    rank = {layer: i for i, layer in enumerate(layers)}
    return {
        "version": VERSION,
        "name": graph.name,
        "tensors": [[t.name, list(t.shape), t.dtype] for t in graph.tensors],
        "layers": layers,
        "ops": [
            [o.name, o.kind, [*o.inputs], [*o.outputs], {**o.attributes}, o.flops, PHASES.index(o.phase), rank[o.layer]]
            for o in graph.ops
        ],
        "parameters": [[p.name, p.tensor, p.gradient] for p in graph.parameters],
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "buffers": list(graph.buffers),
        "batch_dims": [list(pair) for pair in graph.batch_dims],
    }


def from_json(value: Any) -> Graph:
    """Undo `to_json`.

    Raises:
        GraphError: another version, or not of this form.
    """
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise GraphError(f"version {version!r} of the graph format; this program reads {VERSION}: make the graph again")
    layers = value["layers"]
    try:
        return Graph(
            name=value["name"],
            tensors=tuple(TensorInfo(name, tuple(shape), dtype) for name, shape, dtype in value["tensors"]),
            ops=tuple(
                Op(name, kind, tuple(i), tuple(o), attributes, flops, PHASES[phase], layers[layer])
                for name, kind, i, o, attributes, flops, phase, layer in value["ops"]
            ),
            parameters=tuple(Parameter(*row) for row in value["parameters"]),
            inputs=tuple(value["inputs"]),
            outputs=tuple(value["outputs"]),
            buffers=tuple(value["buffers"]),
            batch_dims=tuple((tensor, dim) for tensor, dim in value["batch_dims"]),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise GraphError(f"not a graph: {error!r}") from error
