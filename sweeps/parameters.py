"""Parameters of a search space: what they may be, what they set, and when they are there at all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Protocol

from experiments.errors import UserError
from experiments.schema import hashed_keys, nearest

Scalar = bool | int | float | str | None


class Draws(Protocol):
    """What an Optuna trial and a FrozenTrial can do."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


@dataclass(frozen=True)
class Parameter:
    """One thing that is searched.

    Exactly one of: `choices` (plain values for `path`), `options` (names, each setting several config paths at once), or
    `low` and `high` (a range: integers where both are, on a grid with `step`, by orders of magnitude with `log`).

    Attributes:
        path: the config path that the value goes to; None where only `set` uses it.
        when: {earlier parameter: its values}; else this one does not exist.
        kind: "int" or "float" for a range whose ends do not say it.
    Raises:
        UserError: naming what cannot be.
    """

    name: str
    path: str | None = None
    choices: tuple[Scalar, ...] | None = None
    options: Mapping[str, Mapping[str, Any]] | None = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    kind: str | None = None
    when: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"parameters.{self.name}"
        if not re.fullmatch(r"[a-zA-Z_]\w*", self.name):
            raise UserError(f"{where}: a name is letters, digits and _")
        ranged = self.low is not None or self.high is not None
        if sum((self.choices is not None, self.options is not None, ranged)) != 1:
            raise UserError(f"{where}: has either choices, or options, or low and high")
        if ranged:
            self._check_range(where)
        elif self.step is not None or self.log or self.kind is not None:
            raise UserError(f"{where}: step, log and kind are of a range")
        if self.choices is not None:
            if not self.choices or not all(isinstance(v, bool | int | float | str | None) for v in self.choices):
                raise UserError(f"{where}.choices: numbers, words, truth values or null; use options for more")
            if len({(type(v), v) for v in self.choices}) < len(self.choices):
                raise UserError(f"{where}.choices: a value comes twice in {list(self.choices)}")
        if self.options is not None and (self.path is not None or not self.options):
            raise UserError(f"{where}: options name the paths that they set, so there is no path beside them")
        object.__setattr__(self, "choices", tuple(self.choices) if self.choices is not None else None)
        object.__setattr__(self, "when", {n: v if isinstance(v, list) else [v] for n, v in self.when.items()})

    def _check_range(self, where: str) -> None:
        low, high = self.low, self.high
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high))
        if not numbers or not low <= high:  # type: ignore[operator]
            raise UserError(f"{where}: low and high are numbers, low first; got {low!r} and {high!r}")
        if self.log and low <= 0:  # type: ignore[operator]
            raise UserError(f"{where}: a range by orders of magnitude lies above 0, got low {low!r}")
        if self.log and self.step is not None:
            raise UserError(f"{where}: a range has either log or step")
        if self.step is not None and self.step <= 0:
            raise UserError(f"{where}: step must be above 0, got {self.step!r}")
        if self.kind not in (None, "int", "float"):
            raise UserError(f"{where}.kind: 'int' or 'float', got {self.kind!r}")
        if self.is_integer and not all(isinstance(v, int) for v in (low, high, self.step or 1)):
            raise UserError(f"{where}: an integer range has integer ends and step")

    @property
    def is_integer(self) -> bool:
        """Whether a range is of integers."""
        return self.kind == "int" or (self.kind is None and isinstance(self.low, int) and isinstance(self.high, int))

    @property
    def values(self) -> tuple[Scalar, ...] | None:
        """Every value, or None for a range."""
        return self.choices if self.choices is not None else tuple(self.options) if self.options is not None else None

    @property
    def corners(self) -> tuple[Any, ...]:
        """Every value, or the two ends of a range."""
        return self.values if self.values is not None else (self.low, self.high)

    def active(self, values: Mapping[str, Any]) -> bool:
        """Whether the parameter exists beside these values of earlier ones."""
        return all(name in values and values[name] in allowed for name, allowed in self.when.items())

    def draw(self, trial: Draws) -> Any:
        """Return the trial's value."""
        if self.values is not None:
            return trial.suggest_categorical(self.name, self.values)
        assert self.low is not None
        assert self.high is not None
        if self.is_integer:
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def settings(self, value: Any) -> dict[str, Any]:
        """Return {config path: value} that a value of this parameter stands for."""
        if self.options is not None:
            return dict(self.options[value])
        return {self.path: value} if self.path else {}

    def check_value(self, value: Any, where: str) -> None:
        """Refuse a value that the parameter cannot have."""
        if self.values is not None and value not in self.values:
            raise UserError(f"{where}: {value!r} is not among them{nearest(str(value), map(str, self.values))}")
        if self.values is None and not (isinstance(value, int | float) and self.low <= value <= self.high):  # type: ignore[operator]
            raise UserError(f"{where}: {value!r} lies outside {self.low!r} to {self.high!r}")


