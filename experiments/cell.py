"""Cell = (paper, ablation, data, seed, profile) -> resolved configuration -> signature.

The signature is sha256 over the canonical configuration, the code it reaches and the hash of its data. Two cells with
the same signature are the same experiment: one is run, the other is answered from disk.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import memo
from experiments.data_sets import content_sha256
from experiments.records import CellKey
from experiments.schema import ConfigError, hashed_keys, nearest, validate
from experiments.sources_digest import ROOT, closure, digest

CONF = ROOT / "conf"


@dataclass(frozen=True)
class Cell:
    """One training run, resolved: its key and its whole configuration as plain containers, and where those came from."""

    key: CellKey
    config: dict[str, Any]
    conf: Path = CONF
    trainer: str = "cpu"

    @cached_property
    def hashed(self) -> dict[str, Any]:
        """The part of the configuration that says what is computed (`trainer`, `tracking` and the like are not in it)."""
        return {name: self.config[name] for name in hashed_keys()} | {"profile": self.key.profile}

    @cached_property
    def parent(self) -> Cell | None:
        """The cell whose trained weights this one starts from.

        Raises:
            ConfigError: no such ablation, or a cell that descends from itself.
        """
        if self.config["parent"] is None:
            return None
        return resolve(replace(self.key, ablation=self.config["parent"]["ablation"]), self.conf, self.trainer)

    @cached_property
    def signature(self) -> str:
        """First 20 hex digits of the sha256 over configuration, code and data, and those of the parent."""
        parts = {
            "config": self.hashed,
            "code": digest(closure(sorted(set(targets_of(self.hashed))))),
            "data": _data_sha256(self.config["data"]["name"]),
            "parent": self.parent.signature if self.parent else None,
        }
        return hashlib.sha256(canonical(parts).encode()).hexdigest()[:20]

    @property
    def command(self) -> str:
        """The command line that runs this cell again."""
        model = f" --model {self.key.model}" if self.key.model else ""
        return (
            f"fivefold reproduce {self.key.paper} --only {self.key.ablation} --data {self.key.data} "
            f"--seed {self.key.seed} --profile {self.key.profile}{model}"
        )


def _data_sha256(name: str) -> str:
    return content_sha256(name)


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces, the text that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def targets_of(node: Any) -> Iterator[str]:
    """Yield every `_target_` in a nested configuration."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets_of(value)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested containers as {"a.b.0": leaf}."""
    if isinstance(tree, dict):
        pairs = list(tree.items())
    elif isinstance(tree, list):
        pairs = list(enumerate(tree))
    else:
        return {prefix: tree}
    return {name: leaf for k, v in pairs for name, leaf in flatten(v, f"{prefix}.{k}" if prefix else str(k)).items()}


def ablations(paper: str, conf: Path = CONF) -> list[str]:
    """Return the names of a paper's ablation files, sorted."""
    return sorted(file.stem for file in (conf / "ablation" / paper).glob("*.yaml"))


def profiles(paper: str, conf: Path = CONF) -> list[str]:
    """Return the names of the profiles that a paper has, sorted."""
    return sorted(file.stem for file in (conf / "profile" / paper).glob("*.yaml"))


def models(paper: str, conf: Path = CONF) -> list[str]:
    """Return the names of the model sizes that a paper has to choose from, sorted."""
    return sorted(file.stem for file in (conf / "model" / paper).glob("*.yaml"))


def resolve(key: CellKey, conf: Path = CONF, trainer: str = "cpu") -> Cell:
    """Compose, resolve and validate the configuration of a cell.

    Args:
        key: which cell.
        conf: the folder of configuration files.
        trainer: where it runs, a file of conf/trainer. It does not enter the signature.
    Raises:
        ConfigError: an unknown ablation, data set, profile, model, trainer or key, or an impossible value; nearest valid
            names included.
    """
    origin = origin_of(key)
    template = _template(replace(key, seed=0), conf, trainer)
    config = template.config_of(key.seed) if template else _resolved(key, conf, trainer, key.seed)
    validate(config, origin)
    _check_ancestry(key, config, conf, trainer)
    return Cell(key, config, conf, trainer)


def origin_of(key: CellKey) -> str:
    """Return how errors name what a cell of any seed comes from."""
    return f"{key.ablation} on {key.data} ({key.scale})"


def _check_ancestry(key: CellKey, config: dict[str, Any], conf: Path, trainer: str) -> None:
    """Refuse a parent that does not exist, or one that descends from this very ablation."""
    seen, parent = [key.ablation], config["parent"]
    while parent is not None:
        seen.append(parent["ablation"])
        if len(set(seen)) < len(seen):
            raise ConfigError(f"parent.ablation: {' <- '.join(seen)}: an ablation cannot descend from itself")
        above = replace(key, ablation=parent["ablation"])
        template = _template(replace(above, seed=0), conf, trainer)
        parent = (template.config if template else _resolved(above, conf, trainer, above.seed))["parent"]


