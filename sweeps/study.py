"""`fivefold sweep`: search, then the winner on fresh seeds, then the report. Stopped at any moment, it goes on from there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from experiments.cell import Cell
from experiments.claims import load_paper
from experiments.data_sets import card_of
from experiments.errors import UserError
from experiments.records import Record
from experiments.reproduce import Places
from experiments.schema import check_targets
from sweeps import finals
from sweeps.crew import Crew
from sweeps.objective import SECONDS, default_costs
from sweeps.pool import run_cells
from sweeps.samplers import REJECTED, combinations, examples
from sweeps.space import Space, load
from sweeps.storage import SURPLUS, default_storage, open_storage, open_study, places, recover, shown
from sweeps.worker import Task, reachable

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

POLL_S = 1.0
DASHBOARD = "http://127.0.0.1:8080/dashboard"  # where `make sweep-ui` serves a study


@dataclass
class Sweep:
    """One `fivefold sweep` of one space.

    Args:
        trials: in place of the space's; a study that has as many is left as it is.
        workers: processes at once, one thread each.
        storage: the database's address; by default one beside the runs.
    """

    space: Space
    places: Places
    console: Console
    trials: int | None = None
    workers: int = 2
    storage: str = ""
    tracked: bool = True
    _shown: set[tuple[str, int]] = field(default_factory=set)

    def run(self) -> int:
        """Search until every study has its trials, run the finals, write the report.

        Returns:
            The exit status: 1 where no trial came to its end or a final run failed.
        """
        from sweeps.report import print_outcome, write_report

        check_whole(self.space)
        card_of(self.space.data)
        self.places.runs.mkdir(parents=True, exist_ok=True)
        address = self.storage or default_storage(self.places.runs)
        database = open_storage(address)
        self._announce(address)
        self._run_parents()
        studies = {}
        for arm in ("", *(name for name, a in self.space.arms.items() if a.tuned)):
            space = self.space.arm(arm) if arm else self.space
            studies[arm] = self._search(space, arm, address, database)
        contenders = self._run_finals(studies)
        outcome = write_report(self.space, studies, contenders, self.places.results)
        print_outcome(self.console, outcome)
        failed = any(record.state == "failed" for final in contenders for record in final.records)
        return int(failed or finals.best_of(studies[""], self.space) is None)

    def _announce(self, address: str) -> None:
        space, total = self.space, reachable(self.space, self.trials or self.space.trials)
        count = combinations(space)
        arms = [name for name, arm in space.arms.items() if arm.tuned]
        of = f" of {count} combinations" if count is not None else ""
        self.console.print(
            f"{space.paper}, {space.name} ({space.profile}): {total} trials{of}, {len(space.seeds)} seeds each, sampler "
            f"{space.sampler['name']}, pruner {space.pruner['name']}; "
            + (f"as many again for {', '.join(arms)}; " if arms else "")
            + f"then {len(space.report.seeds)} fresh seeds. Workers: {self.workers}. Study {space.study_name()} in "
            f"{shown(address)}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )

    def _run_parents(self) -> None:
        """Train what trials start from, once each, before workers fan out."""
        parents = {p.signature: p for seed in self.space.seeds if (p := self.space.cell(None, seed).parent) is not None}
        for signature, record in run_cells(parents.values(), self.places.runs, self.workers, self._tell).items():
            if record.state != "done":
                raise UserError(f"{parents[signature].key} failed, from which all trials start: {record.error}")

    def _tell(self, record: Record) -> None:
        seconds = f" in {record.done['seconds']:.0f} s" if record.done else f": {record.error}"
        self.console.print(f"  {record.key}: {record.state}{escape(seconds)}", soft_wrap=True, highlight=False)

    def _search(self, space: Space, arm: str, address: str, database: BaseStorage) -> optuna.Study:
        study = open_study(space, database, arm)
        total = reachable(space, self.trials or space.trials)
        task = Task(
            space.paper,
            space.name,
            space.profile,
            space.trainer,
            arm,
            total,
            address,
            str(self.places.runs),
        )
        if self.tracked and self._left(study, space, total):
            task = self._track(task, space, study)
        earlier = [trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
        self._shown |= {(arm, number) for number in earlier}
        if earlier:
            self.console.print(f"  {arm or 'search'}: {len(earlier)} trials are there already")
        crew = Crew(task, self.places.runs / "sweeps" / study.study_name, self.workers)
        try:
            self._watch(study, crew, space, arm, total)
        except KeyboardInterrupt:
            self.console.print("\nStopping; what is finished stays, and the same command goes on from here.")
            raise
        finally:
            crew.close()
            recover(study)
            if task.parent:
                self._end_track(task, space, study)
        return study

    def _left(self, study: optuna.Study, space: Space, total: int) -> int:
        """How many trials are missing, and how many of those that are there have not ended."""
        taken = places(space, study.get_trials(deepcopy=False))
        return max(0, total - len(taken)) + sum(not trial.state.is_finished() for trial in taken)

    def _watch(self, study: optuna.Study, crew: Crew, space: Space, arm: str, total: int) -> None:
        """Keep workers at it until nothing is left, whoever runs it."""
        while True:
            self._show_finished(study, space, arm)
            crew.check()
            recover(study)
            if not self._left(study, space, total):
                crew.wait()
                self._show_finished(study, space, arm)
                return
            running = sum(trial.state.name == "RUNNING" for trial in study.get_trials(deepcopy=False))
            if (ready := self._left(study, space, total) - running) > 0:
                crew.fill(ready)
            time.sleep(POLL_S)

    def _show_finished(self, study: optuna.Study, space: Space, arm: str) -> None:
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and (arm, trial.number) not in self._shown:
                self._shown.add((arm, trial.number))
                if SURPLUS not in trial.user_attrs and REJECTED not in trial.user_attrs:
                    self.console.print(escape(line(trial, space, arm)), soft_wrap=True, highlight=False)

    def _track(self, task: Task, space: Space, study: optuna.Study) -> Task:
        from experiments.tracking_trials import study_run

        store, experiment = self._experiment()
        label = f"sweep {space.name}{f', {task.arm}' if task.arm else ''} on {space.data} ({space.profile})"
        params = {"space": space.name, "sampler": space.sampler["name"], "pruner": space.pruner["name"]}
        params |= {
            "paper": space.paper,
            "ablation": f"sweep.{space.name}",
            "data": space.data,
            "profile": space.profile,
        }
        parent = study_run(store, experiment, study.study_name, label, params, tags_of(task, study) | params)
        return replace(task, experiment=experiment, parent=parent)

    def _experiment(self) -> tuple[Any, str]:
        from experiments import tracking
        from experiments.showcase import describe

        store, paper = tracking.Store(self.places.runs), load_paper(self.space.paper)
        tracking.prepare(store)
        title = f"{paper.number}. {paper.title}"
        return store, tracking.experiment_id(store, paper.key, title, describe(paper))

    def _end_track(self, task: Task, space: Space, study: optuna.Study) -> None:
        from experiments import tracking

        best, found = finals.best_of(study, space), {}
        if best is not None:
            found = {o.metric: (v, None, None, None) for o, v in zip(space.objectives, best.values, strict=True)}
        status = "FINISHED" if not self._left(study, space, task.total) else "KILLED"
        tracking.summarise_parent(tracking.Store(self.places.runs), task.parent, found, status)

    def _run_finals(self, studies: Mapping[str, optuna.Study]) -> list[finals.Final]:
        """Run winner and arms on the report's seeds, which no trial used."""
        contenders = finals.contenders(self.space, studies)
        cells = {final.arm: finals.cells_of(self.space, final) for final in contenders}
        missing = [
            c for own in cells.values() for c in own if not (self.places.runs / c.signature / "done.json").exists()
        ]
        if missing:
            self.console.print(f"Fresh seeds {', '.join(map(str, self.space.report.seeds))}: {', '.join(cells)}")
            tracks = self._track_finals(missing) if self.tracked else {}
            try:
                run_cells(missing, self.places.runs, self.workers, self._tell, tracks)
            finally:
                self._end_finals(tracks)
        return [finals.with_records(self.space, final, self.places.runs) for final in contenders]

    def _track_finals(self, cells: list[Cell]) -> dict[str, tuple[str, str]]:
        from experiments import tracking

        store, experiment = self._experiment()
        found: dict[str, tuple[str, str]] = {}
        for cell in cells:
            key = cell.key
            if key.ablation not in found:
                names = {"paper": key.paper, "ablation": key.ablation, "data": key.data, "profile": key.scale}
                found[key.ablation] = experiment, tracking.parent_run(store, experiment, **names, params={})
        return found

    def _end_finals(self, tracks: Mapping[str, tuple[str, str]]) -> None:
        from experiments import tracking

        for _, parent in tracks.values():
            tracking.summarise_parent(tracking.Store(self.places.runs), parent, {}, "FINISHED")


