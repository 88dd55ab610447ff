"""What a finished, failed or missing cell looks like to everything that reads results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["done", "failed", "running", "stale", "not run"]


@dataclass(frozen=True, order=True)
class CellKey:
    """The name of one training run: which ablation of which paper, on which data, with which seed and profile, and with which
    model where it is not the profile's own.
    """

    paper: str
    ablation: str
    data: str
    seed: int
    profile: str
    model: str = ""  # a file of conf/model/<paper>, or empty for the profile's

    @property
    def scale(self) -> str:
        """What is told apart from results of other sizes: the profile, with the model where it is another."""
        return f"{self.profile}+{self.model}" if self.model else self.profile

    def __str__(self) -> str:
        return f"{self.paper}/{self.ablation} on {self.data}, seed {self.seed} ({self.scale})"


@dataclass(frozen=True)
class Record:
    """A cell as it lies on disk. `metrics` holds only what was measured: a missing value is missing.

    `error` is the last line of the traceback of a failed cell; the whole of it is in `path / "failed.json"`.
    """

    key: CellKey
    signature: str
    state: State
    path: Path
    metrics: dict[str, float] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def run_id(self) -> str:
        """The MLflow run id, or the signature where the run was not tracked."""
        return str(self.manifest.get("mlflow_run_id") or self.signature)
