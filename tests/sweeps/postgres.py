"""A PostgreSQL server that a test starts for itself: on a port of its own, over a folder of its own, gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any


def binaries() -> Path | None:
    """Return the folder that holds initdb and postgres; None where there is none."""
    found = [Path(p) for name in ("initdb",) if (p := shutil.which(name))]
    places = [file.resolve().parent for file in found]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "postgres").exists() and (place / "initdb").exists()), None)


def unavailable() -> str:
    """Say why no server can be started here; nothing where one can."""
    if binaries() is None:
        return "PostgreSQL is not on this machine"
    return "" if importlib.util.find_spec("psycopg") else "the driver psycopg is not installed (extra 'postgres')"


class Server:
    """A server over `folder`, which refuses to be run by root: there it is run by 'nobody', in a folder of nobody's."""

    def __init__(self, folder: Path) -> None:
        place = binaries()
        assert place is not None
        self.bin, self.log = place, folder / "server.log"
        self.user: dict[str, Any] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # parents of `folder` may be closed to nobody
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.databases = 0

    def __enter__(self) -> Server:
        data = self.folder / "data"
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self.folder)}
        options: dict[str, Any] = {"env": environment, "cwd": self.folder, **self.user}
        make = [str(self.bin / "initdb"), "-D", str(data), "-U", "sweeper", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(make, check=True, capture_output=True, **options)
        serve = [str(self.bin / "postgres"), "-D", str(data), "-p", str(self.port), "-h", "127.0.0.1"]
        serve += ["-k", str(self.folder), "-c", "fsync=off"]
        self.words = open(self.log, "wb")
        self.process = subprocess.Popen(serve, stdout=self.words, stderr=self.words, **options)
        self._wait()
        return self

    def _wait(self) -> None:
        import psycopg

        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self._address("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError(f"the server did not start:\n{self.log.read_text()}") from None
                time.sleep(0.2)

    def _address(self, name: str) -> str:
        return f"postgresql://sweeper@127.0.0.1:{self.port}/{name}"

    def database(self) -> str:
        """Make an empty database and return its address."""
        import psycopg

        self.databases += 1
        name = f"sweeps_{self.databases}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._address(name)

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.send_signal(signal.SIGINT)  # a fast shutdown
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.words.close()
        shutil.rmtree(self.folder, ignore_errors=True)
