"""The typed shape of a resolved configuration. Unknown keys and impossible values fail here, before anything runs."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experiments.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be run. The message names the key, the value and the way out."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (nearest valid: 'x')" for the closest of `known`, whatever its case, or the list of them where none is close."""
    options = sorted(known)
    folded = {option.lower(): option for option in options}
    match = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    if match:
        return f" (nearest valid: '{folded[match[0]]}')"
    return f" (valid: {', '.join(options)})" if options else ""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Target(BaseModel):
    """Something Hydra instantiates: `_target_` and the keyword arguments its signature knows."""

    model_config = ConfigDict(extra="allow", frozen=True)
    target: str = Field(alias="_target_")


Positive = Annotated[int, Field(ge=1)]


class Data(Strict):
    """Images to classify (`channels`, `image_size`, `classes`) or to restore (without classes), a function to approximate
    (`dims`), text to predict (`context` tokens at once out of `vocab`), or a model to plan for (`observation`: numbers that an
    agent sees of its plan).
    """

    name: str
    channels: Positive | None = None
    image_size: Positive | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    dims: Positive | None = None
    context: Positive | None = None
    vocab: Annotated[int, Field(ge=2)] | None = None
    observation: Positive | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Data:
        image, classes, function, text = {"channels", "image_size"}, {"classes"}, {"dims"}, {"context", "vocab"}
        plan = {"observation"}
        given = {name for name in image | classes | function | text | plan if getattr(self, name) is not None}
        if given not in [image | classes, image, function, text, plan]:
            raise ValueError(
                "images need channels and image_size, and classes where they are to be told apart; a function needs dims "
                "alone; text needs context and vocab; a model to plan for needs observation alone"
            )
        return self

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W), (dims,), (context,) or (observation,)."""
        if self.dims is not None or self.observation is not None:
            return (self.dims or self.observation or 0,)
        if self.context is not None:
            return (self.context,)
        assert self.channels is not None
        assert self.image_size is not None
        return (self.channels, self.image_size, self.image_size)


class Budget(Strict):
    """How much a cell trains and tests. `train_samples: null` means all that remain after the validation split.
    No epochs: the net is a construction, tested as it was built. `micro_batch` samples go through the net at once, over all
    processes together, and their gradients add up to a batch's; what a loss says of a batch it then says of those.
    """

    max_epochs: Annotated[int, Field(ge=0)]
    batch_size: Positive
    micro_batch: Positive | None = None
    train_samples: Positive | None = None
    val_samples: Positive
    test_samples: Positive | None = None
    noise: bool = False


class Optim(Strict):
    optimizer: Target
    schedule: Target | None = None


class Selection(Strict):
    """Which epoch's weights are tested: the best by a validation metric."""

    monitor: Annotated[str, Field(pattern=r"^val/")]
    mode: Literal["max", "min"]


class Parent(Strict):
    """The ablation whose trained weights a net starts from (same data, seed and profile), and what carries them over."""

    ablation: str
    inherit: Target


class Trainer(Strict):
    accelerator: Literal["cpu", "gpu", "auto"]
    devices: int | str
    num_nodes: Literal[1]
    strategy: Literal["auto", "ddp", "fsdp"]
    compile: bool = False
    micro_batch: Positive | None = None  # the budget's, for the strategy, which sees no other part of the configuration


class Tracking(Strict):
    enabled: bool
    system_metrics: bool
    log_every: Positive


class Executor(Strict):
    kind: Literal["local"]
    jobs: Positive | Literal["auto"]


class Profile(Strict):
    """How much is run: seeds from `first_seed` on, which is above those that settings were chosen with. `sizes` are names for
    numbers that ablations refer to, such as a net's width at this scale.
    """

    name: Literal["smoke", "small", "gpu", "paper"]
    seeds: Positive
    first_seed: Annotated[int, Field(ge=0)] = 0
    budgets: dict[str, dict[str, Budget]]
    sizes: dict[str, Positive] = {}


EXECUTION_ONLY = Field(json_schema_extra={"execution_only": True})


class CellConfig(Strict):
    """Everything that makes one cell. Fields marked execution-only say where it runs, not what is computed. A cell that is
    `alone` measures time: it starts when no other cell runs or waits, and none starts beside it.
    """

    paper: str
    seed: Annotated[int, Field(ge=0)]
    precision: Literal["32-true", "64-true", "16-mixed", "bf16-mixed"]
    family: str
    data: Data
    net: Target
    module: Target
    datamodule: Target
    optim: Optim
    budget: Budget
    selection: Selection
    parent: Parent | None
    profile: Profile = EXECUTION_ONLY
    trainer: Trainer = EXECUTION_ONLY
    tracking: Tracking = EXECUTION_ONLY
    executor: Executor = EXECUTION_ONLY
    alone: bool = Field(default=False, json_schema_extra={"execution_only": True})


