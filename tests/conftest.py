"""Shared by all tests: one thread per process, and a home folder of its own for anything that writes runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FIVEFOLD_HOME that the test may fill."""
    monkeypatch.setenv("FIVEFOLD_HOME", str(tmp_path))
    return tmp_path
