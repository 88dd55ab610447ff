"""What tests of sweeps share: a small space on a real ablation, and a training that takes no time and has a known best."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.cell import Cell
from experiments.records import Record
from experiments.store import read_run, write_json
from sweeps.space import Space, parse
from sweeps.storage import open_storage, open_study
from sweeps.worker import Task, Trials, work

BEST = 0.02  # the rate that trains best
NOISE = {1000: 0.0, 1001: 1.0, 1002: -0.5}  # what a seed adds, the same for every rate


def raw(**changes: Any) -> dict[str, Any]:
    """A space file's content: the rate and the width of net1_tuned."""
    return {
        "title": "A toy",
        "ablation": "net1_tuned",
        "data": "mnist",
        "parameters": {
            "rate": {"path": "optim.optimizer.lr", "low": 0.001, "high": 0.1, "log": True},
            "width": {"path": "net.width", "choices": [4, 8]},
        },
        "objectives": [{"metric": "val/acc", "direction": "higher"}],
        "seeds": [1000, 1001, 1002],
        "sampler": {"name": "tpe", "n_startup_trials": 4, "seed": 3},
        "trials": 6,
        "report": {"metric": "test/acc", "direction": "higher", "seeds": [0, 1, 2]},
        **changes,
    }


def space(**changes: Any) -> Space:
    """The toy space in the smoke profile."""
    return parse(raw(**changes), "tropical_cnn", "toy", "smoke")


def score(config: Mapping[str, Any]) -> float:
    """Validation accuracy: the nearer the rate is to BEST, the better; wider nets gain a little; seeds differ."""
    rate, width = config["optim"]["optimizer"]["lr"], config["net"].get("width", 4)
    return 90 - 3 * math.log10(rate / BEST) ** 2 + 0.1 * width + NOISE.get(config["seed"], 0.1 * config["seed"])


class Train:
    """Stands in for `run_cell`: writes what a run writes, at once, and counts how often it trained."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.trained: list[str] = []
        self.seconds = seconds

    def __call__(self, cell: Cell, runs: Path) -> Record:
        folder = runs / cell.signature
        if not (folder / "done.json").exists():
            time.sleep(self.seconds)
            self.trained.append(cell.signature)
            write_json(
                folder / "manifest.json", {**vars(cell.key), "signature": cell.signature, "command": cell.command}
            )
            write_json(folder / "metrics.json", self.metrics(cell))
            write_json(folder / "done.json", {"weights_sha256": "0", "seconds": 1.0, "finished": "2026-01-01"})
            with open(runs / "trained.txt", "a") as file:  # for tests with several processes
                file.write(f"{cell.signature}\n")
        return read_run(folder)

    def metrics(self, cell: Cell) -> dict[str, float]:
        """What a run measured."""
        value, width = score(cell.config), float(cell.config["net"].get("width", 4))
        return {
            "val/acc": value,
            "test/acc": value - 0.5,
            "cost/multiplications": 490 * width,
            "cost/params": 500 * width,
        }


def run_toy(made: Space, runs: Path, url: str, total: int, train: Any = None, worker: int = 0, arm: str = "") -> Any:
    """Run trials in this process until the study has `total`, and return it."""
    study = open_study(made, open_storage(url, heartbeat_s=1, grace_s=4), arm)
    task = Task("tropical_cnn", "toy", "smoke", "cpu", arm, total, url, str(runs), worker)
    runs.mkdir(parents=True, exist_ok=True)
    work(task, made, study, Trials(made, runs, total, train or Train()))
    return study
