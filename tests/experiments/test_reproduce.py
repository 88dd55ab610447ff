"""The command line as people use it, on the smoke profile: one run of it serves most tests here."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.claims import load_paper
from experiments.provenance import ROOT


def fivefold(home: Path, *arguments: str, root: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ
        | {"FIVEFOLD_HOME": str(home), "PYTHONPATH": str(root), "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module", autouse=True)
def _needs_data() -> None:
    from datamodules.sources import DataUnavailable, load_images

    for name in ("mnist", "cifar10"):
        try:
            load_images(name, progress=False)
        except DataUnavailable as error:
            pytest.skip(f"{name} cannot be had here: {error}")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the smoke profile of paper 3 has run, by two commands started at once."""
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "experiments.cli", "reproduce", "3", "--profile", "smoke", "--jobs", "1"]
    env = os.environ | {"FIVEFOLD_HOME": str(home), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    return home


def test_two_commands_at_once_ran_every_cell_once(smoke: Path) -> None:
    needed = 2 * len(load_paper("tropical_cnn").required("smoke"))
    assert len(list(smoke.glob("runs/*/done.json"))) == needed
    assert not list(smoke.glob("runs/*/failed.json"))
    with sqlite3.connect(smoke / "runs" / "mlflow.db") as database:
        children = database.execute("select count(*) from tags where key = 'mlflow.parentRunId'").fetchone()[0]
        statuses = {row[0] for row in database.execute("select distinct status from runs")}
        tests = database.execute("select count(*) from metrics where key = 'test/acc' group by run_uuid").fetchall()
    assert children == needed
    assert statuses == {"FINISHED"}
    # A cell that ran twice would have tested twice in its run; a parent holds its mean once for each report.
    assert [count for (count,) in tests].count(1) >= needed
    assert max(count for (count,) in tests) <= 2


def test_nothing_is_written_outside_runs(smoke: Path) -> None:
    assert {path.name for path in smoke.iterdir()} == {"runs"}
    for run in smoke.glob("runs/*/done.json"):
        names = {file.name for file in run.parent.iterdir()}
        assert {"config.yaml", "manifest.json", "metrics.json", "last.ckpt", "best.ckpt", "done.json"} <= names
        assert not [name for name in names if name.endswith(".tmp")]


@pytest.fixture(scope="module")
def smoke4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the smoke profile of paper 4 has run."""
    home = tmp_path_factory.mktemp("home4")
    fivefold(home, "reproduce", "4", "--profile", "smoke", "--jobs", "1")
    return home


@pytest.mark.parametrize(("paper", "home"), [("tropical_cnn", "smoke"), ("min_max_plus", "smoke4")])
def test_every_metric_that_a_claim_reads_was_measured(paper: str, home: str, request: pytest.FixtureRequest) -> None:
    """Smoke's claims by their own runs; those of the other profiles by what the same kind of run logs."""
    spec = load_paper(paper)
    measured: dict[tuple[str, str], set[str]] = {}
    for run in request.getfixturevalue(home).glob("runs/*/metrics.json"):
        manifest = json.loads((run.parent / "manifest.json").read_text())
        measured[manifest["ablation"], manifest["data"]] = set(json.loads(run.read_text()))
    for claim in spec.claims_of("smoke"):
        for operand in claim.operands:
            for ablation in operand.ablations:
                assert {operand.metric, *claim.match} <= measured[ablation, operand.data], claim.id
    logged = set().union(*measured.values())
    for claim in spec.claims:
        assert {*(o.metric for o in claim.operands), *claim.match} <= logged, claim.id
    for table in spec.tables:
        assert {column.metric for column in table.columns} <= logged, table.id


def test_smoke_reproduces_nothing_and_leaves_the_real_results_alone(smoke: Path) -> None:
    content = json.loads((smoke / "runs/results-smoke/tropical_cnn/verdicts.json").read_text())
    assert {claim["verdict"] for claim in content["claims"]} == {"not assessable"}
    assert content["profile"] == "smoke"
    assert (smoke / "runs/results-smoke/report.html").exists()


def test_run_again_it_does_nothing_and_says_so(smoke: Path) -> None:
    before = {
        f: f.stat().st_mtime_ns for f in smoke.rglob("*") if f.is_file() and f.suffix in (".json", ".ckpt", ".csv")
    }
    done = fivefold(smoke, "reproduce", "3", "--profile", "smoke")
    assert "Nothing to do" in done.stdout
    assert {f: f.stat().st_mtime_ns for f in before} == before
    assert "mlflow" not in done.stderr.lower()


def test_plan_shows_exactly_the_cells_whose_operator_changed(smoke: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    for name in ("experiments", "lit_modules", "datamodules", "sweeps", "conf"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert "10 done" in fivefold(smoke, "plan", "3", "--profile", "smoke", root=root).stdout
    operator = root / "lit_modules/ops/tropical_portable.py"
    operator.write_text(operator.read_text().replace("return a + b", "return b + a"))
    changed = fivefold(smoke, "plan", "3", "--profile", "smoke", root=root).stdout
    assert "4 done, 6 stale" in changed
    states = {
        line.split()[0]: line.split()[2:4] for line in changed.splitlines() if line.startswith(("net", "tcnn", "ctcnn"))
    }
    assert states["net0"][0] == states["net0_relu"][0] == "2"
    assert all(states[name][1] == "2" for name in ("net1", "tcnn1", "ctcnn2"))
    operator.write_text(operator.read_text().replace("return b + a", "return a + b  # a comment changes nothing"))
    assert "10 done" in fivefold(smoke, "plan", "3", "--profile", "smoke", root=root).stdout


def test_stale_and_missing_cells_never_replace_results_that_are_there(smoke: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(smoke, home)
    root = tmp_path / "project"
    for name in ("experiments", "lit_modules", "datamodules", "sweeps", "conf"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = {f: f.read_bytes() for f in home.glob("runs/results-smoke/**/*") if f.is_file()}
    operator = root / "lit_modules/ops/tropical_portable.py"
    operator.write_text(operator.read_text().replace("return a + b", "return b + a"))
    stale = fivefold(home, "reproduce", "3", "--profile", "smoke", root=root, check=False)
    assert stale.returncode == 1
    assert "6 cells are stale" in stale.stdout
    assert "Nothing to do" not in stale.stdout
    for folder in list(home.glob("runs/*/done.json"))[:3]:
        shutil.rmtree(folder.parent)
    missing = fivefold(home, "report", "--profile", "smoke", check=False)
    assert missing.returncode == 2
    assert "3 not run" in missing.stdout
    assert {f: f.read_bytes() for f in before} == before


def test_a_selection_of_cells_shows_its_numbers_and_leaves_results_alone(smoke: Path) -> None:
    before = {f: f.read_bytes() for f in smoke.glob("runs/results-smoke/**/*") if f.is_file()}
    shown = fivefold(smoke, "reproduce", "3", "--profile", "smoke", "--only", "net1").stdout
    (line,) = [line for line in shown.splitlines() if re.match(r"net1 +mnist +test accuracy ", line)]
    assert "±" in line
    assert {f: f.read_bytes() for f in before} == before


def test_a_table_of_another_profile_can_be_asked_for(smoke: Path) -> None:
    planned = fivefold(smoke, "plan", "3", "--profile", "smoke", "--table", "axes", "--table", "resnet").stdout
    rows = {line.split()[0] for line in planned.splitlines() if line.strip()}
    wanted = {
        row for table in load_paper("tropical_cnn").tables if table.id in ("axes", "resnet") for row in table.rows
    }
    assert wanted <= rows
    shown = fivefold(smoke, "reproduce", "3", "--profile", "smoke", "--table", "lenet", "--seed", "0").stdout
    assert [line for line in shown.splitlines() if line.startswith("| lenet_relu") and "(one run)" in line]
    wrong = fivefold(smoke, "plan", "3", "--table", "axis", check=False)
    assert wrong.returncode == 2
    assert "'axes'" in wrong.stdout


def test_explain_verify_and_diff(smoke: Path) -> None:
    explained = fivefold(smoke, "explain", "A1.mnist", "--profile", "smoke").stdout
    assert "not assessable" in explained
    assert explained.count("test/acc") == 4
    runs = {
        (m["ablation"], m["seed"]): m["signature"]
        for m in (json.loads(f.read_text()) for f in smoke.glob("runs/*/manifest.json"))
    }
    verified = fivefold(smoke, "verify", runs["net1", 0]).stdout
    assert "DIFFERS" not in verified
    assert verified.count("ok ") == 5
    shown = fivefold(smoke, "diff", runs["net1", 0], runs["net0", 0]).stdout
    assert "config.net._target_" in shown
    assert "metrics.test/acc" in shown
    same = fivefold(smoke, "diff", runs["net1", 0], runs["net1", 0]).stdout
    assert "agree" in same


def test_verify_notices_weights_that_are_not_the_runs(smoke: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(smoke, home)
    manifests = [json.loads(f.read_text()) for f in home.glob("runs/*/manifest.json")]
    a, b = (m["signature"] for m in manifests if m["ablation"] == "net0")
    shutil.copy(home / "runs" / b / "last.ckpt", home / "runs" / a / "last.ckpt")
    done = fivefold(home, "verify", a, "--no-rerun", check=False)
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reproduce", "tropical_cn"], "'tropical_cnn'"),
        (["reproduce", "3", "--only", "nett1"], "'net1'"),
        (["plan", "3", "--profile", "smal"], "'small'"),
        (["explain", "A1.mnits"], "'A1.mnist'"),
        (["verify", "nosuchrun"], "no run under"),
        (["sweep", "3", "--space", "layer_mx"], "'layer_mix'"),
    ],
)
def test_a_wrong_word_is_one_message_with_the_way_out(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = fivefold(tmp_path, *arguments, check=False)
    assert done.returncode == 2
    assert words in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
