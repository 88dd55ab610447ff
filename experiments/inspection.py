"""Behind `explain`, `verify`, `diff` and `data`: where a number came from, and whether it comes again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.cell import CONF, Cell, flatten, resolve
from experiments.errors import UserError
from experiments.records import Record
from experiments.reproduce import Places, Reproduction
from experiments.schema import ConfigError
from experiments.store import read_run
from experiments.summary import from_shell

OF_EVERY_RUN_ITS_OWN = ("command", "created", "finished")  # what no two runs have in common


def find_run(prefix: str, runs: Path) -> Record:
    """Return the one run whose signature or MLflow id starts with `prefix`.

    Raises:
        UserError: none or several do.
    """
    records = []
    for file in sorted(runs.glob("*/manifest.json")):
        with suppress(KeyError, TypeError, json.JSONDecodeError):  # a damaged folder hides no other
            records.append(read_run(file.parent))
    found = [r for r in records if r.signature.startswith(prefix) or r.run_id.startswith(prefix)]
    if not found:
        raise UserError(f"no run under {runs} starts with '{prefix}'; signatures are the folder names there")
    if len(found) > 1:
        names = ", ".join(f"{r.signature} ({r.key})" for r in found[:4])
        raise UserError(f"'{prefix}' is the start of {len(found)} runs: {names}; give more digits")
    return found[0]


def explain_claim(console: Console, claim_id: str, places: Places, profile: str, seeds: int | None) -> None:
    """Print a claim, its design, the value of every seed behind it, and its verdict with the runs."""
    from experiments.claims import available_papers, load_paper
    from experiments.graph import Selection
    from experiments.schema import nearest
    from experiments.verdict import judge

    specs = [load_paper(key).in_profile(profile) for key in available_papers().values()]
    claims = {claim.id: (spec, claim) for spec in specs for claim in spec.claims}
    if claim_id not in claims:
        raise UserError(f"there is no claim '{claim_id}'{nearest(claim_id, claims)}")
    spec, claim = claims[claim_id]
    records = Reproduction(spec, Selection(profile, seeds), places, console).records()
    verdict = next((v for v in judge(spec, records, profile) if v.id == claim_id), None)
    _say(console, f"[bold]{escape(claim.id)}[/]  {escape(claim.text)}")
    _say(console, escape(f"paper: {spec.title}, arXiv {spec.arxiv}; source: {claim.source}"))
    design = claim.design
    pairing = "paired" if design.paired else "unpaired"
    console.print(
        f"kind: {claim.kind}; margin {claim.margin}; {design.seeds} {pairing} seeds, alpha {design.alpha}, test {design.test}"
    )
    reported = "not readable in any source we reached" if claim.reported is None else claim.reported
    _say(console, f"the paper reports: {reported}")
    console.print(_seed_table(claim, records))
    if verdict is None:
        console.print(f"This claim is not judged under the profile '{profile}'.")
        return
    _say(console, f"[bold]{escape(verdict.verdict)}[/]: {escape(verdict.reason)}")
    numbers = {k: v for k, v in verdict.to_dict().items() if k in ("n", "estimate", "ci", "p", "p_adjusted")}
    shown = ", ".join(f"{name} {value}" for name, value in numbers.items() if value is not None)
    _say(console, escape(shown))


def _say(console: Console, text: str) -> None:
    """Print a line of markup; what is not ours in it must be escaped."""
    console.print(text, soft_wrap=True)


def _seed_table(claim: Any, records: list[Record]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("metric", "ablation", "data", "seed", "value", "state", "run"):
        table.add_column(name, justify="right" if name in ("seed", "value") else "left")
    for operand in claim.operands:
        names = operand.best_of or (operand.ablation,)
        for record in sorted(records, key=lambda r: r.key):
            if record.key.ablation in names and record.key.data == operand.data:
                value = record.metrics.get(operand.metric)
                shown = "missing" if value is None else f"{value:.10g}"
                key = record.key
                cells = (
                    operand.metric,
                    key.ablation,
                    key.data,
                    str(key.seed),
                    shown,
                    record.state,
                    record.signature[:10],
                )
                table.add_row(*map(escape, cells))
    return table


@dataclass
class _Checks:
    console: Console
    good: bool = True

    def add(self, name: str, passed: bool | None, detail: str) -> None:
        word = {True: "ok", False: "DIFFERS", None: "not checked"}[passed]
        self.good &= passed is not False
        _say(self.console, escape(f"{word:<12}{name}: {detail}"))


def verify_run(console: Console, prefix: str, places: Places, rerun: bool) -> bool:
    """Check a finished run: signature, weights on disk, data; then train it again and compare. True if all agree.

    Raises:
        UserError: there is no such run, or it is not finished.
        DataUnavailable: it is to be trained again, and its data cannot be had.
    """
    record = find_run(prefix, places.runs)
    if record.state != "done":
        raise UserError(f"{record.signature} ({record.key}) is {record.state}: only a finished run can be verified")
    _say(console, escape(f"{record.key}, signature {record.signature}"))
    checks = _Checks(console)
    cell = _check_identity(checks, record)
    _check_weights(checks, record)
    if not rerun:
        checks.add("running it again", None, "--no-rerun was given")
    elif cell is None:
        checks.add("running it again", None, "there is no such cell any more")
    else:
        _run_again(checks, record, cell)
    if cell is not None and cell.signature != record.signature:
        _say(console, f"To run the cell as it is now: {escape(from_shell(cell.command))}")
    return checks.good


def _check_identity(checks: _Checks, record: Record) -> Cell | None:
    """Hold a record against what its key composes to now. Returns that, or None if its key names nothing any more."""
    try:
        cell = resolve(record.key, trainer=_trainer_of(record))
    except ConfigError as error:
        checks.add("configuration, code and data", False, f"{record.key} can no longer be composed: {error}")
        return None
    same = cell.signature == record.signature
    checks.add("configuration, code and data", same, f"today's signature {cell.signature}")
    stored = _stored_config(record)
    what = "config.yaml against what the files compose to now" if stored else "config.yaml is missing or damaged"
    checks.add("stored configuration", stored == cell.hashed, what)
    return cell


def _trainer_of(record: Record) -> str:
    """The name of the trainer that a run was made with: on other devices sums come in another order, and weights differ."""
    made = record.manifest.get("trainer", {})
    same = ("accelerator", "devices", "strategy")
    for file in sorted((CONF / "trainer").glob("*.yaml")):
        found = yaml.safe_load(file.read_text())
        if all(made.get(name) == found[name] for name in same):
            return file.stem
    return "cpu"


def _stored_config(record: Record) -> dict[str, Any]:
    """The configuration that a run kept, or {}."""
    try:
        config = yaml.safe_load((record.path / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _check_weights(checks: _Checks, record: Record) -> None:
    """Compare the hash that a run promised with its last checkpoint, or with its net built anew if nothing was trained."""
    import torch

    from experiments.run import weights_sha256

    promised = record.done.get("weights_sha256")
    config = _stored_config(record)
    if config.get("budget", {}).get("max_epochs") == 0:
        try:
            built = weights_sha256(_build(config))
        except Exception as error:
            checks.add("weights", False, f"nothing was trained, and the net cannot be built: {_first_line(error)}")
            return
        checks.add("weights", built == promised, f"{built[:16]}, of the net built anew: nothing was trained")
        return
    file = record.path / "last.ckpt"
    try:
        kept = weights_sha256(torch.load(file, map_location="cpu", weights_only=False)["state_dict"])
    except FileNotFoundError:
        checks.add("weights on disk", False, f"{file} is missing")
    except Exception as error:  # whatever the bytes of a damaged file make the unpickler say
        checks.add("weights on disk", False, f"{file} is damaged ({type(error).__name__}: {_first_line(error)})")
    else:
        checks.add("weights on disk", kept == promised, kept[:16])


def _build(config: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a cell's module before any training."""
    from hydra.utils import instantiate

    from experiments.run import build_net

    optim = config["optim"]
    module = instantiate(
        config["module"],
        net=build_net(dict(config)),
        optimizer=instantiate(optim["optimizer"], _partial_=True),
        schedule=instantiate(optim["schedule"]) if optim["schedule"] else None,
        steps_per_epoch=1,
    )
    return module.state_dict()


