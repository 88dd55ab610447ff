"""The training step of a real PyTorch model as a Graph: forward and backward pass under fake tensors.

No weight is allocated and nothing is computed. The model is built under FakeTensorMode, since on the meta device the backward
pass would silently be missing. Attention stays one operation and so does its backward pass, whatever kernel torch would
take, for once its heads are merged into the batch of a matrix product they cannot be split any more. Products with a bias
become a product and a sum.

Source: the traps are those that PyTorch's own planner (meta-pytorch/autoparallel, tracing.py) avoids in the same way; it and
make_fx record through proxies, this records calls below autograd directly, which is several times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from datamodules.planning.assemble import assemble
from datamodules.planning.graph import Graph, Parameter
from datamodules.planning.opaque import opaque
from datamodules.planning.recorder import Recorder, TraceError


@dataclass
class Step:
    """What is trained, on what.

    Attributes:
        model: the module, in training mode.
        inputs: what `loss` is given, by name; first dim of each is the batch unless `batch_dims` says otherwise.
        loss: (model, **inputs) -> scalar.
        batch_dims: dim of each input that counts examples; None for an input that has none.
    """

    model: nn.Module
    inputs: Mapping[str, Tensor]
    loss: Callable[..., Tensor]
    batch_dims: Mapping[str, int | None] = field(default_factory=dict)


def trace(build: Callable[[], Step], name: str) -> Graph:
    """Return the graph of one training step: loss and the gradient of every trainable variable.

    Args:
        build: makes model and inputs; called under FakeTensorMode, so that its tensors need no memory.
        name: of the graph.
    Raises:
        TraceError: the model looks at a tensor's values, fails, or its loss is not a scalar that depends on its parameters.
    """
    # Gradients are wanted wherever this is called from: Lightning tests in inference mode.
    with torch.inference_mode(False), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        step = build()
        recorder = Recorder()
        given = _register(recorder, step)
        try:
            with _layers(recorder, step.model), recorder, opaque(recorder):
                loss = step.loss(step.model, **step.inputs)
                _check_loss(loss, step.model)
                recorder.phase, recorder.path[:] = "backward", []
                trained = [p for p in step.model.parameters() if p.requires_grad]
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        except TraceError:
            raise
        except Exception as error:
            raise _explain(error, recorder) from error
        return _graph(name, recorder, step, given, loss, gradients)


def _register(recorder: Recorder, step: Step) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Number parameters, inputs and buffers; frozen parameters count as buffers."""
    named = dict(step.model.named_parameters())
    trained = {n: recorder.name(p, n) for n, p in named.items() if p.requires_grad}
    inputs = {n: recorder.name(t, n) for n, t in step.inputs.items()}
    buffers = {n: recorder.name(p, n) for n, p in named.items() if not p.requires_grad}
    buffers |= {n: recorder.name(b, n) for n, b in step.model.named_buffers()}
    return trained, inputs, buffers


def _check_loss(loss: Any, model: nn.Module) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TraceError(f"the loss must be a scalar tensor, and is {what}")
    if not any(p.requires_grad for p in model.parameters()):
        raise TraceError(f"{type(model).__name__} has no trainable parameters")
    if not loss.requires_grad:
        raise TraceError("the loss does not depend on any parameter: there is no backward pass to plan")


def _explain(error: Exception, recorder: Recorder) -> TraceError:
    where = recorder.path[-1] if recorder.path else ""
    place = f"{recorder.phase} pass" + (f", module {where}" if where else "")
    if type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        return TraceError(
            f"{place}: the model looks at a tensor's values ({error}), but a plan is made from shapes alone; take values out "
            "of Python control flow and shapes, or plan a static form (a fixed capacity, a mask)"
        )
    return TraceError(f"{place}: {type(error).__name__}: {error}")


def _graph(
    name: str,
    recorder: Recorder,
    step: Step,
    given: tuple[dict[str, int], dict[str, int], dict[str, int]],
    loss: Tensor,
    gradients: tuple[Tensor | None, ...],
) -> Graph:
    trained, inputs, buffers = given
    numbers = [None if g is None else recorder.value(g) for g in gradients]
    parameters = tuple(Parameter(n, t, g) for (n, t), g in zip(trained.items(), numbers, strict=True))
    outputs = (recorder.value(loss), *dict.fromkeys(n for n in numbers if n is not None))
    dims = {n: step.batch_dims.get(n, 0) for n in inputs}
    batch = tuple((inputs[n], d) for n, d in dims.items() if d is not None and step.inputs[n].ndim > d)
    return assemble(
        name, recorder.tensors, recorder.ops, parameters, [*inputs.values()], outputs, [*buffers.values()], batch
    )


@contextmanager
def _layers(recorder: Recorder, model: nn.Module) -> Iterator[None]:
    """Let the recorder know which module is running."""

    def leaves(*_: Any) -> None:
        if recorder.path:
            recorder.path.pop()

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda m, a, path=path: recorder.path.append(path))
            leave = module.register_forward_hook(leaves)
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        yield
