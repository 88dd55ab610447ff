"""`fivefold compare`: what differs between ablations or runs in configuration, metrics, intervals and cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import tables
from experiments.cell import flatten
from experiments.claims import PaperSpec, available_papers, load_paper
from experiments.errors import UserError
from experiments.export_runs import finished
from experiments.inspection import find_run
from experiments.numbers import signed
from experiments.records import Record
from experiments.schema import nearest
from experiments.showcase import headline
from experiments.stats import t_estimate, welch
from experiments.verdict import EstimateRow, estimates

COSTS = ("cost/", "train/seconds", "train/samples")  # metrics that say what a result took
OF_A_SEED = ("seed", "datamodule.seed")  # settings that differ within a side


@dataclass(frozen=True)
class Side:
    """One of the things compared: its name, and its finished runs, by seed."""

    name: str
    records: tuple[Record, ...]

    @property
    def paper(self) -> str:
        """The key of its paper."""
        return self.records[0].key.paper

    def config(self) -> dict[str, Any]:
        """Return the settings that its seeds have in common, flat."""
        known = [
            flatten(yaml.safe_load(f.read_text())) for r in self.records if (f := r.path / "config.yaml").is_file()
        ]
        first = known[0] if known else {}
        return {k: v for k, v in first.items() if k not in OF_A_SEED and all(o.get(k) == v for o in known)}

    def values(self, metric: str) -> dict[int, float]:
        """Return {seed: value} of a metric."""
        return {r.key.seed: r.metrics[metric] for r in self.records if metric in r.metrics}


def compare(
    console: Console, names: Sequence[str], runs: Path, profile: str = "", data: str = "", metrics: Sequence[str] = ()
) -> None:
    """Print the differences; the first name is what the others are held against.

    Args:
        names: ablations ("net1", "net1@mnist" for one data set), or runs (the start of a signature or MLflow id).
        profile: only runs of this profile; where an ablation has several and none is named, the one with most runs.
        data: the data set of ablations that have run on several and do not name one.
        metrics: which to show, as patterns such as "noise/*"; default the paper's headline metrics that were measured.
    Raises:
        UserError: fewer than two names, a name that is neither, or a choice that has to be made.
    """
    if len(names) < 2:
        raise UserError("compare takes two or more: `fivefold compare net0 net1`")
    everything = finished(runs)
    if not everything:
        raise UserError(f"there are no finished runs under {runs}; `make reproduce-paper-3` makes some")
    sides = [side(name, everything, runs, profile, data) for name in names]
    console.print(configuration_table(sides))
    console.print(metric_table(sides, metrics))
    console.print(cost_table(sides))
    first = sides[0]
    console.print(
        f"Means over seeds with half the 95% Student interval. Differences are the other minus {escape(first.name)}, paired by "
        "seed on the same data and by Welch otherwise; * marks an interval that does not hold 0, uncorrected: a verdict "
        "corrects for all claims of its paper, see `fivefold explain`.",
        soft_wrap=True,
    )


def side(name: str, records: Sequence[Record], runs: Path, profile: str, data: str) -> Side:
    """Return what a name stands for: an ablation's seeds, or a single run.

    Raises:
        UserError: it is nothing, or several things.
    """
    ablation, _, wanted = name.partition("@")
    mine = [r for r in records if r.key.ablation == ablation and (not profile or r.key.scale == profile)]
    if not mine:
        known = {r.key.ablation for r in records if not profile or r.key.scale == profile}
        if len(name) >= 4 and any(r.signature.startswith(name) or r.run_id.startswith(name) for r in records):
            found = find_run(name, runs)
            return Side(f"{found.key.ablation} seed {found.key.seed} ({name[:8]})", (found,))
        under = f" under the profile '{profile}'" if profile else ""
        raise UserError(f"'{name}' is no ablation with finished runs{under}, and no run{nearest(ablation, known)}")
    mine = _one(mine, "paper", lambda r: r.key.paper, name, "", "")
    mine = _one(mine, "data set", lambda r: r.key.data, name, wanted or data, "name it as in `{0}@{1}`, or with --data")
    counts = {r.key.scale: sum(o.key.scale == r.key.scale for o in mine) for r in mine}
    scale = max(sorted(counts), key=counts.__getitem__)
    # An ablation that was run again after a change has old runs beside new ones: the latest of each seed counts.
    latest = {r.key.seed: r for r in sorted(mine, key=_when) if r.key.scale == scale}
    return Side(f"{ablation} on {mine[0].key.data}", tuple(latest[seed] for seed in sorted(latest)))


def _when(record: Record) -> str:
    return str(record.done.get("finished", ""))


def _one(records: list[Record], what: str, of: Any, name: str, wanted: str, hint: str) -> list[Record]:
    """The records of the one wanted value; refused where there are several and none is wanted."""
    found = sorted({of(record) for record in records})
    if wanted and wanted not in found:
        raise UserError(
            f"'{name}' has no finished runs on '{wanted}'{nearest(wanted, found)}; there are {', '.join(found)}"
        )
    if not wanted and len(found) > 1:
        said = hint.format(name.partition("@")[0], found[0]) if hint else "name a run instead"
        raise UserError(f"'{name}' stands for runs of more than one {what}: {', '.join(found)}; {said}")
    return [record for record in records if of(record) == (wanted or found[0])]


def configuration_table(sides: Sequence[Side]) -> Table:
    """Return the settings in which the sides differ."""
    configs = [side.config() for side in sides]
    table = _table("Configuration", "setting", sides)
    names = sorted({name for config in configs for name in config})
    differing = [name for name in names if len({str(config.get(name, tables.MISSING)) for config in configs}) > 1]
    for name in differing:
        table.add_row(escape(name), *(escape(str(config.get(name, tables.MISSING))) for config in configs))
    if not differing:
        table.add_row("no setting differs", *[""] * len(sides))
    return table


def metric_table(sides: Sequence[Side], patterns: Sequence[str]) -> Table:
    """Return each metric's mean with its interval, and the difference to the first side with its own."""
    specs = {
        key: load_paper(key) for key in sorted({side.paper for side in sides}) if key in available_papers().values()
    }
    measured = sorted({name for side in sides for record in side.records for name in record.metrics})
    chosen = _chosen(measured, patterns, specs.values())
    table = _table("Metrics", "metric", sides, differences=True)
    rows = [_rows(side, specs) for side in sides]
    for name in chosen:
        unit = next((s.metric(name).unit for s in specs.values() if _knows(s, name)), "")
        cells = [tables.number(row) if (row := found.get(name)) else tables.MISSING for found in rows]
        gaps = [difference(sides[0], other, name, unit) for other in sides[1:]]
        table.add_row(f"{escape(name)} ({escape(unit)})" if unit else escape(name), *cells, *gaps)
    if not chosen:
        table.add_row("no such metric was measured", *[""] * (2 * len(sides) - 1))
    return table


