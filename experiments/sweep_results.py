"""What sweeps have found, read back from results/<paper>/sweeps/<space>/ for the report page. Knows nothing of Optuna."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.tables import TableCell, TableModel


@dataclass(frozen=True)
class SweepFigure:
    """A picture of a search: its name, its title, and the SVG file."""

    name: str
    title: str
    path: Path


@dataclass(frozen=True)
class SweepSection:
    """One search: what it was, in words, its tables, its pictures, and its verdicts as in verdicts.json.

    `current` is false where the trials ran on other code or data than the report's writer had. `best` is the best
    configuration as the text of an ablation file, empty where no trial came to its end.
    """

    paper: str
    space: str
    title: str
    profile: str
    about: str
    current: bool
    tables: tuple[TableModel, ...]
    figures: tuple[SweepFigure, ...]
    verdicts: tuple[dict[str, Any], ...]
    best: str


def sweep_sections(results: Path, paper: str) -> list[SweepSection]:
    """Return the searches of a paper that have a report, sorted by name; none where there is no folder of them.

    Args:
        results: the results folder of a profile, such as `Places.default().results`.
    """
    return [_section(file) for file in sorted((results / paper / "sweeps").glob("*/summary.json"))]


def _section(file: Path) -> SweepSection:
    read = json.loads(file.read_text())
    folder = file.parent
    figures = [SweepFigure(f["name"], f["title"], folder / f["file"]) for f in read["figures"]]
    best = folder / "best.yaml"
    return SweepSection(
        read["paper"],
        read["space"],
        read["title"],
        read["profile"],
        _about(read),
        bool(read["current"]),
        tuple(_model(table) for table in read["tables"]),
        tuple(f for f in figures if f.path.is_file()),
        tuple(read["verdicts"]),
        best.read_text() if best.is_file() else "",
    )


def _about(read: dict[str, Any]) -> str:
    goals = " and ".join(f"{o['metric']} ({o['direction']} is better)" for o in read["objectives"])
    seeds = ", ".join(map(str, read["seeds"]))
    return (
        f"Searched by {goals} on seeds {seeds}, never on test data; sampler {read['sampler']['name']}, pruner "
        f"{read['pruner']['name']}, Optuna {read['optuna']}. {read['counts']}"
    )


def _model(table: dict[str, Any]) -> TableModel:
    rows = tuple(tuple(TableCell(**cell) for cell in row) for row in table["rows"])
    header, notes, left = tuple(table["header"]), tuple(table["notes"]), tuple(table["left"])
    return TableModel(table["id"], table["title"], header, rows, notes, left)