def check_whole(space: Space) -> None:
    """Resolve, import and check the configuration of every value of every parameter, before the first trial.

    Raises:
        UserError: naming the setting and the way out.
    """
    for values in examples(space):
        check_targets(space.cell(values, space.seeds[0]).config, f"{space.name}: {values}")
    for name, arm in space.arms.items():
        for values in examples(space.arm(name)) if arm.tuned else [dict(arm.fix)]:
            space.cell({**values, **arm.fix}, space.seeds[0])
    space.cell(None, space.report.seeds[0], space.report.settings)
    if space.constraints:
        default_costs(space)


def tags_of(task: Task, study: optuna.Study, trial: int | None = None) -> dict[str, str]:
    """Return the tags of a study's run, or of one of its trials."""
    tags = {
        "study": study.study_name,
        "storage": shown(task.storage),
        "study_url": f"{DASHBOARD}/studies/{study._study_id}",
    }
    tags |= {"space": task.space, "arm": task.arm or "search"}
    tags |= {"paper": task.paper, "ablation": f"sweep.{task.space}", "profile": task.profile}
    return tags | ({} if trial is None else {"trial": str(trial), "study_url": f"{tags['study_url']}/trials"})


def line(trial: optuna.trial.FrozenTrial, space: Space, arm: str) -> str:
    """Return one line on a finished trial."""
    drawn = ", ".join(f"{n} {v:.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in trial.params.items())
    head = f"  {arm + ' ' if arm else ''}trial {trial.number}"
    if trial.state.name == "COMPLETE":
        scores = ", ".join(f"{o.metric} {v:,.6g}" for o, v in zip(space.objectives, trial.values, strict=True))
        outcome = f"{scores}"
    elif trial.state.name == "PRUNED":
        outcome = f"cut after {len(trial.intermediate_values)} of {len(space.seeds)} seeds"
    else:
        outcome = "failed"
    seconds = trial.user_attrs.get(SECONDS)
    return f"{head}: {outcome} ({drawn})" + (f", {seconds:.0f} s" if seconds is not None else "")


def make_sweep(
    paper: str,
    name: str,
    profile: str,
    console: Console,
    trials: int | None = None,
    workers: int = 2,
    storage: str = "",
    trainer: str = "cpu",
) -> Sweep:
    """Return the sweep of a space by name, its results where this profile's go."""
    return Sweep(load(paper, name, profile, trainer), Places.default(profile), console, trials, workers, storage)
