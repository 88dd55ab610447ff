"""Lightning's MLflow logger as a guest in a run that `experiments.tracking` owns.

Apart from `experiments.tracking`, since importing Lightning takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

FLUSH_S = 2.0  # metrics wait at most about this long for their transaction, which costs milliseconds on SQLite
Row = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step


class GuestLogger(MLFlowLogger):
    """Gathers metrics into transactions, and leaves the run's parameters and status to its owner.

    Lightning's own ends the run when `fit` ends, before `test` has run; logs hyperparameters whose print differs from
    one attempt to the next, which MLflow refuses on a resumed run; and changes the process's tracking URI.
    """

    def __init__(self, uri: str, experiment_id: str, run_id: str, write: Callable[[list[Row]], None]) -> None:
        super().__init__(tracking_uri=uri, run_id=run_id, log_model=False)
        self._experiment_id = experiment_id
        self._write = write
        self._rows: list[Row] = []
        self._flushed = time.monotonic()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The MlflowClient."""
        return self._mlflow_client

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any) -> None:
        """Nothing: the whole configuration is logged already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Gather metrics at a step; they are written every two seconds and at the end."""
        now_ms = int(time.time() * 1000)
        self._rows += [(name, float(value), now_ms, step or 0) for name, value in metrics.items()]
        if time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write what was gathered."""
        self.flush()

    @contextmanager
    def flushed(self) -> Iterator[None]:
        """Write, whatever happens inside, what was gathered."""
        try:
            yield
        finally:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write what was gathered. What cannot be written is not tried again."""
        rows, self._rows, self._flushed = self._rows, [], time.monotonic()
        self._write(rows)
