""".ci/setup.sh and the Makefile: which branch is taken on which machine, with stubs in place of Python and uv."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("awk", "bash", "cat", "chmod", "dirname", "mkdir", "rm", "touch")
UV = """#!/bin/bash
echo "uv $*" >>"$LOG"
if [ "$1" = venv ]; then
  venv="${@: -1}"
  mkdir -p "$venv/bin"
  printf '#!/bin/bash\\ncat >/dev/null\\n' >"$venv/bin/python"
  chmod +x "$venv/bin/python"
fi
"""
# A Python of version $VERSION. $HAS lists which of venv and pip work; everything else goes to a real Python.
PYTHON = f"""#!/bin/bash
echo "${{0##*/}} ${{*:1:2}}" >>"$LOG"
if [ "$1" = -c ]; then
  exec {sys.executable} -c "import sys, collections; sys.version_info = ($VERSION); ${{2#import sys;}}"
elif [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"; cp_python "$3/bin/python"
  case " $HAS " in *" venv "*) exit 0;; *) echo "ensurepip is not available"; exit 1;; esac
elif [ "$1 $2" = "-m pip" ]; then
  case "$HAS" in *pip*|*venv*) ;; *) exit 1;; esac
  [ "$3" = --version ] && exit 0
  case "$*" in *--target*) bin="${{@: -1}}/bin";; *) bin="${{0%/*}}";; esac
  mkdir -p "$bin"; cat "$UV_STUB" >"$bin/uv"; chmod +x "$bin/uv"
else
  exec {sys.executable} "$@"
