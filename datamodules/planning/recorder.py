"""Records what a program does to fake tensors as operations of a graph.

Views and updates in place are undone as they come: each tensor object stands for the newest value it can see, so that the
graph holds values only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.planning.decompose import DECOMPOSED, arguments_of, translate
from datamodules.planning.flops import flops_of
from datamodules.planning.graph import BYTES, Op, TensorInfo


class TraceError(ValueError):
    """A model that cannot become a graph, and why."""


@dataclass
class View:
    """Where a view came from: output `at` of func(*args), made when `base` had the value `seen`."""

    base: Tensor
    seen: int
    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    at: int


class Recorder(TorchDispatchMode):
    """A dispatch mode that writes every call below autograd into `ops`; enter it inside a FakeTensorMode.

    Attributes:
        tensors, ops: as in Graph.
        phase: what the next operation is marked with.
        path: the modules that are running, innermost last. Without any in the backward pass, an operation belongs to the layer
            of the one whose gradient it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[TensorInfo] = []
        self.ops: list[Op] = []
        self.phase = "forward"
        self.path: list[str] = []
        self._values: dict[int, int] = {}  # id of a tensor object -> number of its value
        self._views: dict[int, View] = {}
        self._aliases: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []  # fake tensors cost nothing; while they live their ids are theirs
        self._layers: dict[int, str] = {}  # autograd's sequence number -> layer
        self._paused = False

    def name(self, tensor: Tensor, name: str) -> int:
        """Register a parameter, an input or a buffer under a name; returns its number."""
        number = self._new(tensor, name)
        self._set(tensor, number)
        return number

    def value(self, tensor: Tensor) -> int:
        """Number of the newest value of a tensor object; what was never seen before is a constant."""
        tensor = self._aliases.get(id(tensor), tensor)
        view = self._views.get(id(tensor))
        if view is not None and (now := self.value(view.base)) != view.seen:  # the base was written to: look again
            view.seen = now
            self._set(tensor, self._look(view))
        if id(tensor) not in self._values:
            number = self._new(tensor, f"constant_{len(self.tensors)}")
            self._append("constant", (), (number,), {})
            self._set(tensor, number)
        return self._values[id(tensor)]

    def emit(
        self, kind: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attributes: Mapping[str, Any]
    ) -> None:
        """Write one operation; each output object stands for a new value from here on."""
        numbers = tuple(self.value(t) for t in inputs)
        name = f"{kind}_{len(self.ops)}"
        made = tuple(self._new(t, name if i == 0 else f"{name}.{i}") for i, t in enumerate(outputs))
        self._append(kind, numbers, made, attributes)
        for tensor, number in zip(outputs, made, strict=True):
            self._set(tensor, number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func in DECOMPOSED:
            with self:
                result = DECOMPOSED[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        outputs = [t for t in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(t, Tensor)]
        written = written_to(func, args, kwargs)
        if written:
            self._write(func, args, kwargs, written)
        elif outputs and any(r.alias_info is not None for r in func._schema.returns):
            self._view(func, args, kwargs, outputs)
        elif outputs:
            kind, inputs, attributes = translate(func, args, kwargs, outputs)
            self.emit(kind, inputs, outputs, attributes)
        return result

    def _new(self, tensor: Tensor, name: str) -> int:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in BYTES:
            raise TraceError(f"{name} has dtype {dtype}; plans know {', '.join(BYTES)}")
        self.tensors.append(TensorInfo(name, tuple(int(size) for size in tensor.shape), dtype))
        return len(self.tensors) - 1

    def _set(self, tensor: Tensor, number: int) -> None:
        self._values[id(tensor)] = number
        self._alive.append(tensor)

    def _append(
        self, kind: str, inputs: tuple[int, ...], outputs: tuple[int, ...], attributes: Mapping[str, Any]
    ) -> None:
        read, made = ([self.tensors[t].shape for t in group] for group in (inputs, outputs))
        flops = flops_of(kind, read, made, attributes)
        name = f"{kind}_{len(self.ops)}"
        self.ops.append(Op(name, kind, inputs, outputs, dict(attributes), flops, self.phase, self._layer()))

    def _layer(self) -> str:
        if self.phase == "forward" or self.path:  # a module that runs in the backward pass is one that is recomputed
            layer = self.path[-1] if self.path else ""
            self._layers.setdefault(torch.autograd._get_sequence_nr() - 1, layer)
            return layer
        node = torch._C._current_autograd_node()
        found = None if node is None else self._layers.get(node._sequence_nr())
        return found if found is not None else self.ops[-1].layer if self.ops else ""

    def _view(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor]) -> None:
        base = self._aliases.get(id(args[0]), args[0])
        kind, inputs, attributes = translate(func, args, kwargs, outputs)
        if kind == "alias":
            self._aliases[id(outputs[0])] = base
            self._alive += [base, outputs[0]]
            return
        self.emit(kind, inputs, outputs, attributes)
        for at, output in enumerate(outputs):
            self._views[id(output)] = View(base, self.value(base), func, args, kwargs, at)

    def _look(self, view: View) -> int:
        """Take a view again; returns the number of what it shows now."""
        with self.paused():
            result = view.func(*view.args, **view.kwargs)
        outputs = list(result) if isinstance(result, (list, tuple)) else [result]
        kind, inputs, attributes = translate(view.func, view.args, view.kwargs, outputs)
        self.emit(kind, inputs, outputs, attributes)
        return self._values[id(outputs[view.at])]

    def _write(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], written: Sequence[Tensor]) -> None:
        if len(written) > 1:
            raise TraceError(f"{func} writes to {len(written)} tensors at once; write the model without it")
        target = self._aliases.get(id(written[0]), written[0])
        kind, inputs, attributes = translate(func, args, kwargs, [target])
        self.emit(kind, inputs, [target], attributes)
        self._write_through(target)

    def _write_through(self, target: Tensor) -> None:
        """A view was written to: so was its base."""
        view = self._views.get(id(target))
        if view is None:
            return
        kind, _, attributes = translate(view.func, view.args, view.kwargs, [target])
        undone = undo_view(kind, attributes)
        if undone is None:
            raise TraceError(f"a tensor is written to through {view.func}, which plans cannot follow: clone it first")
        kind, how, reads_base = undone
        self.emit(kind, [view.base, target] if reads_base else [target], [view.base], how)
        view.seen = self._values[id(view.base)]
        self._write_through(view.base)


def written_to(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to in place."""
    if not func._schema.is_mutable:
        return []
    named = arguments_of(func, args, kwargs)
    marked = [named[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [t for t in marked if isinstance(t, Tensor)]


def undo_view(kind: str, attributes: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], bool] | None:
    """What puts a written view back into its base: kind, attributes, and whether it reads the base's other elements."""
    if kind == "view":
        return "view", {}, False
    if kind == "permute":
        dims = attributes["dims"]
        return "permute", {"dims": [dims.index(d) for d in range(len(dims))]}, False
    return (f"{kind}_scatter", attributes, True) if kind in ("slice", "select") else None
