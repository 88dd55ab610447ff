"""`fivefold sweep | sweep-report | sweep-ui` as people use them, on the smoke profile of paper 3."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from experiments.provenance import ROOT
from sweeps.storage import open_storage


def fivefold(home: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"FIVEFOLD_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


SWEEP = ("sweep", "3", "--space", "layer_mix", "--profile", "smoke", "--workers", "2", "--trials")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which a small sweep has run."""
    from datamodules.sources import DataUnavailable, load_images

    try:
        load_images("mnist", progress=False)
    except DataUnavailable as error:
        pytest.skip(f"mnist cannot be had here: {error}")
    home = tmp_path_factory.mktemp("home")
    fivefold(home, *SWEEP, "4")
    return home


def _folder(home: Path) -> Path:
    return home / "runs" / "results-smoke" / "tropical_cnn" / "sweeps" / "layer_mix"


@pytest.mark.slow
def test_a_sweep_ends_with_a_report_of_search_arms_and_fresh_seeds(swept: Path) -> None:
    summary = json.loads((_folder(swept) / "summary.json").read_text())
    assert summary["current"]
    for name in ("search", "paper"):
        trials = summary["trials"][name]
        assert trials["complete"] + trials["cut"] + trials["failed"] == 4
    assert [final["arm"] for final in summary["finals"]] == ["winner", "default", "paper"]
    assert all(final["n"] == 2 for final in summary["finals"])
    assert {v["verdict"] for v in summary["verdicts"]} == {"not assessable"}  # a smoke run decides nothing
    assert "/" not in summary["study"]
    assert not re.search(r"(/tmp/|/home/|/root/)", (_folder(swept) / "summary.json").read_text())
    assert (_folder(swept) / "figures" / "pareto.svg").is_file()


@pytest.mark.slow
def test_every_trial_keeps_to_the_budget_of_multiplications(swept: Path) -> None:
    rows = (_folder(swept) / "trials.csv").read_text().splitlines()
    at = rows[0].split(",").index("cost/multiplications")
    done = [row.split(",") for row in rows[1:] if ",complete," in row]
    assert done
    assert all(float(row[at]) <= 16072 for row in done)


@pytest.mark.slow
def test_the_same_command_adds_nothing_and_a_larger_total_adds_the_rest(swept: Path) -> None:
    import optuna

    def count() -> list[int]:
        storage = open_storage(f"sqlite:///{swept / 'runs' / 'optuna.db'}")
        names = [n for n in optuna.get_all_study_names(storage) if n.startswith("tropical_cnn.layer_mix.smoke.")]
        return sorted(len(optuna.load_study(study_name=n, storage=storage).trials) for n in names)

    before = count()
    fivefold(swept, *SWEEP, "4")
    assert count() == before
    fivefold(swept, *SWEEP, "5")
    assert sum(count()) >= sum(before) + 2


@pytest.mark.slow
def test_the_report_can_be_written_again_without_running_anything(swept: Path) -> None:
    folder = _folder(swept)
    kept = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    runs = sorted((swept / "runs").glob("*/done.json"))
    told = fivefold(swept, "sweep-report", "3", "--space", "layer_mix", "--profile", "smoke").stdout
    assert "winner: test/acc" in told
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == kept
    assert sorted((swept / "runs").glob("*/done.json")) == runs


@pytest.mark.slow
def test_the_tracker_has_the_study_as_parent_and_the_trials_as_children(swept: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{swept / 'runs' / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.tags.get("paper") == "tropical_cnn")
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    studies = {r.info.run_id: r for r in runs if r.data.tags.get("arm") and "mlflow.parentRunId" not in r.data.tags}
    trials = [r for r in runs if r.data.tags.get("mlflow.parentRunId") in studies]
    assert {r.data.tags["arm"] for r in studies.values()} == {"search", "paper"}
    assert len(trials) >= 8
    for run in trials:
        assert {"trial", "study", "storage", "study_url"} <= run.data.tags.keys()
        assert "learning_rate" in run.data.params
        assert run.info.status == "FINISHED"


def test_without_a_space_they_are_listed(home: Path) -> None:
    told = fivefold(home, "sweep", "1").stdout
    assert "routing:" in told
    assert "granularity:" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep", "9", "--space", "x"), "there is no paper '9'"),
        (("sweep", "3", "--space", "layermix"), "nearest valid: 'layer_mix'"),
        (("sweep", "3", "--space", "layer_mix", "--profile", "huge"), "unknown profile 'huge'"),
        (("sweep", "3", "--space", "layer_mix", "--profile", "smoke", "--storage", "nonsense"), "no address"),
        (("sweep-report", "3", "--space", "layer_mix", "--profile", "smoke"), "no study of layer_mix"),
        (("sweep-report", "3"), "name a search space"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(home: Path, arguments: tuple[str, ...], words: str) -> None:
    done = fivefold(home, *arguments, check=False)
    assert done.returncode == 2
    assert words in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("optuna_dashboard") is None, reason="extra 'sweeps' is not installed")
def test_the_dashboard_is_served_on_this_machine_only(home: Path) -> None:
    (home / "runs").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", "sweep-ui", "--port", "18080"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"FIVEFOLD_HOME": str(home), "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/dashboard", process.stdout.readline())
        assert address is not None
        page = _opened(address.group(), process)
        assert "Optuna Dashboard" in page
    finally:
        process.terminate()
        process.wait()


def _opened(address: str, process: subprocess.Popen[str]) -> str:
    """The page at an address, as soon as there is one."""
    opener, deadline = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + 120
    while True:
        try:
            return opener.open(address, timeout=10).read().decode()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.3)
