"""What a paper's claims need, what of it is done, stale, failed or missing, and what the rest will cost."""

from __future__ import annotations

import inspect
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from experiments.cell import Cell, ablations, resolve
from experiments.claims import PaperSpec
from experiments.records import CellKey, Record
from experiments.schema import ConfigError, Data, check_targets, default_of, nearest
from experiments.store import Index


@dataclass(frozen=True)
class Node:
    """A needed cell, its state on disk and, where it has yet to run, its price."""

    cell: Cell
    record: Record
    params: int | None = None
    operations_per_sample: int | None = None  # additions, multiplications and comparisons of one sample's forward pass
    seconds: float | None = None  # expected on one core


@dataclass(frozen=True)
class Plan:
    """Every cell that was asked for, in running order."""

    nodes: list[Node]
    rerun_stale: bool = False
    retry_failed: bool = True

    def of(self, *states: str) -> list[Node]:
        """Return the nodes in any of these states."""
        return [node for node in self.nodes if node.record.state in states]

    @property
    def to_run(self) -> list[Node]:
        """Cells that a `reproduce` starts now; a stale one only on request."""
        states = ["not run", "running"]
        states += ["failed"] if self.retry_failed else []
        states += ["stale"] if self.rerun_stale else []
        return self.of(*states)

    def eta_seconds(self, jobs: int) -> float:
        """Expected wall-clock seconds with `jobs` processes: total work over jobs, but no less than the longest cell."""
        times = [node.seconds or 0.0 for node in self.to_run]
        return max(sum(times) / jobs, max(times, default=0.0))


@dataclass(frozen=True)
class Selection:
    """What the user asked for: a profile, perhaps fewer or other seeds, ablations, data sets or tables, and where to run."""

    profile: str = "small"
    seeds: int | None = None
    seed: tuple[int, ...] = ()
    only: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    trainer: str = "cpu"  # a file of conf/trainer
    table: tuple[str, ...] = ()


def keys_for(spec: PaperSpec, selection: Selection) -> list[CellKey]:
    """Return the cells that this selection of a paper needs, seed by seed so that partial results are paired; the cells
    whose trained weights others start from come before those.

    Raises:
        ConfigError: an ablation or table that does not exist, nearest name included.
    """
    pairs = _pairs_of_tables(spec, selection.table) if selection.table else spec.required(selection.profile)
    if selection.only:
        known = ablations(spec.key)
        for name in selection.only:
            if name not in known:
                raise ConfigError(f"unknown ablation '{name}'{nearest(name, known)}")
        needed = [pair for pair in pairs if pair[0] in selection.only]
        default = selection.data or (_first_data(spec),)
        extra = [(a, d) for a in selection.only if a not in {p[0] for p in needed} for d in default]
        pairs = needed + extra
    if selection.data:
        listed = [pair for pair in pairs if pair[1] in selection.data]
        extra = [(a, d) for a in selection.only for d in selection.data if (a, d) not in listed]
        pairs = listed + extra
    if not pairs:
        raise ConfigError(f"nothing to run: no ablation of {spec.key} matches this selection")
    seeds = selection.seed or tuple(range(selection.seeds or _profile_seeds(spec, pairs[0], selection.profile)))
    pairs = _with_parents(spec, pairs, selection.profile)
    return [CellKey(spec.key, a, d, seed, selection.profile) for seed in seeds for a, d in pairs]


def _first_data(spec: PaperSpec) -> str:
    """The data set of the paper's first claim, taken for an ablation that no claim or table names."""
    return spec.claims[0].operands[0].data


def _with_parents(spec: PaperSpec, pairs: list[tuple[str, str]], profile: str) -> list[tuple[str, str]]:
    """The same pairs with those that they descend from in front, generation by generation."""
    generations = [pairs]
    while above := [pair for pair in (_parent_of(spec, p, profile) for p in generations[0]) if pair]:
        generations.insert(0, above)
    return list(dict.fromkeys(pair for generation in generations for pair in generation))


def _parent_of(spec: PaperSpec, pair: tuple[str, str], profile: str) -> tuple[str, str] | None:
    parent = resolve(CellKey(spec.key, *pair, 0, profile)).config["parent"]
    return (parent["ablation"], pair[1]) if parent else None


