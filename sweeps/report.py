"""What a search found, as files: results/<paper>/sweeps/<space>/{trials.csv, summary.json, best.yaml, table_*, figures/}."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from experiments import tables
from experiments.claims import load_paper
from experiments.store import write_atomically
from experiments.verdict import Verdict
from sweeps import figures, finals
from sweeps.finals import Final
from sweeps.objective import CELLS, SCORES, SECONDS
from sweeps.promote import ablation_text, header_of
from sweeps.samplers import REJECTED
from sweeps.space import WINNER, Space
from sweeps.storage import SURPLUS
from sweeps.tables import best_table, counts, counts_line, described, final_table, importance_table, points

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Studies = Mapping[str, "optuna.Study"]


def write_report(
    space: Space, studies: Studies, contenders: Sequence[Final], results: Path, current: bool = True
) -> dict[str, Any]:
    """Write the report of a search and return its summary. The same trials give the same bytes.

    Args:
        studies: the search under "", tuned arms under their names.
        contenders: with their runs, as far as there are any.
        results: the results folder of the profile.
        current: whether the study is of the code and data as they are now.
    """
    folder = results / space.paper / "sweeps" / space.name
    verdicts = finals.verdicts(space, list(contenders))
    shares = importances(studies[""], space)
    drawn = figures.draw_all(
        space, load_paper(space.paper), points(studies[""], space), shares, _marks(space, contenders)
    )
    models = [
        final_table(space, contenders, verdicts),
        best_table(space, studies[""]),
        importance_table(space, studies[""], shares),
    ]
    summary = _summary(space, studies, contenders, verdicts, shares, current)
    summary["figures"] = [{"name": n, "title": title, "file": f"figures/{n}.svg"} for n, (title, _) in drawn.items()]
    summary["tables"] = [asdict(model) for model in models]
    written = {folder / "trials.csv": trials_csv(space, studies)}
    for model in models:
        written[folder / f"table_{model.id}.md"] = tables.markdown(model)
        written[folder / f"table_{model.id}.tex"] = tables.latex(model)
    for name, (_, svg) in drawn.items():
        written[folder / "figures" / f"{name}.svg"] = svg
    if contenders and contenders[0].arm == WINNER:
        header = header_of(space, contenders[0], studies[""].study_name)
        written[folder / "best.yaml"] = ablation_text(space, contenders[0], header)
    written[folder / "summary.json"] = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for path, content in written.items():
        write_atomically(path, content)
    for old in {*folder.glob("table_*"), *folder.glob("figures/*.svg"), *folder.glob("best.yaml")} - written.keys():
        old.unlink()
    return summary | {"folder": str(folder)}


def importances(study: optuna.Study, space: Space) -> dict[str, dict[str, float]]:
    """Return {method: {parameter: share of 1}} by the first objective; a method that cannot be asked is empty.

    fANOVA knows parameters that every trial has; PED-ANOVA those that only some have, too, and asks what the best trials
    have in common.
    """
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    sign = -1 if space.objectives[0].direction == "higher" else 1
    methods = {"fANOVA": FanovaImportanceEvaluator(seed=0), "PED-ANOVA": PedAnovaImportanceEvaluator()}
    found: dict[str, dict[str, float]] = {}
    for name, evaluator in methods.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that lower is taken for better: it is, by the sign
                shares = get_param_importances(study, evaluator=evaluator, target=lambda trial: sign * trial.values[0])
        except (ValueError, RuntimeError):  # fewer than two different trials
            shares = {}
        rounded = {n: round(float(v), 4) for n, v in shares.items() if math.isfinite(v)}
        found[name] = dict(sorted(rounded.items(), key=lambda item: (-item[1], item[0])))  # ties in a fixed order
    return found


def _marks(space: Space, contenders: Sequence[Final]) -> dict[str, tuple[float, ...]]:
    """Where the default and untuned arms lie beside a Pareto front: measured on the report's seeds."""
    found = {}
    for final in contenders:
        means = [final.estimate(o.metric) for o in space.objectives]
        if final.arm != WINNER and all(mean is not None for mean in means):
            found[f"{final.arm}, fresh seeds"] = tuple(mean.mean for mean in means if mean is not None)
    return found


