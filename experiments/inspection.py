"""Behind `explain`, `verify`, `diff` and `data`: where a number came from, and whether it comes again."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from experiments.cell import flatten, resolve
from experiments.errors import UserError
from experiments.records import Record
from experiments.reproduce import Places, Reproduction
from experiments.store import read_run


def find_run(prefix: str, runs: Path) -> Record:
    """Return the one run whose signature or MLflow id starts with `prefix`.

    Raises:
        UserError: none or several do.
    """
    folders = [file.parent for file in runs.glob("*/manifest.json")]
    records = [read_run(folder) for folder in folders]
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

    specs = [load_paper(key) for key in available_papers().values()]
    claims = {claim.id: (spec, claim) for spec in specs for claim in spec.claims}
    if claim_id not in claims:
        raise UserError(f"there is no claim '{claim_id}'{nearest(claim_id, claims)}")
    spec, claim = claims[claim_id]
    records = Reproduction(spec, Selection(profile, seeds), places, console).records()
    verdict = next((v for v in judge(spec, records, profile) if v.id == claim_id), None)
    console.print(f"[bold]{claim.id}[/]  {claim.text}", soft_wrap=True)
    console.print(f"paper: {spec.title}, arXiv {spec.arxiv}; source: {claim.source}", soft_wrap=True)
    design = claim.design
    pairing = "paired" if design.paired else "unpaired"
    console.print(
        f"kind: {claim.kind}; margin {claim.margin}; {design.seeds} {pairing} seeds, alpha {design.alpha}, test {design.test}"
    )
    reported = "not readable in any source we reached" if claim.reported is None else claim.reported
    console.print(f"the paper reports: {reported}", soft_wrap=True)
    console.print(_seed_table(claim, records))
    if verdict is None:
        console.print(f"This claim is not judged under the profile '{profile}'.")
        return
    console.print(f"[bold]{verdict.verdict}[/]: {verdict.reason}", soft_wrap=True)
    numbers = {k: v for k, v in verdict.to_dict().items() if k in ("n", "estimate", "ci", "p", "p_adjusted")}
    console.print(", ".join(f"{name} {value}" for name, value in numbers.items() if value is not None))


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
                table.add_row(
                    operand.metric,
                    key.ablation,
                    key.data,
                    str(key.seed),
                    shown,
                    record.state,
                    record.signature[:10],
                )
    return table


@dataclass
class _Checks:
    console: Console
    good: bool = True

    def add(self, name: str, passed: bool | None, detail: str) -> None:
        word = {True: "ok", False: "DIFFERS", None: "not checked"}[passed]
        self.good &= passed is not False
        self.console.print(f"{word:<12}{name}: {detail}", soft_wrap=True)


def verify_run(console: Console, prefix: str, places: Places, rerun: bool) -> bool:
    """Check a finished run: signature, weights on disk, data; then train it again and compare. True if all agree."""
    import torch

    from experiments.run import run_cell, weights_sha256

    record = find_run(prefix, places.runs)
    if record.state != "done":
        raise UserError(f"{record.signature} ({record.key}) is {record.state}: only a finished run can be verified")
    console.print(f"{record.key}, signature {record.signature}", soft_wrap=True)
    checks = _Checks(console)
    cell = resolve(record.key)
    checks.add(
        "configuration, code and data",
        cell.signature == record.signature,
        f"today's signature {cell.signature}",
    )
    stored = yaml.safe_load((record.path / "config.yaml").read_text())
    checks.add("stored configuration", stored == cell.hashed, "config.yaml against what the files compose to now")
    state = torch.load(record.path / "last.ckpt", map_location="cpu", weights_only=False)["state_dict"]
    kept, promised = weights_sha256(state), record.done["weights_sha256"]
    checks.add("weights on disk", kept == promised, kept[:16])
    if not rerun:
        checks.add("running it again", None, "--no-rerun was given")
        return checks.good
    with tempfile.TemporaryDirectory(prefix="fivefold-verify-") as folder:
        again = run_cell(cell, Path(folder))
    same = again.done["weights_sha256"] == promised
    checks.add(
        "running it again",
        same,
        f"weights {again.done['weights_sha256'][:16]}, {again.done['seconds']:.0f} s",
    )
    moved = _moved(record.metrics, again.metrics)
    checks.add("metrics", not moved, ", ".join(moved) or f"{len(record.metrics)} agree to the last digit")
    return checks.good


def _moved(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """The metrics that differ; wall time may."""
    names = (before.keys() | after.keys()) - {"train/seconds"}
    return [f"{n} {before.get(n)} against {after.get(n)}" for n in sorted(names) if before.get(n) != after.get(n)]


def diff_runs(console: Console, a: str, b: str, places: Places) -> None:
    """Print what differs between two runs, and say so if nothing does."""
    left, right = (_everything(find_run(prefix, places.runs)) for prefix in (a, b))
    table = Table(box=None, header_style="bold")
    for name in ("what", a, b):
        table.add_column(name, overflow="fold")
    names = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    for name in names:
        table.add_row(name, *(str(side.get(name, "—")) for side in (left, right)))
    console.print(
        table if names else "The two runs agree in configuration, code, data, versions, hardware and metrics."
    )


def _everything(record: Record) -> dict[str, Any]:
    config = yaml.safe_load((record.path / "config.yaml").read_text()) if (record.path / "config.yaml").exists() else {}
    manifest = {k: v for k, v in record.manifest.items() if not k.startswith("mlflow") and k != "command"}
    sides = {"config": config, "manifest": manifest, "metrics": record.metrics, "done": record.done}
    return {
        "state": record.state,
        **{f"{s}.{k}": v for s, tree in sides.items() for k, v in flatten(tree).items()},
    }


def show_data(console: Console, names: list[str] | None, check: bool) -> bool:
    """Fetch (unless `check`) and list the data sets. True if all of them are there."""
    from datamodules import sources

    table = Table(box=None, header_style="bold")
    for column in ("data", "samples", "kind", "from", "licence", "sha256"):
        table.add_column(column, overflow="fold")
    complete = True
    for name in names or list(sources.DATASETS):
        try:
            card = sources.load_images(name, fetch=not check).card
        except sources.DataUnavailable as error:
            complete = False
            table.add_row(name, "", "not here", str(error), "", "")
            continue
        kind = "real" if card.real else "synthetic"
        table.add_row(card.name, f"{card.n:,}", kind, card.source, card.licence, card.sha256[:16])
    console.print(table)
    return complete
