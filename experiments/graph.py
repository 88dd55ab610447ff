"""What a paper's claims need, what of it is done, stale, failed or missing, and what the rest will cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from experiments.cell import Cell, ablations, resolve
from experiments.claims import PaperSpec
from experiments.prices import Cost, Pricer, processes_of
from experiments.records import CellKey, Record
from experiments.schema import ConfigError, nearest
from experiments.store import Index


@dataclass(frozen=True)
class Node:
    """A needed cell, its state on disk and, where it has yet to run, its price."""

    cell: Cell
    record: Record
    cost: Cost | None = None
    seconds: float | None = None  # expected, on one core or on as many devices as a cell takes
    memory: int | None = None  # bytes on each device, where they are known

    @property
    def params(self) -> int | None:
        """Trainable parameters."""
        return self.cost.params if self.cost else None

    @property
    def operations_per_sample(self) -> int | None:
        """Additions, multiplications and comparisons of one sample's forward pass."""
        return self.cost.operations if self.cost else None

    @property
    def samples(self) -> int:
        """Samples trained on, over all epochs; 0 where that is known only with the data."""
        budget = self.cell.config["budget"]
        return int(budget["max_epochs"] * (budget["train_samples"] or 0))


@dataclass(frozen=True)
class Plan:
    """Every cell that was asked for, in running order."""

    nodes: list[Node]
    rerun_stale: bool = False
    retry_failed: bool = True
    processes: int = 1  # that a cell takes
    missing: tuple[str, ...] = ()  # data sets that are not here, without which nobody knows which runs are of them

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
    model: str = ""  # a file of conf/model/<paper>, in the place of the profile's
    instead: tuple[str, ...] = ()  # OTHER=NAME of data sets that the paper's claims have been put on


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
    seeds = selection.seed or _profile_seeds(spec, pairs[0], selection)
    pairs = _with_parents(spec, pairs, selection)
    return [_key(spec, pair, selection, seed) for seed in seeds for pair in pairs]


def _key(spec: PaperSpec, pair: tuple[str, str], selection: Selection, seed: int = 0) -> CellKey:
    return CellKey(spec.key, *pair, seed, selection.profile, selection.model)


def _first_data(spec: PaperSpec) -> str:
    """The data set of the paper's first claim, taken for an ablation that no claim or table names."""
    return spec.claims[0].operands[0].data


def _with_parents(spec: PaperSpec, pairs: list[tuple[str, str]], selection: Selection) -> list[tuple[str, str]]:
    """The same pairs with those that they descend from in front, generation by generation."""
    generations = [pairs]
    while above := [pair for pair in (_parent_of(spec, p, selection) for p in generations[0]) if pair]:
        generations.insert(0, above)
    return list(dict.fromkeys(pair for generation in generations for pair in generation))


def _parent_of(spec: PaperSpec, pair: tuple[str, str], selection: Selection) -> tuple[str, str] | None:
    parent = resolve(_key(spec, pair, selection), trainer=selection.trainer).config["parent"]
    return (parent["ablation"], pair[1]) if parent else None


def _pairs_of_tables(spec: PaperSpec, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """What some tables need, whichever profile shows them."""
    tables = {table.id: table for table in spec.tables}
    for name in names:
        if name not in tables:
            raise ConfigError(f"unknown table '{name}' of {spec.key}{nearest(name, tables)}")
    chosen = [tables[name] for name in names]
    return list(dict.fromkeys((row, column.data) for table in chosen for row in table.rows for column in table.columns))


def _profile_seeds(spec: PaperSpec, pair: tuple[str, str], selection: Selection) -> tuple[int, ...]:
    """The profile's seeds, or as many from its first one on as are asked for."""
    profile = resolve(_key(spec, pair, selection), trainer=selection.trainer).config["profile"]
    first = int(profile.get("first_seed", 0))
    return tuple(range(first, first + (selection.seeds or int(profile["seeds"]))))


def plan(spec: PaperSpec, selection: Selection, runs: Path, rerun_stale: bool = False) -> Plan:
    """Resolve every needed cell, look each up on disk and price what has yet to run.

    Raises:
        ConfigError: any faulty configuration among them, before anything runs.
    """
    index, missing = Index.scan(runs), set[str]()
    nodes = []
    for key in keys_for(spec, selection):
        cell = resolve(key, trainer=selection.trainer)
        nodes.append(Node(cell, _record(index, cell, missing)))
    found = Plan(nodes, rerun_stale, missing=tuple(sorted(missing)))
    waiting = {id(node) for node in (*found.to_run, *found.of("stale"))}
    if not waiting:
        return found
    trainer = nodes[0].cell.config["trainer"]
    pricer = Pricer(index, spec, processes_of(trainer))
    nodes = [_priced(node, pricer) if id(node) in waiting else node for node in nodes]
    return replace(found, nodes=nodes, processes=pricer.processes)


def _record(index: Index, cell: Cell, missing: set[str]) -> Record:
    """What is known of a cell on disk: nothing, while its data, whose content names its runs, is not here."""
    from datamodules.sources import DataUnavailable

    try:
        if cell.key.data not in missing:
            return index.record(cell.key, cell.signature)
    except DataUnavailable:
        missing.add(cell.key.data)
    return Record(key=cell.key, signature="", state="not run", path=index.runs)


def _priced(node: Node, pricer: Pricer) -> Node:
    cost, seconds = pricer.price(node.cell)
    config = node.cell.config
    memory = cost.memory(config["budget"], config["trainer"]["strategy"], pricer.processes)
    return Node(node.cell, node.record, cost, seconds, memory)