def trials_csv(space: Space, studies: Studies) -> str:
    """Return a row for every trial of every study: parameters, scores seed by seed, cells, and what became of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    several = [f"{o.metric}, seed {s}" for o in space.objectives for s in space.seeds]
    names = list(space.parameters)
    means = [o.metric for o in space.objectives]
    writer.writerow(["arm", "trial", "state", "why", *names, *means, *several, "seconds", "runs"])
    for arm, study in studies.items():
        own = space.arm(arm) if arm else space
        for trial in study.get_trials(deepcopy=False):
            if SURPLUS in trial.user_attrs or not trial.state.is_finished():
                continue
            writer.writerow([arm or "search", *_row(trial, own, names)])
    return text.getvalue()


def _row(trial: FrozenTrial, space: Space, names: Sequence[str]) -> list[Any]:
    ended = {"COMPLETE": "complete", "PRUNED": "cut", "FAIL": "failed"}[trial.state.name]
    values = {**trial.params, **space.fixed}
    drawn = [_plain(values[name]) if name in values else "" for name in names]
    scores: list[list[float]] = trial.user_attrs.get(SCORES, [])
    count = len(space.objectives)
    means = [_plain(v) for v in trial.values] if ended == "complete" else [""] * count
    single = [_plain(scores[at][i]) if at < len(scores) else "" for i in range(count) for at in range(len(space.seeds))]
    why = trial.user_attrs.get(REJECTED, "")
    tail = [trial.user_attrs.get(SECONDS, ""), " ".join(trial.user_attrs.get(CELLS, []))]
    return [trial.number, "rejected" if why else ended, why, *drawn, *means, *single, *tail]


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _summary(
    space: Space,
    studies: Studies,
    contenders: Sequence[Final],
    verdicts: Sequence[Verdict],
    shares: Mapping[str, Mapping[str, float]],
    current: bool,
) -> dict[str, Any]:
    study = studies[""]
    ended = [t.datetime_complete for t in study.get_trials(deepcopy=False) if t.datetime_complete]
    metric = space.report.metric
    return {
        "paper": space.paper,
        "space": space.name,
        "title": space.title,
        "profile": space.profile,
        "study": study.study_name,
        "current": current,
        "optuna": study.user_attrs.get("optuna"),
        "sampler": dict(space.sampler),
        "pruner": dict(space.pruner),
        "objectives": [asdict(o) for o in space.objectives],
        "seeds": list(space.seeds),
        "report_seeds": list(space.report.seeds),
        "created": max(ended).isoformat(timespec="seconds") if ended else None,
        "trials": {arm or "search": counts(s) for arm, s in studies.items()},
        "importance": {name: dict(s) for name, s in shares.items()},
        "finals": [
            {
                "arm": final.arm,
                "what": described(space, final),
                "values": dict(final.values) if final.values is not None else None,
                "search_score": final.tuning,
                "metric": metric,
                **({} if (e := final.estimate(metric)) is None else asdict(e)),
                "runs": [r.run_id for r in final.records if r.state == "done"],
            }
            for final in contenders
        ],
        "verdicts": [v.to_dict() for v in verdicts],
        "counts": counts_line(study),
    }


def print_outcome(console: Console, summary: Mapping[str, Any]) -> None:
    """Print what the search came to."""
    console.print(escape(summary["counts"]), soft_wrap=True, highlight=False)
    for final in summary["finals"]:
        mean = "not run" if final.get("mean") is None else f"{final['metric']} {final['mean']:.5g}"
        half = f" ± {final['ci_high'] - final['mean']:.2g}" if final.get("ci_high") is not None else ""
        console.print(f"  {final['arm']}: {mean}{half} ({escape(final['what'])})", soft_wrap=True, highlight=False)
    for verdict in summary["verdicts"]:
        console.print(
            f"  [bold]{verdict['verdict']}[/]: {escape(verdict['text'])} {escape(verdict['reason'])}",
            soft_wrap=True,
            highlight=False,
        )
    if not summary["current"]:
        console.print(
            "  The study is of other code, data or settings than there are now; `fivefold sweep` starts another."
        )
    console.print(f"Report: {summary['folder']}", soft_wrap=True, highlight=False)
