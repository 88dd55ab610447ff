"""The MLflow UI: on this machine only, quiet, and gone when it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from tracking_fixtures import AXES, child, children, files, joined, parent, serve, start, store, template, wait_for

from experiments import tracking
from experiments.errors import UserError
from experiments.tracking import Store

__all__ = ["parent", "store", "template"]  # fixtures
Parent = tuple[str, str]


def test_the_ui_answers_on_this_machine_only_and_stops_on_ctrl_c(store: Store, parent: Parent, tmp_path: Path) -> None:
    with child(store, parent) as run:
        pass
    before = {path.name for path in tmp_path.iterdir()} | {"said"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(serve, store.root, port, tmp_path / "said")
        try:
            address = wait_for(tmp_path / "said", 120).split()[2]
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert opener.open(f"{address}/health", timeout=10).read() == b"OK"
            query = f"{address}/get-artifact?path=config.yaml&run_uuid={run.run_id}"
            assert opener.open(query, timeout=10).read() == b"optim:\n  lr: 0.02\n"
            listening = {
                connection.laddr
                for member in tree
                for connection in member.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            }
            assert {place.ip for place in listening} == {"127.0.0.1"}
            log_through(Store(store.root, server=address))
            assert address == f"http://127.0.0.1:{max(p.port for p in listening)}" != f"http://127.0.0.1:{port}"
        finally:
            os.kill(process.pid or 0, signal.SIGINT)
            codes = joined([process])
    assert codes == [0]
    assert not [member for member in tree if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert {path.name for path in tmp_path.iterdir()} == before
    assert files(tmp_path / "cwd") == []


def log_through(remote: Store) -> None:
    """The same calls against a server's address: it keeps the artifacts, under the same root."""
    experiment = tracking.experiment_id(remote, "min_max_plus", "4. Min-Max-Plus", "")
    parent = tracking.parent_run(remote, experiment, **(AXES | {"paper": "min_max_plus"}), params={})
    with child(remote, (experiment, parent), log_system_metrics=True) as run:
        run.logger.log_metrics({"train/loss": 1.5}, 3)
    (found,) = children(remote, (experiment, parent))
    assert (found.info.run_id, found.info.status) == (run.run_id, "FINISHED")
    assert found.data.metrics["train/loss"] == 1.5
    kept = remote.root / "mlartifacts" / experiment / run.run_id / "artifacts"
    assert files(kept) == [Path("config.yaml"), Path("manifest.json")]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.com", "::"])
def test_a_host_that_others_reach_is_refused(store: Store, host: str) -> None:
    with pytest.raises(UserError, match="not this machine alone"):
        tracking.serve(store, host=host)


def test_the_server_that_cannot_start_says_why(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="did not start"):
        tracking.serve(store)
