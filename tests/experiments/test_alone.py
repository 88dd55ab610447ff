"""Cells that measure time start last, and nothing runs beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.cell import Cell
from experiments.executors import Job, LocalPool
from experiments.records import CellKey
from experiments.schema import CellConfig, hashed_keys


class _Process:
    """A process that ends when it is told to."""

    def __init__(self, **_: Any) -> None:
        self.exitcode: int | None = None
        self.sentinel = 0

    def start(self) -> None:
        """Begin."""

    def join(self, timeout: float | None = None) -> None:
        """Be over."""


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalPool]:
    made = LocalPool(jobs=2)
    made._context = SimpleNamespace(Process=_Process, set_forkserver_preload=lambda names: None)  # type: ignore[assignment]
    monkeypatch.setattr("experiments.executors.wait", lambda sentinels, timeout: sentinels)
    yield made
    made._running.clear()


def _job(name: str, alone: bool) -> Job:
    cell = Cell(CellKey("toy", name, "none", 0, "smoke"), {"alone": True} if alone else {})
    vars(cell)["signature"] = name  # a cached property
    return Job(cell, Path("/nowhere"))


def test_they_wait_for_all_others_and_run_one_by_one(pool: LocalPool) -> None:
    for name, alone in (("clock1", True), ("a", False), ("clock2", True), ("b", False), ("c", False)):
        pool.submit(_job(name, alone))
    order: list[set[str]] = [set(pool._running)]
    while pool._running:
        for _, process in list(pool._running.values())[:1]:
            process.exitcode = 0  # type: ignore[misc]
        pool.poll(0.0)
        order.append(set(pool._running))
    # The first came when there was no other, and kept the machine to itself.
    assert order == [{"clock1"}, {"a", "b"}, {"b", "c"}, {"c"}, {"clock2"}, set()]


def test_it_does_not_enter_the_signature() -> None:
    assert "alone" in CellConfig.model_fields
    assert "alone" not in hashed_keys()