def _run_again(checks: _Checks, record: Record, cell: Cell) -> None:
    from datamodules.sources import DataUnavailable, UnknownData
    from experiments.run import run_cell

    with tempfile.TemporaryDirectory(prefix="fivefold-verify-") as folder:
        try:
            again = run_cell(cell, Path(folder))
        except (DataUnavailable, UnknownData):
            raise
        except Exception as error:
            checks.add("running it again", False, f"it failed ({type(error).__name__}: {_first_line(error)})")
            return
    found = again.done["weights_sha256"]
    same = found == record.done.get("weights_sha256")
    checks.add("running it again", same, f"weights {found[:16]}, {again.done['seconds']:.0f} s, trainer {cell.trainer}")
    moved = _moved(record.metrics, again.metrics)
    checks.add("metrics", not moved, ", ".join(moved) or f"{len(record.metrics)} agree to the last digit")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _moved(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """The metrics that differ; wall time may."""
    names = (before.keys() | after.keys()) - {"train/seconds"}
    return [f"{n} {before.get(n)} against {after.get(n)}" for n in sorted(names) if before.get(n) != after.get(n)]


def diff_runs(console: Console, a: str, b: str, places: Places) -> None:
    """Print what differs between two runs, and say so if nothing does."""
    records = [find_run(prefix, places.runs) for prefix in (a, b)]
    left, right = map(_everything, records)
    table = Table(box=None, header_style="bold")
    for name in ("what", a, b):
        table.add_column(escape(name), overflow="fold")
    names = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    for name in names:
        table.add_row(escape(name), *(escape(str(side.get(name, "—"))) for side in (left, right)))
    console.print(
        table if names else "The two runs agree in configuration, code, data, versions, hardware and metrics."
    )
    if names:
        _say(console, _code_differs(*records))


def _code_differs(left: Record, right: Record) -> str:
    """What two signatures say of the code: they are made from configuration, code and data, and from nothing else."""
    if left.signature == right.signature:
        return "Code: the same."
    if _stored_config(left) != _stored_config(right) or _data_of(left) != _data_of(right):
        return "Code: not told by these runs, since their configuration or data differ too; compare their commits."
    commits = [str(record.manifest.get("commit") or "unknown")[:12] for record in (left, right)]
    return f"Code: it differs, since configuration and data are equal and the signatures are not; commits {', '.join(commits)}."


def _data_of(record: Record) -> list[str]:
    return [card["sha256"] for card in record.manifest.get("data_cards", [])]


def _everything(record: Record) -> dict[str, Any]:
    """All that a run says of itself, flat, less what no two runs have in common."""
    manifest = {
        k: v for k, v in record.manifest.items() if not k.startswith("mlflow") and k not in OF_EVERY_RUN_ITS_OWN
    }
    done = {k: v for k, v in record.done.items() if k not in OF_EVERY_RUN_ITS_OWN}
    sides = {"config": _stored_config(record), "manifest": manifest, "metrics": record.metrics, "done": done}
    return {
        "state": record.state,
        **{f"{s}.{k}": v for s, tree in sides.items() for k, v in flatten(tree).items()},
    }


def show_data(console: Console, names: list[str] | None, check: bool) -> bool:
    """Fetch (unless `check`) and list the data sets, by default those of the small profiles. True if all are there."""
    from datamodules import sources
    from experiments.data_sets import card_of

    table = Table(box=None, header_style="bold")
    for column in ("data", "samples", "kind", "from", "licence", "sha256"):
        table.add_column(column, overflow="fold")
    complete = True
    for name in names or [*sources.DATASETS, "python_stdlib"]:
        try:
            card = card_of(name, fetch=not check)
        except sources.DataUnavailable as error:
            complete = False
            table.add_row(escape(name), "", "not here", escape(str(error)), "", "")
            continue
        kind = "real" if card.real else "synthetic"
        samples = f"{card.n:,}" if card.n else "any number"
        row = (card.name, samples, kind, card.source, card.licence, card.sha256[:16])
        table.add_row(*map(escape, row))
    console.print(table)
    return complete
