"""Cells outside trials, each in a process of its own: parents that trials start from, and the winner's fresh seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from experiments.cell import Cell
from experiments.executors import Job, LocalPool
from experiments.records import Record
from experiments.store import read_run

BUSY_S = 2.0
Tracks = Mapping[str, tuple[str, str]]  # ablation -> (experiment, parent run) in the tracker


def run_cells(
    cells: Iterable[Cell], runs: Path, jobs: int, tell: Callable[[Record], None], tracks: Tracks | None = None
) -> dict[str, Record]:
    """Run cells, those that others start from first, and return what became of each by signature.

    One that another command runs is waited for. One that failed is in the result as such.

    Args:
        tell: called with each record as it is there, unless it was there before.
        tracks: where runs are tracked, by ablation; those without a place, such as parents, are not.
    """
    wanted = {cell.signature: cell for cell in cells}
    generations = [wanted]
    while above := {c.parent.signature: c.parent for c in generations[0].values() if c.parent is not None}:
        generations.insert(0, above)
    found: dict[str, Record] = {}
    for generation in generations:
        found |= _run({s: c for s, c in generation.items() if s not in found}, runs, jobs, tell, tracks or {})
    return {signature: found[signature] for signature in wanted}


def _run(
    cells: Mapping[str, Cell], runs: Path, jobs: int, tell: Callable[[Record], None], tracks: Tracks
) -> dict[str, Record]:
    found = {s: read_run(runs / s) for s in cells if (runs / s / "done.json").exists()}
    waiting = {s: cell for s, cell in cells.items() if s not in found}
    if not waiting:
        return found
    pool = LocalPool(jobs)
    try:
        for cell in waiting.values():
            pool.submit(_job(cell, runs, tracks))
        while len(found) < len(cells):
            for finished in pool.poll(timeout_s=1):
                if finished.outcome == "busy":
                    time.sleep(BUSY_S)
                    pool.submit(_job(waiting[finished.handle], runs, tracks))
                    continue
                found[finished.handle] = read_run(runs / finished.handle)
                tell(found[finished.handle])
    finally:
        pool.close()
    return found


def _job(cell: Cell, runs: Path, tracks: Tracks) -> Job:
    place = tracks.get(cell.key.ablation)
    return Job(cell, runs, tracked=place is not None, parent=place)