def hashed_keys() -> list[str]:
    """The top-level keys that enter a cell's signature, read off the schema."""
    return [
        name
        for name, field in CellConfig.model_fields.items()
        if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("execution_only"))
    ]


def validate(config: Mapping[str, Any], origin: str) -> CellConfig:
    """Check a resolved configuration.

    Args:
        config: the resolved configuration as plain containers.
        origin: what to call it in errors, such as the ablation's name.
    Raises:
        ConfigError: an unknown key, a missing one or an impossible value; every fault is listed with its key.
    """
    try:
        checked = CellConfig.model_validate(config)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise ConfigError(f"{origin}: the configuration cannot be run:\n{faults}") from None
    for path, node in _targets(config):
        rate = node.get("lr", 1.0)
        if not (isinstance(rate, int | float) and 0 < rate < float("inf")):
            raise ConfigError(f"{origin}: {path}.lr: a learning rate must be above 0 and finite, got {rate!r}")
    return checked


def check_targets(config: Mapping[str, Any], origin: str) -> None:
    """Check that every `_target_` can be imported and knows its arguments, and that plain values are of the annotated type.

    Imports what it checks, torch included.

    Raises:
        ConfigError: naming the key and the nearest argument that the target has, or the value and what it may be.
    """
    for path, node in _targets(config):
        _check_target(origin, path, node)


def _explain(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        *parents, key = fault["loc"]
        return f"{path}: unknown key{nearest(str(key), _fields_at(parents))}"
    if fault["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def _fields_at(path: list[Any]) -> list[str]:
    model: Any = CellConfig
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = (field.annotation, *get_args(field.annotation))  # what may be null is an option among two
        model = next((option for option in options if hasattr(option, "model_fields")), None)
    return [f.alias or name for name, f in getattr(model, "model_fields", {}).items()]


def _targets(node: Any, path: str = "") -> Iterable[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}" if path else str(key))


@lru_cache(maxsize=256)
def _signature_of(target: str) -> dict[str, inspect.Parameter]:
    from hydra.utils import get_object

    return dict(inspect.signature(get_object(target)).parameters)


def _check_target(origin: str, path: str, node: Mapping[str, Any]) -> None:
    target = node["_target_"]
    try:
        parameters = _signature_of(target)
    except Exception as error:
        raise ConfigError(f"{origin}: {path}._target_: cannot import '{target}': {error}") from None
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key in node:
        if key.startswith("_"):
            continue
        if not takes_any and key not in parameters:
            raise ConfigError(f"{origin}: {path}.{key}: unknown key for {target}{nearest(key, parameters)}")
        hint = _hints_of(target).get(key, Any)
        if not _fits(node[key], hint):
            words = [word for word in _literals(hint) if isinstance(word, str)]
            near = nearest(str(node[key]), words) if words else ""
            raise ConfigError(
                f"{origin}: {path}.{key}: must be {_in_words(hint)}, got {node[key]!r}{near}{default_of(target, key)}"
            )


@lru_cache(maxsize=256)
def _hints_of(target: str) -> dict[str, Any]:
    """The annotations of a target's arguments, or none where they cannot be read."""
    from hydra.utils import get_object

    found = get_object(target)
    try:
        return typing.get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except (NameError, TypeError, AttributeError):
        return {}


def default_of(target: str, name: str) -> str:
    """Return "; left out, it is 0" for an argument of a target that has a default."""
    parameter = _signature_of(target).get(name)
    known = parameter is not None and parameter.default is not inspect.Parameter.empty
    return f"; left out, it is {parameter.default!r}" if parameter is not None and known else ""


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is what an annotation of plain types says; any other annotation is not judged."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return any(value == word and type(value) is type(word) for word in inner)
    if origin in (list, tuple, Sequence):
        items = [inner[0]] * len(value) if isinstance(value, list | tuple) and len({*inner} - {...}) == 1 else []
        return isinstance(value, list | tuple) and all(map(_fits, value, items))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return value is None if hint in (None, type(None)) else True


def _literals(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for option in get_args(hint) for word in _literals(option)]


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_in_words(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return plain.get(hint) or str(hint).replace("typing.", "")
