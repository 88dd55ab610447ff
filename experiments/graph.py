"""What a paper's claims need, what of it is done, stale, failed or missing, and what the rest will cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.cell import Cell, ablations, resolve
from experiments.claims import PaperSpec
from experiments.records import CellKey, Record
from experiments.schema import ConfigError, Data, check_targets, nearest
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
    """What the user asked for: a profile, perhaps fewer or other seeds, ablations and data sets."""

    profile: str = "small"
    seeds: int | None = None
    seed: tuple[int, ...] = ()
    only: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


def keys_for(spec: PaperSpec, selection: Selection) -> list[CellKey]:
    """Return the cells that this selection of a paper needs, seed by seed so that partial results are paired.

    Raises:
        ConfigError: an ablation that does not exist, nearest name included.
    """
    pairs = spec.required(selection.profile)
    if selection.only:
        known = ablations(spec.key)
        for name in selection.only:
            if name not in known:
                raise ConfigError(f"unknown ablation '{name}'{nearest(name, known)}")
        needed = [pair for pair in pairs if pair[0] in selection.only]
        default = selection.data or ("mnist",)
        extra = [(a, d) for a in selection.only if a not in {p[0] for p in needed} for d in default]
        pairs = needed + extra
    if selection.data:
        listed = [pair for pair in pairs if pair[1] in selection.data]
        extra = [(a, d) for a in selection.only for d in selection.data if (a, d) not in listed]
        pairs = listed + extra
    if not pairs:
        raise ConfigError(f"nothing to run: no ablation of {spec.key} matches this selection")
    seeds = selection.seed or tuple(range(selection.seeds or _profile_seeds(spec, pairs[0], selection.profile)))
    return [CellKey(spec.key, a, d, seed, selection.profile) for seed in seeds for a, d in pairs]


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
        cell = resolve(key)
        nodes.append(Node(cell, index.record(key, cell.signature)))
    found = Plan(nodes, rerun_stale)
    waiting = {id(node) for node in (*found.to_run, *found.of("stale"))}
    if waiting:
        pricer = _Pricer(index)
        nodes = [pricer.price(node) if id(node) in waiting else node for node in nodes]
    return Plan(nodes, rerun_stale)


@dataclass
class _Pricer:
    """Prices cells, one net per (ablation, data set); times come from finished runs where there are any."""

    index: Index
    _nets: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    # Rough single-core model for a machine that has not run the cell yet; measured on an AMD EPYC core.
    FIXED_S, PER_STEP_S, PER_OPERATION_S = 3.0, 1.7e-3, 6.0e-11

    def price(self, node: Node) -> Node:
        config, key = node.cell.config, node.cell.key
        check_targets(config, origin=f"{key.ablation} on {key.data} ({key.profile})")
        if (key.ablation, key.data) not in self._nets:
            self._nets[key.ablation, key.data] = _price_net(config, key)
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


def _price_net(config: dict, key: CellKey) -> tuple[int, int]:
    from experiments.run import build_net
    from lit_modules.nets.counting import count_ops, count_params

    try:
        net = build_net(config)
    except Exception as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{key.ablation} on {key.data}: the net cannot be built: {cause}") from error
    return count_params(net), count_ops(net, Data.model_validate(config["data"]).input_shape).total