def check_parameters(parameters: Mapping[str, Parameter], templates: Mapping[str, Any]) -> None:
    """Refuse conditions on what does not come before, templates on what does not exist, and what would change nothing.

    Raises:
        UserError: naming the parameter or template.
    """
    before: dict[str, Parameter] = {}
    for name, parameter in parameters.items():
        for other, allowed in parameter.when.items():
            if other not in before:
                raise UserError(f"parameters.{name}.when: no parameter '{other}' comes before{nearest(other, before)}")
            for value in allowed:
                before[other].check_value(value, f"parameters.{name}.when.{other}")
        before[name] = parameter
    used = {field for template in templates.values() for field in fields(template)}
    for field_name in sorted(used - parameters.keys()):
        raise UserError(f"set: unknown parameter '{field_name}'{nearest(field_name, parameters)}")
    conditions = {other for parameter in parameters.values() for other in parameter.when}
    for name, parameter in parameters.items():
        if parameter.path is None and parameter.options is None and name not in used | conditions:
            raise UserError(f"parameters.{name}: has no path, and neither `set` nor a condition uses it")


def fields(template: Any) -> list[str]:
    """Return the parameters that a template names."""
    if not isinstance(template, str):
        return []
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def filled(template: Any, values: Mapping[str, Any]) -> Any:
    """Fill a template: "{x}" alone is the value itself; elsewhere its text. A word that names an absent parameter is left out.

    "{kind_1}{width} {kind_2}{width} L10" is so a net of one or two layers.
    """
    names = fields(template)
    if not names:
        return template
    if template == f"{{{names[0]}}}":
        return values.get(names[0], "")
    words = [word for word in template.split(" ") if all(name in values for name in fields(word))]
    return " ".join(word.format(**values) for word in words)


def draw_all(parameters: Mapping[str, Parameter], fixed: Mapping[str, Any], trial: Draws) -> dict[str, Any]:
    """Return the values of all parameters that exist in this trial, in the order of the file."""
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.active(values):
            values[name] = fixed[name] if name in fixed else parameter.draw(trial)
    return values


def put(config: dict[str, Any], path: str, value: Any, origin: str) -> None:
    """Replace a setting of a resolved configuration, in place; a target's argument may be new there.

    Raises:
        UserError: there is no such setting, or none that enters a cell's signature; nearest valid key included.
    """
    *parents, leaf = path.split(".")
    node: Any = config
    for depth, name in enumerate([*parents, leaf]):
        known = node if isinstance(node, Mapping) else {}
        if depth == 0:
            known = {key: known[key] for key in hashed_keys() if key in known}
        last = depth == len(parents)
        if name not in known and not (last and "_target_" in known and name.isidentifier()):
            where = ".".join([*parents, leaf][: depth + 1])
            raise UserError(f"{origin} has no key '{where}'{nearest(name, known)}")
        if not last:
            node = node[name]
    node[leaf] = value
