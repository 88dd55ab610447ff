"""A search space as data: sweeps/spaces/<paper>/<space>.yaml, read and checked before the first trial.

A file of this kind has `parameters`; one with `axes` is a grid of `sweeps.grid`. Keys of the file:

    title, ablation, data       what is searched, starting from which ablation on which data set
    parameters                  name -> {path | options, choices | low, high, step, log, when}
    set                         config path -> template such as "normal:{sigma}"
    constraints                 [{metric: cost/..., at_most | at_least, of: default}], checked before anything trains
    objectives                  [{metric, direction}], validation or cost, never test; two or more draw a Pareto front
    seeds, trials, settings     of a trial; a profile has its own under `profiles`
    sampler, pruner             by name, with their options
    arms                        what the winner is held against: {name: {fix: {...}, tuned: bool}}
    report                      {metric, direction, seeds, settings}: what is measured once, on seeds no trial used
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from experiments.cell import Cell, canonical, resolve
from experiments.claims import PROFILES, load_paper
from experiments.errors import UserError
from experiments.records import CellKey
from experiments.schema import nearest, validate
from sweeps.parameters import Parameter, check_parameters, filled, put

SPACES = Path(__file__).parent / "spaces"
DIRECTIONS = {"higher": "maximize", "lower": "minimize"}
PREFIXES = ("val/", "train/", "cost/", "search/", "gap_at/")  # the last two: what paper 5's agent met while it trained
DEFAULT = "default"  # the arm that is the ablation as it is
WINNER = "winner"


class SpaceError(UserError):
    """A search space that cannot be used; the message says where, and the nearest valid name."""


@dataclass(frozen=True)
class Objective:
    """What a trial is judged by: a metric of validation or training data, or a cost, and which way is better."""

    metric: str
    direction: str

    def __post_init__(self) -> None:
        if not self.metric.startswith(PREFIXES):
            raise SpaceError(f"objectives: a metric of {', '.join(PREFIXES)}, never test data; got '{self.metric}'")
        if self.direction not in DIRECTIONS:
            raise SpaceError(f"objectives: unknown direction '{self.direction}'{nearest(self.direction, DIRECTIONS)}")


@dataclass(frozen=True)
class Constraint:
    """A bound on a cost of the net, checked before it trains: a number, or a multiple of the default's cost."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None
    of: str | None = None  # "default": bounds are multiples of the ablation's own cost

    def __post_init__(self) -> None:
        if not self.metric.startswith("cost/"):
            raise SpaceError(f"constraints: what a net costs is known before it trains, {self.metric} is not a cost/")
        if self.at_most is None and self.at_least is None:
            raise SpaceError(f"constraints: {self.metric} has neither at_most nor at_least")
        if self.of not in (None, DEFAULT):
            raise SpaceError(f"constraints: `of` is 'default' or left out, got '{self.of}'")

    def excess(self, cost: float, default: float) -> float:
        """Return by which share the cost lies outside the bounds; 0 or less inside."""
        unit = default if self.of else 1.0
        over = cost / (self.at_most * unit) - 1 if self.at_most is not None else float("-inf")
        under = 1 - cost / (self.at_least * unit) if self.at_least is not None else float("-inf")
        return max(over, under)


