"""`fivefold export-runs`: every run as a row, for people who live in pandas or on a cluster."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from experiments.cell import flatten
from experiments.errors import UserError
from experiments.records import Record
from experiments.store import read_run, write_atomically

FORMATS = ("csv", "parquet", "json")
IDENTITY = ("paper", "ablation", "data", "seed", "profile", "model", "state", "signature", "mlflow_run_id")
MADE = ("commit", "command", "created", "finished", "seconds", "weights_sha256", "error")
Row = dict[str, Any]


def all_runs(runs: Path) -> list[Record]:
    """Return the record of every run folder, sorted by key; folders that cannot be read are left out."""
    found = []
    for file in sorted(runs.glob("*/manifest.json")):
        with suppress(KeyError, TypeError, ValueError, OSError):
            found.append(read_run(file.parent))
    return sorted(found, key=lambda record: (record.key, record.signature))


def finished(runs: Path) -> list[Record]:
    """Return the records of finished runs."""
    return [record for record in all_runs(runs) if record.state == "done"]


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Return a flat row for each run: what it is, how it was made, `config.*`, `metric.*`. What is missing is not there."""
    return [_row(record) for record in records]


def _row(record: Record) -> Row:
    key = record.key
    row: Row = {"paper": key.paper, "ablation": key.ablation, "data": key.data, "seed": key.seed}
    row |= {"profile": key.profile, "model": key.model or None, "state": record.state, "signature": record.signature}
    row |= {"mlflow_run_id": record.manifest.get("mlflow_run_id"), "error": record.error}
    row |= {name: record.manifest.get(name) for name in ("commit", "command", "created")}
    row |= {name: record.done.get(name) for name in ("finished", "seconds", "weights_sha256")}
    config = record.path / "config.yaml"
    if config.is_file():
        with suppress(yaml.YAMLError):
            settings = flatten(yaml.safe_load(config.read_text()) or {})
            row |= {f"config.{name}": value for name, value in settings.items()}
    row |= {f"metric.{name}": value for name, value in record.metrics.items()}
    return {name: value for name, value in row.items() if value is not None}


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the columns of all rows: identity, how made, then settings and metrics by name."""
    names = {name for row in rows for name in row}
    first = [*IDENTITY, *MADE]
    return [*first, *sorted(names - set(first))]


def export(records: Sequence[Record], target: Path) -> tuple[int, int]:
    """Write runs to a file whose ending says how: .csv, .parquet or .json; whole or not at all.

    CSV leaves what is missing empty, Parquet has null, JSON leaves it out. Settings of several types become text in
    Parquet, which has one type a column.

    Returns:
        The number of runs and of columns.
    Raises:
        UserError: another ending, or nothing to write.
    """
    kind = target.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise UserError(f"'{target}' should end in .csv, .parquet or .json: the ending says how it is written")
    if not records:
        raise UserError("there are no runs to write; `make reproduce-paper-3` makes some")
    rows = rows_of(records)
    columns = columns_of(rows)
    writers: dict[str, Callable[[Sequence[Row], Sequence[str]], str | bytes]]
    writers = {"csv": _csv, "parquet": _parquet, "json": _json}
    write_atomically(target, writers[kind](rows, columns))
    return len(rows), len(columns)


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(rows: Sequence[Row], columns: Sequence[str]) -> str:
    finite = [{k: v for k, v in row.items() if not (isinstance(v, float) and not math.isfinite(v))} for row in rows]
    return json.dumps(finite, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: _one_type([row.get(name) for row in rows]) for name in columns})
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def _one_type(values: list[Any]) -> list[Any]:
    """Values of one type: numbers stay numbers, a mixture becomes text, a missing value stays missing."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 and not kinds & {list, dict}:
        return values
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values]
    return [None if value is None else str(value) for value in values]