fi
"""


class Machine:
    """A copy of the script in a folder of its own, with a PATH that holds only what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.log = folder / "project", folder / "bin", folder / "log"
        (self.folder / ".ci").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / ".ci" / "setup.sh", self.folder / ".ci")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        self.uv_stub = folder / "uv"
        self.uv_stub.write_text(UV)
        self.lock("0" * 64)
        self.log.touch()
        (folder / "pip.conf").write_text("[global]\nindex-url =\n")  # whatever this machine is set to use
        self.env: dict[str, str] = {"PIP_CONFIG_FILE": str(folder / "pip.conf")}

    def lock(self, digest: str) -> None:
        text = f"torch==2.0 \\\n    --hash=sha256:{'1' * 64}\nuv==1.2.3 \\\n    --hash=sha256:{digest}\nzipp==1 \\\n"
        (self.folder / "requirements.lock").write_text(text)

    def put(self, name: str, text: str) -> None:
        file = self.bin / name
        file.write_text(text)
        file.chmod(0o755)

    def python(self, name: str, version: str, has: str = "") -> None:
        copy = f'cp_python() {{ cat "{self.bin / name}" >"$1"; chmod +x "$1"; }}\n'
        head = f'VERSION="{version}"\nHAS="{has}"\n{copy}'
        self.put(name, PYTHON.replace("#!/bin/bash\n", f"#!/bin/bash\n{head}", 1))

    def run(self) -> tuple[int, str, list[str]]:
        env = {"PATH": str(self.bin), "LOG": str(self.log), "UV_STUB": str(self.uv_stub), "HOME": str(self.folder)}
        command = ["bash", ".ci/setup.sh", ".venv"]
        done = subprocess.run(command, cwd=self.folder, env=env | self.env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, self.log.read_text().splitlines()

    def created_with(self) -> str:
        code, said, log = self.run()
        assert code == 0, said
        made = [line for line in log if line.startswith("uv venv")]
        assert len(made) == 1
        assert [line.split()[1:3] for line in log if line.startswith("uv pip")] == [["pip", "sync"], ["pip", "install"]]
        match = re.search(r"--python (\S+)", made[0])
        assert match
        return match[1]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_uv_that_is_there_needs_no_python(machine: Machine) -> None:
    machine.put("uv", UV)
    assert machine.created_with() == "3.11"


@pytest.mark.parametrize("version", ["3, 8", "3, 10", "3, 13", "3, 14"])
@pytest.mark.parametrize("has", ["venv", "pip"])
def test_any_python_gets_uv_which_gets_a_3_11(machine: Machine, version: str, has: str) -> None:
    machine.python("python3", version, has)
    assert machine.created_with() == "3.11"


@pytest.mark.parametrize("version", ["3, 11", "3, 12"])
def test_a_python_that_fits_is_used(machine: Machine, version: str) -> None:
    machine.python("python3", version, "venv")
    assert machine.created_with() == str(machine.bin / "python3")


def test_a_python_that_fits_is_preferred_to_a_newer_one(machine: Machine) -> None:
    machine.python("python3", "3, 14", "venv")
    machine.python("python3.12", "3, 12", "venv")
    assert machine.created_with() == str(machine.bin / "python3.12")


def test_the_second_run_has_its_uv_and_its_environment(machine: Machine) -> None:
    machine.python("python3", "3, 13", "pip")
    assert machine.run()[0] == 0
    machine.log.write_text("")
    code, _, log = machine.run()
    assert code == 0
    assert not [line for line in log if "venv" in line.split()[1:2] or "-m pip" in line]


def test_without_python_and_uv_the_message_says_what_is_needed(machine: Machine) -> None:
    code, said, _ = machine.run()
    assert code == 1
    assert said.count("\n") == 1
    assert "some Python from 3.8 on" in said
    machine.python("python3", "3, 7", "venv")
    assert machine.run()[0] == 1


def test_without_venv_pip_and_index_the_message_says_what_to_install(machine: Machine) -> None:
    machine.python("python3", "3, 11")
    code, said, _ = machine.run()
    assert code == 1
    assert "no package index is configured" in said
    assert "apt-get install python3-venv" in said


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A package index on this machine with one wheel of uv that would fit it: its address, the wheel's sha256."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("uv-1.2.3.data/scripts/uv", UV)
    libc = "manylinux_2_17" if platform.libc_ver()[0] == "glibc" else "musllinux_1_1"
    family = "macosx_11_0" if sys.platform == "darwin" else libc
    name = f"uv-1.2.3-py3-none-{family}_{platform.machine()}.whl"
    (tmp_path / "served" / "simple" / "uv").mkdir(parents=True)
    (tmp_path / "served" / name).write_bytes(wheel.getvalue())
    others = '<a href="../../uv-1.2.3.tar.gz">s</a><a href="../../uv-1.2.2-py3-none-any.whl">o</a>'
    page = f'{others}<a href="../../{name}#sha256=0">w</a>'
    (tmp_path / "served" / "simple" / "uv" / "index.html").write_text(page)
    handler = partial(_Quiet, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/simple", hashlib.sha256(wheel.getvalue()).hexdigest()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("way", ["PIP_INDEX_URL", "UV_DEFAULT_INDEX", "pip.conf"])
def test_without_venv_and_pip_uv_comes_from_the_configured_index(
    machine: Machine, index: tuple[str, str], way: str
) -> None:
    machine.python("python3", "3, 13")
    address, digest = index
    machine.lock(digest)
    if way == "pip.conf":
        (machine.folder / "pip.conf").write_text(f"[global]\nindex-url = {address}/\n")
        machine.env["PIP_CONFIG_FILE"] = str(machine.folder / "pip.conf")
    else:
        machine.env[way] = address
    assert machine.created_with() == "3.11"
    assert os.access(machine.folder / ".venv" / ".uv" / "bin" / "uv", os.X_OK)


def test_a_wheel_without_the_locked_hash_is_not_used(machine: Machine, index: tuple[str, str]) -> None:
    machine.python("python3", "3, 13")
    machine.env["PIP_INDEX_URL"] = index[0]
    code, said, log = machine.run()
    assert code == 1
    assert "does not have the locked hash" in said
    assert not [line for line in log if line.startswith("uv ")]
    assert not (machine.folder / ".venv" / ".uv" / "bin" / "uv").exists()


def test_the_script_names_no_host() -> None:
    text = (ROOT / ".ci" / "setup.sh").read_text()
    assert "://" not in text
    assert not re.search(r"\b[a-z0-9-]+\.(org|com|io|net|sh)\b(?<!setup\.sh)", text)


def _make(*arguments: str) -> tuple[int, str]:
    """What make would run, the environment being taken as made."""
    command = ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/.installed", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_passes_the_trainer_and_the_rerun_of_stale_cells_on() -> None:
    assert _make("reproduce-paper-3") == (0, ".venv/bin/fivefold reproduce 3 --profile small --trainer cpu")
    code, said = _make("reproduce-paper-3", "TRAINER=gpu", "RERUN=stale", "PROFILE=paper", "SEEDS=2", "JOBS=1")
    options = "--profile paper --seeds 2 --jobs 1 --trainer gpu --rerun-stale"
    assert (code, said) == (0, f".venv/bin/fivefold reproduce 3 {options}")
    assert _make("plan-paper-4", "RERUN=stale")[1].endswith("plan 4 --profile small --trainer cpu --rerun-stale")
    assert _make("reproduce-all", "TRAINER=ddp")[1].endswith("reproduce all --profile small --trainer ddp")
    assert _make("report", "RERUN=stale", "TRAINER=gpu") == (0, ".venv/bin/fivefold report --profile small")
    code, said = _make("reproduce-paper-3", "RERUN=yes")
    assert code != 0
    assert "RERUN is 'stale' or nothing" in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_describes_every_variable() -> None:
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("PROFILE=", "SEEDS=", "JOBS=", "TRAINER=cpu|gpu|ddp", "RERUN=stale", "DATA_ROOT="):
        assert f"  {name}" in said
