"""Cell = (paper, ablation, data, seed, profile) -> resolved configuration -> signature.

The signature is sha256 over the canonical configuration, the code it reaches and the hash of its data. Two cells with
the same signature are the same experiment: one is run, the other is answered from disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.records import CellKey
from experiments.schema import ConfigError, hashed_keys, nearest, validate
from experiments.sources_digest import ROOT, closure, digest

CONF = ROOT / "conf"


@dataclass(frozen=True)
class Cell:
    """One training run, resolved: its key and its whole configuration as plain containers."""

    key: CellKey
    config: dict[str, Any]

    @cached_property
    def hashed(self) -> dict[str, Any]:
        """The part of the configuration that says what is computed (`trainer`, `tracking` and the like are not in it)."""
        return {name: self.config[name] for name in hashed_keys()} | {"profile": self.key.profile}

    @cached_property
    def signature(self) -> str:
        """First 20 hex digits of the sha256 over configuration, code and data."""
        from datamodules.catalogue import content_sha256

        parts = {
            "config": self.hashed,
            "code": digest(closure(sorted(set(targets_of(self.hashed))))),
            "data": content_sha256(self.key.data),
        }
        return hashlib.sha256(canonical(parts).encode()).hexdigest()[:20]

    @property
    def command(self) -> str:
        """The command line that runs this cell again."""
        return (
            f"fivefold reproduce {self.key.paper} --only {self.key.ablation} --data {self.key.data} "
            f"--seed {self.key.seed} --profile {self.key.profile}"
        )


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


def resolve(key: CellKey, conf: Path = CONF) -> Cell:
    """Compose, resolve and validate the configuration of a cell.

    Raises:
        ConfigError: an unknown ablation, data set, profile or key, or an impossible value; nearest valid names included.
    """
    composed = _compose(key.paper, key.ablation, key.data, key.profile, conf)
    origin = f"{key.ablation} on {key.data} ({key.profile})"
    try:
        seeded = OmegaConf.merge(composed, {"seed": key.seed})
        config = OmegaConf.to_container(seeded, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, dict)
    named = {str(name): value for name, value in config.items()}
    validate(named, origin)
    return Cell(key, named)


@cache
def _compose(paper: str, ablation: str, data: str, profile: str, conf: Path) -> DictConfig:
    """Compose the files once for all seeds; interpolations are resolved later, per seed."""
    _check_choice(conf, "paper", "paper", paper)
    _check_choice(conf, f"ablation/{paper}", "ablation", ablation)
    _check_choice(conf, f"profile/{paper}", "profile", profile)
    _check_choice(conf, "data", "data", data)
    choices = [f"paper={paper}", f"ablation={paper}/{ablation}", f"data={data}", f"profile={paper}/{profile}"]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf), version_base="1.3", job_name="fivefold"):
            return compose(config_name="config", overrides=choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{ablation} on {data} ({profile}): {str(error).splitlines()[0]}") from error


def _check_choice(conf: Path, folder: str, what: str, name: str) -> None:
    known = [file.stem for file in (conf / folder).glob("*.yaml")]
    if name not in known:
        raise ConfigError(f"unknown {what} '{name}'{nearest(name, known)}")
