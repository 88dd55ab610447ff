"""A local server as a child process: on the loopback interface only, quiet, and gone when this process is."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.errors import UserError

START_S = 120.0  # MLflow's server imports for a minute where the machine is busy
PORTS = 100  # how many ports are tried


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside, unless this is no main thread or somebody handles it already."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("asked to stop")

    if mine:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def free_port(host: str, port: int) -> int:
    """Return the first port from `port` on that nobody listens on.

    Raises:
        UserError: `host` is not of this machine alone, or no port is free.
    """
    with suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            for candidate in range(port, min(port + PORTS, 65536)):
                with socket.socket(family) as probe, suppress(OSError):
                    # As the server binds: a port whose last connections are still closing counts as free.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((host, candidate))
                    return candidate
            raise UserError(f"no free port from {port} to {port + PORTS - 1} on {host}: name another with --port")
    raise UserError(f"host '{host}' is not this machine alone: use 127.0.0.1 (and an ssh tunnel from elsewhere)")


def run_server(
    command: Sequence[str],
    address: str,
    folder: Path,
    environment: Mapping[str, str],
    name: str,
    more: Sequence[str] = (),
) -> None:
    """Run a server in `folder` until Ctrl-C or SIGTERM; print its address, and the lines `more`, once `address`/health answers.

    Its own words go to `folder`/server.log.

    Raises:
        UserError: it ended by itself, or did not answer in time.
    """
    log = folder / "server.log"
    with sigterm_interrupts(), open(log, "wb") as words:
        # A session of its own: Ctrl-C comes to this process alone, which then ends the server and its children.
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            start_new_session=True,
        )
        try:
            _wait_until_healthy(server, address, log)
            print("\n".join([f"{name}: {address}  (Ctrl-C stops it)", *more]), flush=True)
            raise UserError(f"the server ended with status {server.wait()}; its last words:\n{_tail(log)}")
        except KeyboardInterrupt:
            print(f"\n{name} has stopped.", flush=True)
        finally:
            _stop(server)


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    import urllib.request

    deadline = time.monotonic() + START_S
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # a proxy cannot reach this machine's loopback
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), opener.open(f"{address}/health", timeout=5):
            return
        time.sleep(0.2)
    raise UserError(f"the server did not start on {address}; its last words:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server with all processes of its session: first asked, then made to."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=10)
