"""The typed shape of a resolved configuration. Unknown keys and impossible values fail here, before anything runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experiments.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be run. The message names the key, the value and the way out."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (nearest valid: 'x')" for the closest of `known`, or the list of them where none is close."""
    options = sorted(known)
    match = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if match:
        return f" (nearest valid: '{match[0]}')"
    return f" (valid: {', '.join(options)})" if options else ""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Target(BaseModel):
    """Something Hydra instantiates: `_target_` and the keyword arguments its signature knows."""

    model_config = ConfigDict(extra="allow", frozen=True)
    target: str = Field(alias="_target_")


Positive = Annotated[int, Field(ge=1)]


class Data(Strict):
    """A set of images to classify (`channels`, `image_size`, `classes`), or a function to approximate (`dims`)."""

    name: str
    channels: Positive | None = None
    image_size: Positive | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    dims: Positive | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Data:
        image = [self.channels, self.image_size, self.classes]
        if (self.dims is None and None in image) or (self.dims is not None and image != [None] * 3):
            raise ValueError("images need channels, image_size and classes; a function needs dims alone")
        return self

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) or (dims,)."""
        if self.dims is not None:
            return (self.dims,)
        assert self.channels is not None
        assert self.image_size is not None
        return (self.channels, self.image_size, self.image_size)


class Budget(Strict):
    """How much a cell trains and tests. `train_samples: null` means all that remain after the validation split.
    No epochs: the net is a construction, tested as it was built.
    """

    max_epochs: Annotated[int, Field(ge=0)]
    batch_size: Positive
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


class Trainer(Strict):
    accelerator: Literal["cpu", "gpu", "auto"]
    devices: int | str
    num_nodes: Positive
    strategy: str


class Tracking(Strict):
    enabled: bool
    system_metrics: bool
    log_every: Positive


class Executor(Strict):
    kind: Literal["local"]
    jobs: Positive | Literal["auto"]


class Profile(Strict):
    name: Literal["smoke", "small", "paper"]
    seeds: Positive
    budgets: dict[str, dict[str, Budget]]


EXECUTION_ONLY = Field(json_schema_extra={"execution_only": True})


class CellConfig(Strict):
    """Everything that makes one cell. Fields marked execution-only say where it runs, not what is computed."""

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
    profile: Profile = EXECUTION_ONLY
    trainer: Trainer = EXECUTION_ONLY
    tracking: Tracking = EXECUTION_ONLY
    executor: Executor = EXECUTION_ONLY


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
    """Check that every `_target_` can be imported and knows its arguments. Imports what it checks, torch included.

    Raises:
        ConfigError: naming the key and the nearest argument that the target has.
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
        model = field.annotation
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
        if not takes_any and not key.startswith("_") and key not in parameters:
            raise ConfigError(f"{origin}: {path}.{key}: unknown key for {target}{nearest(key, parameters)}")
