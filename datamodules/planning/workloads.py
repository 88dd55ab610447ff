"""Workloads by name, each a builder and its sizes; and any model of the user's.

`load_graph("bert-48", batch=8, length=384)` gives the graph, from a file where it was traced before.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from datamodules.planning import workloads_experts, workloads_text, workloads_vision
from datamodules.planning.graph import Graph
from datamodules.planning.graph_cache import kept
from datamodules.planning.trace import Step, trace

TINY_TEXT = {"batch": 8, "length": 16, "vocab": 128, "width": 32, "layers": 2, "heads": 8}
T5_PAPER = {f"{name}-paper": {**size, "biases": True} for name, size in workloads_text.SIZES.items() if "t5" in name}


Builder = Callable[..., Step]


@dataclass(frozen=True)
class Workload:
    """A builder of a Step and the arguments it is called with unless others are given."""

    name: str
    build: Builder
    arguments: Mapping[str, Any]


def _text() -> dict[str, Workload]:
    builders: dict[str, Builder] = {"bert": workloads_text.bert, "gpt2": workloads_text.gpt2, "t5": workloads_text.t5}
    lengths = {
        "bert": 384,
        "gpt2": 1024,
        "t5": 512,
    }  # of the longest input that each was published with; BERT's is SQuAD's
    found = {}
    for name, size in {**workloads_text.SIZES, **T5_PAPER}.items():
        family = name.split("-")[0]
        found[name] = Workload(name, builders[family], {"batch": 8, "length": lengths[family], **size})
    tiny_t5 = {**TINY_TEXT, "head_width": 4, "hidden": 64}
    found["bert-tiny"] = Workload("bert-tiny", workloads_text.bert, {**TINY_TEXT, "hidden": 64})
    found["gpt2-tiny"] = Workload("gpt2-tiny", workloads_text.gpt2, TINY_TEXT)
    found["t5-tiny"] = Workload("t5-tiny", workloads_text.t5, tiny_t5)
    found["t5-tiny-paper"] = Workload("t5-tiny-paper", workloads_text.t5, {**tiny_t5, "biases": True})
    return found


def _vision() -> dict[str, Workload]:
    tiny = {"batch": 8, "size": 32, "classes": 16}
    rows: list[tuple[str, Builder, dict[str, Any]]] = [
        ("vgg19", workloads_vision.vgg19, {"batch": 32, "size": 224}),
        ("vgg19-tiny", workloads_vision.vgg19, {**tiny, "hidden": 64, "divide": 8}),
        ("resnet50", workloads_vision.resnet50, {"batch": 32, "size": 224}),
        ("resnet50-tiny", workloads_vision.resnet50, {**tiny, "blocks": [1, 1, 1, 1]}),
        ("inception-v3", workloads_vision.inception_v3, {"batch": 32, "size": 299}),
        ("inception-v3-tiny", workloads_vision.inception_v3, {**tiny, "size": 75}),
    ]
    return {name: Workload(name, build, arguments) for name, build, arguments in rows}


def _experts() -> dict[str, Workload]:
    sizes = {
        "moe-tiny": {**TINY_TEXT, "hidden": 64, "experts": 8},
        "moe-12": {"vocab": 32000, "width": 1024, "layers": 12, "heads": 16, "hidden": 4096, "experts": 8},
        "moe-24": {"vocab": 32000, "width": 2048, "layers": 24, "heads": 16, "hidden": 8192, "experts": 8},
    }
    return {name: Workload(name, workloads_experts.moe, {"batch": 8, "length": 1024, **s}) for name, s in sizes.items()}


WORKLOADS: Mapping[str, Workload] = {**_vision(), **_text(), **_experts()}


def arguments_for(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a workload.

    Raises:
        ValueError: an unknown workload or argument, with the nearest known one; a number below 1.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}{_near(name, WORKLOADS)}; known: {', '.join(sorted(WORKLOADS))}")
    workload = WORKLOADS[name]
    known = inspect.signature(workload.build).parameters
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{name} has no argument {key!r}{_near(key, known)}; it has: {', '.join(known)}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"{name}: {key} must be above 0, got {value}")
    return {**workload.arguments, **given}


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build_step(name: str, **arguments: Any) -> Step:
    """Model, inputs and loss of a workload: real ones, or fake ones under FakeTensorMode.

    Raises:
        ValueError: see arguments_for; sizes that do not fit each other.
    """
    return WORKLOADS[name].build(**arguments_for(name, arguments))


def load_graph(name: str, **arguments: Any) -> Graph:
    """Return the graph of a workload's training step, traced once and then read from its file.

    Raises:
        ValueError: see arguments_for; sizes that do not fit each other.
    """
    whole = arguments_for(name, arguments)
    size = f"length {whole['length']}" if "length" in whole else f"size {whole['size']}"
    title = f"{name} batch {whole['batch']} {size}"
    return kept(name, whole, lambda: trace(lambda: WORKLOADS[name].build(**whole), title))


def load_user_model(spec: str, **arguments: Any) -> Graph:
    """Return the graph of a user's model. It is traced each time: nobody but Python knows what its code depends on.

    Args:
        spec: "module:factory". The factory takes `arguments` and returns a Step, or (model, inputs), or (model, inputs, loss):
            inputs a tensor, a tuple or a mapping by name; loss(output, **inputs) a scalar. Without a loss the model must
            return one, itself or as the attribute `loss`.
    Raises:
        ValueError: what is wrong with the spec, the factory or the model.
    """
    factory = find_factory(spec)
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{spec} cannot be called with {arguments or 'no arguments'}: {error}") from error
    return trace(lambda: as_step(factory(**arguments), spec), spec)


def find_factory(spec: str) -> Callable[..., Any]:
    """Return what "module:factory" names.

    Raises:
        ValueError: not of that form, no such module, no such name in it, or not callable.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{spec!r} is not of the form module:factory, as in my_models:make_model")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        hint = "" if module_name.startswith(missing) else f", which {module_name} imports"
        raise ValueError(f"there is no module {missing!r}{hint}; install it or run where it can be imported") from error
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"{module_name} has no {attribute!r}{_near(part, dir(factory))}")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ValueError(f"{spec} is a {type(factory).__name__}, not something to call")
    return factory


def as_step(made: Any, spec: str) -> Step:
    """Turn what a user's factory returned into a Step.

    Raises:
        ValueError: it is not what load_user_model asks for.
    """
    if isinstance(made, Step):
        return made
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise ValueError(
            f"{spec} returned a {type(made).__name__}; wanted (model, inputs) or (model, inputs, loss), with model an nn.Module"
        )
    model, inputs, *rest = made
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    by_name = isinstance(inputs, Mapping)
    named = dict(inputs) if by_name else {f"input{i}": value for i, value in enumerate(inputs)}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{spec}: input {name!r} is a {type(value).__name__}, not a tensor")

    def loss(module: nn.Module, **tensors: Tensor) -> Tensor:
        out = module(**tensors) if by_name else module(*tensors.values())
        if rest:
            return rest[0](out, **tensors)
        return out if isinstance(out, Tensor) else getattr(out, "loss", out)

    return Step(model, named, loss)
