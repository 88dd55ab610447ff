"""The progress display of a reproduction, with an estimate of the time left."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.executors import Finished
from experiments.graph import Node
from experiments.store import is_held


class Watch:
    """The progress display: cells done, a bar over the expected work, and the time left at the speed seen so far."""

    def __init__(self, console: Console, nodes: dict[str, Node], runs: Path, jobs: int) -> None:
        self.nodes, self.runs, self.jobs = nodes, runs, jobs
        self.over: set[str] = set()
        self.elsewhere: set[str] = set()
        self._work = {handle: max(node.seconds or 1.0, 0.1) for handle, node in nodes.items()}
        self._already = {handle: self._fraction(handle) for handle in nodes}
        self._started = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("[progress.percentage]{task.fields[share]:>4.0%}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            refresh_per_second=2,
        )
        guess = clock(sum(self._work.values()) / jobs)
        self._task = self._progress.add_task("cells", total=len(nodes), eta=guess, share=0.0)

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._progress.stop()

    def finish(self, finished: Finished) -> None:
        """Count a job that is over, and say so where no live display can be seen."""
        self.over.add(finished.handle)
        self.elsewhere.discard(finished.handle)
        if not self._progress.console.is_terminal:
            node = self.nodes[finished.handle]
            left = clock(self._left())
            count = f"[{len(self.over)}/{len(self.nodes)}]"
            self._progress.console.print(f"{count} {finished.outcome} {node.cell.key}, ETA {left}", soft_wrap=True)

    def elsewhere_done(self) -> list[str]:
        """Return cells that another command was running and has finished."""
        return [handle for handle in self.elsewhere if (self.runs / handle / "done.json").exists()]

    def released(self) -> list[str]:
        """Return cells that another command was running and has let go of unfinished."""
        free = [handle for handle in self.elsewhere if not is_held(self.runs / handle)]
        free = [handle for handle in free if not (self.runs / handle / "done.json").exists()]
        self.elsewhere -= set(free)
        return free

    def refresh(self) -> None:
        """Redraw from what the processes have written."""
        total = sum(self._work.values())
        done = sum(self._work[h] * (1.0 if h in self.over else self._fraction(h)) for h in self.nodes)
        waiting = f", {len(self.elsewhere)} run by another command" if self.elsewhere else ""
        self._progress.update(
            self._task,
            completed=len(self.over),
            eta=clock(self._left()),
            share=done / total,
            description=f"cells{waiting}",
        )

    def _fraction(self, handle: str) -> float:
        try:
            return min(1.0, float((self.runs / handle / "progress.json").read_text() or 0))
        except (OSError, ValueError):
            return 0.0

    def _left(self) -> float:
        """Seconds left: the expected work that remains, rescaled by how wrong the expectation has been so far."""
        fractions = {h: 1.0 if h in self.over else self._fraction(h) for h in self.nodes}
        done = sum(self._work[h] * max(0.0, fractions[h] - self._already[h]) for h in self.nodes)
        left = sum(self._work[h] * (1 - fractions[h]) for h in self.nodes)
        elapsed = time.monotonic() - self._started
        speed = done / elapsed if done > 0.02 * (done + left) and elapsed > 5 else float(self.jobs)
        return left / speed


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
