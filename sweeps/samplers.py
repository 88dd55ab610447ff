"""Samplers and pruners by name, with their options under Optuna's own names."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError
from experiments.schema import nearest
from sweeps.parameters import Parameter

if TYPE_CHECKING:
    import optuna

    from sweeps.space import Space

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "grid": "GridSampler",
    "brute_force": "BruteForceSampler",
    "nsga2": "NSGAIISampler",
    "nsga3": "NSGAIIISampler",
    "cmaes": "CmaEsSampler",
    "gp": "GPSampler",
    "qmc": "QMCSampler",
}
PRUNERS = {
    "none": "NopPruner",
    "wilcoxon": "WilcoxonPruner",
    "hyperband": "HyperbandPruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
}
EXHAUSTIVE = ("grid", "brute_force")
ONE_SEQUENCE = ("grid", "qmc")  # all draws are places of one sequence, which a seed fixes for the whole study
OURS = ("search_space", "constraints_func")  # options that the space itself gives
REJECTED = "rejected"  # user attribute of a trial whose net the constraints do not allow
EXCESS = "excess"  # user attribute: by how much each constraint is broken


def check_sampler(options: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> None:
    """Refuse an unknown sampler or option, and a grid over what has no list of values.

    Raises:
        UserError: with the nearest valid name.
    """
    _check("sampler", options, SAMPLERS, "samplers")
    if options["name"] == "grid":
        for name, parameter in parameters.items():
            if parameter.when:
                raise UserError(
                    f"sampler: a grid has every parameter in every trial; {name} has `when`: use brute_force"
                )
    if options["name"] in EXHAUSTIVE:
        for name, parameter in parameters.items():
            if points(parameter) is None:
                raise UserError(f"sampler: {options['name']} needs a list of values; {name} is a range without step")


def check_pruner(options: Mapping[str, Any], several: bool) -> None:
    """Refuse an unknown pruner or option, and any but none where there are several objectives.

    Raises:
        UserError: with the nearest valid name.
    """
    _check("pruner", options, PRUNERS, "pruners")
    if several and options["name"] != "none":
        raise UserError(f"pruner: several objectives have no order to cut by: 'none', not '{options['name']}'")


def _check(what: str, options: Mapping[str, Any], known: Mapping[str, str], module: str) -> None:
    import optuna

    name = str(options.get("name"))
    if name not in known:
        raise UserError(f"{what}: unknown name '{name}'{nearest(name, known)}")
    takes = inspect.signature(getattr(getattr(optuna, module), known[name])).parameters
    for option in options:
        if option != "name" and option != "seed" and (option not in takes or option in OURS):
            raise UserError(f"{what}: {name} has no option '{option}'{nearest(option, set(takes) - set(OURS))}")


def points(parameter: Parameter) -> list[Any] | None:
    """Return every value of a parameter, or None where there are too many to list."""
    if parameter.values is not None:
        return list(parameter.values)
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.is_integer and not parameter.log:
        return list(range(int(parameter.low), int(parameter.high) + 1, int(parameter.step or 1)))
    if parameter.step is not None:
        count = math.floor((parameter.high - parameter.low) / parameter.step + 1e-9) + 1
        return [parameter.low + i * parameter.step for i in range(count)]
    return None


def combinations(space: Space) -> int | None:
    """Return how many different trials there are, or None where a parameter is a range."""
    if any(points(p) is None for p in space.free.values()):
        return None
    found: list[dict[str, Any]] = [{}]
    for name, parameter in space.parameters.items():
        values = [space.fixed[name]] if name in space.fixed else points(parameter) or []
        found = [
            {**so_far, name: value} if active else so_far
            for so_far in found
            for active in [parameter.active(so_far)]
            for value in (values if active else values[:1])
        ]
    return len(found)


def make_sampler(space: Space, trial: int, worker: int = 0) -> optuna.samplers.BaseSampler:
    """Return the sampler that draws this trial.

    Its generator is keyed by the trial's number, so that a search that was stopped and goes on draws what one that was not
    stopped would have drawn; and by the worker, so that two workers do not draw the same.
    """
    import optuna

    options = dict(space.sampler)
    name, seed = options.pop("name"), options.pop("seed", 0)
    kind = getattr(optuna.samplers, SAMPLERS[name])
    takes = inspect.signature(kind).parameters
    if "seed" in takes:
        key = () if name in ONE_SEQUENCE else (trial, worker)
        options["seed"] = int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:4], "little")
    if space.constraints and "constraints_func" in takes:
        options["constraints_func"] = excess
    if name == "grid":
        options["search_space"] = {key: points(p) for key, p in space.free.items()}
    return kind(**options)


def excess(trial: optuna.trial.FrozenTrial) -> list[float]:
    """Return by how much a trial breaks each constraint, as Optuna wants it: above 0 is broken."""
    return trial.user_attrs.get(EXCESS, [0.0])


def make_pruner(space: Space) -> optuna.pruners.BasePruner:
    """Return the pruner, which sees one step per seed."""
    import optuna

    options = dict(space.pruner)
    return getattr(optuna.pruners, PRUNERS[options.pop("name")])(**options)


def reported(space: Space, scores: list[float]) -> tuple[float, int]:
    """Return what is reported to the pruner after the last of these seeds, and its step.

    Wilcoxon's test pairs trials seed by seed; all others compare how good a trial is so far, with seeds as the resource.
    """
    if space.pruner["name"] == "wilcoxon":
        return scores[-1], len(scores) - 1
    return sum(scores) / len(scores), len(scores)


def examples(space: Space) -> list[dict[str, Any]]:
    """Return sets of values in which each value of each choice, and each end of each range, is there once."""
    found = []
    for name, parameter in space.parameters.items():
        for corner in parameter.corners:
            values: dict[str, Any] = {}
            wanted = {**{n: allowed[0] for n, allowed in _conditions(space, name).items()}, name: corner}
            for other, p in space.parameters.items():
                if p.active(values):
                    values[other] = wanted.get(other, p.corners[0])
            found.append(values)
    return [values for values, _ in itertools.groupby(found)]


def _conditions(space: Space, name: str) -> dict[str, Any]:
    """What must be so for a parameter to exist, through all that its conditions depend on."""
    found: dict[str, Any] = {}
    for other, allowed in space.parameters[name].when.items():
        found |= {other: allowed, **_conditions(space, other)}
    return found