def _pairs_of_tables(spec: PaperSpec, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """What some tables need, whichever profile shows them."""
    tables = {table.id: table for table in spec.tables}
    for name in names:
        if name not in tables:
            raise ConfigError(f"unknown table '{name}' of {spec.key}{nearest(name, tables)}")
    chosen = [tables[name] for name in names]
    return list(dict.fromkeys((row, column.data) for table in chosen for row in table.rows for column in table.columns))


def _profile_seeds(spec: PaperSpec, pair: tuple[str, str], profile: str) -> int:
    return int(resolve(CellKey(spec.key, *pair, 0, profile)).config["profile"]["seeds"])


def plan(spec: PaperSpec, selection: Selection, runs: Path, rerun_stale: bool = False) -> Plan:
    """Resolve every needed cell, look each up on disk and price what has yet to run.

    Raises:
        ConfigError: any faulty configuration among them, before anything runs.
    """
    index = Index.scan(runs)
    nodes = []
    for key in keys_for(spec, selection):
        cell = resolve(key, trainer=selection.trainer)
        nodes.append(Node(cell, index.record(key, cell.signature)))
    found = Plan(nodes, rerun_stale)
    waiting = {id(node) for node in (*found.to_run, *found.of("stale"))}
    if waiting:
        pricer = _Pricer(index, spec)
        nodes = [pricer.price(node) if id(node) in waiting else node for node in nodes]
    return Plan(nodes, rerun_stale)


@dataclass
class _Pricer:
    """Prices cells, one net per (ablation, data set); times come from finished runs where there are any."""

    index: Index
    spec: PaperSpec
    _nets: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    # Rough single-core model for a machine that has not run the cell yet; measured on an AMD EPYC core.
    FIXED_S, PER_STEP_S, PER_OPERATION_S = 3.0, 1.7e-3, 6.0e-11

    def price(self, node: Node) -> Node:
        config, key = node.cell.config, node.cell.key
        if (key.ablation, key.data) not in self._nets:
            origin = f"{key.ablation} on {key.data} ({key.profile})"
            self._nets[key.ablation, key.data] = _check_and_price(config, self.spec, origin)
        params, operations = self._nets[key.ablation, key.data]
        earlier = self.index.seconds(self._same_but_seed(key))
        seconds = statistics.median(earlier) if earlier else self._guess(config, operations)
        return Node(node.cell, node.record, params, operations, seconds)

    def _same_but_seed(self, key: CellKey) -> Iterable[CellKey]:
        wanted = (key.paper, key.ablation, key.data, key.profile)
        return [k for k in self.index.signatures if (k.paper, k.ablation, k.data, k.profile) == wanted]

    def _guess(self, config: dict, operations: int) -> float:
        budget = config["budget"]
        samples = budget["max_epochs"] * (budget["train_samples"] or 55_000)
        steps = samples / budget["batch_size"]
        return self.FIXED_S + steps * self.PER_STEP_S + 4 * samples * operations * self.PER_OPERATION_S


def _check_and_price(config: dict[str, Any], spec: PaperSpec, origin: str) -> tuple[int, int]:
    """Refuse what would fail in training, without loading data; return the net's parameters and operations."""
    from lit_modules.nets.counting import count_ops, count_params

    try:
        check_targets(config, origin)
        _check_data(config)
        net = _dry_build(config)
        _check_monitor(config, spec)
        shape = Data.model_validate(config["data"]).input_shape
        try:
            return count_params(net), count_ops(net, shape).total
        except Exception as error:
            raise ConfigError(f"net: it cannot take a sample of shape {shape}: {_cause(error)}") from error
    except ConfigError as error:
        said = str(error)
        raise ConfigError(said if said.startswith(origin) else f"{origin}: {said}") from error


def _check_data(config: Mapping[str, Any]) -> None:
    """Compare what the configuration says of a set of images with what the set is: shape, classes, numbers of images."""
    from datamodules.images import IMAGE_SETS, check_split

    data, facts = config["data"], IMAGE_SETS.get(config["data"]["name"])
    if facts is None:
        return
    takers = {"channels": "in_channels", "image_size": "image_size", "classes": "num_classes"}
    for name, argument in takers.items():
        right = getattr(facts, name)
        given = {f"data.{name}": data[name]}
        given |= {
            f"{part}.{argument}": config[part][argument] for part in ("net", "module") if argument in config[part]
        }
        for path, value in given.items():
            if value != right:
                raise ConfigError(f"{path}: {value!r}, but {data['name']} has {right}; leave it to conf/data")
    for part in ("budget", "datamodule"):
        sizes = {name: config[part].get(name) for name in ("val_samples", "train_samples", "test_samples")}
        if sizes["test_samples"] is not None and not 1 <= sizes["test_samples"] <= facts.test:
            limits = f"must lie between 1 and {facts.test}, or be null for all"
            raise ConfigError(f"{part}.test_samples {limits}; got {sizes['test_samples']}")
        if sizes["val_samples"] is not None:
            try:
                check_split(facts.train, sizes["val_samples"], sizes["train_samples"])
            except ValueError as error:
                raise ConfigError(f"{part}.{error}") from error


def _dry_build(config: dict[str, Any]) -> Any:
    """Build everything that a run of this configuration builds before it loads data, and return the net."""
    from hydra.utils import instantiate

    from experiments.run import build_net

    net = _build(config["net"], "net", lambda node: build_net({**config, "net": node}))
    parameters, optim = list(net.parameters()), config["optim"]
    if parameters and config["budget"]["max_epochs"]:
        _build(optim["optimizer"], "optim.optimizer", lambda node: instantiate(node, _partial_=True)(parameters))
    schedule = optim["schedule"] and _build(optim["schedule"], "optim.schedule", instantiate)
    _build(config["datamodule"], "datamodule", instantiate)
    if config["parent"]:
        _build(config["parent"]["inherit"], "parent.inherit", instantiate)
    parts = {"net": net, "optimizer": instantiate(optim["optimizer"], _partial_=True), "schedule": schedule}
    _build(config["module"], "module", lambda node: instantiate(node, **parts, steps_per_epoch=1))
    return net


def _build(node: dict[str, Any], path: str, make: Callable[[dict[str, Any]], Any]) -> Any:
    """Build one part, or say which of its arguments stands in the way."""
    try:
        return make(node)
    except Exception as error:
        said = _cause(error)
        name = _culprit(node, make, said)
        if name is None:
            raise ConfigError(f"{path}: {node['_target_']} cannot be built: {said}") from error
        hint = default_of(node["_target_"], name)
        raise ConfigError(f"{path}.{name}: {node[name]!r} cannot be used: {said}{hint}") from error


def _culprit(node: dict[str, Any], make: Callable[[dict[str, Any]], Any], said: str) -> str | None:
    """The argument that an error names or, where it names none, the one without which there is no error."""
    names = [name for name in node if not name.startswith("_")]
    named = [(found.start(), name) for name in names if (found := re.search(rf"\b{re.escape(name)}\b", said))]
    if named:
        return min(named)[1]
    for name in names:
        try:
            make({key: value for key, value in node.items() if key != name})
        except Exception:
            continue
        return name
    return None


def _cause(error: Exception) -> str:
    """What went wrong, without the frame that Hydra puts round it."""
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [type(cause).__name__])[0]


def _check_monitor(config: Mapping[str, Any], spec: PaperSpec) -> None:
    """The metric that selects weights must be one that the claims file knows or that the module writes about."""
    monitor = config["selection"]["monitor"]
    known = {name for name in spec.metrics if name.startswith("val/")} | _written_of(config["module"]["_target_"])
    if monitor not in known:
        raise ConfigError(f"selection.monitor: nothing logs '{monitor}'{nearest(monitor, known)}")


@cache
def _written_of(module: str) -> frozenset[str]:
    """The validation metrics that the code and docstrings of a module write about."""
    from hydra.utils import get_class

    ours = [kind for kind in get_class(module).__mro__ if kind.__module__.startswith("lit_modules.")]
    return frozenset(name for kind in ours for name in re.findall(r"\bval/\w+", inspect.getsource(kind)))
