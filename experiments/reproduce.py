"""From claims to verdicts: plan, run what is missing, judge, report."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from experiments.cell import resolve
from experiments.claims import PaperSpec
from experiments.data_sets import card_of, named_by_content
from experiments.errors import UserError
from experiments.executors import Finished, Job, LocalPool, default_jobs
from experiments.graph import Node, Plan, Selection, keys_for, plan
from experiments.numbers import amount
from experiments.records import CellKey, Record
from experiments.store import Index, read_json, write_json
from experiments.verdict import Verdict, judge
from experiments.watch import Watch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Places:
    """Where runs lie and results go: `runs/` and `results/` of the project, or of FIVEFOLD_HOME."""

    runs: Path
    results: Path

    @classmethod
    def default(cls, profile: str = "small") -> Places:
        """Smoke results decide nothing, so they never overwrite those of a real run."""
        home = Path(os.environ.get("FIVEFOLD_HOME", ROOT)).resolve()
        results = home / "results" if profile != "smoke" else home / "runs" / "results-smoke"
        return cls(home / "runs", results)


@dataclass
class Reproduction:
    """One `fivefold reproduce` of one paper."""

    spec: PaperSpec
    selection: Selection
    places: Places
    console: Console
    jobs: int | None = None
    rerun_stale: bool = False

    def run(self) -> int:
        """Run what is missing, write the report, print the verdicts.

        Returns:
            The exit status: 1 if a cell failed, or if results/ could not be written since cells are stale.
        """
        from experiments.summary import print_plan

        self._fetch_unpinned()
        found = plan(self.spec, self.selection, self.places.runs, self.rerun_stale)
        jobs = self.jobs or default_jobs(found.nodes[0].cell.config["trainer"])
        if not found.to_run and not found.of("stale") and self._report_is_current(found):
            self.console.print(f"Nothing to do: all {len(found.nodes)} cells of this selection are done.")
            self._show(self._stored_verdicts())
            return 0
        print_plan(self.console, found, jobs)
        failed = self._execute(found, jobs) if found.to_run else []
        for node in failed:
            self._print_failure(node)
        if stale := found.of("stale") if not self.rerun_stale else []:
            self.console.print(
                f"{len(stale)} cells are stale: they ran with other code or settings. Nothing is written to results/ from a "
                "mixture; run them again with --rerun-stale (make: RERUN=stale).",
                soft_wrap=True,
            )
            return 1
        self._show(self.report())
        return 1 if failed else 0

    def _show(self, verdicts: list[dict]) -> None:
        """Print the verdicts; of a selection of single cells its numbers too."""
        from experiments import tables
        from experiments.summary import print_verdicts
        from experiments.verdict import estimates

        if not self._is_whole:
            records = self.records()
            rows = estimates(self.spec, records)
            self.console.print(tables.listing(self.spec, rows))
            for table in self.spec.tables:
                if table.id in self.selection.table:
                    notes = [f"Profile: {records[0].key.scale}."]
                    text = tables.markdown(tables.build(self.spec, table, rows, records, notes))
                    self.console.print(text, soft_wrap=True, markup=False, highlight=False)
        if self._is_whole or verdicts:
            print_verdicts(self.console, self.spec, verdicts, self.results)

    def records(self) -> list[Record]:
        """Read the record of every selected cell as it is now."""
        index = Index.scan(self.places.runs)
        trainer = self.selection.trainer  # of no consequence here, but composed already
        return [index.record(k, resolve(k, trainer=trainer).signature) for k in keys_for(self.spec, self.selection)]

    def report(self) -> list[dict]:
        """Judge the claims and write results/. A selection of single cells is judged and not written.

        Raises:
            UserError: cells that results/ would have to show are not finished; what is there stays as it is.
        """
        from experiments import page, report

        records = self.records()
        verdicts = judge(self.spec, records, self.selection.profile)
        if not self._is_whole:
            return [verdict.to_dict() for verdict in _about(verdicts, records)]
        self._refuse_unfinished(records)
        report.write_paper(self.spec, records, verdicts, self.results / self.spec.key)
        page.write_html([(self.spec, records, verdicts)], self.results / "report.html")
        self._summarise_in_tracker(records, verdicts)
        write_json(self._stamp, {"inputs": self._inputs(records)})
        return [verdict.to_dict() for verdict in verdicts]

    def _refuse_unfinished(self, records: list[Record]) -> None:
        """Numbers that are there are never replaced by the word that they are missing."""
        counts = Counter(record.state for record in records if record.state not in ("done", "failed"))
        if counts or not any(record.state == "done" for record in records):
            states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "all failed"
            raise UserError(
                f"paper {self.spec.number} ({self.selection.profile}): of {len(records)} cells {states}; results/ stays as it "
                f"is. Run `make reproduce-paper-{self.spec.number} PROFILE={self.selection.profile}` first"
                + (" with RERUN=stale." if counts["stale"] else ".")
            )

    @property
    def _is_whole(self) -> bool:
        chosen = self.selection
        return not (chosen.only or chosen.data or chosen.seed or chosen.table)

    @cached_property
    def results(self) -> Path:
        """Where this reproduction's results go: with another model or other data than the profile's, or fewer or more seeds,
        to a folder under runs/, so that they never take the place of the profile's own.
        """
        seeds, chosen = self.selection.seeds, Selection(self.selection.profile, model=self.selection.model)
        usual = seeds is None or seeds == len({key.seed for key in keys_for(self.spec, chosen)})
        others = [chosen.model] * bool(chosen.model) + [text.partition("=")[2] for text in self.selection.instead]
        if usual and not others:
            return self.places.results
        name = "+".join([f"results-{chosen.profile}", *others])
        return self.places.runs / (name if usual else f"{name}-{seeds}-seeds")

    @property
    def _stamp(self) -> Path:
        return self.places.runs / f".report-{self.spec.key}-{self.selection.profile}-{self.results.name}.json"

    def _inputs(self, records: Iterable[Record]) -> str:
        """A digest of all that a report is made from: the cells and their states, the claims and the reporting code."""
        whole = hashlib.sha256()
        for record in records:
            whole.update(f"{record.key}|{record.signature}|{record.state}\n".encode())
        code = [*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("templates/*")]
        for file in sorted([*code, *(Path(__file__).parent / "papers" / self.spec.key).iterdir()]):
            whole.update(file.read_bytes() if file.is_file() else b"")
        return whole.hexdigest()

    def _report_is_current(self, found: Plan) -> bool:
        if not self._is_whole:
            return True
        written = read_json(self.results / self.spec.key / "verdicts.json").get("profile")
        same = read_json(self._stamp).get("inputs") == self._inputs(n.record for n in found.nodes)
        return written == self.selection.profile and same

    def _stored_verdicts(self) -> list[dict]:
        if self._is_whole:
            return read_json(self.results / self.spec.key / "verdicts.json")["claims"]
        return self.report()

    def _execute(self, found: Plan, jobs: int) -> list[Node]:
        self._fetch_data(found)
        parents = self._parents(found)
        nodes = {node.cell.signature: node for node in found.to_run}
        heirs = _heirs(nodes)
        pool = LocalPool(jobs)
        watch = Watch(self.console, nodes, self.places.runs, jobs)
        failed: list[Node] = []

        def start(node: Node) -> None:
            tracked = node.cell.config["tracking"]["enabled"]
            pool.submit(Job(node.cell, self.places.runs, tracked, parents[_group(node.cell.key)]))

        def over(finished: Finished) -> None:
            watch.finish(finished)
            if finished.outcome == "failed":
                failed.append(nodes[finished.handle])
            for heir in heirs.pop(finished.handle, []):
                if finished.outcome == "done":
                    start(heir)
                else:
                    self._disinherit(heir)
                    over(Finished(heir.cell.signature, "failed"))

        try:
            with watch:
                waiting = {heir.cell.signature for group in heirs.values() for heir in group}
                for node in nodes.values():
                    if node.cell.signature not in waiting:
                        start(node)
                while nodes.keys() - watch.over:
                    for finished in pool.poll(timeout_s=0.5):
                        if finished.outcome == "busy":
                            watch.elsewhere.add(finished.handle)
                        else:
                            over(finished)
                    for handle in watch.elsewhere_done():
                        over(Finished(handle, "done"))
                    for handle in watch.released():
                        start(nodes[handle])
                    watch.refresh()
        except KeyboardInterrupt:
            self.console.print("\nStopping; what is finished stays, and the same command goes on from here.")
            pool.close()
            raise
        finally:
            pool.close()
            self._end_parents(parents, {_group(node.cell.key) for node in failed}, nodes.keys() - watch.over)
        return failed

    def _disinherit(self, heir: Node) -> None:
        """Keep why a cell was never started: the one whose weights it was to start from failed."""
        from experiments.run import write_failure

        cell = heir.cell
        assert cell.parent is not None
        folder = self.places.runs / cell.signature
        folder.mkdir(parents=True, exist_ok=True)
        write_failure(folder, cell, "", f"its parent failed: {cell.parent.key}")

    def _end_parents(self, parents: dict[tuple[str, ...], tuple[str, str]], failed: set, unfinished: set[str]) -> None:
        """End the parent runs of what this command ran, so that none is left running in the tracker."""
        from experiments import tracking

        store = tracking.Store(self.places.runs)
        for group, (_, parent) in parents.items():
            status = "FAILED" if group in failed else "KILLED" if unfinished else "FINISHED"
            tracking.summarise_parent(store, parent, {}, status)

    def _fetch_unpinned(self) -> None:
        """Have every text and all faces on disk: what is computed from them is named by what they turn out to hold."""
        for name in dict.fromkeys(key.data for key in keys_for(self.spec, self.selection)):
            if named_by_content(name):
                card_of(name)

    def _fetch_data(self, found: Plan) -> None:
        """Have every data set on disk, checked, before processes fan out."""
        for name in dict.fromkeys(node.cell.key.data for node in found.to_run):
            card = card_of(name)
            what = f"{amount(card.n, card.note)}, real" if card.real else "generated"
            self.console.print(f"Data: {card.name}, {what}, from {card.source}")

    def _parents(self, found: Plan) -> dict[tuple[str, ...], tuple[str, str]]:
        """Make the tracking store and the parent run of every group of seeds, once, before processes fan out."""
        from experiments import showcase, tracking

        store = tracking.Store(self.places.runs)
        tracking.prepare(store)
        title = f"{self.spec.number}. {self.spec.title}"
        experiment = tracking.experiment_id(store, self.spec.key, title, showcase.describe(self.spec))
        parents: dict[tuple[str, ...], tuple[str, str]] = {}
        for node in found.to_run:
            key, group = node.cell.key, _group(node.cell.key)
            if group not in parents:
                names = {
                    "paper": key.paper,
                    "ablation": key.ablation,
                    "data": key.data,
                    "profile": key.scale,
                }
                parents[group] = (experiment, tracking.parent_run(store, experiment, **names, params={}))
        return parents

    def _summarise_in_tracker(self, records: list[Record], verdicts: list[Verdict]) -> None:
        """Write mean and interval of every metric on the parent run of each group of seeds, with what people look at."""
        from experiments import showcase, tracking
        from experiments.verdict import estimates

        store = tracking.Store(self.places.runs)
        if not any(record.manifest.get("mlflow_run_id") for record in records):
            return
        tracking.prepare(store)
        by_group: dict[tuple[str, ...], dict[str, tuple[float, float | None, float | None, int]]] = defaultdict(dict)
        for row in estimates(self.spec, records):
            by_group[row.paper, row.ablation, row.data, row.profile][row.metric] = (
                row.mean,
                row.ci_low,
                row.ci_high,
                row.n,
            )
        experiments = {_group(r.key): r.manifest.get("mlflow_experiment_id") for r in records if r.manifest}
        failed = {_group(r.key) for r in records if r.state == "failed"}
        parents: dict[tuple[str, ...], tuple[str, str]] = {}
        for group, values in by_group.items():
            if experiment := experiments.get(group):
                names = dict(zip(("paper", "ablation", "data", "profile"), group, strict=True))
                parent = tracking.parent_run(store, experiment, **names, params={})
                status = "FAILED" if group in failed else "FINISHED"
                tracking.summarise_parent(store, parent, values, status)
                parents[group] = (experiment, parent)
        showcase.show(store, self.spec, records, verdicts, parents)

    def _print_failure(self, node: Node) -> None:
        failed = read_json(self.places.runs / node.cell.signature / "failed.json")
        where = self.places.runs / node.cell.signature / "failed.json"
        error = escape(failed.get("error", "no reason was left"))
        self.console.print(f"[bold]failed[/]: {node.cell.key}: {error}", soft_wrap=True)
        self.console.print(f"        traceback: {where}", soft_wrap=True)


def _heirs(nodes: Mapping[str, Node]) -> dict[str, list[Node]]:
    """For each cell that is yet to run, those that wait for its weights."""
    found: dict[str, list[Node]] = defaultdict(list)
    for node in nodes.values():
        if node.cell.parent is not None and node.cell.parent.signature in nodes:
            found[node.cell.parent.signature].append(node)
    return dict(found)


def _group(key: CellKey) -> tuple[str, ...]:
    return (key.paper, key.ablation, key.data, key.scale)


def _about(verdicts: list[Verdict], records: list[Record]) -> list[Verdict]:
    """The verdicts that some of these records feed."""
    runs = {record.run_id for record in records if record.state == "done"}
    return [verdict for verdict in verdicts if runs & set(verdict.runs)]
