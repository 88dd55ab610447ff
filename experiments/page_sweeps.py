"""What the page shows of searches, whoever ran them: their tables, their drawings as files beside the page, their files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from experiments import tables
from experiments.sweep_results import SweepSection, sweep_sections

FILES = ("trials.csv", "best.yaml", "summary.json")


@dataclass(frozen=True)
class Sweep:
    """A search as the page shows it. `figures` are (title, address), `files` (name, address), relative to the page."""

    title: str
    about: str
    tables: list[Markup]
    figures: list[tuple[str, str]]
    files: list[tuple[str, str]]


def sweeps_of(paper: str, page: Path) -> list[Sweep]:
    """Return the searches of a paper that have a report in the folder `page`, which addresses are relative to.

    None where one of them cannot be read: it may be in the middle of being written, and the page is not to wait for it.
    """
    try:
        return [_sweep(section, page) for section in sweep_sections(page, paper)]
    except (OSError, json.JSONDecodeError):
        return []


def _sweep(section: SweepSection, page: Path) -> Sweep:
    folder = page / section.paper / "sweeps" / section.space
    files = [(name, f"{folder.relative_to(page).as_posix()}/{name}") for name in FILES if (folder / name).is_file()]
    drawn = [(figure.title, figure.path.relative_to(page).as_posix()) for figure in section.figures]
    shown = [Markup(tables.html(model, f"{section.paper}-{section.space}")) for model in section.tables]
    old = "" if section.current else " Code or data have changed since these trials ran."
    return Sweep(f"{section.title} ({section.profile})", section.about + old, shown, drawn, files)