@dataclass(frozen=True)
class _Template:
    """A resolved configuration and the places in it that hold the seed and nothing else."""

    config: dict[str, Any]
    places: tuple[tuple[str | int, ...], ...]

    def config_of(self, seed: int) -> dict[str, Any]:
        """Return a copy for this seed."""
        filled = copy.deepcopy(self.config)
        for *parents, last in self.places:
            node: Any = filled
            for part in parents:
                node = node[part]
            node[last] = seed
        return filled


PROBES = (1_073_741_827, 2_147_483_659)  # two seeds that no one uses


@cache
def _template(key: CellKey, conf: Path, trainer: str) -> _Template | None:
    """Resolve for two seeds, which is slow, so that no other seed needs it; None if more than the seed itself changes."""
    name, inputs = (
        f"{conf}|{key}|{trainer}",
        memo.digest_of_conf(conf, key.paper, key.ablation) if conf == CONF else None,
    )
    if inputs and (kept := memo.recall("conf", name, inputs)):
        return _Template(kept["config"], tuple(tuple(place) for place in kept["places"]))
    first, second = (_resolved(key, conf, trainer, seed) for seed in PROBES)
    places = _changes(first, second)
    if places is None:
        return None
    if inputs:
        memo.keep("conf", name, inputs, {"config": first, "places": [list(place) for place in places]})
    return _Template(first, tuple(places))


def _changes(first: Any, second: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]] | None:
    """The paths at which one probe stands in the place of the other; None where anything else differs."""
    if isinstance(first, dict) and isinstance(second, dict) and list(first) == list(second):
        parts = [_changes(first[name], second[name], (*path, name)) for name in first]
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        parts = [_changes(a, b, (*path, i)) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    elif type(first) is type(second) and (first == second or first is second):
        return []
    else:
        return [path] if (first, second) == PROBES else None
    found = [part for part in parts if part is not None]
    return [place for part in found for place in part] if len(found) == len(parts) else None


def _resolved(key: CellKey, conf: Path, trainer: str, seed: int) -> dict[str, Any]:
    composed = _compose(replace(key, seed=0), conf, trainer)
    try:
        seeded = OmegaConf.merge(composed, {"seed": seed})
        config = OmegaConf.to_container(seeded, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin_of(key)}: {_explain(composed, key, error)}") from error
    assert isinstance(config, dict)
    return {str(name): value for name, value in config.items()}


def _explain(composed: DictConfig, key: CellKey, error: OmegaConfBaseException) -> str:
    """Say which key is at fault. `budget` is looked up by `family`, so a wrong family shows as a missing budget."""
    line = str(error).splitlines()[0]
    budgets, family = OmegaConf.select(composed, "profile.budgets"), OmegaConf.select(composed, "family")
    if "profile.budgets" in line and isinstance(budgets, DictConfig):
        if family not in budgets:
            return f"family: '{family}' names no budget of the profile{nearest(str(family), map(str, budgets))}"
        known = [str(name) for name in budgets[family]]
        return f"family: '{family}' has no budget for {key.data} in this profile{nearest(key.data, known)}"
    return f"{error.full_key}: {line}" if error.full_key else line


@cache
def _compose(key: CellKey, conf: Path, trainer: str) -> DictConfig:
    """Compose the files once for all seeds; interpolations are resolved later."""
    paper, ablation, profile = key.paper, key.ablation, key.profile
    _check_choice(conf, "paper", "paper", paper)
    _check_choice(conf, f"ablation/{paper}", "ablation", ablation)
    _check_choice(conf, f"profile/{paper}", "profile", profile)
    _check_choice(conf, "data", "data", key.data)
    _check_choice(conf, "trainer", "trainer", trainer)
    choices = [f"paper={paper}", f"ablation={paper}/{ablation}", f"data={key.data}", f"profile={paper}/{profile}"]
    if key.model:
        _check_model(conf, key)
        choices.append(f"model/{paper}@_global_={key.model}")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3", job_name="fivefold"):
            return compose(config_name="config", overrides=[*choices, f"trainer={trainer}"])
    except yaml.YAMLError as error:
        raise ConfigError(_explain_yaml(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{origin_of(key)}: {str(error).splitlines()[0]}") from error


def _explain_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a configuration file"
    return f"{where}: this is not YAML: {problem}"


def _check_model(conf: Path, key: CellKey) -> None:
    if not (known := models(key.paper, conf)):
        raise ConfigError(f"{key.paper} has no other models to choose from; leave --model out")
    if key.model not in known:
        raise ConfigError(f"unknown model '{key.model}'{nearest(key.model, known)}")


def _check_choice(conf: Path, folder: str, what: str, name: str) -> None:
    known = [file.stem for file in (conf / folder).glob("*.yaml")]
    if name not in known:
        raise ConfigError(f"unknown {what} '{name}'{nearest(name, known)}")