@dataclass(frozen=True)
class Arm:
    """A setting that the winner is held against: parameters fixed to it; `tuned` searches the others with as many trials."""

    fix: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = False
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What is measured once the search is over: winner and arms on seeds that no trial used."""

    metric: str
    direction: str
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    settings: Mapping[str, Any] = field(default_factory=dict)
    margin: float = 0.0


@dataclass(frozen=True)
class Space:
    """A search space in one profile. `settings` are of trials alone, such as a shorter training."""

    paper: str
    name: str
    profile: str
    title: str
    ablation: str
    data: str
    parameters: Mapping[str, Parameter]
    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    report: Report
    set: Mapping[str, Any] = field(default_factory=dict)
    constraints: tuple[Constraint, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 20
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "tpe"})
    pruner: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    arms: Mapping[str, Arm] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # parameters held at a value: an arm's
    trainer: str = "cpu"

    @property
    def free(self) -> dict[str, Parameter]:
        """The parameters that are searched."""
        return {name: p for name, p in self.parameters.items() if name not in self.fixed}

    @property
    def several(self) -> bool:
        """Whether there is more than one objective."""
        return len(self.objectives) > 1

    @property
    def exhaustive(self) -> bool:
        """Whether every combination is tried once, and then the search is over."""
        return self.sampler["name"] in ("grid", "brute_force")

    def arm(self, name: str) -> Space:
        """Return the space of an arm: its parameters fixed, the others searched under the same budget.

        Where that leaves fewer combinations than trials, each is tried once, in random order.
        """
        from sweeps.samplers import combinations

        own = dataclasses.replace(self, fixed={**self.fixed, **self.arms[name].fix})
        count = combinations(own)
        if count is None or count > self.trials:
            return own
        return dataclasses.replace(own, sampler={"name": "brute_force", "seed": self.sampler.get("seed", 0)})

    def cell(
        self, values: Mapping[str, Any] | None, seed: int, settings: Mapping[str, Any] | None = None, arm: str = ""
    ) -> Cell:
        """Return the cell of these parameter values: the ablation's, with `settings` and what the values set replaced.

        Args:
            values: of the parameters that exist; None for the ablation as it is.
            settings: {config path: value}; by default those of trials.
            arm: what the cell is called in the tracker, beside the space.
        Raises:
            UserError: a setting that the configuration does not have, or an impossible value.
        """
        settings = dict(self.settings if settings is None else settings)
        key = CellKey(self.paper, self.ablation, self.data, seed, self.profile)
        cell = resolve(key, trainer=self.trainer)
        settings |= self.chosen(values) if values is not None else {}
        if not settings:
            return cell
        for path, value in settings.items():
            put(cell.config, path, value, f"{self.name}: {self.ablation}")
        validate(cell.config, f"{self.name}: {self.ablation} with {dict(settings)}")
        # Not under the ablation's name: a run of other settings would make the ablation's own look out of date.
        key = dataclasses.replace(cell.key, ablation=f"sweep.{self.name}{'.' if arm else ''}{arm}")
        return SweepCell(key, cell.config, cell.conf, cell.trainer)

    def chosen(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return {config path: value} of parameter values; those of inactive parameters are not in `values`."""
        found: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if name in values:
                found |= parameter.settings(values[name])
        for path, template in self.set.items():
            if (value := filled(template, values)) != "":  # of an arm that leaves this to the ablation, nothing is left
                found[path] = value
        return found

    @cached_property
    def definition(self) -> dict[str, Any]:
        """What makes two searches the same one: all but how many trials it has and how it is reported."""
        parts = ("paper", "profile", "ablation", "data", "seeds", "settings", "set", "sampler", "pruner", "fixed")
        return {
            **{name: _plain(getattr(self, name)) for name in parts},
            "parameters": {name: _plain(dataclasses.asdict(p)) for name, p in self.parameters.items()},
            "objectives": [vars(o) for o in self.objectives],
            "constraints": [vars(c) for c in self.constraints],
        }

    @cached_property
    def code(self) -> str:
        """What code and data trials run on: the signature of the default with the first seed."""
        return self.cell(None, self.seeds[0], {}).signature

    def study_name(self, arm: str = "") -> str:
        """Return the study's name: another definition, code or data makes another study."""
        digest = hashlib.sha256(canonical({"space": self.definition, "code": self.code}).encode()).hexdigest()[:8]
        return f"{self.prefix(arm)}{digest}"

    def prefix(self, arm: str = "") -> str:
        """Return what the names of all studies of this space, profile and arm begin with."""
        return f"{self.paper}.{self.name}.{self.profile}.{arm + '.' if arm else ''}"


class SweepCell(Cell):
    """A cell of a sweep: its command is the sweep's, since no ablation file makes it."""

    @property
    def command(self) -> str:
        """The command line that runs this cell again."""
        if not self.key.ablation.startswith("sweep."):
            return super().command
        space = self.key.ablation.split(".")[1]
        return f"fivefold sweep {self.key.paper} --space {space} --profile {self.key.profile}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def spaces(paper: str) -> list[str]:
    """Return the names of a paper's search spaces, sorted; grids of `sweeps.grid` are not among them."""
    return sorted(
        f.stem for f in (SPACES / paper).glob("*.yaml") if "parameters" in (yaml.safe_load(f.read_text()) or {})
    )


def load(paper: str, name: str, profile: str, trainer: str = "cpu") -> Space:
    """Read a search space as one profile has it, and check all that can be checked without building a net.

    Raises:
        SpaceError: no such space, a key too many or too few, an objective on test data, seeds that a report uses, an
            unknown sampler or pruner, or a value that cannot be.
    """
    file = SPACES / paper / f"{name}.yaml"
    if name not in (known := spaces(paper)):
        grid = " (a grid: run it by `python -m sweeps.grid`)" if file.is_file() else nearest(name, known)
        raise SpaceError(f"there is no search space '{name}' for {paper}{grid}")
    try:
        return parse(yaml.safe_load(file.read_text()), paper, name, profile, trainer)
    except UserError as error:
        raise SpaceError(f"{file.name}: {error}") from None


