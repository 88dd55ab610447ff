"""Processes give their answers by rank, or say why not; none is left behind."""

from __future__ import annotations

import math
import multiprocessing
import time

import pytest
import torch.distributed as dist

from lit_modules.execution.launch import RanksFailed, launch


def test_answers_come_by_rank() -> None:
    assert launch(dist.get_rank, 2) == [0, 1]


def test_what_a_process_died_of_is_said() -> None:
    with pytest.raises(RanksFailed, match=r"math domain error|expected a nonnegative input"):
        launch(math.sqrt, 2, -1.0)


def test_time_is_up() -> None:
    before = set(multiprocessing.active_children())  # of other tests
    with pytest.raises(RanksFailed, match="sleep did not end within 4 s and was stopped"):
        launch(time.sleep, 2, 600.0, timeout_s=4.0)
    assert set(multiprocessing.active_children()) <= before


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        launch(dist.get_rank, 0)