def cost_table(sides: Sequence[Side]) -> Table:
    """Return what each side took: parameters, operations, samples, seconds a run."""
    table = _table("Cost", "cost", sides)
    names = sorted({n for s in sides for r in s.records for n in r.metrics if n.startswith(COSTS)})
    for name in names:
        known = [list(side.values(name).values()) for side in sides]
        table.add_row(escape(name), *(f"{sum(v) / len(v):,.6g}" if v else tables.MISSING for v in known))
    table.add_row("seeds", *(str(len(side.records)) for side in sides))
    return table


def difference(first: Side, other: Side, metric: str, unit: str) -> str:
    """Return other minus first with its interval, as people read it: paired by seed on the same data, else by Welch."""
    a, b = first.values(metric), other.values(metric)
    if not a or not b:
        return tables.MISSING
    if min(len(a), len(b)) < 2:
        return f"{signed(_mean(b) - _mean(a), unit)} (no interval)"
    common, same = sorted(a.keys() & b.keys()), first.records[0].key.data == other.records[0].key.data
    if same and len(common) > 1:
        gap = t_estimate([b[seed] - a[seed] for seed in common])
    else:
        gap, _ = welch(list(b.values()), list(a.values()))
    if gap.ci_low is None or gap.ci_high is None or gap.ci_low == gap.ci_high:
        return signed(gap.mean, unit)
    star = " *" if gap.ci_low > 0 or gap.ci_high < 0 else ""
    return f"{signed(gap.mean, unit)} ({signed(gap.ci_low, unit)} to {signed(gap.ci_high, unit)}){star}"


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values)


def _chosen(measured: Sequence[str], patterns: Sequence[str], specs: Iterable[PaperSpec]) -> list[str]:
    results = [name for name in measured if not name.startswith(COSTS)]
    if patterns:
        return [name for name in measured if any(fnmatch(name, pattern) for pattern in patterns)]
    wanted = dict.fromkeys(metric.name for spec in specs for metric in headline(spec))
    return [name for name in wanted if name in results] or [n for n in results if n.startswith("test/")] or results


def _knows(spec: PaperSpec, name: str) -> bool:
    try:
        spec.metric(name)
    except UserError:
        return False
    return True


def _rows(side: Side, specs: Mapping[str, PaperSpec]) -> dict[str, EstimateRow]:
    """A side's estimates; metrics that its paper's file does not know are shown without a unit."""
    spec = specs.get(side.paper)
    found = {row.metric: row for row in estimates(spec, side.records)} if spec else {}
    pools: dict[str, list[float]] = defaultdict(list)
    for record in side.records:
        for name, value in record.metrics.items():
            pools[name].append(value)
    for name in pools.keys() - found.keys():
        e, key = t_estimate(pools[name]), side.records[0].key
        numbers = (e.n, e.mean, e.sd, e.ci_low, e.ci_high)
        found[name] = EstimateRow(key.paper, key.ablation, key.data, name, "", *numbers, key.scale, "")
    return found


def _table(title: str, first: str, sides: Sequence[Side], differences: bool = False) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    table.add_column(first, overflow="fold")
    for side in sides:
        table.add_column(escape(side.name), justify="right", overflow="fold")
    for other in sides[1:] if differences else ():
        table.add_column(f"{escape(other.name)} minus the first", justify="right", overflow="fold")
    return table