def parse(raw: Mapping[str, Any], paper: str, name: str, profile: str, trainer: str = "cpu") -> Space:
    """Turn a space file's content into a Space of one profile.

    Raises:
        SpaceError: as `load`.
    """
    if profile not in PROFILES:
        raise SpaceError(f"unknown profile '{profile}'{nearest(profile, PROFILES)}")
    body = dict(raw)
    per_profile = body.pop("profiles", {})
    for known in per_profile:
        if known not in PROFILES:
            raise SpaceError(f"profiles: unknown profile '{known}'{nearest(known, PROFILES)}")
    body = _merged(body, per_profile.get(profile, {}))
    data = str(body.get("data"))
    data = load_paper(paper).data_in.get(profile, {}).get(data, data)
    body |= {"paper": paper, "name": name, "profile": profile, "data": data, "trainer": trainer}
    body["parameters"] = {
        key: _build(Parameter, {"name": key, **_mapping(own, f"parameters.{key}")}, f"parameters.{key}")
        for key, own in _mapping(body.get("parameters"), "parameters").items()
    }
    body["objectives"] = tuple(_build(Objective, o, "objectives") for o in body.get("objectives", ()))
    body["constraints"] = tuple(_build(Constraint, c, "constraints") for c in body.get("constraints", ()))
    body["arms"] = {key: _build(Arm, own or {}, f"arms.{key}") for key, own in body.get("arms", {}).items()}
    body["report"] = _build(Report, _tupled(_mapping(body.get("report"), "report"), "seeds"), "report")
    space = _build(Space, _tupled(body, "seeds"), "")
    _check(space)
    return space


def _merged(base: Any, change: Any) -> Any:
    """`change` over `base`; mappings are merged, all else is replaced."""
    if not (isinstance(base, Mapping) and isinstance(change, Mapping)):
        return change
    return {**base, **{k: _merged(base[k], v) if k in base else v for k, v in change.items()}}


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not value:
        raise SpaceError(f"{where}: expected a mapping, got {value!r}")
    return value


def _tupled(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**body, **({name: tuple(body[name])} if isinstance(body.get(name), list) else {})}


def _build(kind: Any, body: Any, where: str) -> Any:
    """Turn a mapping into a frozen dataclass, every fault with its place."""
    where = f"{where}: " if where else ""
    if not isinstance(body, Mapping):
        raise SpaceError(f"{where}expected a mapping, got {body!r}")
    names = {f.name: f for f in dataclasses.fields(kind)}
    for key in body:
        if key not in names:
            raise SpaceError(f"{where}unknown key '{key}'{nearest(str(key), names)}")
    missing = [
        name
        for name, f in names.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in body
    ]
    if missing:
        raise SpaceError(f"{where}missing {', '.join(missing)}")
    return kind(**body)


def _check(space: Space) -> None:
    from sweeps.samplers import check_pruner, check_sampler

    if not space.objectives:
        raise SpaceError("objectives: nothing to search by")
    for name, value in (("seeds", space.seeds), ("report.seeds", space.report.seeds)):
        if not value or not all(isinstance(s, int) and s >= 0 for s in value) or len(set(value)) < len(value):
            raise SpaceError(f"{name}: different numbers from 0 on, got {list(value)}")
    if shared := sorted(set(space.seeds) & set(space.report.seeds)):
        raise SpaceError(f"seeds {shared} are the report's too: what is chosen by a seed is not reported on it")
    if not isinstance(space.trials, int) or space.trials < 1:
        raise SpaceError(f"trials: at least 1, got {space.trials!r}")
    metric = load_paper(space.paper).metric(space.report.metric)
    if metric.direction != space.report.direction:
        raise SpaceError(f"report: {metric.name} is better where it is {metric.direction}")
    check_parameters(space.parameters, space.set)
    for name, arm in space.arms.items():
        if name in (WINNER, DEFAULT) and (arm.fix or name == WINNER):
            raise SpaceError(f"arms: '{name}' is taken: the search's winner, or the ablation as it is")
        for parameter, value in arm.fix.items():
            if parameter not in space.parameters:
                raise SpaceError(
                    f"arms.{name}.fix: unknown parameter '{parameter}'{nearest(parameter, space.parameters)}"
                )
            space.parameters[parameter].check_value(value, f"arms.{name}.fix.{parameter}")
    check_sampler(space.sampler, space.parameters)
    check_pruner(space.pruner, space.several)
